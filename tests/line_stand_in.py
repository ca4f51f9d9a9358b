"""A stand-in for a line and for its records: what health page, terminal, log and watchdog look at."""

import time
from dataclasses import replace
from itertools import count

import numpy as np

from omniad_edge.frame import Frame
from omniad_edge.line.snapshot import CameraState, Counts, Snapshot
from omniad_edge.outputs.delivery import OutputStatus
from omniad_edge.result import Result
from omniad_edge.verdict import Late, Origin, Status, Verdict

numbers = count(1)


class StandInLine:
    """`snapshot` gives `now`, alive at every call; set `dead_s` for a line that hangs."""

    def __init__(self, **changes):
        self.now = replace(SNAPSHOT, **changes)
        self.dead_s = 0.0

    def change(self, **changes):
        self.now = replace(self.now, **changes)

    def snapshot(self):
        return replace(self.now, last_progress_s=time.monotonic() - self.dead_s)


TOP = CameraState("top", "running", "", 1, 4, Counts(100, 90, 4, 1, 2, 3))
SIDE = CameraState("side", "running", "", 0, 0, Counts(50, 50))
SNAPSHOT = Snapshot(
    line="line3",
    product="cap",
    uptime_s=3725.0,
    state="running",
    counts=TOP.counts + SIDE.counts,
    triggers=71,
    decisions={"accept": 60, "reject": 8, "no_verdict": 2},
    open_parts=1,
    cameras=(TOP, SIDE),
    outputs=(OutputStatus("results.jsonl", 0, 70, 0, 0), OutputStatus("mqtt", 5, 40, 1, 2, spooled=22)),
    last_progress_s=0.0,
)


def origin(clock="2026-03-04T09:12:01.250+00:00"):
    return Origin("line3", "0123456789ab", next(numbers), clock)


def frame(source="top"):
    return Frame(np.zeros((8, 8, 3), np.uint8), 7, 0.0, source)


def result(score=0.2, threshold=0.5, product="cap"):
    speed_ms = {"preprocess": 2.0, "engine": 8.0, "postprocess": 1.0, "total": 11.0}
    empty = np.zeros((8, 8), np.float32)
    label = "defective" if score > threshold else "good"
    return Result(
        label, score, threshold, product, False, empty, empty > 1, (), 8, 8, 0.0, speed_ms, "onnxruntime", "fp32"
    )


def verdict(score=0.2, threshold=0.5, product="cap", decision=None, reason="", part_id="4711", latency_ms=20.0):
    decision = decision or ("reject" if score > threshold else "accept")
    results = () if decision == "no_verdict" else (result(score, threshold, product),)
    return Verdict(
        origin(), part_id, decision, reason, product, False, latency_ms, latency_ms - 2, results, (frame(),)
    )


def late():
    return Late(origin(), "4711", 12.0, result(), frame())


def status(event="camera lost", who="top", detail="no frame for 5 s"):
    return Status(origin(), event, who, detail)
