"""Calls that may hang, made all at once and waited for no longer than is good."""

import threading
from collections.abc import Callable, Iterable
from time import monotonic

POLL_S = 0.02


def side_by_side(
    calls: Iterable[Callable[[], object]], timeout_s: float, cut_short: Callable[[], bool] = lambda: False
) -> list[BaseException]:
    """Make each call in a daemon thread of its own; return when all are done, or after `timeout_s`.

    cut_short: looked at meanwhile; True ends the waiting. A call that hangs is left behind.
    -> what the calls raised.
    """
    raised: list[BaseException] = []

    def attempt(call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as exc:
            raised.append(exc)

    threads = [threading.Thread(target=attempt, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    end = monotonic() + timeout_s
    for thread in threads:
        while thread.is_alive() and monotonic() < end and not cut_short():
            thread.join(POLL_S)
    return list(raised)
