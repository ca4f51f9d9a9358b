"""Threads that inspect: they take waiting frames from a line, call its detector and hand the results back."""

from collections.abc import Callable, Sequence
from math import inf
from time import monotonic
from typing import TYPE_CHECKING

import numpy as np

from ..credentials import without_credentials
from ..errors import EngineLostError
from ..outputs.delivery import FailureSeries
from ..result import Result
from ..verdict import Late

if TYPE_CHECKING:
    from .line import Line
    from .parts import View

BATCHES = (8, 4, 2)
# A slower engine is a CPU's, which takes eight times as long for eight images as for one.
BATCH_BELOW_S = 0.03
IDLE_S = 0.25  # an idle worker looks around this often
# A GPU lowers its clocks when idle and the next part pays for it, so a quick engine runs on a blank frame now and
# then. A slow one, on a CPU, is left alone: the part that comes meanwhile would have to wait for it.
WARM_EVERY_S = 0.05
WARM_BELOW_S = 0.005
BLANK = np.zeros((64, 64, 3), np.uint8)


class Workers:
    """Inspects with a detector. `measure` comes first, and is the engine's warm-up too.

    batch: frames a call may take. A call of several is good for throughput and bad for the first frame in it, so
        it has to take less than 0.7 times as long per frame, and under half of the deadline.
    """

    def __init__(self, line: "Line", detector: Callable, deadline_ms: float | None) -> None:
        self.line, self.detector, self.deadline_ms = line, detector, deadline_ms
        self.failures = FailureSeries("engine", lambda event, detail: line.tell(event, "", detail))
        self.batch, self.call_s = 1, 0.0

    def measure(self) -> None:
        self.call_s = self.seconds_for(1)
        limit_s = inf if self.deadline_ms is None else self.deadline_ms / 2e3
        for batch in BATCHES if self.call_s < BATCH_BELOW_S else ():
            if self.line.stop_asked:
                return
            if self.seconds_for(batch) <= min(0.7 * batch * self.call_s, limit_s):
                self.batch = batch
                return

    def seconds_for(self, batch: int) -> float:
        """The fastest of three calls."""
        taken_s = []
        for _ in range(3):
            start = monotonic()
            self.detector([BLANK] * batch, self.line.product)
            taken_s.append(monotonic() - start)
        return min(taken_s)

    def run(self, keeps_warm: bool) -> None:
        """One worker's thread."""
        line, keeps_warm = self.line, keeps_warm and self.call_s < WARM_BELOW_S
        while not line.stopping:
            line.beat()
            with line.lock:
                line.frame_waits.wait_for(
                    lambda: line.parts.waiting or line.stopping, WARM_EVERY_S if keeps_warm else IDLE_S
                )
                views = line.parts.next_views(self.batch)
                line.room.notify_all()
            if views:
                self.inspect(views)
            elif keeps_warm:
                self.keep_warm()

    def keep_warm(self) -> None:
        try:
            self.detector([BLANK], self.line.product)
        except Exception as exc:
            self.failed(None, exc)

    def inspect(self, views: list["View"]) -> None:
        try:
            results = self.detector([view.frame.image for view in views], views[0].part.product)
        except Exception as exc:
            if len(views) == 1:
                self.failed(views[0], exc)
                return
            for view in views:  # one bad frame costs no other part its verdict
                self.inspect([view])
        else:
            self.finish(views, results)

    def finish(self, views: list["View"], results: Sequence[Result]) -> None:
        """What the detector found on these frames; too late for a verdict, it is recorded."""
        line = self.line
        with line.lock:
            self.failures.good()
            for view, result in zip(views, results, strict=True):
                if not line.parts.finish(view, result):
                    part = view.part
                    due_s = part.triggered_s if part.deadline_s is None else part.deadline_s
                    late_ms = 1e3 * (monotonic() - due_s)
                    line.put(Late(line.origin(), part.part_id, late_ms, result, view.frame))
            line.deliver()

    def failed(self, view: "View | None", error: Exception) -> None:
        """view: what the detector was working on; None for a blank frame to keep it warm."""
        line = self.line
        with line.lock:
            if view is not None:
                line.parts.fail(view, without_credentials(f"engine failed: {error}"))
            self.failures.bad(f"{type(error).__name__}: {error}")
            line.deliver()
        if line.on_error == "stop" or isinstance(error, EngineLostError):
            line.fail(error)
