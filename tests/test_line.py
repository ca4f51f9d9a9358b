"""A whole line with threads: every trigger one verdict in time, whatever camera, engine and outputs do."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import weakref
from dataclasses import replace
from time import monotonic, sleep

import cv2
import numpy as np
import pytest
from line_parts import FakeCamera, FakeDetector
from records import PATIENCE_S, check, wait_until

from omniad_edge.errors import CameraError, EngineLostError, InputError, OutputError
from omniad_edge.frame import Frame
from omniad_edge.line import clock
from omniad_edge.line.line import WORKERS, Line
from omniad_edge.line.parts import OPEN_FRAMES, QUEUE_FRAMES
from omniad_edge.outputs.delivery import Output


class Keeper(Output):
    """Keeps all records, and can be waited for."""

    name = "keeper"

    def __init__(self) -> None:
        self.records: list = []
        self.changed = threading.Condition()

    def write(self, records: list) -> None:
        with self.changed:
            self.records += records
            self.changed.notify_all()

    def of(self, kind: str) -> list:
        return [record for record in self.records if record.kind == kind]

    def wait(self, n: int, kind: str = "verdict") -> list:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.of(kind)) >= n, PATIENCE_S), self.records
            return self.of(kind)

    def wait_event(self, event: str) -> object:
        def found():
            return [record for record in self.of("status") if record.event == event]

        with self.changed:
            assert self.changed.wait_for(found, PATIENCE_S), (event, self.of("status"))
            return found()[0]


class Running:
    """A line in a thread of its own."""

    def __init__(self, source=None, detector=None, **options) -> None:
        self.camera = source or FakeCamera()
        self.detector = detector or FakeDetector()
        self.keeper = Keeper()
        self.line = Line(self.detector, self.camera, **options).add(self.keeper)
        self.error = None
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self.line.run()
        except Exception as exc:
            self.error = exc

    def __enter__(self) -> "Running":
        self.thread.start()
        self.keeper.wait_event("camera runs")
        return self

    def __exit__(self, *exc) -> None:
        self.detector.gate.set()
        self.line.stop()
        self.join()

    def join(self) -> None:
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()
        snapshot = self.line.snapshot()
        counts = snapshot.counts
        fates = counts.inspected + counts.dropped + counts.late + counts.failed + counts.waiting
        assert counts.captured == fates and counts.waiting == 0
        verdicts = self.keeper.of("verdict")
        assert len(verdicts) == sum(snapshot.decisions.values()) == snapshot.triggers
        assert len({record.to_dict()["id"] for record in self.keeper.records}) == len(self.keeper.records)
        for record in self.keeper.records:
            check(record.to_dict())


def test_a_list_of_frames_gives_a_verdict_each_and_ends():
    frames = [np.full((8, 8, 3), value, np.uint8) for value in (50, 120, 60)]
    keeper = Keeper()
    counts = Line(FakeDetector(), frames).add(keeper).run()
    assert [verdict.decision for verdict in keeper.of("verdict")] == ["accept", "reject", "accept"]
    assert counts.captured == counts.inspected == 3
    verdict = keeper.of("verdict")[1]
    assert verdict.pred_score == pytest.approx(0.8) and verdict.threshold == 0.5 and verdict.product == "gear"
    assert verdict.frames[0].image.shape == (8, 8, 3) and 0 <= verdict.age_ms <= verdict.latency_ms < 1e4


def test_iterating_gives_every_verdict_at_the_pace_of_the_loop():
    frames = (np.full((8, 8, 3), 50 + n, np.uint8) for n in range(100))
    line = Line(FakeDetector(), frames)
    seen = []
    for verdict in line:
        seen.append(verdict)
        assert line.snapshot().counts.captured - len(seen) <= OPEN_FRAMES + 2  # the source waits for a slow loop
    assert len(seen) == 100 and line.snapshot().state == "stopped"


def test_pictures_are_freed_without_the_garbage_collector():
    frames = (np.full((8, 8, 3), 50 + n, np.uint8) for n in range(20))
    gc.collect()
    gc.disable()
    try:
        alive = []
        for verdict in Line(FakeDetector(), frames):
            alive.append(weakref.ref(verdict.frames[0].image))
        del verdict
        assert sum(reference() is not None for reference in alive) <= 2  # one may be in a thread's last frame
    finally:
        gc.enable()


def test_leaving_the_loop_stops_the_line():
    camera = FakeCamera()
    for _ in range(5):
        camera.push()
    line = Line(FakeDetector(), camera)
    for _ in line:
        break
    assert line.snapshot().state == "stopped" and line.snapshot().counts.waiting == 0
    with pytest.raises(InputError, match="started before"):
        line.run()


def test_a_callback_gets_verdicts_and_may_fail():
    seen, keeper = [], Keeper()

    def callback(verdict):
        seen.append(verdict.part_id)
        if len(seen) == 2:
            raise ValueError("no such coil")

    frames = [np.full((8, 8, 3), 50, np.uint8)] * 4
    Line(FakeDetector(), frames).add(callback, keeper).run()
    assert len(seen) == 4
    assert "no such coil" in keeper.wait_event("output error").detail


def test_by_choice_a_failing_callback_stops_the_line():
    def callback(verdict):
        raise ValueError("no such coil")

    camera, keeper = FakeCamera(), Keeper()
    camera.push()
    with pytest.raises(OutputError, match="no such coil"):
        Line(FakeDetector(), camera, on_error="stop").add(callback, keeper).run()
    assert len(keeper.of("verdict")) == 1


def test_one_trigger_one_verdict():
    with Running(trigger="call", deadline_ms=5000) as r:
        for n in range(5):
            assert r.line.trigger(f"part {n}") == f"part {n}"
            r.camera.push(120 if n == 3 else 50)
            r.keeper.wait(n + 1)
        verdicts = r.keeper.of("verdict")
        assert [v.part_id for v in verdicts] == [f"part {n}" for n in range(5)]
        assert [v.decision for v in verdicts] == ["accept"] * 3 + ["reject", "accept"]


@pytest.mark.parametrize("on_timeout", ["reject", "no_verdict"])
def test_no_frame_gives_the_safe_verdict_in_time(on_timeout):
    with Running(trigger="call", deadline_ms=80, on_timeout=on_timeout) as r:
        r.line.trigger("1")
        (verdict,) = r.keeper.wait(1)
    assert (verdict.decision, verdict.reason) == (on_timeout, "deadline: no frame from cam")
    assert verdict.latency_ms > 70 and verdict.results == () and verdict.age_ms is None


def test_a_hanging_engine_gives_safe_verdicts_and_late_records():
    with Running(trigger="call", deadline_ms=80) as r:
        r.detector.gate.clear()
        r.line.trigger("1")
        r.camera.push(50)
        (verdict,) = r.keeper.wait(1)
        assert (verdict.decision, verdict.reason) == ("reject", "deadline: not inspected in time")
        r.detector.gate.set()
        (late,) = r.keeper.wait(1, "late")
        assert late.part_id == "1" and late.late_ms > 0 and late.result.pred_label == "good"
        assert r.line.snapshot().counts.late == 1


def test_a_hanging_engine_does_not_hinder_the_stop():
    r = Running()
    r.detector.gate.clear()
    with_hang = r.__enter__()
    r.camera.push()
    assert r.detector.entered.wait(PATIENCE_S)
    start = monotonic()
    with_hang.line.stop()
    r.join()
    assert monotonic() - start < 1.0
    (verdict,) = r.keeper.of("verdict")
    assert (verdict.decision, verdict.reason) == ("reject", "line stopped")
    r.detector.gate.set()


def test_a_software_trigger_takes_one_frame_a_part():
    with Running(FakeCamera(software_trigger=True), trigger="call", deadline_ms=5000) as r:
        for n in range(10):
            r.line.trigger(str(n))
        verdicts = r.keeper.wait(10)
    assert [v.part_id for v in verdicts] == [str(n) for n in range(10)]
    assert [v.frames[0].sequence for v in verdicts] == list(range(10)) and r.camera.triggers == 10


def test_after_an_unanswered_trigger_the_camera_is_connected_anew():
    """Else the frame, when it comes at last, would be taken for the next part's."""
    camera = FakeCamera(software_trigger=True, answers=False)
    with Running(camera, trigger="call", deadline_ms=60) as r:
        r.line.trigger("1")
        (verdict,) = r.keeper.wait(1)
        assert verdict.reason == "deadline: no frame from cam"
        assert "a trigger gave no frame in time" in r.keeper.wait_event("camera lost").detail
        r.keeper.wait_event("camera back")
        assert camera.opened == 2


