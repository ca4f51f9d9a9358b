"""A line that is looked at all the time, and what it owes whatever happens around it."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import monotonic

import numpy as np
from line_parts import FakeCamera
from records import PATIENCE_S, check
from test_line import Keeper

from omniad_edge.frame import Frame
from omniad_edge.line.line import Line
from omniad_edge.line.snapshot import Snapshot
from omniad_edge.outputs.json_lines import JsonLines
from omniad_edge.verdict import Status, Verdict

NOISE_MS = 100.0  # a part that waits for a server, a disk or a slow output would wait for much longer


def is_balanced(snapshot: Snapshot) -> bool:
    """Every frame is in one count, every part open or decided; of each camera and of the line."""
    frames = [snapshot.counts, *(camera.counts for camera in snapshot.cameras)]
    return snapshot.triggers == sum(snapshot.decisions.values()) + snapshot.open_parts and all(
        n.captured == n.inspected + n.dropped + n.late + n.failed + n.waiting for n in frames
    )


@contextmanager
def counters_watched(line: Line) -> Iterator[None]:
    """Takes snapshots all the time. Raises AssertionError at the end if the counters of one did not add up."""
    wrong, ended = [], threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            snapshot = line.snapshot()
            if not is_balanced(snapshot):
                wrong.append(snapshot)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(PATIENCE_S)
    last = line.snapshot()
    assert not wrong, wrong[:1]
    assert is_balanced(last) and last.counts.waiting == last.open_parts == 0, last


class WatchedLine:
    """A line in a thread of its own, with its records in `keeper` and in folder/line.jsonl.

    At the end it has to stop within a second, its counters are checked, and that both hold one verdict a part.
    """

    def __init__(self, folder: Path, detector, source, *outputs, **options) -> None:
        self.keeper, self.file = Keeper(), folder / "line.jsonl"
        self.line = Line(detector, source, **options).add(self.keeper, JsonLines(self.file), *outputs)
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            with counters_watched(self.line):
                self.line.run()
        except BaseException as exc:
            self.error = exc

    def __enter__(self) -> "WatchedLine":
        self.thread.start()
        return self

    def __exit__(self, kind, *exc) -> None:
        stopped_s = self.stop()
        if kind is None:
            self.check()
            assert stopped_s < 1.0

    def stop(self) -> float:
        """-> after how many seconds `run` came back."""
        start = monotonic()
        self.line.stop()
        self.thread.join(PATIENCE_S)
        return monotonic() - start

    def check(self) -> None:
        assert not self.thread.is_alive()
        if self.error is not None:
            raise self.error
        verdicts, snapshot = self.keeper.of("verdict"), self.line.snapshot()
        assert len(verdicts) == snapshot.triggers == sum(snapshot.decisions.values())
        records = read_records(self.file)
        assert [r["id"] for r in records if r["kind"] == "verdict"] == [v.to_dict()["id"] for v in verdicts]
        assert len({r["id"] for r in records}) == len(records)

    def more(self, n: int, source: str | None = None) -> list[Verdict]:
        """Wait for n more verdicts by the network, on frames of this source. -> these."""
        before = len(self.keeper.of("verdict"))

        def new() -> list[Verdict]:
            given = self.keeper.of("verdict")[before:]
            return [v for v in given if v.results and source in (None, v.frames[0].source)]

        with self.keeper.changed:
            assert self.keeper.changed.wait_for(lambda: len(new()) >= n, PATIENCE_S), (source, new(), self.error)
            return new()[:n]

    def inspect(self, product: str | None = None) -> Verdict:
        """Trigger a part, and wait for its verdict; for lines that number their parts."""
        part_id = self.line.trigger(product=product)
        verdict = self.keeper.wait(int(part_id))[int(part_id) - 1]
        assert verdict.part_id == part_id
        return verdict

    def told(self, event: str, who: str | None = None) -> list[Status]:
        return [s for s in self.keeper.of("status") if s.event == event and who in (None, s.who)]

    def wait_event(self, event: str, who: str | None = None, times: int = 1) -> Status:
        """-> what was told the `times`-th time."""
        with self.keeper.changed:
            enough = self.keeper.changed.wait_for(lambda: len(self.told(event, who)) >= times, PATIENCE_S)
            assert enough, (event, who, self.keeper.of("status"), self.error)
        return self.told(event, who)[times - 1]


def read_records(path: Path) -> list[dict]:
    """All lines of a file, each of them a record after the schema."""
    text = path.read_text("ascii")
    assert text.endswith("\n")
    return [check(json.loads(line)) for line in text.splitlines()]


def p99_ms(verdicts: list[Verdict], what: str = "latency_ms") -> float:
    return float(np.percentile([getattr(verdict, what) for verdict in verdicts], 99))


class LargerCamera(FakeCamera):
    """Its frames have the size of those that the results of FakeDetector are of."""

    def read(self, timeout_s: float) -> Frame | None:
        frame = super().read(timeout_s)
        return frame and replace(frame, image=np.tile(frame.image, (3, 4, 1)))
