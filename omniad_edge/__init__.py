"""Anomaly detection for production lines: `Detector("line3.omniad")(frame)` gives a verdict.

A `Line` gives one a part, from cameras to outputs, in time. Importing this package takes numpy, OpenCV, Pillow and
rich; a Detector adds ONNX Runtime or OpenVINO. Training and export live in `omniad_edge.train` and
`omniad_edge.export` and need torch.
"""

from . import errors
from .cameras.sources import open_source
from .detector import Detector
from .errors import OmniADError
from .frame import Frame
from .line.health import Health
from .line.line import Line
from .line.terminal_view import TerminalView
from .outputs.json_lines import JsonLines
from .outputs.mqtt import Mqtt, MqttTrigger
from .outputs.rejects import Rejects
from .outputs.webhook import Webhook
from .result import Region, Result
from .verdict import Verdict

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