def test_a_lost_camera_comes_back_and_parts_meanwhile_are_decided_at_once():
    with Running(trigger="call", deadline_ms=60_000) as r:
        r.line.trigger("open")
        r.camera.refuses = 2
        r.camera.lose()
        (first,) = r.keeper.wait(1)
        assert (first.part_id, first.reason) == ("open", "camera lost: cam")
        r.line.trigger("meanwhile")
        assert r.keeper.wait(2)[1].reason == "camera lost: cam"
        r.keeper.wait_event("camera back")
        r.line.trigger("after")
        r.camera.push()
        assert r.keeper.wait(3)[2].decision == "accept"
        assert r.line.snapshot().cameras[0].reconnects == 1


def test_frames_the_camera_lost_get_a_verdict():
    with Running() as r:
        r.camera.push()
        r.camera.push(lost=2)
        verdicts = r.keeper.wait(4)
    assert [(v.part_id, v.reason) for v in verdicts] == [
        ("cam-0", ""),
        ("cam-1", "frame lost by the camera or on its way here"),
        ("cam-2", "frame lost by the camera or on its way here"),
        ("cam-3", ""),
    ]


def test_a_faulty_frame_is_not_scored():
    with Running() as r:
        r.camera.push()
        r.camera.queue.put(Frame(np.zeros((480, 640, 3), np.uint8), 1, 0.0, ""))
        first, second = r.keeper.wait(2)
        assert first.decision == "accept"
        assert (second.decision, second.reason, second.results) == ("reject", "camera fault: black frame", ())
        assert r.keeper.wait_event("camera fault").detail == "black frame"
        assert r.line.snapshot().cameras[0].fault == "black frame"


