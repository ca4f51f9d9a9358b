"""What a line is doing at one moment: read by the health page, the terminal and the watchdog."""

from dataclasses import astuple, dataclass
from typing import Protocol

from ..outputs.delivery import OutputStatus


@dataclass(frozen=True)
class Counts:
    """Where the frames are; captured == inspected + dropped + late + failed + waiting at every moment.

    captured:  frames that reached the line, since it started
    inspected: their results counted in a verdict
    dropped:   left out unseen: a newer one took their place, or no part wanted them
    late:      their part's verdict was given without them, whether or not a result came afterwards
    failed:    unfit to be inspected (a camera fault, a file that cannot be read), or the detector raised an error
    waiting:   in a queue or in the engine now
    """

    captured: int = 0
    inspected: int = 0
    dropped: int = 0
    late: int = 0
    failed: int = 0
    waiting: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class CameraState:
    """One camera or other source of frames.

    state:       "connecting", "running", "lost" or "ended" (a file or folder that has no more)
    fault:       what is wrong with its frames now: "black frame", "frozen frame", ...; "" if nothing
    reconnects:  how often it came back after a loss
    lost_frames: gaps in its numbering: frames that never reached the line, so in none of the counts
    """

    name: str
    state: str
    fault: str
    reconnects: int
    lost_frames: int
    counts: Counts


@dataclass(frozen=True)
class Snapshot:
    """A line at one moment.

    line:            its name; product: what it inspects, None if each trigger says so
    uptime_s:        since it was started
    state:           "starting", "running" or "stopped"
    counts:          of frames, the sum over cameras
    triggers:        parts announced since the start; decisions: verdicts by "accept", "reject", "no_verdict"
    open_parts:      triggered, without a verdict yet
    last_progress_s: time.monotonic() of the line's last sign of life; a line that waits for a trigger has them too
    """

    line: str
    product: str | None
    uptime_s: float
    state: str
    counts: Counts
    triggers: int
    decisions: dict[str, int]
    open_parts: int
    cameras: tuple[CameraState, ...]
    outputs: tuple[OutputStatus, ...]
    last_progress_s: float


class Watched(Protocol):
    """A line, for who only looks at it."""

    def snapshot(self) -> Snapshot: ...
