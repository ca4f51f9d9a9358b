"""Cameras in a process of their own: what comes through, and every way for it to end."""

import os
import signal
import sys
import threading
import time

import cv2
import numpy as np
import pytest
from cameras import GSTREAMER, PYTHON, read_until_lost, skip_without, wait_until

from omniad_edge.cameras import camera_process
from omniad_edge.cameras.camera_process import CameraProcess
from omniad_edge.cameras.sources import open_source
from omniad_edge.errors import CameraError, InputError, MissingDependencyError

needs_gstreamer = skip_without(GSTREAMER)
ENDLESS = "gst:{}videotestsrc is-live=true pattern={} ! video/x-raw,width={},height={},framerate=50/1"


def process_of(source) -> int:
    return source._child.process.pid


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@needs_gstreamer
@pytest.mark.parametrize(
    ("pattern", "caps", "colour"),
    [
        ("red", "format=BGR", (0, 0, 255)),
        ("green", "format=RGB", (0, 255, 0)),
        ("blue", "format=BGRx", (255, 0, 0)),
        ("red", "format=NV12,colorimetry=bt601", (0, 0, 255)),
        ("green", "format=I420,colorimetry=bt601", (0, 255, 0)),
        ("blue", "format=NV12,colorimetry=bt709", (255, 0, 0)),
        ("red", "format=I420,colorimetry=bt709", (0, 0, 255)),
        ("white", "format=GRAY8", (235, 235, 235)),  # so videotestsrc paints white in gray
        ("white", "format=GRAY16_LE", (235, 235, 235)),
    ],
)
@pytest.mark.parametrize("size", [(64, 32), (38, 30)])  # the second has rows that GStreamer pads
def test_colours(opened, pattern, caps, colour, size):
    width, height = size
    raw = f"video/x-raw,{caps},width={width},height={height}"
    source = opened(f"gst:videotestsrc num-buffers=2 pattern={pattern} ! {raw}")
    frame = source.read(5)
    assert frame.image.shape == (height, width, 3)
    assert np.abs(frame.image.astype(int) - colour).max() <= 3


@needs_gstreamer
def test_odd_width(opened):
    source = opened("gst:videotestsrc pattern=red num-buffers=1 ! video/x-raw,format=I420,width=33,height=21")
    frame = source.read(5)
    assert frame.image.shape == (21, 33, 3)
    assert np.abs(frame.image.astype(int) - (0, 0, 255)).max() <= 3


@needs_gstreamer
def test_frames_have_numbers_and_times(opened):
    source = opened(ENDLESS.format("buffer=8 ", "ball", 64, 48))
    frames = [source.read(5) for _ in range(10)]
    assert [frame.sequence for frame in frames] == list(range(frames[0].sequence, frames[0].sequence + 10))
    took = frames[-1].captured_s - frames[0].captured_s
    assert 0.1 < took < 1.0  # nine periods of 20 ms
    assert 0 <= time.monotonic() - frames[-1].captured_s < 0.5
    assert frames[0].source == source.name and frames[0].exposure_us is None


@needs_gstreamer
def test_a_slow_reader_gets_the_newest_frame_and_sees_the_gap(opened):
    source = opened(ENDLESS.format("", "ball", 640, 480))
    first = source.read(5)
    wait_until(lambda: source._child.frames and source._child.frames[-1].sequence >= first.sequence + 20)
    asked_s = time.monotonic()
    frame = source.read(5)
    assert frame.sequence >= first.sequence + 20
    assert asked_s - frame.captured_s < 0.2


@needs_gstreamer
def test_no_frame_in_time(opened):
    source = opened(ENDLESS.format("", "ball", 64, 48))
    source.read(5)
    os.kill(process_of(source), signal.SIGSTOP)
    wait_until(lambda: source.read(0) is None)
    start = time.monotonic()
    assert source.read(0.2) is None
    assert 0.2 <= time.monotonic() - start < 0.5
    os.kill(process_of(source), signal.SIGCONT)
    assert source.read(5) is not None


@needs_gstreamer
def test_a_silent_camera_is_lost_in_time_and_can_be_opened_again(opened):
    source = opened(ENDLESS.format("timeout_s=0.5 ", "ball", 64, 48))
    first = source.read(5)
    stuck = process_of(source)
    os.kill(stuck, signal.SIGSTOP)
    last = read_until_lost(source, 1.5, r"lost: no frame for 0\.5 s") or first
    start = time.monotonic()
    source.close()
    assert time.monotonic() - start < 0.5
    assert is_gone(stuck)
    source.open()
    assert source.read(5).sequence == last.sequence + 1


@needs_gstreamer
@pytest.mark.parametrize("sign", [signal.SIGSEGV, signal.SIGKILL])
def test_a_crash_is_a_lost_camera(opened, sign):
    source = opened(ENDLESS.format("", "ball", 64, 48))
    source.read(5)
    os.kill(process_of(source), sign)
    read_until_lost(source, 2, f"its process ended .killed by signal {sign:d}")
    source.open()
    assert source.read(5) is not None


@needs_gstreamer
def test_the_end_of_a_pipeline_comes_after_its_frames(opened):
    source = opened("gst:buffer=8 videotestsrc num-buffers=4 ! video/x-raw,width=64,height=48")
    assert [source.read(5).sequence for _ in range(4)] == [0, 1, 2, 3]
    for _ in range(2):
        with pytest.raises(CameraError, match="the pipeline came to its end"):
            source.read(5)


