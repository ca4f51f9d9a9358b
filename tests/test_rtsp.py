"""Network cameras, against a real RTSP server on loopback."""

import signal
import socket
import time

import numpy as np
import pytest
from cameras import RTSP, free_port, read_until_lost, rtsp_server, skip_without, wait_until

from omniad_edge.cameras.sources import open_source
from omniad_edge.errors import CameraError

pytestmark = skip_without(RTSP)
RED, BLUE = (0, 0, 255), (255, 0, 0)
BLUE_PATTERN = 6  # videotestsrc's number for it
CLOSE = 12  # of 255: H.264 is lossy


def is_of(frame, colour) -> bool:
    return np.abs(frame.image.astype(int) - colour).max() <= CLOSE


def address(port: int, settings: str = "timeout_s=2") -> str:
    return f"rtsp://line:s3cret@127.0.0.1:{port}/cam?{settings}"


@pytest.fixture
def closing():
    sources = []
    yield lambda address: sources.append(open_source(address)) or sources[-1]
    for source in sources:
        source.close()


def test_camera_dies_and_comes_back_with_another_size(closing):
    port = free_port()
    source = closing(address(port))
    with rtsp_server(port, 320, 240, "red") as server:
        source.open()
        frames = [source.read(5) for _ in range(3)]
        assert all(frame.image.shape == (240, 320, 3) and is_of(frame, RED) for frame in frames)
        assert frames[0].sequence < frames[1].sequence < frames[2].sequence
        server.kill()
        last = read_until_lost(source, 3, "lost") or frames[-1]
        assert is_of(last, RED)
    start = time.monotonic()
    with pytest.raises(CameraError, match=r"(?s)cannot be opened.*Connection refused"):
        source.open()
    assert time.monotonic() - start < 3
    with rtsp_server(port, 176, 144, "blue"):
        source.open()
        frames = [source.read(5) for _ in range(3)]
    # Neither an old frame, nor a black one, nor one of a decoder that began in the middle.
    assert all(frame.image.shape == (144, 176, 3) and is_of(frame, BLUE) for frame in frames)
    assert frames[0].sequence > last.sequence


def test_a_slow_reader_does_not_fall_behind(closing):
    port = free_port()
    source = closing(address(port))
    with rtsp_server(port, 640, 480, "red") as server:
        source.open()
        first = source.read(5)
        wait_until(lambda: source._child.frames and source._child.frames[-1].sequence > first.sequence + 25)
        assert is_of(source.read(5), RED)
        changed_s = time.monotonic()
        print(BLUE_PATTERN, file=server.stdin, flush=True)
        while not is_of(frame := source.read(5), BLUE):
            assert time.monotonic() - changed_s < 2
        # One frame's period and what coding takes, however many frames nobody has read.
        assert frame.captured_s - changed_s < 0.5


def test_a_frozen_server_is_lost_in_time(closing):
    """It no longer sends, but its connection stands."""
    port = free_port()
    source = closing(address(port, "timeout_s=1"))
    with rtsp_server(port, 320, 240, "red") as server:
        source.open()
        source.read(5)
        server.send_signal(signal.SIGSTOP)
        read_until_lost(source, 2, "lost")
        start = time.monotonic()
        source.close()
        assert time.monotonic() - start < 0.5


def test_a_server_that_accepts_and_says_nothing(closing):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        source = closing(f"rtsp://127.0.0.1:{silent.getsockname()[1]}/cam?timeout_s=1")
        start = time.monotonic()
        with pytest.raises(CameraError, match="cannot be opened"):
            source.open()
        assert time.monotonic() - start < 3


def test_a_wrong_password_is_told_and_not_shown(closing):
    port = free_port()
    with rtsp_server(port, 320, 240, "red"):
        source = closing(f"rtsp://line:wr0ng@127.0.0.1:{port}/cam")
        with pytest.raises(CameraError, match="401") as caught:
            source.open()
    assert "wr0ng" not in str(caught.value)


def test_udp(closing):
    port = free_port()
    with rtsp_server(port, 320, 240, "red"):
        source = closing(address(port, "transport=udp"))
        source.open()
        assert is_of(source.read(5), RED)
