"""What runs in a camera's own process: reads the camera, writes its frames to a pipe.

Started by camera_process.py as `python -I camera_child.py`, by whichever interpreter has the camera's library:
GStreamer and Aravis come with Debian's Python, which knows nothing of this package. So this file and the three
that it loads, opencv_child.py, gstreamer_child.py and aravis_child.py, import the standard library alone.

stdin:  one line of JSON with the settings, then `trigger` lines; at its end this process ends
stdout: messages, each a HEADER and `size` bytes; OPENED once, FRAME each time, FAILED once at the end
"""

import importlib.util
import json
import math
import os
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

# mark, kind, sequence, captured_s, exposure_us, temperature_c (NaN: unknown), width, height, pixel format, size
HEADER = struct.Struct("<4s4sqdddII24sQ")
MARK = b"OMNI"
OPENED, FRAME, FAILED = b"OPEN", b"FRAM", b"FAIL"

GRACE_S = 0.2  # to let go of the camera, after stdin has ended

UNKNOWN = math.nan


class Failure(Exception):
    """Why there is no camera: `kind` is "camera" (try again), "input" (never works), "missing" (see install)."""

    def __init__(self, kind: str, message: str, install: str = "") -> None:
        super().__init__(message)
        self.report = {"kind": kind, "message": message, "install": install}


class Channel:
    """To the parent: `opened`, `frame`; from it: `stopping`, and `on_trigger` is called for each trigger."""

    failure = Failure

    def __init__(self, out: int) -> None:
        self.out = out
        self.writing = threading.Lock()
        self.stopping = threading.Event()
        self.on_trigger: Callable[[], None] | None = None

    def opened(self) -> None:
        self.send(OPENED)

    def frame(
        self,
        pixels: bytes | memoryview,
        sequence: int,
        captured_s: float,
        width: int,
        height: int,
        pixel_format: str,
        exposure_us: float = UNKNOWN,
        temperature_c: float = UNKNOWN,
    ) -> None:
        """pixels: rows without padding, in pixel_format as pixel_format.py names it."""
        values = (sequence, captured_s, exposure_us, temperature_c, width, height, pixel_format.encode())
        self.send(FRAME, pixels, values)

    def failed(self, failure: Failure) -> None:
        self.send(FAILED, json.dumps(failure.report).encode())

    def send(self, kind: bytes, data: bytes | memoryview = b"", values: tuple = (0, 0, 0, 0, 0, 0, b"")) -> None:
        data = memoryview(data).cast("B")
        with self.writing:
            self.write(memoryview(HEADER.pack(MARK, kind, *values, len(data))))
            self.write(data)

    def write(self, data: memoryview) -> None:
        while data:
            data = data[os.write(self.out, data) :]

    def listen(self) -> None:
        for line in sys.stdin:
            if line.strip() == "trigger" and self.on_trigger:
                try:
                    self.on_trigger()
                except Exception as exc:
                    self.failed(Failure("camera", f"the trigger failed: {exc}"))
        self.stopping.set()
        time.sleep(GRACE_S)
        os._exit(0)  # the camera's library may be stuck


def load(backend: str):
    """The module beside this file, by its path: here there is no package to import it from."""
    path = Path(__file__).with_name(f"{backend}_child.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    channel = Channel(os.dup(1))
    os.dup2(2, 1)  # what libraries print must not come between the frames
    settings = json.loads(sys.stdin.readline())
    sys.path[:] = settings.pop("path", sys.path)
    threading.Thread(target=channel.listen, daemon=True).start()
    try:
        load(settings.pop("backend")).run(channel, **settings)
    except Failure as exc:
        channel.failed(exc)
    except BrokenPipeError:
        pass  # the parent is gone
    except Exception as exc:
        channel.failed(Failure("camera", f"{type(exc).__name__}: {exc}"))
    sys.stderr.flush()
    os._exit(0)  # threads of the camera's library may be stuck


if __name__ == "__main__":
    main()
