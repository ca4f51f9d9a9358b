"""A Python that has a stand-in for anomalib: its interface, around our own ResNet, with the simplest of methods.

Both methods score a position by the squared distance of its layer1 feature from the mean of all good ones.
"""

import sys
from pathlib import Path

MODEL = """
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from omniad_edge.backbone import ResNet


class StandIn(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.feature_extractor = nn.Module()
        self.feature_extractor.feature_extractor = ResNet(name).eval()
        self.register_buffer("mean", torch.zeros(64, 1, 1))
        self.seen = []

    def forward(self, image):
        feature = self.feature_extractor.eval().feature_extractor(image)[0]
        if self.training:
            return self.seen.append(feature)
        distance = (feature - self.mean).square().sum(1, keepdim=True)
        anomaly_map = F.interpolate(distance, image.shape[-2:])
        return SimpleNamespace(anomaly_map=anomaly_map, pred_score=anomaly_map.amax((2, 3)))

    def fit(self):
        self.mean = torch.cat(self.seen).mean((0, 2, 3))[:, None, None]
"""
PADIM = """
from anomalib.stand_in import StandIn


class PadimModel(StandIn):
    def __init__(self, backbone, layers, pre_trained, n_features):
        assert (layers, pre_trained, n_features) == (["layer1", "layer2", "layer3"], False, 100)
        super().__init__(backbone)
"""
PATCHCORE = """
from anomalib.stand_in import StandIn


class PatchcoreModel(StandIn):
    def __init__(self, layers, backbone, pre_trained, num_neighbors):
        assert (layers, pre_trained, num_neighbors) == (["layer2", "layer3"], False, 9)
        super().__init__(backbone)

    def subsample_embedding(self, ratio):
        assert ratio == 0.1
        self.fit()
"""


def make_python(folder: Path) -> Path:
    """This interpreter, which finds the stand-in as anomalib 0.1."""
    files = {
        "anomalib/__init__.py": "",
        "anomalib/stand_in.py": MODEL,
        "anomalib/models/image/padim/torch_model.py": PADIM,
        "anomalib/models/image/patchcore/torch_model.py": PATCHCORE,
        "anomalib-0.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: anomalib\nVersion: 0.1\n",
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return python
