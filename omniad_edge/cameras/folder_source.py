"""Frames from image files: those of a folder, or also all that are still to come into it."""

import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import NamedTuple

from ..errors import CameraError, InputError
from ..frame import EndOfSource, Frame
from ..image import list_images, natural_order, read_image, walk_images


class FolderSource:
    """A Source (see frame.py): the image files below a folder in natural order (2 before 10), or one file.

    `open` begins again at the first. `read` raises InputError for a file that cannot be decoded; the next `read`
    goes on with the file after it, and the broken one leaves a gap in the numbers.
    """

    live = False
    software_trigger = False

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = str(path)
        self._left: Iterator[tuple[int, Path]] | None = None

    def open(self) -> None:
        self._left = iter(list(enumerate(list_images(self.path))))

    def read(self, timeout_s: float) -> Frame | None:
        if self._left is None:
            raise CameraError(f"{self.name}: is not open; call open() first")
        try:
            sequence, path = next(self._left)
        except StopIteration:
            raise EndOfSource(f"{self.name}: no more images") from None
        return Frame(read_image(path), sequence, time.monotonic(), self.name, item=str(path))

    def trigger(self) -> None:
        raise CameraError(f"{self.name}: a folder cannot be triggered")

    def close(self) -> None:
        self._left = None

    def __repr__(self) -> str:
        return f"FolderSource({self.name})"


class Stamp(NamedTuple):
    """What changes while a file is being written."""

    size_bytes: int
    modified_ns: int


class WatchedFolder:
    """A Source (see frame.py): every image file that is or comes below a folder, each once, for ever.

    existing: whether files that are there at the first `open` count
    settle_s: a file counts when its size and time have been the same for so long, and it can be decoded
    broken_s: one that stays the same for so long and cannot be decoded is told as InputError, once

    A file written anew under the same name counts again. Over `open` and `close` it is remembered which files
    were read. The whole folder is looked through each time, 20 000 files in about 0.2 s: somebody has to clear it
    now and then.
    Raises CameraError if the folder is not there, as a network drive may not be.
    """

    live = True
    software_trigger = False

    poll_s = 0.05

    def __init__(
        self, path: str | Path, existing: bool = True, settle_s: float = 0.3, broken_s: float = 5.0
    ) -> None:
        self.path = Path(path)
        self.name = str(path)
        self.existing, self.settle_s, self.broken_s = existing, settle_s, broken_s
        self._done: dict[Path, Stamp] | None = None
        self._waiting: dict[Path, tuple[Stamp, float]] = {}  # and since when it has been the same
        self._ready: deque[Path] = deque()
        self._sequence = 0
        self._closed = Event()
        self._closed.set()

    def open(self) -> None:
        found = self._look()
        if self._done is None:
            self._done = {} if self.existing else found
        self._closed.clear()

    def read(self, timeout_s: float) -> Frame | None:
        if self._closed.is_set():
            raise CameraError(f"{self.name}: is not open; call open() first")
        deadline = time.monotonic() + timeout_s
        while True:
            start = time.monotonic()
            if not self._ready:
                self._ready.extend(self._settled())
            while self._ready:
                frame = self._try(self._ready.popleft())
                if frame is not None:
                    return frame
            now = time.monotonic()
            # A fifth of the time at most goes into looking, however many files there are.
            pause = min(max(self.poll_s, 4 * (now - start)), deadline - now)
            if pause <= 0 or self._closed.wait(pause):
                return None

    def _settled(self) -> list[Path]:
        """New files that have been the same for `settle_s`, in natural order."""
        now, found = time.monotonic(), self._look()
        self._done = {path: stamp for path, stamp in self._done.items() if path in found}
        waiting = {}
        for path, stamp in found.items():
            if self._done.get(path) != stamp:
                before = self._waiting.get(path)
                waiting[path] = before if before and before[0] == stamp else (stamp, now)
        self._waiting = waiting
        return sorted((p for p, (_, since) in waiting.items() if now - since >= self.settle_s), key=natural_order)

    def _try(self, path: Path) -> Frame | None:
        """The frame, or None if the file still grows or may do so."""
        if path not in self._waiting:
            return None
        stamp, since = self._waiting[path]
        try:
            image = read_image(path)
            if _stamp(path) != stamp:
                return None  # it was written on meanwhile
        except (InputError, OSError) as exc:
            if _stamp(path) is None or time.monotonic() - since < self.broken_s:
                return None
            self._finish(path, stamp)
            raise InputError(str(exc)) from exc
        self._finish(path, stamp)
        return Frame(image, self._sequence - 1, time.monotonic(), self.name, item=str(path))

    def _finish(self, path: Path, stamp: Stamp) -> None:
        self._done[path] = stamp
        del self._waiting[path]
        self._sequence += 1

    def _look(self) -> dict[Path, Stamp]:
        try:
            stamps = {path: _stamp(path) for path in walk_images(self.path)}
        except OSError as exc:
            raise CameraError(f"{self.name}: expected a folder to watch; it cannot be read: {exc}") from exc
        return {path: stamp for path, stamp in stamps.items() if stamp is not None}

    def trigger(self) -> None:
        raise CameraError(f"{self.name}: a folder cannot be triggered")

    def close(self) -> None:
        self._closed.set()

    def __repr__(self) -> str:
        return f"WatchedFolder({self.name})"


def _stamp(path: Path) -> Stamp | None:
    """None if it has gone, as a temporary file that was renamed."""
    try:
        status = path.stat()
    except OSError:
        return None
    return Stamp(status.st_size, status.st_mtime_ns)
