"""Records as JSON lines in a file."""

import errno
import os
from pathlib import Path

from ..errors import OutputError
from ..verdict import Record
from .delivery import Output
from .record_text import json_text


class JsonLines(Output):
    """Appends each record to a file, one JSON object a line; the file may be renamed by a log rotation any time.

    Lines are whole: what a full disk cut off is taken back and written again later; what a crash cut off is
    ended, so that it spoils no other line.
    """

    images = False

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = f"JSON lines {self.path}"
        self._file: int | None = None
        self._torn_at: int | None = None  # length of the file to go back to, bytes

    def open(self) -> None:
        self.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            size = os.fstat(self._file).st_size
            if size and os.pread(self._file, 1, size - 1) != b"\n":
                self._append(b"\n")
        except BaseException:
            self.close()  # so that nothing is written behind the torn line
            raise

    def write(self, records: list[Record]) -> None:
        self._mend()
        if self._file is None or self._moved():
            self.open()
        self._append("".join(json_text(record) + "\n" for record in records).encode("ascii"))

    def close(self) -> None:
        if self._file is not None:
            file, self._file, self._torn_at = self._file, None, None
            os.close(file)

    def _append(self, data: bytes) -> None:
        before = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, data)
            if written < len(data):
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, {written} of {len(data)} bytes written")
        except OSError as exc:
            self._torn_at = before
            self._mend()
            raise OutputError(f"{self.path}: cannot append: {exc}; free space, records wait in memory") from exc

    def _mend(self) -> None:
        if self._file is not None and self._torn_at is not None:
            os.ftruncate(self._file, self._torn_at)
            self._torn_at = None

    def _moved(self) -> bool:
        try:
            there, ours = os.stat(self.path), os.fstat(self._file)
        except FileNotFoundError:
            return True
        return (there.st_ino, there.st_dev) != (ours.st_ino, ours.st_dev)
