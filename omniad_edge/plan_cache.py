"""TensorRT plans built on this machine, kept in the user's cache folder.

A plan is native code: loading one runs it. So it is read only where a record beside it, written when it was built
here, has its SHA-256, and only for the very GPU, driver and libraries it was built with.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from .cuda_driver import Driver
from .download import default_cache_dir
from .errors import EngineError
from .files import atomic_write, file_sha256
from .jetson import Jetson
from .progress import say

FORMAT = "omniad-tensorrt-plan"
TRUSTED_OWNERS = (0,)  # root, besides the user
MOST_BYTES = 4_000_000_000  # of all plans together; the weights alone of one of preset `base` are 63 MB
DAY_S = 24 * 3600
KIND = {"plan_sha256": str, "conditions": dict, "batches": list, "workspace_bytes": int}


def plan_folder() -> Path:
    return default_cache_dir() / "tensorrt"


@dataclass(frozen=True)
class StoredPlan:
    """batches: numbers of images of its profiles, in order"""

    plan: bytes
    batches: tuple[int, ...]
    workspace_bytes: int


@dataclass(frozen=True)
class PlanCache:
    """The place of one plan.

    network:    SHA-256 of what it is built from
    conditions: all else that it depends on, in words; for another value there is another place
    """

    network: str
    conditions: Mapping[str, str]
    folder: Path = field(default_factory=plan_folder)

    def path(self, suffix: str) -> Path:
        return self.folder / f"{self.network[:16]}-{self.conditions_digest}{suffix}"

    @property
    def conditions_digest(self) -> str:
        return digest(json.dumps(self.conditions, sort_keys=True).encode())[:16]

    def read(self) -> StoredPlan:
        """Raises EngineError where there is none that may be loaded; the message says why."""
        record = read_record(self.path(".json"))
        if record is None:
            raise EngineError(self.why_none())
        path = self.path(".plan")
        check_owner(path)
        try:
            plan = path.read_bytes()
        except OSError as exc:
            raise EngineError(f"the engine built for it cannot be read: {exc}") from exc
        if digest(plan) != record["plan_sha256"]:
            raise EngineError(f"{path} is not the engine that was built here, its SHA-256 is another: not loaded")
        return StoredPlan(plan, tuple(record["batches"]), record["workspace_bytes"])

    def keep(self, plan: bytes, batches: Sequence[int], workspace_bytes: int) -> None:
        """Takes the place of the one before; others go where there would be too many, see `make_room`.

        The record comes last: with it the plan is complete. Raises OSError, as on a full disk.
        """
        record = {
            "format": FORMAT,
            "plan_sha256": digest(plan),
            "network": self.network,
            "conditions": dict(self.conditions),
            "batches": list(batches),
            "workspace_bytes": workspace_bytes,
            "built": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        make_room(self.folder, len(plan), self.path(".plan"))
        self.path(".speeds").unlink(missing_ok=True)
        write(self.path(".plan"), plan)
        self.path(".used").touch()
        write(self.path(".json"), json.dumps(record, indent=1).encode())

    def hold(self, owned: ExitStack) -> None:
        """Notes that it is used now; until `owned` is closed, or this process ends, no process removes it."""
        with suppress(OSError, ImportError):  # there is none yet; or no such locks
            import fcntl

            file = owned.enter_context(self.path(".used").open("rb"))
            fcntl.flock(file, fcntl.LOCK_SH)
            os.utime(file.fileno())  # last, as where root built it this is refused

    def why_none(self) -> str:
        """What is other than for the engine that was built of this network last."""
        others = sorted(self.folder.glob(f"{self.network[:16]}-*.json"), key=lambda path: path.stat().st_mtime)
        record = read_record(others[-1]) if others else None
        if record is None:
            return "no engine was built of this bundle here yet"
        before, now = record["conditions"], self.conditions
        names = [name for name in now if before.get(name) != now[name]]
        changes = ", ".join(f"{name} was {before.get(name, 'unknown')}, is {now[name]}" for name in names)
        return f"the engine built here before does not fit any more: {changes}"

    # What was found out about it

    def speeds(self, rival: str) -> dict[str, float]:
        """What `keep_speeds` was given for the same rival, else {}."""
        try:
            found = json.loads(self.path(".speeds").read_bytes())
            return {name: float(ms) for name, ms in found[rival].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a lost measurement is made again
            return {}

    def keep_speeds(self, rival: str, median_ms: dict[str, float]) -> None:
        """rival: digest of the kernels that this plan was measured beside; median_ms: by backend"""
        with suppress(OSError):  # as on a full disk: it is measured again
            write(self.path(".speeds"), json.dumps({rival: median_ms}).encode())

    # TensorRT's measurements of single layers, which are the same in every network

    @property
    def timing_path(self) -> Path:
        return self.folder / f"timing-{self.conditions_digest}.cache"

    def timings(self) -> bytes:
        return self.timing_path.read_bytes() if self.timing_path.is_file() else b""

    def keep_timings(self, timings: bytes) -> None:
        with suppress(OSError):
            write(self.timing_path, timings)


def make_room(folder: Path, wanted_bytes: int, place: Path) -> None:
    """Removes the plans used longest ago, until all have MOST_BYTES at most with one of wanted_bytes at `place`.

    Never one that an engine uses now, in whichever process: see `PlanCache.hold`.
    """
    total, removed = wanted_bytes, []
    for _, size, plan in stored_plans(folder):
        total += size if plan != place else 0
        if plan != place and total > MOST_BYTES and remove(plan):
            total -= size
            removed.append(size)
    if removed:
        say(
            f"removed TensorRT engines that were used longest ago: {len(removed)}, {sum(removed) / 1e6:.0f} MB; "
            f"{folder} keeps {MOST_BYTES / 1e9:g} GB at most"
        )
    for part in folder.glob(".*.part"):  # of a write that a power cut ended
        with suppress(OSError):
            if time.time() - part.stat().st_mtime > DAY_S:
                part.unlink()


def stored_plans(folder: Path) -> list[tuple[float, int, Path]]:
    """When each was used, its bytes, its path; the one used last comes first."""
    found = []
    for plan in folder.glob("*.plan"):
        used = plan.with_suffix(".used")
        with suppress(FileNotFoundError):  # another process removed it just now
            found.append(((used if used.exists() else plan).stat().st_mtime, plan.stat().st_size, plan))
    return sorted(found, reverse=True)


def remove(plan: Path) -> bool:
    """With all that belongs to it; the record first, so that half of it is none. False if it is in use."""
    try:
        import fcntl

        with plan.with_suffix(".used").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for suffix in (".json", ".plan", ".speeds", ".used"):
                plan.with_suffix(suffix).unlink(missing_ok=True)
    except (OSError, ImportError):  # in use, or not ours to remove
        return False
    return True


def conditions(driver: Driver, tensorrt_version: str, arch: int, plugin: Path | None) -> dict[str, str]:
    """What a plan depends on besides its network. The GPU's id makes it this machine's own."""
    device = driver.device()
    return {
        "TensorRT": tensorrt_version,
        "GPU": driver.call("cuDeviceGetName", 256, device).split(b"\0")[0].decode(errors="replace"),
        "GPU id": driver.call("cuDeviceGetUuid", device).bytes.hex(),
        "architecture": f"sm_{arch}",
        "driver": driver_version(driver),
        "power mode": Jetson().power_mode or "none",
        "plugin": file_sha256(plugin)[:16] if plugin else "none",
        "omniad-edge": version("omniad-edge"),  # how it builds may change
    }


def driver_version(driver: Driver) -> str:
    """NVIDIA's number where the system says it, like 570.86.15, or a Jetson's release; and CUDA's."""
    try:
        named = [Path("/sys/module/nvidia/version").read_text().strip()]
    except OSError:  # under JetPack 6 it has no number
        named = []
    release = Jetson().l4t
    named += [f"L4T {release}"] if release else []
    cuda = driver.call("cuDriverGetVersion")
    return ", ".join([*named, f"CUDA {cuda // 1000}.{cuda % 1000 // 10}"])


def read_record(path: Path) -> dict | None:
    """None if there is no file. Raises EngineError if it is not one of ours."""
    if not path.is_file():
        return None
    check_owner(path)
    try:
        record = json.loads(path.read_bytes())
        if record["format"] == FORMAT and all(isinstance(record[key], kind) for key, kind in KIND.items()):
            return record
    except (ValueError, KeyError, TypeError):
        pass
    raise EngineError(f"{path} is damaged; delete it to have the engine built again")


def check_owner(path: Path) -> None:
    """Raises EngineError for a file of another user, other than root."""
    if hasattr(os, "getuid") and path.exists() and path.stat().st_uid not in (*TRUSTED_OWNERS, os.getuid()):
        raise EngineError(f"{path} belongs to another user: not loaded; set OMNIAD_CACHE to a folder of your own")


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with atomic_write(path) as part:
        part.write_bytes(content)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
