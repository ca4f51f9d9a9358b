"""A watched folder: slow writers, broken files, files written anew, a drive that goes."""

import shutil
import threading
import time

import cv2
import numpy as np
import pytest

from omniad_edge.cameras.folder_source import WatchedFolder
from omniad_edge.errors import CameraError, InputError

SETTLE_S, BROKEN_S = 0.1, 0.6


def png(value: int) -> bytes:
    noise = np.random.default_rng(value).integers(0, 256, (40, 40, 3), np.uint8)
    noise[0, 0] = value
    return cv2.imencode(".png", noise)[1].tobytes()


@pytest.fixture
def watched(tmp_path):
    source = WatchedFolder(tmp_path, settle_s=SETTLE_S, broken_s=BROKEN_S)
    source.open()
    return source


def value(frame) -> int:
    return int(frame.image[0, 0, 0])


def test_new_files_each_once_in_natural_order(tmp_path, watched):
    for number in (10, 9):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    assert [value(watched.read(5)) for _ in range(2)] == [9, 10]
    assert watched.read(2 * SETTLE_S) is None
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "3.png").write_bytes(png(3))
    frame = watched.read(5)
    assert (value(frame), frame.sequence, frame.item) == (3, 2, str(tmp_path / "sub" / "3.png"))


def test_slow_writer(tmp_path, watched):
    """Written in pieces, with pauses shorter and longer than a file takes to settle."""
    data, pieces = png(77), 6

    def write():
        with (tmp_path / "slow.png").open("wb") as file:
            for piece in range(pieces):
                file.write(data[piece * len(data) // pieces : (piece + 1) * len(data) // pieces])
                file.flush()
                if piece < pieces - 1:
                    time.sleep(SETTLE_S * (0.5 if piece % 2 else 2.5))

    writer = threading.Thread(target=write)
    writer.start()
    frame = watched.read(10)
    writer.join()
    np.testing.assert_array_equal(frame.image, cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR))
    assert watched.read(2 * SETTLE_S) is None


def test_uncompressed_file_of_full_size_still_being_filled(tmp_path, watched):
    """Some programs reserve the size first: it decodes, but its time still changes."""
    path = tmp_path / "part.bmp"
    data = cv2.imencode(".bmp", np.full((30, 30, 3), 200, np.uint8))[1].tobytes()
    path.write_bytes(data[:60] + bytes(len(data) - 60))
    stop = time.monotonic() + 3 * SETTLE_S
    while time.monotonic() < stop:
        path.touch()
        assert watched.read(SETTLE_S / 4) is None
    path.write_bytes(data)
    assert (watched.read(5).image == 200).all()


def test_renamed_into_place(tmp_path, watched):
    (tmp_path / "part.tmp").write_bytes(png(5))
    assert watched.read(2 * SETTLE_S) is None
    (tmp_path / "part.tmp").rename(tmp_path / "part.png")
    assert value(watched.read(5)) == 5


def test_broken_file_is_told_once_and_hides_no_other(tmp_path, watched):
    (tmp_path / "a.png").write_bytes(png(1)[:-50])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "b.png").write_bytes(png(2))
    assert value(watched.read(5)) == 2
    told = []
    for _ in range(2):
        with pytest.raises(InputError) as caught:
            watched.read(5)
        told.append(str(caught.value).split(":")[0])
    assert told == [str(tmp_path / "a.png"), str(tmp_path / "empty.png")]
    assert watched.read(2 * BROKEN_S) is None
    (tmp_path / "a.png").write_bytes(png(1))  # somebody copied it again
    assert value(watched.read(5)) == 1


def test_the_same_name_written_anew(tmp_path, watched):
    for number in (1, 2, 3):
        (tmp_path / "current.png").write_bytes(png(number))
        assert value(watched.read(5)) == number


def test_existing_files(tmp_path):
    (tmp_path / "old.png").write_bytes(png(1))
    new_only = WatchedFolder(tmp_path, existing=False, settle_s=SETTLE_S)
    new_only.open()
    (tmp_path / "new.png").write_bytes(png(2))
    assert value(new_only.read(5)) == 2
    assert new_only.read(2 * SETTLE_S) is None


def test_a_drive_that_goes_and_comes_back(tmp_path):
    folder = tmp_path / "drive"
    watched = WatchedFolder(folder, settle_s=SETTLE_S)
    with pytest.raises(CameraError, match="expected a folder to watch"):
        watched.open()
    folder.mkdir()
    watched.open()
    (folder / "1.png").write_bytes(png(1))
    assert value(watched.read(5)) == 1
    shutil.move(folder, tmp_path / "away")
    with pytest.raises(CameraError, match="expected a folder to watch"):
        watched.read(5)
    shutil.move(tmp_path / "away", folder)
    (folder / "2.png").write_bytes(png(2))
    watched.open()
    assert value(watched.read(5)) == 2  # and not the first once more


def test_close_ends_a_read(watched):
    closing = threading.Timer(0.1, watched.close)
    closing.start()
    start = time.monotonic()
    assert watched.read(30) is None
    assert time.monotonic() - start < 5
