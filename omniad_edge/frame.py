"""What a camera gives: a frame with its number and time; and what every source of frames can do."""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture.

    image:      (H, W, 3) uint8 BGR
    sequence:   the number its camera or source gave it; a gap is frames that were lost before they reached us
    captured_s: time.monotonic() when it arrived
    source:     name of the source
    item:       the image file it came from; empty for a camera or a film
    exposure_us, temperature_c: where the camera says so
    """

    image: np.ndarray = field(repr=False)
    sequence: int
    captured_s: float
    source: str
    item: str = ""
    exposure_us: float | None = None
    temperature_c: float | None = None


class EndOfSource(Exception):
    """A file, folder or list has no more frames. Not an error: cameras never raise it."""


class Source(Protocol):
    """Where frames come from. One thread opens, reads and closes it; `trigger` and `close` may come from others.

    name:             for results and messages; holds no credentials
    live:             a camera, whose loss is a fault to recover from; else a file, folder or list, which ends
    software_trigger: `trigger` makes the camera take a frame, and it takes none without
    """

    name: str
    live: bool
    software_trigger: bool

    def open(self) -> None:
        """Connect; may be called again after a loss. Raises CameraError, InputError for what cannot ever work."""

    def read(self, timeout_s: float) -> Frame | None:
        """The next frame; None if none came in time. Raises CameraError if lost, EndOfSource at the end."""

    def trigger(self) -> None:
        """Take a frame now. Raises CameraError if the camera cannot be told."""

    def close(self) -> None:
        """Let go of the device; a `read` in progress ends soon. May be called twice, and before `open`."""
