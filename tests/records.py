"""Records as a line makes them, small; outputs to write them to, and what a test waits for."""

import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from time import monotonic

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from omniad_edge.calibration import Calibration
from omniad_edge.errors import OutputError
from omniad_edge.frame import Frame
from omniad_edge.outputs.delivery import Output, OutputQueue
from omniad_edge.result import Result, decide
from omniad_edge.verdict import Late, Origin, Status, Verdict, record_schema

TIME = "2026-03-02T10:15:02.123+00:00"
PATIENCE_S = 20.0  # on a loaded machine; no test of a working product waits that long


def make_frame(seed: int = 0, height: int = 24, width: int = 32) -> Frame:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Frame(image, sequence=seed, captured_s=1.5, source="top", exposure_us=900.0)


def make_result(score: float = 0.8, threshold: float = 0.5, product: str = "gear") -> Result:
    """Of a frame as `make_frame` gives it, with one region if the score is above the threshold."""
    anomaly_map = np.full((12, 16), 0.1, np.float32)
    anomaly_map[3:5, 4:8] = score
    decision = decide(anomaly_map, score, Calibration(threshold, 10, None, 0.26, 0.95, 0, 0, 0.1), 24, 32)
    speed_ms = {"preprocess": 1.0, "engine": 2.0, "postprocess": 0.5, "total": 3.5}
    rest = {"backend": "onnxruntime", "precision": "fp32"}
    return Result(**decision, product=product, product_assumed=False, speed_ms=speed_ms, **rest)


def of_another_product(shown: str = "") -> Result:
    """Of a frame that should show a gear. shown: the product it shows; "" for none that is known."""
    label = "wrong product" if shown else "unknown product"
    return replace(make_result(0.2), pred_label=label, product_shown=shown, product_distance=3.0)


def make_origin(number: int, time: str = TIME, run: str = "a1b2") -> Origin:
    return Origin("line3", run, number, time)


def make_verdict(number: int = 1, score: float | None = 0.8, views: int = 1, **fields: object) -> Verdict:
    """score None: no result came in time."""
    results = () if score is None else tuple(make_result(score) for _ in range(views))
    if score is None:
        decision, reason = "no_verdict", "deadline: no result in 40 ms"
    else:
        decision, reason = ("reject" if score > 0.5 else "accept"), ""
    verdict = Verdict(
        origin=make_origin(number),
        part_id=f"A{number}",
        decision=decision,
        reason=reason,
        product="gear",
        product_assumed=False,
        latency_ms=12.5,
        age_ms=11.0,
        results=results,
        frames=tuple(make_frame(number * 10 + i) for i in range(views)),
    )
    return replace(verdict, **fields)


def make_late(number: int = 1) -> Late:
    return Late(make_origin(number), "A1", 3.5, make_result(), make_frame())


def make_status(number: int = 1, detail: str = "no frame for 2 s") -> Status:
    return Status(make_origin(number), "camera lost", "top", detail)


def of_every_kind() -> list:
    return [make_verdict(1), make_verdict(2, 0.2), make_verdict(3, None), make_late(4), make_status(5)]


@cache
def validator() -> Draft202012Validator:
    return Draft202012Validator(record_schema())


def check(record: dict) -> dict:
    """The record, if it is one after the schema."""
    validator().validate(record)
    return record


class Events:
    """An on_event that keeps what it was told and can be waited for."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, str]] = []
        self._changed = threading.Condition()

    def __call__(self, event: str, who: str, detail: str) -> None:
        with self._changed:
            self.seen.append((event, who, detail))
            self._changed.notify_all()

    def names(self) -> list[str]:
        return [event for event, _, _ in self.seen]

    def wait(self, event: str, times: int = 1) -> str:
        """The detail of its `times`-th appearance."""
        with self._changed:
            enough = self._changed.wait_for(lambda: self.names().count(event) >= times, PATIENCE_S)
            assert enough, f"expected {times} of {event!r}, got {self.seen}"
            return [detail for name, _, detail in self.seen if name == event][times - 1]


class Scripted(Output):
    """An output that does at each write what it is told: "ok", "later", "broken"; "ok" after the last one."""

    name = "scripted"

    def __init__(self, script: Iterator[str] | list[str] = (), batch: int = 100) -> None:
        self.script = iter(script)
        self.batch = batch
        self.calls: list[list[int]] = []
        self.written: list[int] = []
        self.failed: list[int] = []
        self.closed = threading.Event()
        self.gate = threading.Event()  # cleared: writes hang
        self.entered = threading.Event()
        self.gate.set()

    def write(self, records: list) -> None:
        numbers = [record.origin.number for record in records]
        self.calls.append(numbers)
        self.entered.set()
        self.gate.wait()
        doing = next(self.script, "ok")
        if doing == "later":
            raise OutputError("the server is away")
        if doing == "broken":
            self.failed += numbers
            raise ZeroDivisionError("division by zero")
        self.written += numbers

    def close(self) -> None:
        self.closed.set()


def started(output: object, on_event: Events, capacity: int = 1000) -> OutputQueue:
    queue = OutputQueue(output, on_event, capacity)
    queue.start()
    return queue


def wait_until(condition: Callable[[], bool]) -> None:
    """For what gives no signal to wait for."""
    deadline = monotonic() + PATIENCE_S
    pause = threading.Event()
    while not condition():
        assert monotonic() < deadline, "it did not come about"
        pause.wait(0.005)


@contextmanager
def small_disk(folder: Path, size_kb: int) -> Iterator[Path]:
    """A file system of its own with so much space."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size_kb}k", "tmpfs"]
    try:
        subprocess.run(["mount", *options, str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a tmpfs needs root and, in a container, --cap-add SYS_ADMIN")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
