"""Debian's programs that stand for cameras in tests, and skips where they are not installed."""

import fcntl
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from omniad_edge.errors import CameraError

PYTHON = "/usr/bin/python3"
RTSP = ("gir1.2-gst-rtsp-server-1.0", "python3-gi", "gstreamer1.0-plugins-good", "gstreamer1.0-plugins-ugly")
GSTREAMER = ("python3-gi", "gir1.2-gst-plugins-base-1.0", "gstreamer1.0-plugins-base")
ARAVIS = ("aravis-tools", "gir1.2-aravis-0.8", "python3-gi")


def skip_without(packages: tuple[str, ...]) -> pytest.MarkDecorator:
    missing = not all(installed(package) for package in packages)
    return pytest.mark.skipif(missing, reason=f"sudo apt install {' '.join(packages)}")


@cache
def installed(package: str) -> bool:
    if shutil.which("dpkg-query") is None:
        return False
    query = ["dpkg-query", "-W", "-f", "${Status}", package]
    return "ok installed" in subprocess.run(query, capture_output=True, text=True).stdout


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def running(*command: str):
    """The process of a program, killed in the end."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()


class GigePort:
    """The one GigE Vision port of this machine: test runs take turns, and each may enter it twice."""

    path = Path(tempfile.gettempdir()) / "omniad-test-gige.lock"

    def __init__(self) -> None:
        self.users, self.lock = 0, None

    @contextmanager
    def taken(self):
        if not self.users:
            self.lock = self.path.open("w")
            fcntl.flock(self.lock, fcntl.LOCK_EX)
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1
            if not self.users:
                self.lock.close()


gige_port = GigePort()


@contextmanager
def rtsp_server(port: int, width: int, height: int, pattern: str):
    script = Path(__file__).with_name("rtsp_server.py")
    with running(PYTHON, str(script), str(port), str(width), str(height), pattern) as process:
        assert process.stdout.readline() == "ready\n"
        yield process


def read_until_lost(source, within_s: float, match: str):
    """The last frame before `read` raised CameraError, which has to be within `within_s` seconds."""
    last, deadline = None, time.monotonic() + within_s
    with pytest.raises(CameraError, match=match):
        while time.monotonic() < deadline:
            last = source.read(0.1) or last
    assert time.monotonic() < deadline
    return last


def wait_until(condition, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.005)
