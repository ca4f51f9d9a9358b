"""Stopping: from any state within a second, every part decided, whatever hangs or raises."""

import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from time import monotonic

import pytest
from line_parts import FakeCamera, FakeDetector
from records import PATIENCE_S, wait_until
from test_line import Keeper, Running

from omniad_edge.errors import InputError
from omniad_edge.line.line import Line
from omniad_edge.outputs.delivery import Output

STOP_S = 1.0


@pytest.fixture
def never():
    """An event that nobody sets before the test is over: waiting for it hangs."""
    event = threading.Event()
    yield event
    event.set()


def stop_takes(line: Line, thread: threading.Thread) -> float:
    start = monotonic()
    line.stop()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    return monotonic() - start


def in_thread(line: Line) -> threading.Thread:
    thread = threading.Thread(target=line.run, daemon=True)
    thread.start()
    return thread


def test_an_engine_that_hangs_at_the_first_call(never):
    entered = threading.Event()

    def detector(images, product=None):
        entered.set()
        never.wait()

    line = Line(detector, FakeCamera())
    thread = in_thread(line)
    assert entered.wait(PATIENCE_S)
    assert stop_takes(line, thread) < STOP_S


def test_cameras_that_hang_in_close(never):
    cameras = {str(n): FakeCamera() for n in range(4)}
    for camera in cameras.values():
        camera.close = never.wait
    line = Line(FakeDetector(), cameras)
    thread = in_thread(line)
    wait_until(lambda: all(camera.state == "running" for camera in line.snapshot().cameras))
    assert stop_takes(line, thread) < STOP_S


def test_outputs_that_hang(never):
    seen = [threading.Event() for _ in range(4)]

    def hang(event):
        return lambda verdict: (event.set(), never.wait())

    camera = FakeCamera()
    camera.push()
    line = Line(FakeDetector(), camera).add(*map(hang, seen))
    thread = in_thread(line)
    assert all(event.wait(PATIENCE_S) for event in seen)
    assert stop_takes(line, thread) < STOP_S


def test_a_stop_while_outputs_drain(never):
    """The sources have ended and the outputs may take their time, until somebody asks."""
    seen = threading.Event()
    camera = FakeCamera(live=False)
    camera.push()
    camera.end()
    line = Line(FakeDetector(), camera).add(lambda verdict: (seen.set(), never.wait()))
    thread = in_thread(line)
    assert seen.wait(PATIENCE_S)
    wait_until(lambda: line.snapshot().state == "stopped")
    assert thread.is_alive()
    assert stop_takes(line, thread) < STOP_S


def test_an_error_in_close_does_not_keep_parts_open():
    camera = FakeCamera()

    def close():
        raise ValueError("already closed")

    with Running(camera) as r:
        r.detector.gate.clear()
        camera.push()
        assert r.detector.entered.wait(PATIENCE_S)
        camera.close = close
        assert stop_takes(r.line, r.thread) < STOP_S
    assert [verdict.reason for verdict in r.keeper.of("verdict")] == ["line stopped"]
    assert "already closed" in r.keeper.wait_event("close failed").detail


class Trigger:
    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.stopped = error, False

    def start(self, trigger) -> None:
        if self.error:
            raise self.error

    def stop(self) -> None:
        self.stopped = True


def test_a_trigger_that_cannot_start_stops_the_line():
    camera, trigger = FakeCamera(), Trigger(OSError("no such broker"))
    line = Line(FakeDetector(), camera, trigger=trigger, deadline_ms=50)
    with pytest.raises(OSError, match="no such broker"):
        line.run()
    assert line.snapshot().state == "stopped" and trigger.stopped
    wait_until(lambda: not any(thread.is_alive() for thread in line.threads))


def test_a_thread_that_ends_by_system_exit_stops_the_line():
    camera = FakeCamera()
    camera.read = lambda timeout_s: sys.exit(3)
    with pytest.raises(SystemExit):
        Line(FakeDetector(), camera).run()


def test_a_loop_that_is_slower_than_the_line_ends_at_the_stop():
    camera = FakeCamera(software_trigger=True)
    line = Line(FakeDetector(), camera, trigger=0.001, deadline_ms=1000)
    seen = []
    for verdict in line:
        seen.append(verdict)
        if len(seen) == 20:
            wait_until(lambda: len(line.fetched) > 5)
            line.stop()
    after = len(seen) - 20
    assert after <= 110 and line.snapshot().state == "stopped"
    assert len(seen) == sum(line.snapshot().decisions.values())


def test_what_the_stop_decides_reaches_the_loop():
    camera = FakeCamera()
    line = Line(FakeDetector(), camera, trigger="call", deadline_ms=60_000, on_timeout="no_verdict")
    thread = threading.Thread(target=lambda: (line_runs(line), line.trigger("A"), line.stop()))
    thread.start()
    assert [(v.part_id, v.decision, v.reason) for v in line] == [("A", "no_verdict", "line stopped")]
    thread.join(PATIENCE_S)


def line_runs(line: Line) -> None:
    wait_until(lambda: all(camera.state == "running" for camera in line.snapshot().cameras))


def test_a_second_loop_is_refused_and_does_not_stop_the_first():
    with Running() as r:
        with pytest.raises(InputError, match="started before"):
            next(iter(r.line))
        r.camera.push()
        assert r.keeper.wait(1)[0].decision == "accept"


def test_a_second_interrupt_ends_a_loop_that_does_not_return():
    code = """
        import sys, time
        sys.path.insert(0, sys.argv[1])
        from line_parts import FakeCamera, FakeDetector
        from omniad_edge.line.line import Line
        camera = FakeCamera()
        camera.push()
        for verdict in Line(FakeDetector(), camera):
            print("busy", flush=True)
            time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(Path(__file__).parent)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "busy\n"
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        try:
            process.wait(0.5)
        except subprocess.TimeoutExpired:
            continue
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode and "KeyboardInterrupt" in err


def test_frames_that_come_after_the_stop_are_not_counted():
    camera, keeper = FakeCamera(), Keeper()
    line = Line(FakeDetector(), camera).add(keeper)
    thread = in_thread(line)
    line_runs(line)
    stop_takes(line, thread)
    camera.push()
    line.take(camera.read(1.0), "", 0)
    snapshot = line.snapshot()
    assert snapshot.counts.captured == 0 and snapshot.triggers == 0


class Dead(Output):
    name = "dead"

    def open(self) -> None:
        raise OSError("no such disk")


def test_an_output_that_never_opens_does_not_hinder_the_stop():
    camera = FakeCamera()
    line = Line(FakeDetector(), camera).add(Dead())
    thread = in_thread(line)
    line_runs(line)
    assert stop_takes(line, thread) < STOP_S
