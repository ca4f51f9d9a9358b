"""Every exception the product raises on purpose.

OmniADError                    catch this to catch them all
├── InputError                 a frame, image or argument is not what was asked for
├── DataError                  a data set is broken, empty or mislabelled
├── TrainingError              training cannot go on (loss is not finite, run cannot be resumed)
├── BundleError                a bundle or checkpoint is missing, damaged, altered or too new
├── CalibrationError           the good images cannot support the wanted false-reject rate
├── ExportError                an export was refused, for example by the parity gate
├── EngineError                a backend is unavailable or failed
│   └── EngineLostError        for good: this process has to be started anew
├── CameraError                a camera or stream cannot be opened, or was lost
├── OutputError                an output cannot take a record now
├── DownloadError              weights could not be downloaded or do not match their checksum
└── MissingDependencyError     an optional package is not installed; the message has the command that does it
"""


class OmniADError(Exception):
    """Base of all errors raised on purpose; the message says what was expected, what came, what to do."""


class InputError(OmniADError, ValueError):
    """A frame, image or argument is not what was asked for."""


class DataError(OmniADError):
    """A data set is broken, empty or mislabelled."""


class TrainingError(OmniADError):
    """Training cannot go on."""


class BundleError(OmniADError):
    """A bundle or checkpoint is missing, damaged, altered or too new."""


class CalibrationError(OmniADError):
    """The good images cannot support the wanted false-reject rate."""


class ExportError(OmniADError):
    """An export was refused."""


class EngineError(OmniADError):
    """A backend is unavailable or failed."""


class EngineLostError(EngineError):
    """An engine will not run again in this process: start it anew."""


class CameraError(OmniADError):
    """A camera or stream cannot be opened, or was lost."""


class OutputError(OmniADError):
    """An output cannot take a record now; it is kept and tried again."""


class DownloadError(OmniADError):
    """Weights could not be downloaded or do not match their checksum."""


class MissingDependencyError(OmniADError, ImportError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str = "", install: str = "") -> None:
        """package: what could not be imported; extra: of omniad-edge, that brings it; or install: the command."""
        command = install or f'pip install "omniad-edge[{extra}]"'
        super().__init__(f"{package} is not installed; run: {command}")
