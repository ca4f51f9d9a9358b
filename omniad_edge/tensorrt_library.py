"""TensorRT's Python package: imported where it is there, its errors put into words, our plugin library loaded."""

import os
from pathlib import Path
from typing import Any

from .errors import EngineError, MissingDependencyError

PLUGIN_VARIABLE = "OMNIAD_PLUGIN"
PLUGIN_LIBRARY = "libomniad_plugin.so"
PLUGIN_NAMESPACE, PLUGIN_VERSION = "omniad", "1"
PLUGINS = ("OmniBlock", "OmniDecoder")
INSTALL = 'pip install "omniad-edge[tensorrt]"; on a Jetson: sudo apt install python3-libnvinfer'


def import_tensorrt() -> Any:
    """The module. Raises MissingDependencyError where it is not installed, EngineError where it cannot load."""
    try:
        import tensorrt
    except ModuleNotFoundError as exc:
        raise MissingDependencyError("TensorRT", install=INSTALL) from exc
    except (ImportError, OSError) as exc:  # the package without its libraries, or of another CUDA
        raise EngineError(
            f"TensorRT is installed but cannot be loaded: {exc}; install it anew: {INSTALL}"
        ) from exc
    return tensorrt


def new_log(trt: Any) -> Any:
    """A trt.ILogger that keeps the errors; the calls that fail return None or False and say why here alone."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(msg)

        def failure(self, what: str) -> EngineError:
            """The error to raise, with all that was said since the last one."""
            said = "; ".join(dict.fromkeys(self.errors)) or "it gave no reason"
            self.errors.clear()
            return EngineError(f"TensorRT {trt.__version__} {what}: {said}")

    return Log()


def find_plugin() -> Path | None:
    """Our plugin library: $OMNIAD_PLUGIN, else the one in this package. None without, or if that is "none".

    Raises EngineError if $OMNIAD_PLUGIN names a file that is not there.
    """
    named = os.environ.get(PLUGIN_VARIABLE)
    if named == "none":
        return None
    library = Path(named) if named else Path(__file__).with_name(PLUGIN_LIBRARY)
    if library.is_file():
        return library.resolve()
    if named:
        raise EngineError(
            f'{PLUGIN_VARIABLE} is {named!r}, not a file; expected the path of {PLUGIN_LIBRARY}, or "none"'
        )
    return None


def load_plugin(trt: Any, library: Path) -> None:
    """Once per process. Raises EngineError if TensorRT does not take the library."""
    registry = trt.get_plugin_registry()

    def missing() -> list[str]:
        return [name for name in PLUGINS if registry.get_creator(name, PLUGIN_VERSION, PLUGIN_NAMESPACE) is None]

    if missing():
        registry.load_library(str(library))  # gives nothing also where another library has the plugins already
    if missing():
        raise EngineError(
            f"TensorRT {trt.__version__} does not find {', '.join(missing())} in {library}; build the library "
            f"again (export/tensorrt.md), or set {PLUGIN_VARIABLE}=none to go without"
        )
