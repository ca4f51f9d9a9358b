"""Images of rejected parts and of near misses, as many as the disk is meant to hold."""

import errno
import heapq
import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from time import time

import cv2
import numpy as np

from ..errors import InputError, OutputError
from ..files import atomic_write
from ..sizes import age_s, size_bytes
from ..verdict import ACCEPT, Record, Verdict
from .delivery import Output
from .record_text import json_text

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
DAY = re.compile(r"\d{4}-\d\d-\d\d")
FILE = re.compile(r"(\d{6}\.\d{3}_(?:reject|near)_[\w.-]+-\d+)\.(?:json|\d+\.png|\d+\.heat\.jpg)", re.ASCII)
PART = re.compile(rf"\.{FILE.pattern}\.\w+\.part", re.ASCII)  # of a write that a crash cut off


class Rejects(Output):
    """Saves the frames of rejected parts and near misses in folder/YYYY-MM-DD, with a picture and a JSON beside.

    Of part A7 at 10:15:02 UTC: `101502.123_reject_A7_<record id>.json` with the record, `.0.png` with its first
    frame as the camera gave it, `.0.heat.jpg` with the heatmap drawn on it at the fixed scale of the calibration.

    keep:      size of all images together; the oldest parts go first. A full disk makes room the same way
    max_age:   older parts are deleted, at the start and whenever one is saved
    near_miss: an accepted part is saved too if a score of it reached this share of its threshold; None: none is

    Deletes only files that it named itself. Raises InputError for a keep, max_age or near_miss that make no sense.
    """

    kinds = ("verdict",)
    batch = 1

    def __init__(
        self, folder: str | Path, keep: str = "10GB", max_age: str = "30d", near_miss: float | None = 0.9
    ) -> None:
        if near_miss is not None and not 0 < near_miss <= 1:
            raise InputError(
                f"near_miss: expected a share of the threshold, above 0 to 1, or None; got {near_miss}"
            )
        self.folder = Path(folder)
        self.name = f"rejects {self.folder}"
        self._keep_bytes, self._max_age_s, self._near_miss = size_bytes(keep), age_s(max_age), near_miss
        self._bytes: dict[str, int] = {}  # of each part saved, by "YYYY-MM-DD/HHMMSS.mmm_..."
        self._oldest: list[str] = []  # a heap of the same
        self._total_bytes = 0

    def wants(self, record: Record) -> bool:
        return record.kind == "verdict" and bool(record.frames) and self._why(record) != ""

    def open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._bytes, self._total_bytes = {}, 0
        for path, part in self._files():
            if part:
                self._bytes[part] = self._bytes.get(part, 0) + path.stat().st_size
            else:
                path.unlink(missing_ok=True)
        self._oldest = sorted(self._bytes)
        self._total_bytes = sum(self._bytes.values())
        self._retain(0)

    def write(self, records: list[Record]) -> None:
        for verdict in records:
            part = self._part(verdict)
            files = _encode(verdict)
            size = sum(len(data) for data in files.values())
            self._forget(part)  # tried before
            self._retain(size)
            while not self._save(part, files):
                if not self._oldest:
                    raise OutputError(
                        f"{self.folder}: the disk is full, with no older images to delete; free space"
                    )
                self._free(size)
            self._bytes[part] = size
            self._total_bytes += size
            heapq.heappush(self._oldest, part)

    def _why(self, verdict: Verdict) -> str:
        if verdict.is_rejected:
            return "reject"
        near = self._near_miss is not None and verdict.decision == ACCEPT
        return (
            "near" if near and any(r.pred_score >= self._near_miss * r.threshold for r in verdict.results) else ""
        )

    def _part(self, verdict: Verdict) -> str:
        """Its files' common beginning, "YYYY-MM-DD/HHMMSS.mmm_..."; sorted by name is sorted by time."""
        at = datetime.fromisoformat(verdict.origin.time).astimezone(timezone.utc)
        clock = f"{at:%H%M%S}.{at.microsecond // 1000:03}"
        number = f"{_safe(verdict.origin.run)[-40:]}-{verdict.origin.number}"
        return f"{at:%Y-%m-%d}/{clock}_{self._why(verdict)}_{_safe(verdict.part_id)[:80]}_{number}"

    def _save(self, part: str, files: dict[str, bytes]) -> bool:
        """False if the disk is full: nothing of the part is left then."""
        try:
            for ending, data in files.items():
                with atomic_write(self.folder / f"{part}{ending}") as path:
                    path.write_bytes(data)
        except OSError as exc:
            with suppress(OSError):
                self._delete(part)
            if exc.errno not in NO_SPACE:
                raise
            return False
        return True

    def _files(self, day: str = "*") -> Iterator[tuple[Path, str]]:
        """Every file of ours with its part, "" for what a crash left of one."""
        for path in self.folder.glob(f"{day}/*"):
            name = FILE.fullmatch(path.name)
            if DAY.fullmatch(path.parent.name) and (name or PART.fullmatch(path.name)) and path.is_file():
                yield path, f"{path.parent.name}/{name[1]}" if name else ""

    def _retain(self, coming_bytes: int) -> None:
        """Delete what is too old, then the oldest until `coming_bytes` more fit in what is to be kept."""
        limit = datetime.fromtimestamp(max(0.0, time() - self._max_age_s), timezone.utc)
        while self._oldest and self._oldest[0] < f"{limit:%Y-%m-%d/%H%M%S}":
            self._forget(heapq.heappop(self._oldest))
        self._free(self._total_bytes + coming_bytes - self._keep_bytes)

    def _free(self, wanted_bytes: int) -> None:
        until = self._total_bytes - wanted_bytes
        while self._oldest and self._total_bytes > until:
            self._forget(heapq.heappop(self._oldest))

    def _forget(self, part: str) -> None:
        if part in self._bytes:
            self._delete(part)
            self._total_bytes -= self._bytes.pop(part)

    def _delete(self, part: str) -> None:
        path = self.folder / part
        frames = 0
        while path.with_name(f"{path.name}.{frames}.png").exists():
            frames += 1
        path.with_name(f"{path.name}.json").unlink(missing_ok=True)
        for i in reversed(range(frames)):  # so that what a crash leaves is found by the next start
            path.with_name(f"{path.name}.{i}.heat.jpg").unlink(missing_ok=True)
            path.with_name(f"{path.name}.{i}.png").unlink(missing_ok=True)
        with suppress(OSError):  # another part's images are there, or somebody's files
            path.parent.rmdir()


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]", "_", text) or "part"


def _encode(verdict: Verdict) -> dict[str, bytes]:
    """The contents of a part's files by their endings; the record last, so where it is all is."""
    files = {}
    # Which frame a result belongs to is known only if every frame has one.
    drawn = len(verdict.results) == len(verdict.frames)
    for i, frame in enumerate(verdict.frames):
        files[f".{i}.png"] = _image(".png", frame.image, cv2.IMWRITE_PNG_COMPRESSION, 1)  # 1: quick, and lossless
        if drawn:
            picture = verdict.results[i].draw(frame.image)
            files[f".{i}.heat.jpg"] = _image(".jpg", picture, cv2.IMWRITE_JPEG_QUALITY, 90)
    files[".json"] = (json_text(verdict) + "\n").encode("ascii")
    return files


def _image(ending: str, image: np.ndarray, setting: int, value: int) -> bytes:
    done, data = cv2.imencode(ending, image, [setting, value])
    if not done:
        raise InputError(f"cannot encode an image of shape {image.shape} as {ending}")
    return data.tobytes()
