"""What makes a line act without a frame: deadlines, intervals, signals."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .line import Line

TICK_S = 0.25


def keep_deadlines(line: "Line") -> None:
    """A thread's job: decide parts whose deadline has come. A nearer deadline than the one awaited wakes it."""
    while not line.stopping:
        with line.lock:
            line.beat()
            line.parts.expire(monotonic())
            line.deliver()
            due_s = line.parts.next_deadline_s()
            line.next_due_s = inf if due_s is None else due_s
            line.part_opened.wait(min(TICK_S, max(0.0, line.next_due_s - monotonic())))


def trigger_periodically(line: "Line", period_s: float) -> None:
    """A thread's job. Triggers that a stall of the machine made impossible are not made up for."""
    next_s = monotonic()
    while not line.stopping:
        next_s = max(next_s + period_s, monotonic())
        line.pause(next_s - monotonic())
        if not line.stopping:
            line.trigger()


@contextmanager
def stopped_by_signals(line: "Line") -> Iterator[None]:
    """SIGINT and SIGTERM stop the line, a second SIGINT the program. Only a main thread can be asked that way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def asked(number: int, _: object) -> None:
        if line.stop_asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        line.stop()

    before = {number: signal.signal(number, asked) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
