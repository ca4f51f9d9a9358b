import time

import cv2
import numpy as np
import pytest
from PIL import Image

from omniad_edge.errors import InputError
from omniad_edge.image import list_images, read_image
from omniad_edge.preprocess import resize


def authors(path, height, width):
    return np.asarray(Image.open(path).convert("RGB").resize((width, height), Image.Resampling.BILINEAR))


@pytest.mark.parametrize("product", ["screw", "magnetic_tile"])
def test_real_images_equal_the_authors_preprocessing(data_dir, product):
    for path in list_images(data_dir / product / "test")[::10]:
        assert (resize(read_image(path), 256, 256) == authors(path, 256, 256)).all(), path


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (255, 257), (256, 256), (480, 640), (97, 1000)])
@pytest.mark.parametrize("target", [(256, 256), (320, 256), (32, 4096)])
def test_noise_equals_the_authors_preprocessing(tmp_path, rng, size, target):
    frame = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "noise.png"), frame)
    resized = resize(frame, *target)
    assert (resized == authors(tmp_path / "noise.png", *target)).all()
    assert resized.shape == (*target, 3) and resized.dtype == np.uint8 and resized.flags.c_contiguous


@pytest.mark.parametrize("size", [(1080, 1920), (1024, 1024), (2160, 3840), (1201, 1603), (3000, 300)])
def test_large_frames_differ_little_from_the_authors_preprocessing(data_dir, rng, size):
    """Halved first; with as much detail as a camera's noise brings."""
    photo = read_image(list_images(data_dir / "screw" / "test" / "good")[0])
    frame = cv2.resize(photo, size[::-1], interpolation=cv2.INTER_CUBIC).astype(int)
    frame = np.clip(frame + rng.integers(-9, 10, frame.shape), 0, 255).astype(np.uint8)
    direct = Image.fromarray(frame[..., ::-1]).resize((256, 256), Image.Resampling.BILINEAR)
    difference = np.abs(resize(frame, 256, 256).astype(int) - np.asarray(direct))
    assert difference.mean() <= 0.5 and difference.max() <= 4


def test_bgr_comes_out_as_rgb():
    frame = np.zeros((100, 200, 3), np.uint8)
    frame[:] = 10, 20, 30
    assert (resize(frame, 32, 64) == (30, 20, 10)).all()
    assert (resize(frame, 100, 200) == (30, 20, 10)).all()


def test_it_is_antialiased():
    stripes = np.zeros((256, 2560, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(resize(stripes, 256, 256).astype(int) - 127.5).max() < 20  # without: 0 or 255


def test_views_of_a_frame_give_what_their_copies_give(rng):
    frame = rng.integers(0, 256, (200, 300, 3), dtype=np.uint8)
    for view in (
        frame[20:150, 30:200],
        frame[::2],
        frame[:, ::-1],
        frame[..., ::-1],
        np.asfortranarray(frame),
    ):
        assert (resize(view, 64, 96) == resize(view.copy(order="C"), 64, 96)).all()


def test_the_frame_stays_as_it_was_and_the_result_is_its_own(rng):
    frame = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    frame.flags.writeable = False
    before = frame.copy()
    resized = resize(frame, 64, 64)
    resized[:] = 0
    assert (frame == before).all()


@pytest.mark.parametrize(
    "frame", [None, np.zeros((9, 9), np.uint8), np.zeros((9, 9, 3)), np.zeros((3, 9, 9), np.uint8)]
)
def test_anything_but_a_bgr_frame_is_refused(frame):
    with pytest.raises(InputError, match="expected a uint8 BGR array"):
        resize(frame, 32, 32)


def test_a_full_hd_frame_takes_little_time(rng):
    frame = rng.integers(0, 256, (1080, 1920, 3), dtype=np.uint8)
    times_ms = []
    for _ in range(15):
        start = time.perf_counter()
        resize(frame, 256, 256)
        times_ms.append((time.perf_counter() - start) * 1e3)
    assert min(times_ms) < 30  # 7 on an idle core; this only notices another order of magnitude
