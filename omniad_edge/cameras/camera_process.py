"""A camera that is read by a process of its own, so that its driver or decoder cannot take inspection down.

The process, camera_child.py, writes frames to a pipe. A thread here takes them off at once, so that the camera
never waits and no lag can grow, and keeps the newest few; the pictures become BGR when they are read.
"""

import importlib.util
import json
import math
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..credentials import without_credentials
from ..errors import CameraError, InputError, MissingDependencyError, OmniADError
from ..frame import Frame
from . import aravis_child, gstreamer_child
from .camera_child import FAILED, HEADER, MARK, OPENED
from .pixel_format import to_bgr

PIPE_BYTES = 1 << 18
CLOSE_S = 0.35  # for the process to let go of the camera; then it is killed
LAST_WORDS = 8  # lines of what its libraries wrote to stderr
SYSTEM_PYTHON = "/usr/bin/python3"  # the one that Debian's and Ubuntu's python3-gi is for
LIBRARIES = {  # of a backend, in Python's gi: modules, their version, and the command that installs them
    "gstreamer": (("Gst", "GstApp", "GstVideo"), "1.0", gstreamer_child.INSTALL),
    "aravis": (("Aravis",), "0.8", aravis_child.INSTALL),
}
IMPORT_S = 30.0  # for them, on a slow and loaded machine


class RawFrame(NamedTuple):
    """A frame as the process sent it; `data` is (bytes,) uint8 in `pixel_format`."""

    data: np.ndarray
    sequence: int
    captured_s: float
    exposure_us: float
    temperature_c: float
    width: int
    height: int
    pixel_format: str


class CameraProcess:
    """A Source (see frame.py) read by one of the *_child.py beside this file.

    name:     the camera's address; credentials are taken out of it here
    backend:  "opencv", "gstreamer" or "aravis"; settings: what its `run` takes, JSON-safe
    buffer:   frames kept for `read`; a newer one pushes the oldest out, which leaves a gap in the numbers.
              None: the newest alone, unless a line sets it before `open`
    silence_s: a camera that sent no frame for so long counts as lost; 0: it may be silent, as when triggered
    open_s:   how long `open` waits for the camera

    After `open` the numbers go on from those before the loss.
    """

    live = True

    def __init__(
        self,
        name: str,
        backend: str,
        settings: dict,
        buffer: int | None = None,
        silence_s: float = 5.0,
        open_s: float = 10.0,
        software_trigger: bool = False,
    ) -> None:
        self.name = without_credentials(name)
        self.backend, self.settings = backend, settings
        self.buffer, self.silence_s, self.open_s = buffer, silence_s, open_s
        self.software_trigger = software_trigger
        self._child: _Child | None = None
        self._next: int | None = None  # number of the next frame after a reopening
        self._shift: int | None = 0  # added to the camera's numbers; None until the first frame tells it

    def check_installed(self) -> None:
        """Raises MissingDependencyError with the command that installs what `open` needs; opens no camera."""
        if self.backend not in LIBRARIES:
            return
        modules, version, install = LIBRARIES[self.backend]
        lines = ["import gi", *(f"gi.require_version({module!r}, {version!r})" for module in modules)]
        code = "\n".join([*lines, f"from gi.repository import {', '.join(modules)}"])
        try:
            command = [interpreter(self.backend), "-I", "-c", code]
            subprocess.run(command, check=True, capture_output=True, timeout=IMPORT_S)
        except (OSError, subprocess.SubprocessError) as exc:
            name = {"gstreamer": "GStreamer", "aravis": "Aravis"}[self.backend]
            raise MissingDependencyError(f"{name}'s Python interface", install=install) from exc

    def open(self) -> None:
        """Raises CameraError within `open_s` and MissingDependencyError with the command that installs it."""
        self.close()
        self._shift = 0 if self._next is None else None
        self._child = child = _Child(self.name, self.backend, self.settings, self.buffer or 1)
        try:
            child.wait_until_open(self.open_s)
        except OmniADError:
            self.close()
            raise

    def read(self, timeout_s: float) -> Frame | None:
        child = self._child
        if child is None:
            raise CameraError(f"{self.name}: is not open; call open() first")
        raw = child.take(timeout_s, self.silence_s)
        if raw is None:
            return None
        if self._shift is None:
            self._shift = self._next - raw.sequence
        sequence = raw.sequence + self._shift
        self._next = sequence + 1
        try:
            image = to_bgr(raw.data, raw.pixel_format, raw.width, raw.height)
        except OmniADError as exc:  # of every frame: the camera is lost until it is set otherwise
            raise CameraError(f"{self.name}: {exc}") from exc
        return Frame(
            image=image,
            sequence=sequence,
            captured_s=raw.captured_s,
            source=self.name,
            exposure_us=None if math.isnan(raw.exposure_us) else raw.exposure_us,
            temperature_c=None if math.isnan(raw.temperature_c) else raw.temperature_c,
        )

    def trigger(self) -> None:
        """Returns before the camera has taken the frame; a trigger that fails there is raised by `read`.

        A camera ignores a trigger that comes while it is still at work on the one before.
        """
        if not self.software_trigger:
            raise CameraError(
                f"{self.name}: takes frames by itself; a GenICam camera with ?trigger=Software does not"
            )
        child = self._child
        if child is None:
            raise CameraError(f"{self.name}: is not open; call open() first")
        child.tell("trigger")

    def close(self) -> None:
        """Ends within half a second, whatever the camera does."""
        child, self._child = self._child, None
        if child is not None:
            child.stop()

    def __repr__(self) -> str:
        return f"CameraProcess({self.name})"


