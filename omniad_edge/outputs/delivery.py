"""Where records go: every output works behind a queue and a thread of its own, so none can delay a part.

    Line --put--> OutputQueue (bounded, in memory) --write--> Output: a function, a file, images, a spool

`Callback` is here; files are in `json_lines` and `rejects`, network outputs in `mqtt` and `webhook`.
"""

import math
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Protocol

import numpy as np

from ..errors import InputError, OutputError
from ..verdict import Late, Record, Verdict

RETRY_S = (0.1, 5.0)  # the first pause after a failure, doubled up to the longest
QUIET_S = 10.0  # between two reports of the same kind
HANGING_S = 10.0  # a write that takes longer is reported
TICK_S = 0.5  # how often the reporter looks
GRACE_S = 0.1  # after the time to close is over, for what only has to notice
IMAGE_BYTES = 512_000_000  # of pictures waiting for one output
NO_IMAGE = np.empty((0, 0, 3), np.uint8)
NO_MAP, NO_MASK = np.empty((0, 0), np.float32), np.empty((0, 0), bool)


class Output(Protocol):
    """Takes records somewhere. One thread opens, writes and closes it.

    name:   for messages and counters; holds no credentials
    kinds:  which records it wants: "verdict", "late", "status"
    batch:  at most so many records a `write`
    images: whether it needs the pictures and maps in the records; without, they are empty and no memory is held
    report: set by the queue; an output calls report(event, detail) for what happens outside of `write`
    """

    name: str
    kinds: tuple[str, ...] = ("verdict", "late", "status")
    batch: int = 100
    images: bool = True
    report: Callable[[str, str], None] = staticmethod(lambda event, detail: None)

    def wants(self, record: Record) -> bool:
        """Called in the line's own thread: has to be quick."""
        return record.kind in self.kinds

    def open(self) -> None:
        """Called again, after a pause, until it raises nothing."""

    def write(self, records: list[Record]) -> None:
        """Take all of them, one or more. Raises OutputError or OSError if trying again later makes sense."""

    def close(self) -> None:
        """Nothing is written afterwards."""

    def refine(self, status: "OutputStatus") -> "OutputStatus":
        """What the queue knows -> with what only the output knows."""
        return status


@dataclass(frozen=True)
class OutputStatus:
    """How one output keeps up, in records it wanted since the start.

    waiting: in memory; written: taken by it; failed: cost an error that trying again would repeat;
    dropped: given up, as the queue was full or closed; spooled: on disk until they can be sent.
    At every moment put == written + failed + dropped + waiting; for one with a spool see `Spooled`.
    """

    name: str
    waiting: int
    written: int
    failed: int
    dropped: int
    spooled: int = 0

    @property
    def lost(self) -> int:
        return self.failed + self.dropped


def backoff() -> Iterator[float]:
    """Pauses in seconds between tries, without end."""
    pause_s, longest_s = RETRY_S
    while True:
        yield pause_s
        pause_s = min(2 * pause_s, longest_s)


class FailureSeries:
    """Reports "WHAT failed" at the first failure of a series, "WHAT back" at its end; not every flicker."""

    def __init__(self, what: str, report: Callable[[str, str], None]) -> None:
        self._what, self._report = what, report
        self._lock = threading.Lock()
        self._failing = False
        self._quiet_until = -math.inf

    def bad(self, detail: str) -> None:
        with self._lock:
            if self._failing or monotonic() < self._quiet_until:
                return
            self._failing, self._quiet_until = True, monotonic() + QUIET_S
            self._report(f"{self._what} failed", detail)

    def good(self) -> None:
        with self._lock:
            if self._failing:
                self._failing = False
                self._report(f"{self._what} back", "")


class Tally:
    """Reports a growing count at once and then at most every QUIET_S."""

    def __init__(self, report: Callable[[str, str], None], event: str) -> None:
        self._report, self._event = report, event
        self._lock = threading.Lock()
        self._reported = 0
        self._quiet_until = -math.inf

    def update(self, count: int, detail: str, last: bool = False) -> None:
        """count: of records, since the start; last: nothing comes afterwards, so it is said now."""
        with self._lock:
            new = count - self._reported
            if new > 0 and (last or monotonic() >= self._quiet_until):
                self._report(self._event, f"{new} record{'s' * (new > 1)}: {detail}")
                self._reported, self._quiet_until = count, monotonic() + QUIET_S


