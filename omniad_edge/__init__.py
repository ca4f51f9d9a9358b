"""Anomaly detection for production lines: `Detector("line3.omniad")(frame)` gives a verdict.

A `Line` gives one a part, from cameras to outputs, in time. Importing this package takes numpy, OpenCV, Pillow and
rich; a Detector adds ONNX Runtime or OpenVINO. Training and export live in `omniad_edge.train` and
`omniad_edge.export` and need torch.
"""

from . import errors
from .detector import Detector
from .errors import OmniADError
from .frame import Frame
from .health import Health
from .json_lines import JsonLines
from .line import Line
from .mqtt import Mqtt, MqttTrigger
from .rejects import Rejects
from .result import Region, Result
from .sources import open_source
from .terminal_view import TerminalView
from .verdict import Verdict
from .webhook import Webhook

__all__ = [
    "Detector",
    "Frame",
    "Health",
    "JsonLines",
    "Line",
    "Mqtt",
    "MqttTrigger",
    "OmniADError",
    "Region",
    "Rejects",
    "Result",
    "TerminalView",
    "Verdict",
    "Webhook",
    "errors",
    "open_source",
]
