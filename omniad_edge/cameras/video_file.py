"""Frames of a video file, each once, in order."""

import time
from pathlib import Path

import cv2

from ..errors import CameraError, InputError
from ..frame import EndOfSource, Frame


class VideoFile:
    """A Source (see frame.py): every frame of the file, as fast as it is asked for.

    `open` begins again at the first frame. Raises InputError if it is missing or no video that OpenCV can read.
    """

    live = False
    software_trigger = False

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = str(path)
        self._capture: cv2.VideoCapture | None = None
        self._sequence = 0

    def open(self) -> None:
        self.close()
        if not self.path.is_file():
            raise InputError(f"{self.path}: expected a video file; there is none")
        capture = cv2.VideoCapture(str(self.path), cv2.CAP_FFMPEG)
        if not capture.isOpened():
            raise InputError(f"{self.path}: not a video, damaged, or of a codec that OpenCV's FFmpeg lacks")
        self._capture, self._sequence, self._told = capture, 0, False

    def read(self, timeout_s: float) -> Frame | None:
        if self._capture is None:
            raise CameraError(f"{self.name}: is not open; call open() first")
        there, image = self._capture.read()
        if not there:
            if self._sequence == 0 and not self._told:
                self._told = True
                raise InputError(f"{self.path}: none of its frames can be decoded")
            raise EndOfSource(f"{self.path}: {self._sequence} frames")
        frame = Frame(image, self._sequence, time.monotonic(), self.name)
        self._sequence += 1
        return frame

    def trigger(self) -> None:
        raise CameraError(f"{self.name}: a video cannot be triggered")

    def close(self) -> None:
        # Not released here: a read in another thread may be in it, and holds it until it is done.
        self._capture = None

    def __repr__(self) -> str:
        return f"VideoFile({self.name})"
