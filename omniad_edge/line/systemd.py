"""A line as a service of systemd: says when it is ready, and shows signs of life only while the line has them.

The unit is `omniad@.service` beside this file.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Mapping

from ..errors import InputError
from .snapshot import Snapshot, Watched

READY_EVERY_S = 0.1  # how often to look whether the line has started
STATUS_EVERY_S = 5.0  # where systemd watches nothing

log = logging.getLogger(__name__)


def notify(*assignments: str) -> bool:
    """Tell systemd, as in notify("READY=1", "STATUS=running"). -> whether there was one to tell.

    Never raises: a line does not stop because the init system does not listen.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):  # Linux's abstract names begin with a zero byte
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.settimeout(1.0)
            channel.connect(address)
            channel.sendall("\n".join(assignments).encode())
    except OSError as exc:
        log.warning("systemd does not take messages at NOTIFY_SOCKET: %s", exc)
        return False
    return True


def watchdog_s(environment: Mapping[str, str] = os.environ) -> float | None:
    """Seconds after which systemd restarts a silent process; None if it does not watch this one.

    Raises InputError if WATCHDOG_USEC is not a number of microseconds above 0.
    """
    text = environment.get("WATCHDOG_USEC", "")
    if not text or environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    if not text.isdecimal() or int(text) == 0:
        raise InputError(
            f"WATCHDOG_USEC: expected microseconds above 0, got {text!r}; set WatchdogSec in the unit"
        )
    return int(text) / 1e6


class Watchdog:
    """Reports a line to systemd from a thread; does nothing where there is no systemd.

    READY once the line has started, then every half of the unit's WatchdogSec its status and, if its last progress
    is not older than that, a sign of life. A line that hangs is restarted after at most 1.5 x WatchdogSec.
    Raises InputError for a WATCHDOG_USEC that is no number.
    """

    def __init__(self, line: Watched) -> None:
        self._line = line
        self._limit_s = watchdog_s()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._thread is None and os.environ.get("NOTIFY_SOCKET"):
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Call it when the line has stopped: the process is about to end, on purpose."""
        if self._thread is not None and not self._stopped.is_set():
            self._stopped.set()
            self._thread.join()
            notify("STOPPING=1", "STATUS=stopping")

    def _run(self) -> None:
        every_s = self._limit_s / 2 if self._limit_s else STATUS_EVERY_S
        ready = False
        while True:
            snapshot = self._line.snapshot()
            quiet_s = time.monotonic() - snapshot.last_progress_s
            assignments = [f"STATUS={status(snapshot, quiet_s, every_s)}"]
            if not ready and snapshot.state != "starting":  # it may have ended already, if it was a short one
                assignments.append("READY=1")
                ready = True
            if self._limit_s and quiet_s <= every_s:
                assignments.append("WATCHDOG=1")
            notify(*assignments)
            if self._stopped.wait(every_s if ready else min(every_s, READY_EVERY_S)):
                return


def status(snapshot: Snapshot, quiet_s: float, limit_s: float) -> str:
    """One line for `systemctl status`."""
    if quiet_s > limit_s:
        return f"{snapshot.line}: no sign of life for {quiet_s:.0f} s"
    parts = sum(snapshot.decisions.values())
    text = f"{snapshot.line}: {snapshot.state}, {parts} parts, {snapshot.decisions.get('reject', 0)} rejected"
    lost = [
        f"{camera.name} {camera.state}" for camera in snapshot.cameras if camera.state in ("connecting", "lost")
    ]
    return ", ".join([text, *lost])
