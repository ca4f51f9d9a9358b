"""What a line says: one verdict a part, results that came too late for one, and what happened around them.

`to_dict` of each is one JSON object after `record.schema.json`, the same in every output.
"""

import json
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.resources import files

from .frame import Frame
from .result import GOOD, Result

SCHEMA = 1  # of every record; changes when a field changes its meaning or goes
ACCEPT, REJECT, NO_VERDICT = "accept", "reject", "no_verdict"


def record_schema() -> dict:
    """The JSON schema (draft 2020-12) of every record."""
    return json.loads(files("omniad_edge").joinpath("record.schema.json").read_text(encoding="utf-8"))


def now() -> str:
    """Wall clock in UTC, ISO 8601 with milliseconds; for people, never for measuring."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


@dataclass(frozen=True)
class Origin:
    """Which record this is: `run` is new at each start of the line, `number` counts its records from 1."""

    line: str
    run: str
    number: int
    time: str = field(default_factory=now)

    def to_dict(self, kind: str) -> dict:
        return {
            "schema": SCHEMA,
            "kind": kind,
            "id": f"{self.run}-{self.number}",  # the same if a record is sent twice
            "line": self.line,
            "time": self.time,
        }


@dataclass(frozen=True, eq=False)
class Verdict:
    """The one answer to one part.

    decision:    "accept", "reject" or "no_verdict"
    reason:      in words, why it is not simply the network's: "deadline: ...", "camera lost", "black frame",
                 "unknown product", ...; "" where the network decided
    results:     one per frame of the part that was inspected in time; frames: all that were taken for it
    latency_ms:  from the trigger to here; age_ms: from the first frame's arrival to here, None without a frame
    """

    origin: Origin = field(repr=False)
    part_id: str
    decision: str
    reason: str
    product: str
    product_assumed: bool
    latency_ms: float
    age_ms: float | None
    results: tuple[Result, ...] = field(repr=False)
    frames: tuple[Frame, ...] = field(repr=False)

    kind = "verdict"

    @property
    def worst(self) -> Result | None:
        """The result furthest over its threshold, or nearest to it."""
        return max(self.results, key=lambda r: r.pred_score - r.threshold, default=None)

    @property
    def pred_score(self) -> float | None:
        return None if self.worst is None else self.worst.pred_score

    @property
    def threshold(self) -> float | None:
        return None if self.worst is None else self.worst.threshold

    @property
    def is_rejected(self) -> bool:
        return self.decision == REJECT

    def to_dict(self) -> dict:
        names = ["part_id", "decision", "reason", "product", "product_assumed", "latency_ms", "age_ms"]
        return {
            **self.origin.to_dict(self.kind),
            **{name: getattr(self, name) for name in names},
            "pred_score": self.pred_score,
            "threshold": self.threshold,
            "results": [result.to_dict() for result in self.results],
            "frames": [frame_dict(frame) for frame in self.frames],
        }


@dataclass(frozen=True, eq=False)
class Late:
    """A result that came after its part's verdict was given: kept for the record, acted on by nobody."""

    origin: Origin = field(repr=False)
    part_id: str
    late_ms: float
    result: Result = field(repr=False)
    frame: Frame = field(repr=False)

    kind = "late"

    def to_dict(self) -> dict:
        return {
            **self.origin.to_dict(self.kind),
            "part_id": self.part_id,
            "late_ms": self.late_ms,
            "result": self.result.to_dict(),
            "frame": frame_dict(self.frame),
        }


@dataclass(frozen=True)
class Status:
    """Something happened to a camera, an output or the line.

    event: "line started", "line stopped", "close failed", "camera runs", "camera lost", "camera back",
           "camera ended", "camera fault", "camera well", "frame unreadable", "engine failed",
           "engine back", "verdict not fetched"; of outputs "output failed", "output back", "output error",
           "output dropped", "output refused", "spool damaged"; of MQTT triggers "trigger lost", "trigger back",
           "trigger fault"
    who:   name of the source or output; detail: in words
    """

    origin: Origin = field(repr=False)
    event: str
    who: str = ""
    detail: str = ""

    kind = "status"

    def to_dict(self) -> dict:
        fields = {"event": self.event, "who": self.who, "detail": self.detail}
        return self.origin.to_dict(self.kind) | fields


Record = Verdict | Late | Status


def frame_dict(frame: Frame) -> dict:
    return {
        "source": frame.source,
        "sequence": frame.sequence,
        "item": frame.item,
        "exposure_us": frame.exposure_us,
        "temperature_c": frame.temperature_c,
    }


def combine(results: tuple[Result, ...], rule: str) -> str:
    """Of several views of a part: "any" rejects if one is defective, "all" only if every one is.

    Either rejects if one does not show the product.
    """
    bad = [result.pred_label != GOOD for result in results]
    bad_enough = any(bad) if rule == "any" else all(bad)
    return REJECT if bad_enough or any(result.product_fault for result in results) else ACCEPT
