"""Anomaly detection for production lines: `Detector("line3.omniad")(frame)` gives a verdict.

Importing this package takes numpy, OpenCV and Pillow; a Detector adds ONNX Runtime or OpenVINO. Training and
export live in `omniad_edge.train` and `omniad_edge.export` and need torch.
"""

from . import errors
from .detector import Detector
from .errors import OmniADError
from .result import Region, Result

__all__ = ["Detector", "OmniADError", "Region", "Result", "errors"]