def test_an_engine_error_costs_its_part_alone():
    with Running() as r:
        r.detector.gate.clear()
        r.camera.push(50)
        assert r.detector.entered.wait(PATIENCE_S)
        for value in (13, 50, 120):
            r.camera.push(value)
        r.detector.gate.set()
        verdicts = r.keeper.wait(4)
    assert [v.decision for v in verdicts] == ["accept", "reject", "accept", "reject"]
    assert verdicts[1].reason == "engine failed: division by zero"


def test_a_series_of_engine_errors_is_told_once_and_so_is_its_end():
    with Running() as r:
        for value in (13, 13, 13, 50):
            r.camera.push(value)
        r.keeper.wait(4)
    events = [record.event for record in r.keeper.of("status") if record.event.startswith("engine")]
    assert events == ["engine failed", "engine back"]


def test_an_engine_lost_for_good_stops_the_line_in_the_safe_state():
    class Lost(FakeDetector):
        def __call__(self, images, product=None):
            if images[0].any():
                raise EngineLostError("the GPU fell off the bus; start the process anew")
            return super().__call__(images, product)

    r = Running(detector=Lost())
    r.__enter__()
    r.camera.push(50)
    r.join()
    assert isinstance(r.error, EngineLostError)
    assert [v.decision for v in r.keeper.of("verdict")] == ["reject"]


@pytest.mark.parametrize(
    ("one_s", "eight_s", "deadline_ms", "batch"),
    [
        (0.004, 0.008, None, 8),  # an engine with a graph for eight, which makes two of one and one of these
        (0.004, 0.008, 10, 1),  # where no part could wait for that
        (0.004, 0.032, None, 1),
        (0.04, 0.04, None, 1),  # too slow to be a GPU; not even tried
    ],
)
def test_images_go_together_where_that_is_quicker(one_s, eight_s, deadline_ms, batch):
    class Timed(FakeDetector):
        def __call__(self, images, product=None):
            sleep(eight_s if len(images) == 8 else one_s * len(images))
            return super().__call__(images, product)

    with Running(detector=Timed(), deadline_ms=deadline_ms) as r:
        assert f"calls of up to {batch}" in r.keeper.wait_event("line started").detail


