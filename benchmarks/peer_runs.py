"""Our side of the peers: the same images and weights out to `peers.py`, its maps and scores back."""

import json
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np

from omniad_edge.data import Images
from omniad_edge.errors import OmniADError
from omniad_edge.evaluate import Predictions
from omniad_edge.model import OmniAD
from omniad_edge.weights import write_tensors

SCRIPT = Path(__file__).with_name("peers.py")
LABELS = {"padim": "PaDiM", "patchcore": "PatchCore"}
# PatchCore's coreset keeps a small tensor of each step, which glibc puts into the hole that the step's large one
# left, where the next large one no longer fits: 22 GB for half of 100 images of 128 px. With this, the size from
# which memory goes back to the system, 1 GB for all.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1048576"}


class Peers:
    """PaDiM and PatchCore around a network's own backbone, one model of each for every product.

    python: of an environment that has anomalib (see peers.py); folder: an empty one for what goes to and fro
    timed_product: whose models are kept, to be timed
    facts: of their last run: versions, device, seconds of fitting; stored_bytes: of all products' models so far
    """

    def __init__(self, python: Path, folder: Path, network: OmniAD, timed_product: str, seed: int, threads: int):
        self.script = (python, "-W", "ignore", SCRIPT)  # warnings are for anomalib's developers
        self.folder, self.timed_product = folder, timed_product
        self.seed, self.threads = seed, threads
        self.size = (network.config.height, network.config.width)
        self.backbone = folder / "backbone.safetensors"
        weights = {name: tensor.cpu().contiguous() for name, tensor in network.teacher.state_dict().items()}
        write_tensors(self.backbone, weights, {"backbone": network.config.backbone})
        self.facts: dict = {}
        self.stored_bytes = Counter(dict.fromkeys(LABELS, self.backbone.stat().st_size))

    def fit(self, product: str, train: Images, test: Images) -> dict[str, Predictions]:
        """Fit both on a product's good images; their predictions of its test images. OmniADError if they fail."""
        folder = self.folder / ("timed" if product == self.timed_product else "fitted")
        folder.mkdir()
        np.save(folder / "train.npy", train.pixels)
        np.save(folder / "test.npy", test.pixels)
        command = [*self.script, "fit", self.backbone, folder, str(self.seed), str(self.threads)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | MALLOC)
        if done.returncode:
            raise OmniADError(f"the peers failed on {product}; see {SCRIPT.name} for their set-up:\n{done.stderr}")
        self.facts = json.loads(done.stdout.splitlines()[-1])
        predictions = {}
        for method, label in LABELS.items():
            with np.load(folder / f"{method}.npz", allow_pickle=False) as result:
                predictions[label] = Predictions(test, result["anomaly_maps"], result["pred_scores"])
            self.stored_bytes[method] += (folder / f"{method}.safetensors").stat().st_size
        if folder.name == "fitted":
            shutil.rmtree(folder)
        return predictions

    def served(self) -> dict[str, tuple[list, int]]:
        """What serves each of the timed product's models, on the CPU and where they have one on the GPU; and the
        bytes that are stored for all products."""
        devices = ("cpu", "cuda") if self.facts["device"] == "cuda" else ("cpu",)
        fixed = [*self.script, "serve", self.backbone, self.folder / "timed"]
        numbers = [str(value) for value in (self.threads, *self.size)]
        return {
            f"{label}, {device}": ([*fixed, method, device, *numbers], self.stored_bytes[method])
            for method, label in LABELS.items()
            for device in devices
        }
