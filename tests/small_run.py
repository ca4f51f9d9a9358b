"""A run folder as training leaves it, but of an untrained network: real data, files and formats, in a second."""

from dataclasses import dataclass
from pathlib import Path

import torch

from omniad_edge.data import find_samples
from omniad_edge.model import ModelConfig, OmniAD
from omniad_edge.products import write_line
from omniad_edge.training_images import describe_images, split_holdout
from omniad_edge.versions import versions
from omniad_edge.weights import save_checkpoint

CONFIG = ModelConfig(backbone="resnet18", depths=(1, 1, 1, 1), height=64, width=64)

# Where other work has one of two cores, two threads wait for each other: 10 s an export instead of 2.
torch.set_num_threads(1)


@dataclass(frozen=True)
class SmallRun:
    """folder: of the run; data: three products with four good training images each, and test images."""

    folder: Path
    data: Path


def make_run(folder: Path, holdout: float = 0.25) -> SmallRun:
    write_line(folder / "line", n_train=4, n_calibration=4, n_test_good=2, n_test_per_kind=1, size_px=72)
    data = (folder / "line" / "data").resolve()
    torch.manual_seed(0)
    save_checkpoint(folder / "run" / "model.safetensors", OmniAD(CONFIG), facts(data, holdout))
    return SmallRun(folder / "run", data)


def facts(data: Path, holdout: float) -> dict:
    """What `train` would write of a run of one epoch."""
    samples = find_samples(data, "train")
    training, held_out = split_holdout(samples, holdout, seed=42)
    return {
        "model": CONFIG.to_dict(),
        "data": str(data),
        "epochs": 1,
        "backbone_weights": "none",
        "batch_size": 16,
        "holdout_fraction": holdout,
        "validate_every": 0,
        "seed": 42,
        "processes": 1,
        **describe_images(samples, training, held_out, str(data)),
        "backbone": "none (random, seed 42)",
        "versions": versions(),
        "epoch": 1,
        "lr": 1e-3,
        "loss": 1.0,
        "seconds": 1.0,
    }