def test_a_film_is_not_read_far_ahead_of_the_engine():
    class Slow(FakeDetector):
        def __call__(self, images, product=None):
            sleep(0.04)  # so that it takes one image a call
            return super().__call__(images, product)

    frames = [np.full((8, 8, 3), 50, np.uint8)] * 12
    detector = Slow()
    detector.gate.clear()
    with Running(frames, detector, deadline_ms=60_000) as r:
        taken = WORKERS + 1  # and one that waits
        wait_until(lambda: r.line.snapshot().counts.captured == taken)
        sleep(0.1)
        assert r.line.snapshot().counts.captured == taken
        detector.gate.set()
        assert {verdict.reason for verdict in r.keeper.wait(12)} == {""}


def test_by_choice_an_engine_error_stops_the_line_in_the_safe_state():
    r = Running(on_error="stop", on_timeout="no_verdict")
    r.__enter__()
    r.camera.push(13)
    r.join()
    assert isinstance(r.error, ZeroDivisionError)
    assert [v.decision for v in r.keeper.of("verdict")] == ["no_verdict"]


def test_views_of_two_cameras_make_one_verdict():
    cameras = {"top": FakeCamera(), "side": FakeCamera()}
    r = Running(cameras, trigger="call", deadline_ms=5000, views=2)
    with r:
        wait_until(lambda: all(c.state == "running" for c in r.line.snapshot().cameras))
        r.line.trigger("1")
        for value in (50, 120):
            for camera in cameras.values():
                camera.push(value)
        (verdict,) = r.keeper.wait(1)
    assert verdict.decision == "reject" and len(verdict.results) == 4
    assert sorted(frame.source for frame in verdict.frames) == ["side", "side", "top", "top"]


def test_the_product_may_change_while_the_line_runs():
    with Running(product="gear") as r:
        r.camera.push()
        r.keeper.wait(1)
        r.line.product = "cap"
        r.camera.push()
        assert [v.product for v in r.keeper.wait(2)] == ["gear", "cap"]
        with pytest.raises(InputError, match="expected one of gear, cap; got 'nut'"):
            r.line.product = "nut"


def test_latest_inspects_the_newest():
    with Running(policy="latest") as r:
        r.detector.gate.clear()
        r.camera.push()
        assert r.detector.entered.wait(PATIENCE_S)
        for _ in range(30):
            r.camera.push()
        wait_until(lambda: r.line.snapshot().counts.captured == 31)
        r.detector.gate.set()
        wait_until(lambda: r.line.snapshot().counts.waiting == 0)
        assert r.line.snapshot().counts.dropped >= 25
        assert r.keeper.of("verdict")[-1].frames[0].sequence == 30


def test_intervals_trigger_parts():
    camera = FakeCamera(software_trigger=True)
    with Running(camera, trigger=0.01, deadline_ms=1000) as r:
        verdicts = r.keeper.wait(5)
    assert [v.part_id for v in verdicts[:5]] == ["1", "2", "3", "4", "5"]


def test_a_broken_file_costs_its_part_alone(tmp_path):
    for n in range(3):
        cv2.imwrite(str(tmp_path / f"{n}.png"), np.full((8, 8, 3), 50, np.uint8))
    (tmp_path / "1.png").write_text("not a picture")
    keeper = Keeper()
    counts = Line(FakeDetector(), tmp_path).add(keeper).run()
    first, second, third = keeper.of("verdict")
    assert (first.part_id, first.decision, third.decision) == (str(tmp_path / "0.png"), "accept", "accept")
    assert second.decision == "reject" and "unreadable frame" in second.reason and "1.png" in second.reason
    assert second.part_id == f"{tmp_path}-unreadable-2"
    assert (counts.captured, counts.inspected, counts.failed) == (3, 2, 1)
    with Running(tmp_path, trigger="call", deadline_ms=5000) as r:
        for n in range(3):
            r.line.trigger(str(n))
        assert [verdict.decision for verdict in r.keeper.wait(3)] == ["accept", "reject", "accept"]


def test_a_list_gives_a_frame_a_trigger():
    frames = [np.full((8, 8, 3), 50 + n, np.uint8) for n in range(3)]
    with Running(frames, trigger="call", deadline_ms=5000) as r:
        r.line.trigger("1")
        (verdict,) = r.keeper.wait(1)
        assert verdict.frames[0].sequence == 0
        assert r.line.snapshot().counts.captured == 1


