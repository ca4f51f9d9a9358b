"""Files and folders that are either the old one or the new one, never half of one; and files' digests."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory, mkdtemp

from .errors import InputError


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it takes `path`'s place, on an error it is removed.

    The data is synced to disk before the rename, so after a power cut `path` holds the old content or
    the new one. A link stays one, and the file that it leads to is written; a device or pipe is written into.
    Raises OSError as the file system gives it (disk full, no permission, a folder).
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        with TemporaryDirectory() as folder:
            yield (part := Path(folder, path.name))
            path.write_bytes(part.read_bytes())
        return
    path = path.resolve()
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "expected a file to write, this is a folder", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".part", delete=False) as file:
        part = Path(file.name)
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        # NamedTemporaryFile makes the file private to its owner; give it the usual permissions instead.
        part.chmod(0o666 & ~current_umask())
        part.replace(path)
    except BaseException:
        with suppress(FileNotFoundError):
            part.unlink()
        raise


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`; on success it takes `path`'s place, on an error it is removed.

    `path` may be an empty folder. Raises OSError if something else is there, or as the file system gives it.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    try:
        yield part
        part.chmod(0o777 & ~current_umask())
        part.rename(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def check_writable(path: Path, is_folder: bool) -> None:
    """Raises InputError if an output could not make or extend this file or folder. Makes nothing."""
    if os.path.exists(path) and os.path.isdir(path) != is_folder:
        raise InputError(f"expected a {'folder' if is_folder else 'file'}, got {path}, which is the other")
    there = path
    while not os.path.exists(there):
        there = there.parent
    if there != path and not os.path.isdir(there):
        raise InputError(f"expected a path that can be made, got {path}; {there} is no folder")
    if not os.access(there, os.W_OK | (os.X_OK if os.path.isdir(there) else 0)):
        raise InputError(f"expected a path to write to, got {path}; this user may not write to {there}")


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