class OutputQueue:
    """One output behind its own queue and threads.

    output:   opened by `start`, in the queue's own thread
    on_event: on_event(event, who, detail), called from a thread of this queue, never from `put`: "output failed"
              once for a series of failures and "output back" after it; "output error" for an error in the output's
              own code and "output dropped", with the number of records, at most every 10 s
    capacity: records that wait besides those being written; when full the oldest is dropped. Pictures that wait
              are bounded too, by 512 MB
    """

    def __init__(self, output: Output, on_event: Callable[[str, str, str], None], capacity: int = 1000) -> None:
        if capacity < 1:
            raise InputError(f"capacity: expected at least 1 record, got {capacity}")
        self.output = output
        self._on_event = on_event
        self._capacity = capacity
        # An output of the user's may have name, kinds, open, write and close alone.
        self._wants = getattr(output, "wants", partial(Output.wants, output))
        self._batch = getattr(output, "batch", Output.batch)
        self._images = getattr(output, "images", Output.images)
        self._events: SimpleQueue[tuple[str, str] | None] = SimpleQueue()
        self._failures = FailureSeries("output", self._report)
        self._errors = Tally(self._report, "output error")
        self._drops = Tally(self._report, "output dropped")
        if hasattr(output, "report"):
            output.report = self._report
        self._changed = threading.Condition()  # guards what follows
        self._waiting: deque[tuple[Record, int]] = deque()
        self._waiting_bytes = 0
        self._in_flight: list[Record] = []
        self._written = self._failed = self._dropped = 0
        self._closing = self._abandoned = False
        self._busy_since: float | None = None
        self._writer = threading.Thread(target=self._run, name=f"output {output.name}", daemon=True)
        self._reporter = threading.Thread(target=self._tell, name=f"events {output.name}", daemon=True)

    def start(self) -> None:
        """Open the output and write what was put; once."""
        self._reporter.start()
        self._writer.start()

    def put(self, record: Record) -> None:
        """Hand over a record. Never waits for the output, never raises."""
        try:
            if not self._wants(record):
                return
        except Exception as exc:
            with self._changed:
                self._failed += 1
            self._errors.update(self._failed, in_words(exc))
            return
        if not self._images:
            record = without_images(record)
        size = image_bytes(record)
        with self._changed:
            if self._closing:
                self._dropped += 1
                return
            self._waiting.append((record, size))
            self._waiting_bytes += size
            while len(self._waiting) > self._capacity or (
                self._waiting_bytes > IMAGE_BYTES and len(self._waiting) > 1
            ):
                self._waiting_bytes -= self._waiting.popleft()[1]
                self._dropped += 1
            self._changed.notify_all()

    def status(self) -> OutputStatus:
        with self._changed:
            waiting = len(self._waiting) + len(self._in_flight)
            status = OutputStatus(self.output.name, waiting, self._written, self._failed, self._dropped)
        refine = getattr(self.output, "refine", None)
        return refine(status) if refine else status

    def close(self, timeout_s: float) -> None:
        """Write what waits, for at most `timeout_s`; what is left then is dropped. May be called twice.

        Returns within 0.2 s of `timeout_s` even if the output hangs.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        started = self._writer.ident is not None
        if started:
            self._writer.join(max(0.0, timeout_s))
        with self._changed:
            self._abandoned = True  # a write that hangs is not waited for, and not counted when it ends after all
            self._dropped += len(self._waiting) + len(self._in_flight)
            self._waiting.clear()
            self._in_flight = []
            self._waiting_bytes = 0
            self._changed.notify_all()
        if started:
            self._writer.join(GRACE_S)  # out of a pause; the output is closed
            self._events.put(None)
            self._reporter.join(GRACE_S)

    # ---- the writer's thread

    def _run(self) -> None:
        if not self._open():
            return
        while batch := self._take():
            self._write(batch)
        try:
            self.output.close()
        except Exception as exc:
            self._failures.bad(in_words(exc))

    def _open(self) -> bool:
        """False if closed before it could be opened."""
        for pause_s in backoff():
            try:
                self._call(self.output.open)
            except (Exception, SystemExit) as exc:
                self._failures.bad(in_words(exc))
                if not self._pause(pause_s):
                    return False
            else:
                break
        self._failures.good()
        return True

    def _take(self) -> list[Record]:
        """The next records to write; none when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            taken = [self._waiting.popleft() for _ in range(min(self._batch, len(self._waiting)))]
            self._waiting_bytes -= sum(size for _, size in taken)
            self._in_flight = [record for record, _ in taken]
            return list(self._in_flight)

    def _write(self, batch: list[Record]) -> None:
        for pause_s in backoff():
            try:
                self._call(self.output.write, list(batch))
            except (OutputError, OSError) as exc:
                self._failures.bad(in_words(exc))
                if not self._pause(pause_s):
                    return
            except (Exception, SystemExit) as exc:
                self._settle(failed=len(batch))
                self._errors.update(self._failed, in_words(exc))
                return
            else:
                self._settle(written=len(batch))
                self._failures.good()
                return

    def _settle(self, written: int = 0, failed: int = 0) -> None:
        """The fate of the records in flight, unless `close` gave them up meanwhile."""
        with self._changed:
            if not self._abandoned:
                self._in_flight = []
                self._written += written
                self._failed += failed

    def _call(self, action: Callable[..., None], *args: object) -> None:
        self._busy_since = monotonic()
        try:
            action(*args)
        finally:
            self._busy_since = None

    def _pause(self, pause_s: float) -> bool:
        """Wait before the next try; closing cuts the wait short. False if there is no next."""
        with self._changed:
            closing = self._closing
            self._changed.wait_for(lambda: self._abandoned or self._closing != closing, pause_s)
            return not self._abandoned

    # ---- the reporter's thread: on_event may take its time, and sees a write that hangs

    def _report(self, event: str, detail: str) -> None:
        self._events.put((event, detail))

    def _tell(self) -> None:
        closed = False
        while not closed:
            try:
                event = self._events.get(timeout=TICK_S)
                closed = event is None
            except Empty:
                event = None
            busy_since = self._busy_since
            if busy_since is not None and monotonic() - busy_since > HANGING_S:
                self._failures.bad(f"no return from a call for {HANGING_S:g} s; is its disk or server there?")
            with self._changed:
                dropped = self._dropped
            self._drops.update(dropped, "the output did not take them in time", last=closed)
            if event is not None:
                self._tell_one(*event)
        while not self._events.empty():
            self._tell_one(*self._events.get())

    def _tell_one(self, event: str, detail: str) -> None:
        try:
            self._on_event(event, self.output.name, detail)
        except Exception:
            traceback.print_exc()  # there is nobody else to tell