@pytest.mark.parametrize(
    "options, words",
    [
        ({"policy": "all"}, "policy: expected 'every' or 'latest'; got 'all'"),
        ({"on_timeout": "accept"}, "on_timeout: expected 'reject' or 'no_verdict'"),
        ({"trigger": "call"}, "deadline_ms: needed with a trigger"),
        ({"trigger": "cal", "deadline_ms": 5}, "trigger: expected"),
        ({"trigger": 0, "deadline_ms": 5}, "trigger: expected"),
        ({"deadline_ms": 0}, "deadline_ms: expected a number above 0"),
        ({"deadline_ms": "200"}, "deadline_ms: expected a number above 0, got '200'"),
        ({"deadline_ms": float("inf")}, "deadline_ms: expected a number above 0"),
        ({"trigger": True, "deadline_ms": 5}, "trigger: expected"),
        ({"views": 2}, "frames make a part only with a trigger"),
        ({"views": 0, "trigger": "call", "deadline_ms": 5}, "views: expected a whole number from 1 on"),
        ({"rule": "most"}, "rule: expected"),
        ({"product": "nut"}, "product: expected one of gear, cap"),
    ],
)
def test_what_does_not_fit_together_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        Line(FakeDetector(), FakeCamera(), **options)


def test_a_bundle_s_path_is_no_detector():
    with pytest.raises(InputError, match=r"detector: expected a Detector, such as Detector\('line3.omniad'\)"):
        Line("line3.omniad", FakeCamera())


def test_a_software_trigger_without_triggers_is_refused():
    with pytest.raises(InputError, match="waits for a software trigger"):
        Line(FakeDetector(), FakeCamera(software_trigger=True))


