"""open_source: which address means what, and what is said of those that mean nothing."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from omniad_edge.cameras.array_source import ArraySource
from omniad_edge.cameras.folder_source import FolderSource, WatchedFolder
from omniad_edge.cameras.sources import FORMS, csi_pipeline, open_source
from omniad_edge.cameras.video_file import VideoFile
from omniad_edge.errors import CameraError, InputError
from omniad_edge.frame import EndOfSource


def read_all(source):
    source.open()
    frames = []
    while True:
        try:
            frames.append(source.read(1.0))
        except EndOfSource:
            return frames


def settings(address, backend):
    source = open_source(address)
    assert source.live and source.backend == backend
    return source.settings


@pytest.mark.parametrize(
    ("address", "device"),
    [("webcam:2", 2), (2, 2), ("2", 2), ("v4l2:///dev/video3", "/dev/video3"), ("webcam:0?buffer=4", 0)],
)
def test_webcam(address, device):
    assert settings(address, "opencv")["device"] == device


def test_waiting():
    default, asked = open_source("webcam:0"), open_source("webcam:0?buffer=4&timeout_s=0.5")
    assert (default.buffer, default.silence_s) == (None, 5.0)  # the newest frame alone, or what a line sets
    assert (asked.buffer, asked.silence_s) == (4, 0.5)
    assert open_source("gst:timeout_s=0 buffer=3 v4l2src ! identity").settings["pipeline"] == "v4l2src ! identity"


def test_webcam_size():
    came = settings("webcam:0?width=1280&height=720&fps=30&fourcc=MJPG", "opencv")
    assert came["wanted"] == {"width": 1280, "height": 720, "fps": 30}
    assert came["fourcc"] == "MJPG"


def test_stream_keeps_what_is_the_cameras():
    came = settings("rtsp://u:p@h:554/s?channel=1&transport=udp&subtype=0&buffer=2", "opencv")
    assert came["device"] == "rtsp://u:p@h:554/s?channel=1&subtype=0"
    assert came["transport"] == "udp"
    assert settings("rtsps://h/s", "opencv")["transport"] == "tcp"


def test_genicam():
    address = "gige://Basler-22334455?trigger=software&exposure_us=800.5&Gain=2&PixelFormat=BayerRG12p"
    source = open_source(address)
    assert source.software_trigger and source.silence_s == 0 and source.buffer == 8
    assert source.settings == {
        "interface": "GigEVision",
        "camera_id": "Basler-22334455",
        "trigger": "Software",
        "exposure_us": 800.5,
        "features": {"Gain": "2", "PixelFormat": "BayerRG12p"},
    }
    line, free = open_source("usb3://?trigger=Line1"), open_source("gige://")
    assert (line.settings["interface"], line.settings["trigger"]) == ("USB3Vision", "Line1")
    assert not line.software_trigger and line.silence_s == 0
    assert (free.settings["camera_id"], free.settings["trigger"], free.silence_s) == ("", "off", 5.0)


def test_csi():
    pipeline = settings("csi://1?width=3280&height=2464&fps=21&crop=100,50,1200,800&scale=600x400", "gstreamer")
    assert pipeline["pipeline"] == (
        "nvarguscamerasrc sensor-id=1 ! "
        "video/x-raw(memory:NVMM),format=NV12,width=3280,height=2464,framerate=21/1 ! "
        "nvvidconv left=100 top=50 right=1300 bottom=850 flip-method=0 ! "
        "video/x-raw,format=BGRx,width=600,height=400"
    )
    assert csi_pipeline(0).endswith("nvvidconv flip-method=0 ! video/x-raw,format=BGRx,width=1920,height=1080")
    assert csi_pipeline(0, flip=1).endswith("width=1080,height=1920")


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("webcan:0", "there is no scheme webcan:"),
        ("webcam:256", "camera number: expected a whole number from 0 to 255; got '256'"),
        ("webcam:", "camera number: expected a whole number from 0 to 255; got ''"),
        (-1, "camera number: expected a whole number from 0 to 255; got '-1'"),
        (True, "got bool"),
        (None, "got NoneType"),
        (1.5, "got float"),
        ("webcam:0?width=0", "width: expected a whole number from 1 to 65535; got '0'"),
        ("webcam:0?with=640", "expected settings width, height, fps, fourcc, timeout_s, buffer; got with"),
        (
            "webcam:0?fourcc=jpeg",
            "fourcc: expected four capital letters or digits such as YUYV or MJPG; got 'jpeg'",
        ),
        ("webcam:0?fps=30&fps=60", "fps is there twice"),
        ("webcam:0?buffer=0", "buffer: expected a whole number from 1 to 64; got '0'"),
        ("v4l2:video0", "expected a device such as v4l2:///dev/video0"),
        ("rtsp:///path", "it names no host"),
        ("rtsp://[::1/path", "Invalid IPv6 URL"),
        ("rtsp://h/s?transport=http", "transport: expected tcp or udp; got 'http'"),
        ("gige://?gain=2", "or a feature of the camera; got gain"),
        ("gige://?exposure_us=x", "exposure_us: expected a number from 1 to 1e"),
        ("usb3://?trigger=Line 1", "trigger: expected off, Software or an input"),
        ("csi://0?crop=1,2,3", "crop: expected left,top,width,height in pixels; got '1,2,3'"),
        ("csi://a", "camera number: expected a whole number from 0 to 15; got 'a'"),
        ("gst: ", "the pipeline is empty"),
        ("nowhere/at/all", "there is no such file or folder"),
        ("file://nowhere/at", "expected three slashes"),
        ("file:///nowhere?watch=1", "expected settings none; got watch"),
        ("folder:///tmp?watch=yes", "watch: expected 1 or 0; got 'yes'"),
        ("folder:///tmp?existing=0", "existing is for watch=1"),
        ("x" * 5000, "there is no such file or folder"),
        ("xy:" + "z" * 5000, "there is no scheme xy:"),
        (" ", "the address is empty"),
    ],
)
def test_mistakes_are_answered_with_all_forms(address, reason):
    with pytest.raises(InputError) as caught:
        open_source(address)
    assert reason in str(caught.value)
    assert FORMS in str(caught.value)


@pytest.mark.parametrize("addresses", [["webcam:0", "webcam:1"], (Path("parts"),)])
def test_a_list_of_addresses_is_no_list_of_pictures(addresses):
    with pytest.raises(InputError, match=r"several cameras go by name: \{'top': 'webcam:0', 'side'"):
        open_source(addresses)


def test_crop_must_lie_within():
    with pytest.raises(InputError, match="within 1920 x 1080 pixels"):
        open_source("csi://0?crop=1900,0,100,100")


def test_no_credentials_in_names_and_messages():
    assert open_source("rtsp://line:s3cret@h/s?token=abc").name == "rtsp://***@h/s?token=***"
    for address in ("rtsp://line:s3cret@h/s?transport=s3cret:", "rtspx://line:s3cret@h"):
        with pytest.raises(InputError) as caught:
            open_source(address)
        assert "line:s3cret@" not in str(caught.value)


def test_a_source_is_taken_as_it_is():
    source = ArraySource([])
    assert open_source(source) is source


def test_reading_what_is_not_open(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    addresses = ("rtsp://h/s", tmp_path, f"folder:{tmp_path}?watch=1", tmp_path / "a.mp4", [])
    for source in map(open_source, addresses):
        source.close()
        with pytest.raises(CameraError, match="is not open; call open"):
            source.read(0)
        with pytest.raises(CameraError):
            source.trigger()


# Arrays


def test_arrays():
    images = [np.full((4, 6, 3), value, np.uint8) for value in (1, 2)]
    source = open_source(images)
    assert not source.live and not source.software_trigger
    for _ in range(2):  # a list begins again
        frames = read_all(source)
        assert [frame.sequence for frame in frames] == [0, 1]
        assert all(frame.image is image for frame, image in zip(frames, images, strict=True))
    assert len(read_all(open_source(image for image in images))) == 2
    assert len(read_all(open_source(np.stack(images)))) == 2
    assert len(read_all(open_source(images[0]))) == 1


def test_what_is_no_array_is_told_and_passed_over():
    source = open_source([np.zeros((4, 6), np.uint8), np.zeros((4, 6, 3), np.uint8)])
    source.open()
    with pytest.raises(InputError, match="COLOR_GRAY2BGR"):
        source.read(0)
    assert source.read(0).sequence == 1


# Files


@pytest.fixture
def video(tmp_path) -> Path:
    """Six frames 64 x 48, whose gray value is 40 times their number."""
    path = tmp_path / "parts of line 3.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 25, (64, 48))
    for value in range(6):
        writer.write(np.full((48, 64, 3), 40 * value, np.uint8))
    writer.release()
    return path


def test_video(video):
    for address in (video, str(video), f"file://{str(video).replace(' ', '%20')}"):
        source = open_source(address)
        assert isinstance(source, VideoFile) and not source.live
        frames = read_all(source)
        assert [frame.sequence for frame in frames] == list(range(6))
        assert [round(frame.image.mean() / 40) for frame in frames] == list(range(6))
        assert frames[0].image.shape == (48, 64, 3) and frames[0].item == ""  # not one per frame
    assert len(read_all(source)) == 6  # opened again


def test_not_a_video(tmp_path, video):
    empty = tmp_path / "empty.mp4"
    empty.write_bytes(b"")
    with pytest.raises(InputError, match="not a video"):
        open_source(empty).open()
    source = open_source(video)
    video.unlink()
    with pytest.raises(InputError, match="there is none"):
        source.open()


@pytest.mark.parametrize("ending", ["avi", "mkv"])
def test_a_cut_video_is_told_from_a_whole_one(tmp_path, ending):
    path = tmp_path / f"film.{ending}"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 25, (64, 48))
    random = np.random.default_rng(0)
    for _ in range(100):
        writer.write(random.integers(0, 256, (48, 64, 3), np.uint8))
    writer.release()
    assert len(read_all(open_source(path))) == 100
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    source = open_source(path)
    source.open()
    with pytest.raises(CameraError, match=r"ended early, with (4\d|50) of 100 frames: it is cut or damaged"):
        for _ in range(100):
            source.read(0)


class SixFrames:
    """OpenCV's reader of a film whose container names `count` frames."""

    def __init__(self, count):
        self.count, self.left = count, 6

    def isOpened(self):
        return True

    def get(self, prop):
        assert prop == cv2.CAP_PROP_FRAME_COUNT
        return self.count

    def read(self):
        self.left -= 1
        return self.left >= 0, np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize("count", [-1.9e14, 0, 5, 6, 7])
