"""Frames of a video file, each once, in order."""

import time
from pathlib import Path

import cv2

from ..errors import CameraError, InputError
from ..frame import EndOfSource, Frame


class VideoFile:
    """A Source (see frame.py): every frame of the file, as fast as it is asked for.

    `open` begins again at the first frame. Raises InputError if it is missing or no video that OpenCV can read;
    `read` raises CameraError where the film should go on and does not.
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
        self._capture, self._sequence = capture, 0
        self._expected = max(0, round(capture.get(cv2.CAP_PROP_FRAME_COUNT)))  # 0: its container does not say

    def read(self, timeout_s: float) -> Frame | None:
        if self._capture is None:
            raise CameraError(f"{self.name}: is not open; call open() first")
        there, image = self._capture.read()
        if not there:
            # Some containers tell a duration, from which OpenCV estimates the frames.
            missing = self._expected - self._sequence
            if self._sequence == 0 or missing > max(1, self._expected / 100):
                of = f" of {self._expected}" if self._expected else ""
                raise CameraError(
                    f"{self.path}: ended early, with {self._sequence}{of} frames: it is cut or damaged; "
                    "copy or record it anew"
                )
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