def test_triggers_need_a_running_line_that_takes_them():
    line = Line(FakeDetector(), FakeCamera(), trigger="call", deadline_ms=5)
    with pytest.raises(InputError, match="line is starting"):
        line.trigger()
    with Running() as r, pytest.raises(InputError, match="every frame is a part"):
        r.line.trigger()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_stop_the_line_with_every_part_decided(number):
    code = """
        import sys
        sys.path.insert(0, sys.argv[1])
        from line_parts import FakeCamera, FakeDetector
        from omniad_edge.line.line import WORKERS, Line
        camera, detector = FakeCamera(), FakeDetector()
        line = Line(detector, camera)
        line.add(lambda verdict: print(verdict.part_id, verdict.decision, verdict.reason, flush=True))
        camera.push()
        counts = line.run()
        print(counts.captured, counts.inspected)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), os.path.dirname(__file__)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "cam-0 accept \n"
    start = monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out, err) == (0, "1 1\n", "")
    assert monotonic() - start < 1.5  # with the end of Python; the line itself under one


def test_a_frame_that_comes_too_late_for_its_part_is_not_the_next_ones():
    camera = FakeCamera(software_trigger=True, answers=False)
    with Running(camera, trigger="call", deadline_ms=60) as r:
        r.line.trigger("1")
        wait_until(lambda: camera.triggers == 1)
        r.keeper.wait(1)  # its deadline has come; the camera is still being read
        camera.push(120)
        wait_until(lambda: r.line.snapshot().counts.dropped == 1)
        camera.answers = True
        r.line.trigger("2")
        second = r.keeper.wait(2)[1]
        assert (second.part_id, second.decision) == ("2", "accept")


def test_an_error_while_keeping_warm_is_reported_and_the_line_goes_on():
    with Running() as r:
        call, failed = r.detector.__class__.__call__, threading.Event()

        def fail_once(self, images, product=None):
            if not failed.is_set() and not images[0].any():
                failed.set()
                raise RuntimeError("the driver was reset")
            return call(self, images, product)

        r.detector.__class__ = type("Failing", (FakeDetector,), {"__call__": fail_once})
        assert "the driver was reset" in r.keeper.wait_event("engine failed").detail
        r.camera.push()
        assert r.keeper.wait(1)[0].decision == "accept"


def test_a_callback_that_fails_like_a_network_is_not_called_again_for_the_same_part():
    seen = []

    def act(verdict):
        seen.append(verdict.part_id)
        raise ConnectionResetError("the PLC hung up")

    frames = [np.full((8, 8, 3), 50, np.uint8)] * 3
    keeper = Keeper()
    Line(FakeDetector(), frames).add(act, keeper).run()
    assert len(seen) == len(set(seen)) == 3
    assert "the PLC hung up" in keeper.wait_event("output error").detail


def test_credentials_do_not_reach_records():
    def act(verdict):
        raise ValueError("http://admin:hunter2@plc/coil answered 500")

    def frames():
        yield np.full((8, 8, 3), 50, np.uint8)
        keeper.wait_event("output error")  # outputs that close hear of nothing more

    keeper = Keeper()
    Line(FakeDetector(), frames()).add(act, keeper).run()
    assert "plc/coil" in keeper.wait_event("output error").detail
    assert not any("hunter2" in str(record.to_dict()) for record in keeper.records)


def test_an_old_frame_of_another_camera_keeps_its_own_deadline(monkeypatch):
    monkeypatch.setattr(clock, "TICK_S", 60.0)  # nobody looks by chance
    cameras = {"fast": FakeCamera(), "slow": FakeCamera()}
    r = Running(cameras, deadline_ms=15_000)
    with r:
        wait_until(lambda: all(c.state == "running" for c in r.line.snapshot().cameras))
        r.detector.gate.clear()
        cameras["fast"].push()
        assert r.detector.entered.wait(PATIENCE_S)
        r.line.take(replace(cameras["slow"].make(), captured_s=monotonic() - 14.9), "", 0)
        (first,) = r.keeper.wait(1)
        assert first.frames[0].source == "slow" and first.latency_ms < 20_000  # not at the other's, at 29,900
        r.detector.gate.set()


def test_a_film_that_breaks_off_is_an_error_after_the_last_verdict_and_not_begun_again():
    film, whole = FakeCamera("film", live=False), FakeCamera("whole", live=False)
    for _ in range(3):
        film.push()
    film.lose()
    keeper = Keeper()
    line = Line(FakeDetector(), {"film": film, "whole": whole}).add(keeper)

    def go_on():
        wait_until(lambda: line.snapshot().cameras[0].state == "ended")
        whole.push()
        whole.end()

    thread = threading.Thread(target=go_on)
    thread.start()
    with pytest.raises(CameraError, match="film: connection reset"):
        line.run()
    thread.join()
    assert [v.decision for v in keeper.of("verdict")] == ["accept"] * 4 and film.opened == 1
    told = [status.event for status in keeper.of("status") if status.who == "film"]
    assert told == ["camera runs", "camera lost", "camera ended"]


def test_a_watched_folders_broken_file_gets_one_verdict(tmp_path):
    class Folder(FakeCamera):
        def read(self, timeout_s):
            frame = super().read(timeout_s)
            if frame is not None and frame.sequence == 1:
                raise InputError("1.png: damaged")
            return frame

    with Running(Folder()) as r:
        for _ in range(3):
            r.camera.push()
        verdicts = r.keeper.wait(3)
        assert [v.reason for v in verdicts] == ["", "unreadable frame: 1.png: damaged", ""]
        camera = r.line.snapshot().cameras[0]
        assert (camera.counts.captured, camera.counts.failed, camera.lost_frames) == (3, 1, 0)


@pytest.mark.parametrize(
    "address, policy, buffer",
    [
        ("webcam:0", "every", QUEUE_FRAMES),
        ("webcam:0?buffer=1", "every", 1),
        ("webcam:0", "latest", None),
    ],
)
def test_frames_that_wait_where_each_is_inspected(address, policy, buffer):
    line = Line(FakeDetector(), address, policy=policy)
    assert line.sources["webcam:0" if buffer != 1 else address].buffer == buffer


def test_an_unknown_product_is_refused_where_it_is_named():
    with (
        Running(trigger="call", deadline_ms=1000) as r,
        pytest.raises(InputError, match="expected one of gear, cap"),
    ):
        r.line.trigger("1", product="nut")


def test_opening_a_camera_is_no_sign_of_a_hanging_line():
    camera, opening, go = FakeCamera(), threading.Event(), threading.Event()
    plain = camera.open

    def slow():
        opening.set()
        go.wait(PATIENCE_S)
        plain()

    camera.open = slow
    line = Line(FakeDetector(), {"slow": camera, "quick": FakeCamera()})
    thread = threading.Thread(target=line.run)
    thread.start()
    assert opening.wait(PATIENCE_S)
    wait_until(lambda: line.snapshot().state == "running" and "camera slow" not in line.beats)
    go.set()
    wait_until(lambda: "camera slow" in line.beats)
    line.stop()
    thread.join(PATIENCE_S)