def in_words(exc: BaseException) -> str:
    return str(exc) if isinstance(exc, OutputError) else f"{type(exc).__name__}: {exc}"


def image_bytes(record: Record) -> int:
    """What its pictures and maps take in memory."""
    frames = getattr(record, "frames", None) or ([record.frame] if record.kind == "late" else [])
    results = getattr(record, "results", None) or ([record.result] if record.kind == "late" else [])
    maps = sum(result.anomaly_map.nbytes + result.pred_mask.nbytes for result in results)
    return maps + sum(frame.image.nbytes for frame in frames)


def without_images(record: Record) -> Record:
    """The same record, with empty pictures and maps: `to_dict` does not need them."""
    if record.kind == "verdict":
        return _light_verdict(record)
    if record.kind == "late":
        return _light_late(record)
    return record


def _light_verdict(verdict: Verdict) -> Verdict:
    results = tuple(replace(result, anomaly_map=NO_MAP, pred_mask=NO_MASK) for result in verdict.results)
    return replace(verdict, results=results, frames=tuple(replace(f, image=NO_IMAGE) for f in verdict.frames))


def _light_late(late: Late) -> Late:
    result = replace(late.result, anomaly_map=NO_MAP, pred_mask=NO_MASK)
    return replace(late, result=result, frame=replace(late.frame, image=NO_IMAGE))


class Callback(Output):
    """Calls a function with every verdict, in a thread of its own. What the function raises fails that verdict."""

    kinds = ("verdict",)
    batch = 1

    def __init__(self, function: Callable[[Verdict], None]) -> None:
        if not callable(function):
            raise InputError(f"output: expected a function of one verdict or an Output, got {function!r}")
        self.name = getattr(function, "__name__", type(function).__name__)
        self._function = function

    def write(self, records: list[Record]) -> None:
        for verdict in records:
            try:
                self._function(verdict)
            except (OutputError, OSError) as exc:
                # Not to be tried again, as an output's would be: the next verdict is the one that matters.
                raise RuntimeError(in_words(exc)) from exc
