"""The service protocol over real datagram sockets, and the unit as systemd itself reads it."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
from line_stand_in import SNAPSHOT, TOP, StandInLine

from omniad_edge.errors import InputError
from omniad_edge.line.systemd import Watchdog, notify, status, watchdog_s

WAIT_S = 10.0  # for what comes in milliseconds


@pytest.fixture(params=["file", "abstract"])
def systemd(request, tmp_path, monkeypatch):
    """The end of the socket that systemd holds."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        if request.param == "file":
            name = address = str(tmp_path / "notify")
        else:
            name, address = f"@omniad-{os.getpid()}", f"\0omniad-{os.getpid()}"
        receiver.bind(address)
        receiver.settimeout(WAIT_S)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        monkeypatch.delenv("WATCHDOG_USEC", raising=False)
        yield receiver


def receive(systemd):
    return systemd.recv(4096).decode().split("\n")


def receive_until(systemd, wanted):
    """All assignments up to the message that holds `wanted`."""
    seen = []
    while wanted not in seen:
        seen += receive(systemd)
    return seen


@pytest.fixture
def watchdog(monkeypatch):
    """Makes running watchdogs, and stops them."""
    made = []

    def make(line, limit_s=None):
        if limit_s:
            monkeypatch.setenv("WATCHDOG_USEC", str(int(limit_s * 1e6)))
        made.append(Watchdog(line))
        made[-1].start()
        return made[-1]

    yield make
    for each in made:
        each.stop()


def test_notify_sends_one_datagram(systemd):
    assert notify("READY=1", "STATUS=läuft")
    assert systemd.recv(4096) == "READY=1\nSTATUS=läuft".encode()


@pytest.mark.parametrize("address", ["", "vsock:2:99", None])
def test_without_systemd_nothing_happens(address, monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert not notify("READY=1")


def test_a_socket_nobody_listens_at_is_logged_not_raised(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    assert not notify("WATCHDOG=1")
    assert "NOTIFY_SOCKET" in caplog.text


def test_watchdog_s():
    assert watchdog_s({"WATCHDOG_USEC": "10000000"}) == 10.0
    assert watchdog_s({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": str(os.getpid())}) == 0.5
    assert watchdog_s({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "1"}) is None
    assert watchdog_s({}) is None


@pytest.mark.parametrize("text", ["ten", "0", "-1", "1.5"])
def test_watchdog_s_of_no_number(text):
    with pytest.raises(InputError, match="WATCHDOG_USEC"):
        watchdog_s({"WATCHDOG_USEC": text})


def test_ready_once_and_only_when_the_line_has_started(systemd, watchdog):
    line = StandInLine(state="starting")
    watchdog(line, 0.2)
    assert "READY=1" not in receive(systemd) + receive(systemd)
    line.change(state="running")
    receive_until(systemd, "READY=1")
    later = [receive(systemd) for _ in range(3)]
    assert all("WATCHDOG=1" in message and "READY=1" not in message for message in later)


def test_signs_of_life_come_at_half_of_the_limit(systemd, watchdog):
    watchdog(StandInLine(), 0.4)
    arrivals_s = []
    for _ in range(5):
        assert "WATCHDOG=1" in receive(systemd)
        arrivals_s.append(time.monotonic())
    gaps_s = np.diff(arrivals_s)
    assert sum(gaps_s) > 0.7  # 4 x 0.2 s; longer if the machine is busy,
    assert min(gaps_s) < 0.35  # but not each time


def test_a_line_that_hangs_gives_no_sign_of_life_until_it_goes_on(systemd, watchdog):
    line = StandInLine()
    line.dead_s = 30.0
    watchdog(line, 0.1)
    quiet = [receive(systemd) for _ in range(3)]
    assert not any("WATCHDOG=1" in message for message in quiet)
    assert quiet[-1] == ["STATUS=line3: no sign of life for 30 s"]
    line.dead_s = 0.0
    receive_until(systemd, "WATCHDOG=1")


def test_a_service_that_is_not_watched_is_ready_without_signs_of_life(systemd, watchdog):
    watchdog(StandInLine())
    assert receive(systemd) == ["STATUS=line3: running, 70 parts, 8 rejected", "READY=1"]


def test_stop_says_so_last_and_twice_is_fine(systemd, watchdog):
    running = watchdog(StandInLine(), 30)
    receive_until(systemd, "READY=1")
    running.stop()
    running.stop()
    assert receive(systemd) == ["STOPPING=1", "STATUS=stopping"]
    systemd.setblocking(False)
    with pytest.raises(BlockingIOError):
        systemd.recv(1)


def test_outside_systemd_no_thread_runs(monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)

    class Untouched:
        def snapshot(self):
            raise AssertionError("looked at")

    watchdog = Watchdog(Untouched())
    watchdog.start()
    watchdog.stop()


def test_status_names_cameras_that_are_away():
    away = replace(SNAPSHOT, cameras=(replace(TOP, state="lost"),))
    assert status(away, 0.0, 5.0) == "line3: running, 70 parts, 8 rejected, top lost"


def unit():
    return files("omniad_edge.line").joinpath("omniad@.service").read_text(encoding="utf-8")


def test_unit_runs_what_the_package_installs():
    assert re.search(r"^ExecStart=/\S+/bin/omniad run /etc/omniad/%i\.toml$", unit(), re.M)
    assert re.search(r"^Type=notify$", unit(), re.M) and re.search(r"^WatchdogSec=\d+s$", unit(), re.M)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("broken", [False, True])
def test_systemd_understands_the_unit(broken, tmp_path):
    """`verify` exits with 0 for a key it does not know: what counts is that it says nothing."""
    text = re.sub(r"/opt/\S+/bin/omniad(?= run)", sys.executable, unit())
    path = tmp_path / "omniad@line3.service"
    path.write_text(text.replace("ProtectClock=", "ProtectClocks=") if broken else text)
    done = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True, timeout=30)
    assert ("Unknown key 'ProtectClocks'" in done.stderr) if broken else (done.returncode, done.stderr) == (0, "")