@needs_gstreamer
def test_a_pipeline_that_ends_before_it_is_seen_to_be_open_gives_its_frames(opened, monkeypatch):
    wait = camera_process._Child.wait_until_open

    def look_late(child, timeout_s):
        with child.changed:
            assert child.changed.wait_for(lambda: child.failure, timeout_s)
        wait(child, timeout_s)

    monkeypatch.setattr(camera_process._Child, "wait_until_open", look_late)
    test_the_end_of_a_pipeline_comes_after_its_frames(opened)


@needs_gstreamer
def test_a_camera_whose_format_cannot_be_converted_is_lost(opened, monkeypatch):
    def refuse(data, pixel_format, width, height):
        raise InputError(f"pixel format: expected Mono8; got {pixel_format}")

    source = opened(ENDLESS.format("", "ball", 64, 48))
    monkeypatch.setattr(camera_process, "to_bgr", refuse)
    with pytest.raises(CameraError, match=r"videotestsrc.*: pixel format: expected Mono8; got"):
        source.read(5)


@needs_gstreamer
@pytest.mark.parametrize(
    ("pipeline", "error", "reason"),
    [
        ("videotestsrc ! nosuchelement", CameraError, '"nosuchelement".*sudo apt install .*gstreamer1.0-plug'),
        ("videotestsrc nosuch=3", InputError, 'no property "nosuch".*check it with gst-launch-1.0'),
        ("videotestsrc ! !", InputError, "cannot be built"),
        ("v4l2src device=/dev/video99", CameraError, "Cannot identify device '/dev/video99'"),
        ("filesrc location=/nowhere.mp4 ! decodebin", CameraError, 'No such file "/nowhere.mp4"'),
    ],
)
def test_pipelines_that_cannot_run(pipeline, error, reason):
    source = open_source(f"gst:{pipeline}")
    with pytest.raises(error, match=f"(?s){reason}"):
        source.open()
    source.close()


@needs_gstreamer
def test_close_ends_a_read_and_an_opening(opened):
    source = opened(ENDLESS.format("timeout_s=0 ", "ball", 64, 48))
    source.read(5)
    os.kill(process_of(source), signal.SIGSTOP)
    wait_until(lambda: source.read(0) is None)
    came = []
    reading = threading.Thread(target=lambda: came.append(source.read(30)))
    reading.start()
    start = time.monotonic()
    source.close()
    reading.join(5)
    assert came == [None] and time.monotonic() - start < 0.6
    source.close()  # may be called twice

    never = open_source("gst:videotestsrc is-live=true ! valve drop=true")
    failures = []

    def open_it():
        try:
            never.open()
            never.read(30)
        except CameraError as exc:
            failures.append(exc)

    opening = threading.Thread(target=open_it)
    opening.start()
    wait_until(lambda: never._child is not None)
    never.close()
    opening.join(2)
    assert not opening.is_alive()
    assert all("closed while" in str(failure) for failure in failures)


@needs_gstreamer
def test_a_parent_that_dies_takes_the_process_with_it(opened):
    source = opened(ENDLESS.format("", "ball", 64, 48))
    child = source._child
    child.process.stdin.close()  # as the system does
    child.process.wait(2)


def test_an_interpreter_without_the_library_names_the_packages(monkeypatch):
    """The tests' own interpreter plays the system's."""
    monkeypatch.setattr(camera_process, "interpreter", lambda backend: sys.executable)
    monkeypatch.setattr(camera_process.sys, "path", [p for p in sys.path if "dist-packages" not in p])
    for address, package in (("gst:videotestsrc", "gir1.2-gstreamer-1.0"), ("gige://", "gir1.2-aravis-0.8")):
        with pytest.raises(MissingDependencyError, match=f"sudo apt install .*{package}"):
            open_source(address).open()


def test_no_interpreter_at_all(monkeypatch):
    monkeypatch.setattr(camera_process, "interpreter", lambda backend: "/nowhere/python3")
    with pytest.raises(MissingDependencyError, match="sudo apt install python3-gi"):
        open_source("gige://").open()


def test_which_interpreter(monkeypatch):
    assert camera_process.interpreter("opencv") == sys.executable
    for found, python in ((None, PYTHON), ("a spec", sys.executable)):
        monkeypatch.setattr(camera_process.importlib.util, "find_spec", lambda name, found=found: found)
        assert camera_process.interpreter("aravis") == python


def test_opencv_reads_in_its_process(tmp_path):
    """A video file in place of a stream: no network and no program of Debian's is needed."""
    path = tmp_path / "stream.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 25, (64, 48))
    for value in range(5):
        writer.write(np.full((48, 64, 3), 40 * value, np.uint8))
    writer.release()
    # The first frame is used up for finding out what the stream is.
    settings = {"device": str(path), "transport": "tcp", "wanted": {}, "timeout_s": 5.0}
    source = CameraProcess("test", "opencv", settings, buffer=5)
    source.open()
    frames = [source.read(5) for _ in range(4)]
    assert [(frame.sequence, round(frame.image.mean() / 40)) for frame in frames] == [(n, n + 1) for n in range(4)]
    with pytest.raises(CameraError, match="it ended"):
        source.read(5)
    source.close()


def test_a_webcam_that_is_not_there():
    with pytest.raises(CameraError, match=r"v4l2:///dev/video99: cannot be opened"):
        open_source("v4l2:///dev/video99").open()


def test_only_a_camera_with_a_software_trigger_is_triggered():
    with pytest.raises(CameraError, match="takes frames by itself"):
        open_source("webcam:0").trigger()
    with pytest.raises(CameraError, match="is not open"):
        open_source("gige://?trigger=Software").trigger()