class _Child:
    """One run of the process and the thread that empties its pipe."""

    def __init__(self, name: str, backend: str, settings: dict, buffer: int) -> None:
        self.name = name
        self.changed = threading.Condition()
        self.frames: deque[RawFrame] = deque(maxlen=buffer)
        self.failure: OmniADError | None = None
        self.is_open = self.stopped = False
        self.heard_s = time.monotonic()
        self.last_words: deque[str] = deque(maxlen=LAST_WORDS)
        python = interpreter(backend)
        # -I keeps this package's folder, and the user's PYTHONPATH, away from another interpreter's imports.
        command = [python, "-I", str(Path(__file__).with_name("camera_child.py"))]
        own = {"path": sys.path} if python == sys.executable else {}
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        try:
            # Its own session: Ctrl-C in a terminal is for us, who then close the camera.
            self.process = subprocess.Popen(
                command, bufsize=0, pipesize=PIPE_BYTES, start_new_session=True, **pipes
            )
        except FileNotFoundError as exc:
            raise MissingDependencyError(python, install="sudo apt install python3-gi") from exc
        except OSError as exc:
            raise CameraError(f"{name}: {python} cannot be started: {exc}") from exc
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self.receive, self.overhear)]
        for thread in self.threads:
            thread.start()
        # Not on the command line, which every user of the machine can see: the settings may hold a password.
        self.tell(json.dumps({"backend": backend, **own, **settings}))

    def tell(self, line: str) -> None:
        try:
            self.process.stdin.write(line.encode() + b"\n")
        except (OSError, ValueError) as exc:
            raise CameraError(f"{self.name}: its process has ended") from exc

    def wait_until_open(self, timeout_s: float) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.is_open or self.failure or self.stopped, timeout_s)
            if self.failure and not self.is_open:  # a later one comes behind the frames before it
                raise self.failure
            if self.stopped:
                raise CameraError(f"{self.name}: was closed while it was being opened")
            if not self.is_open:
                raise CameraError(f"{self.name}: does not answer within {timeout_s:g} s")

    def take(self, timeout_s: float, silence_s: float) -> RawFrame | None:
        deadline = time.monotonic() + timeout_s
        with self.changed:
            while not self.frames:
                if self.stopped:
                    return None
                now = time.monotonic()
                lost = self.heard_s + silence_s if silence_s else math.inf
                if self.failure is None and now >= lost:
                    self.failure = CameraError(f"{self.name}: lost: no frame for {silence_s:g} s")
                if self.failure:
                    raise type(self.failure)(str(self.failure))
                if now >= deadline:
                    return None
                self.changed.wait(min(deadline, lost) - now)
            return self.frames.popleft()

    def receive(self) -> None:
        """Thread: empty the pipe until it ends."""
        try:
            while self.receive_message():
                pass
            self.fail(self.why_ended())
        except (OSError, ValueError) as exc:
            self.fail(CameraError(f"{self.name}: its process sent what cannot be read: {exc}"))

    def receive_message(self) -> bool:
        header = self.receive_bytes(HEADER.size)
        if header is None:
            return False
        mark, kind, *values, pixel_format, size = HEADER.unpack(header)
        if mark != MARK:
            raise ValueError(f"expected a message; got {bytes(header[:16])!r}")
        data = self.receive_bytes(size)
        if data is None:
            return False
        if kind == FAILED:
            self.fail(self.translate(json.loads(bytes(data))))
            return True
        with self.changed:
            self.heard_s = time.monotonic()
            if kind == OPENED:
                self.is_open = True
            else:
                self.frames.append(RawFrame(data, *values, pixel_format.rstrip(b"\0").decode()))
            self.changed.notify_all()
        return True

    def receive_bytes(self, size: int) -> np.ndarray | None:
        """(size,) uint8; None if the pipe ended before."""
        data = np.empty(size, np.uint8)
        view, start = memoryview(data), 0
        while start < size:
            count = self.process.stdout.readinto(view[start:])
            if not count:
                return None
            start += count
        return data

    def overhear(self) -> None:
        """Thread: the last lines that the camera's libraries wrote."""
        for line in self.process.stderr:
            if line.strip():
                self.last_words.append(line.decode(errors="replace").strip())

    def fail(self, failure: OmniADError) -> None:
        with self.changed:
            self.failure = self.failure or failure
            self.changed.notify_all()

    def translate(self, report: dict) -> OmniADError:
        if report["kind"] == "missing":
            return MissingDependencyError(report["message"], install=report["install"])
        message = f"{self.name}: {without_credentials(report['message'])}"
        if report["kind"] == "input":
            return InputError(message)
        return CameraError(message + self.overheard())

    def why_ended(self) -> CameraError:
        code = self.process.wait()
        cause = f"killed by signal {-code}" if code < 0 else f"status {code}"
        return CameraError(f"{self.name}: its process ended ({cause}){self.overheard()}")

    def overheard(self) -> str:
        # The process ends after its last message, so this is no wait.
        self.threads[1].join(CLOSE_S)
        return "".join(f"\n  {without_credentials(line)}" for line in list(self.last_words))

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()
        self.process.stdin.close()
        try:
            self.process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for thread in self.threads:
            thread.join(CLOSE_S)
        self.process.stdout.close()
        self.process.stderr.close()


def interpreter(backend: str) -> str:
    """The Python that has the backend's library: for GStreamer and Aravis usually the system's."""
    if backend == "opencv" or importlib.util.find_spec("gi") is not None:
        return sys.executable
    return SYSTEM_PYTHON
