"""GenICam cameras, against Aravis' own GigE Vision camera on loopback. It has one port: one test at a time."""

import os
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from cameras import ARAVIS, gige_port, read_until_lost, running, skip_without, wait_until

from omniad_edge.cameras.aravis_child import unwrap
from omniad_edge.cameras.sources import open_source
from omniad_edge.errors import CameraError, InputError

needs_aravis = skip_without(ARAVIS)
CONTROL_PORT = f":{3956:04X} "  # of every GigE Vision camera


def is_up() -> bool:
    return any(CONTROL_PORT in line.split(" rem")[0] for line in Path("/proc/net/udp").read_text().splitlines())


@contextmanager
def fake_camera(*options: str):
    with gige_port.taken():
        wait_until(lambda: not is_up())
        with running("arv-fake-gv-camera-0.8", "-i", "127.0.0.1", "-s", "LINE3", *options) as process:
            yield process


@pytest.fixture(autouse=True)
def alone():
    with gige_port.taken():
        yield


@pytest.fixture
def camera():
    with fake_camera() as process:
        wait_until(is_up)
        yield process


@needs_aravis
def test_free_running_until_it_dies(camera, opened):
    source = opened("gige://?timeout_s=1")  # the only one
    frames = [source.read(5) for _ in range(3)]
    assert all(frame.image.shape == (512, 512, 3) and frame.image.dtype == np.uint8 for frame in frames)
    assert frames[0].sequence < frames[1].sequence < frames[2].sequence
    assert frames[0].image.std() > 10 and np.ptp(frames[0].image, axis=2).max() == 0  # a gray ramp
    assert frames[2].exposure_us == 10_000
    assert frames[2].temperature_c is None  # this camera has no thermometer
    camera.kill()
    read_until_lost(source, 2, "lost: no frame for 1 s")


@needs_aravis
def test_software_trigger_gives_a_frame_for_each_and_none_without(camera, opened):
    features = "exposure_us=800&PixelFormat=RGB8&Width=128&Height=64"
    source = opened(f"gige://Aravis-LINE3?trigger=Software&{features}")
    assert source.software_trigger
    assert source.read(0.2) is None
    numbers = []
    for _ in range(5):
        source.trigger()
        frame = source.read(5)
        assert frame.image.shape == (64, 128, 3) and frame.exposure_us == 800
        numbers.append(frame.sequence)
    assert source.read(0.2) is None
    assert numbers == list(range(numbers[0], numbers[0] + 5))


@needs_aravis
def test_a_triggered_camera_dies_and_comes_back(opened):
    """Its silence says nothing; Aravis asks it five times, a second each, before it gives it up."""
    with fake_camera() as process:
        wait_until(is_up)
        source = opened("gige://Aravis-LINE3?trigger=Software&Width=64&Height=64")
        source.trigger()
        last = source.read(5)
        process.kill()
        read_until_lost(source, 8, "lost: it no longer answers")
    with pytest.raises(CameraError, match="not found; the cameras there: none"):
        source.open()
    with fake_camera():
        wait_until(is_up)
        source.open()
        source.trigger()
        assert source.read(5).sequence == last.sequence + 1


@needs_aravis
def test_a_camera_whose_reader_was_killed(camera, opened):
    """It still believes that it is being read, for the three seconds of its heartbeat, and still sends."""
    source = opened("gige://")
    source.read(5)
    with pytest.raises(CameraError, match="another program controls it"):
        open_source("gige://").open()
    os.kill(source._child.process.pid, signal.SIGKILL)
    read_until_lost(source, 2, "killed by signal 9")
    source.open()
    assert source.read(5).image.shape == (512, 512, 3)


@needs_aravis
@pytest.mark.slow
def test_numbers_go_on_where_the_cameras_start_again(camera, opened):
    """This camera begins at 65400, and after 65535 comes 1."""
    source = opened("gige://?buffer=64&Width=64&Height=64")
    numbers = [source.read(5).sequence]
    while numbers[-1] < 65540:
        numbers.append(source.read(5).sequence)
    assert numbers == list(range(numbers[0], numbers[-1] + 1))


@needs_aravis
def test_frames_that_lost_packets_are_gaps(opened):
    with fake_camera("-r", "4"):  # of a thousand packets; a frame has about 190
        wait_until(is_up)
        source = opened("gige://?buffer=64&PixelFormat=Mono8")
        numbers = [source.read(5).sequence]
        while len(numbers) == numbers[-1] - numbers[0] + 1:
            assert len(numbers) < 100  # half of the frames are lost
            numbers.append(source.read(5).sequence)
    assert numbers == sorted(set(numbers))


@needs_aravis
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("Widht=64", "no feature Widht; it has for example Width"),
        ("PixelFormat=Mono9", "PixelFormat=Mono9 is not possible.*expected one of .*Mono8"),
        ("trigger=Line77", "'Line77' not an entry; this camera can be triggered by .*Software"),
    ],
)
def test_settings_that_the_camera_does_not_take(camera, settings, reason):
    with pytest.raises(InputError, match=reason):
        open_source(f"gige://Aravis-LINE3?{settings}").open()


@pytest.mark.parametrize(
    ("ids", "numbers"),
    [
        ([7, 8, 10], [7, 8, 10]),
        ([65533, 65535, 1, 2, 4], [65533, 65535, 65536, 65537, 65539]),
        ([65534, 3], [65534, 65538]),
        ([2**40, 2**40 + 1], [2**40, 2**40 + 1]),
        ([500, 1, 2], [500, 501, 502]),  # began anew
        ([2**40, 1, 2], [2**40, 2**40 + 1, 2**40 + 2]),
    ],
)
def test_unwrap(ids, numbers):
    came = [None]
    for frame_id in ids:
        came.append(unwrap(frame_id, came[-1]))
    assert came[1:] == numbers
