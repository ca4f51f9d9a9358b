"""Files from the web, each fetched once: resumed where it was cut, kept only if its checksum is right."""

import os
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from rich.console import Console
from rich.progress import Progress

from .errors import DownloadError
from .files import file_sha256

TIMEOUT_S = 20  # without a byte
CHUNK_BYTES = 1 << 20


def default_cache_dir() -> Path:
    """$OMNIAD_CACHE, or ~/.cache/omniad_edge."""
    return Path(os.environ.get("OMNIAD_CACHE") or Path.home() / ".cache" / "omniad_edge")


def fetch(url: str, sha256_prefix: str, cache_dir: str | Path | None = None, size_mb: int = 0) -> Path:
    """The cached file of `url`; downloads it if it is not there or does not match its checksum.

    sha256_prefix: the first hex digits of the file's SHA-256.
    size_mb: what a message tells somebody who must carry the file by hand; 0 if unknown.
    A cut connection goes on where it stopped, now or at the next call, if the server supports it.
    Raises DownloadError: offline, refused, not found, cut for good, or another content than asked for.
    """
    cached = Path(cache_dir or default_cache_dir()) / url.rsplit("/", 1)[-1]
    part = cached.with_name(cached.name + ".part")
    try:
        if cached.is_file() and file_sha256(cached).startswith(sha256_prefix):
            return cached
        cached.parent.mkdir(parents=True, exist_ok=True)
        resumed = _download(url, part)
        if resumed and not file_sha256(part).startswith(sha256_prefix):
            part.unlink()  # the first half was of another file: once more from the start
            _download(url, part)
        came = file_sha256(part)
        if came.startswith(sha256_prefix):
            part.replace(cached)
            return cached
        part.unlink()
    except (OSError, HTTPException, ValueError) as exc:
        size = f" ({size_mb} MB)" if size_mb else ""
        damaged = " (the file there now is not it: its checksum is wrong)" if cached.is_file() else ""
        raise DownloadError(
            f"cannot download {url}: {exc}. Without a network, bring this file{size} from another machine "
            f"and put it at {cached}{damaged}, or name a local file of the weights instead"
        ) from exc
    raise DownloadError(
        f"{url}: expected a file whose SHA-256 begins with {sha256_prefix}; got {came}. It was not kept; "
        "something between here and the server (a proxy's login page?) changed it"
    )


def _download(url: str, part: Path) -> bool:
    """Bring all of `url` into `part`, which may hold its beginning. Returns whether that was used."""
    resumed = False
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            resumed |= _transfer(url, part, before)
            return resumed
        except HTTPError as exc:
            if exc.code != 416 or not before:  # 416: `part` is not the beginning of this file
                raise
            part.unlink()
        except (OSError, HTTPException):
            if not part.exists() or part.stat().st_size <= before:
                raise  # cut again without a byte more


def _transfer(url: str, part: Path, start: int) -> bool:
    """One connection: append to `part` from byte `start`, or write it anew if the server sends it all."""
    request = Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urlopen(request, timeout=TIMEOUT_S) as response:
        continues = response.status == 206
        length = response.headers.get("Content-Length")
        total = int(length) + (start if continues else 0) if length else None
        with part.open("ab" if continues else "wb") as file, Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task(part.stem, total=total, completed=file.tell())
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                bar.update(task, advance=len(chunk))
            file.flush()
            os.fsync(file.fileno())
            if total is not None and file.tell() < total:
                raise OSError(f"the connection was cut at {file.tell()} of {total} bytes")
    return continues
