"""Frames that the program has itself: any iterable of arrays."""

import time
from collections.abc import Iterable, Iterator

import numpy as np

from ..errors import CameraError
from ..frame import EndOfSource, Frame
from ..image import check_frame


class ArraySource:
    """A Source (see frame.py): the arrays (H, W, 3) uint8 BGR of an iterable, each once.

    `open` begins again, where the iterable can. `read` waits for the iterable, however long that takes.
    Raises InputError for what is not a frame; the next `read` goes on with the one after it.
    """

    live = False
    software_trigger = False

    def __init__(self, arrays: Iterable[np.ndarray]) -> None:
        self.arrays = arrays
        self.name = type(arrays).__name__
        self._left: Iterator[tuple[int, np.ndarray]] | None = None

    def open(self) -> None:
        self._left = enumerate(self.arrays)

    def read(self, timeout_s: float) -> Frame | None:
        if self._left is None:
            raise CameraError(f"{self.name}: is not open; call open() first")
        try:
            sequence, image = next(self._left)
        except StopIteration:
            raise EndOfSource(f"{self.name}: no more frames") from None
        check_frame(image)
        return Frame(image, sequence, time.monotonic(), self.name)

    def trigger(self) -> None:
        raise CameraError(f"{self.name}: arrays cannot be triggered")

    def close(self) -> None:
        self._left = None

    def __repr__(self) -> str:
        return f"ArraySource({self.name})"