def test_a_count_that_is_unknown_or_an_estimate_makes_no_error(video, monkeypatch, count):
    monkeypatch.setattr(cv2, "VideoCapture", lambda path, backend: SixFrames(count))
    assert len(read_all(open_source(video))) == 6


def test_a_video_without_a_frame_that_can_be_decoded(video):
    video.write_bytes(video.read_bytes()[:5_700])  # its header alone
    source = open_source(video)
    source.open()
    with pytest.raises(CameraError, match="ended early, with 0"):
        source.read(0)


def test_folder(tmp_path):
    for number in (10, 9, 100):
        cv2.imwrite(str(tmp_path / f"part{number}.png"), np.full((8, 9, 3), number, np.uint8))
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "part11.png").write_bytes((tmp_path / "part10.png").read_bytes()[:-30])
    source = open_source(str(tmp_path))
    assert isinstance(source, FolderSource) and not source.live
    source.open()
    assert [source.read(0).image[0, 0, 0] for _ in range(2)] == [9, 10]
    with pytest.raises(InputError, match=r"part11\.png: cannot be decoded"):
        source.read(0)
    last = source.read(0)
    assert (last.sequence, last.item) == (3, str(tmp_path / "part100.png"))
    with pytest.raises(EndOfSource):
        source.read(0)
    assert len(read_all(open_source(tmp_path / "part9.png"))) == 1


def test_a_name_with_a_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cv2.imwrite("10:30.png", np.zeros((8, 9, 3), np.uint8))
    cv2.imwrite("at:10.png", np.zeros((8, 9, 3), np.uint8))
    assert len(read_all(open_source("10:30.png"))) == len(read_all(open_source("at:10.png"))) == 1


def test_a_folder_without_images(tmp_path):
    with pytest.raises(InputError, match="no image"):
        open_source(tmp_path).open()


def test_watched_folder_by_address(tmp_path):
    folder = tmp_path / "in box"
    source = open_source(f"folder://{tmp_path}/in%20box?watch=1&existing=0")
    assert isinstance(source, WatchedFolder) and source.live
    assert (source.path, source.existing) == (folder, False)
