"""The folded network equals the plain model in float64, for every variant."""

import numpy as np
import pytest
import torch

from golden import golden_model
from omniad_edge.anomaly_map import anomaly_map
from omniad_edge.kernels.fold import fold
from omniad_edge.kernels.network import TorchOps, backbone, decoder, forward, neck
from omniad_edge.model import ATTENTION_OUTPUTS, ATTENTIONS, BRANCHES, mean_features, normalise

SMALL = {"backbone": "resnet18", "depths": (1, 1, 1, 1), "height": 64, "width": 96}
ORDERS = [{"attention": a, "attention_output": o} for a in ATTENTIONS for o in ATTENTION_OUTPUTS]


@pytest.mark.parametrize(
    "sizes",
    [
        *ORDERS,
        *({"branches": b} for b in BRANCHES),
        *({"tokens": t} for t in (1, 16, 36, 100)),
        {"backbone": "resnet34", "depths": (1, 2, 1, 2), "height": 256, "width": 160},
        {"backbone": "resnet50", "height": 64, "width": 64},
    ],
    ids=str,
)
@torch.inference_mode()
def test_fold_is_exact(sizes, rng):
    model = golden_model(**(SMALL | sizes))
    config, network = model.config, fold(model)
    pixels = torch.from_numpy(rng.integers(0, 256, (2, config.height, config.width, 3), dtype=np.uint8))
    ops = TorchOps()

    teacher, student = model(normalise(pixels, torch.zeros((), dtype=torch.float64)))
    folded_teacher = backbone(ops, network, pixels)
    folded_student = decoder(ops, network, neck(ops, network, *folded_teacher))
    for plain, folded in zip((*teacher, *student), (*folded_teacher, *folded_student), strict=True):
        assert relative_error(folded.reshape(plain.shape), plain) <= 1e-12

    truth = anomaly_map(teacher, student, config.height, config.width)
    maps, scores, embedding = forward(ops, network, pixels)
    assert relative_error(maps, truth) <= 1e-12
    assert torch.equal(scores, maps.amax((1, 2)))
    assert relative_error(embedding, mean_features(teacher)) <= 1e-12


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value - truth).abs().max() / truth.abs().max())
