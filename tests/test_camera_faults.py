"""Camera faults: found on black, saturated, frozen and blurred frames, on no part of real and made lines."""

from functools import lru_cache
from itertools import count

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omniad_edge.cameras.camera_faults import (
    ADAPT_FRAMES,
    ADAPT_S,
    BLACK,
    FROZEN,
    FROZEN_S,
    MIN_HISTORY,
    OUT_OF_FOCUS,
    OVER_EXPOSED,
    FaultDetector,
)
from omniad_edge.frame import Frame
from omniad_edge.image import list_images, read_image
from omniad_edge.products import PRODUCTS, render, write_conveyor, write_line

seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(1, 200), st.integers(1, 200))


def faults(detector, images, period_s=0.5):
    """The fault of each image, seen one after the other."""
    numbers = count()
    return [detector.check(Frame(image, n := next(numbers), n * period_s, "camera")) for image in images]


def add_noise(image, rng, sigma=1.5):
    """As a sensor adds it: after the lens has blurred the picture."""
    return np.clip(image + rng.normal(0, sigma, image.shape) + 0.5, 0, 255).astype(np.uint8)


def defocus(image, sigma_px, rng):
    return add_noise(cv2.GaussianBlur(image, (0, 0), sigma_px), rng)


def film(path):
    capture = cv2.VideoCapture(str(path))
    while (grabbed := capture.read())[0]:
        yield grabbed[1]
    capture.release()


@lru_cache
def parts(product):
    """40 good ones, 256 x 256."""
    return [render(product, np.random.default_rng(n))[0] for n in range(40)]


def check_line(images, rng):
    """No fault on any, in this order and mixed; yet out of focus they are found."""
    images = list(images)
    assert len(images) >= 2 * MIN_HISTORY
    assert set(faults(FaultDetector(live=True), images)) == {""}
    detector = FaultDetector(live=True)
    assert set(faults(detector, [images[i] for i in rng.permutation(len(images))])) == {""}
    blurred = faults(detector, [defocus(image, 8, rng) for image in images[: ADAPT_FRAMES // 2]])
    assert blurred.count(OUT_OF_FOCUS) >= 0.8 * len(blurred), blurred


@pytest.mark.parametrize("product", ["screw", "magnetic_tile"])
def test_no_fault_on_real_parts(product, data_dir, rng):
    images = [read_image(path) for path in list_images(data_dir / product) if "ground_truth" not in path.parts]
    assert len(images) == 160
    assert set(faults(FaultDetector(live=True), images)) == {""}
    # The tiles' pictures differ in size, which starts the history anew each time.
    one_size = [cv2.resize(image, (384, 384), interpolation=cv2.INTER_AREA) for image in images]
    assert set(faults(FaultDetector(live=True), one_size)) == {""}


def test_no_fault_on_a_filmed_line(data_dir, rng):
    check_line(film(data_dir / "line.mp4"), rng)


def test_no_fault_on_the_made_line(tmp_path, rng):
    write_line(tmp_path, 8, 0, 4, 2)
    check_line([read_image(path) for path in list_images(tmp_path / "data") if "_mask" not in path.name], rng)


@pytest.mark.parametrize("size_px", [128, 512])
def test_no_fault_on_the_made_conveyor(size_px, tmp_path, rng):
    write_conveyor(tmp_path / "film.mp4", tmp_path / "truth.csv", 3, size_px=size_px)
    check_line(film(tmp_path / "film.mp4"), rng)


@given(sizes, st.integers(0, 12), st.floats(0, 3), seeds)
@settings(deadline=None, max_examples=50)
def test_black_whatever_the_size_and_noise(size, level, noise, seed):
    rng = np.random.default_rng(seed)
    assert faults(FaultDetector(live=True), [add_noise(np.full((*size, 3), level), rng, noise)]) == [BLACK]


def test_hot_pixels_do_not_light_a_black_frame(rng):
    image = np.zeros((1080, 1920, 3), np.uint8)
    image[rng.integers(0, 1080, 200), rng.integers(0, 1920, 200)] = 255
    assert faults(FaultDetector(live=True), [image]) == [BLACK]


@pytest.mark.parametrize("channel", range(3))
def test_one_colour_of_light_is_not_black(channel):
    image = np.zeros_like(parts("gear")[0])
    image[..., channel] = parts("gear")[0][..., channel]
    assert faults(FaultDetector(live=True), [image]) == [""]


@given(st.integers(256, 400), st.floats(0, 2), seeds)
@settings(deadline=None, max_examples=50)
def test_saturated_is_over_exposed(level, noise, seed):
    rng = np.random.default_rng(seed)
    image = add_noise(np.full((120, 160, 3), level), rng, noise)
    image[50:55, 70:75] = 30  # what little is not blown out: 0.1 %
    assert faults(FaultDetector(live=True), [image]) == [OVER_EXPOSED]


def test_a_dark_part_before_a_saturated_back_light_is_inspected():
    image = np.full((480, 640, 3), 255, np.uint8)
    image[200:300, 280:400] = 40  # 4 %
    assert faults(FaultDetector(live=True), [image]) == [""]


@given(st.floats(5, 15), st.sampled_from(PRODUCTS), seeds)
@settings(deadline=None, max_examples=25)
def test_blurred_is_out_of_focus(sigma_px, product, seed):
    rng = np.random.default_rng(seed)
    detector = FaultDetector(live=True)
    assert set(faults(detector, parts(product))) == {""}
    pictures = [defocus(image, sigma_px, rng) for image in parts(product)[:3]]
    assert set(faults(detector, pictures)) == {OUT_OF_FOCUS}
    assert faults(detector, [add_noise(image, rng) for image in parts(product)[:3]]) == [""] * 3


@given(st.integers(30, 220), st.floats(0.5, 12), seeds)
@settings(deadline=None, max_examples=25)
def test_noise_alone_is_no_fault(level, noise, seed):
    """An empty place on the belt has no edges, which is not the lens's fault."""
    rng = np.random.default_rng(seed)
    detector = FaultDetector(live=True)
    empty = (add_noise(np.full((256, 256, 3), level), rng, noise) for _ in range(3))
    assert set(faults(detector, [*parts("gear"), *empty])) == {""}


def test_a_first_blurred_camera_has_nothing_to_be_compared_with(rng):
    blurred = [defocus(image, 6, rng) for image in parts("cap")]
    assert set(faults(FaultDetector(live=True), blurred)) == {""}


def test_blur_that_leaves_only_noise_does_not_become_normal(rng):
    detector = FaultDetector(live=True)
    faults(detector, parts("board"))
    faults(detector, [defocus(image, 40, rng) for image in parts("board")], period_s=ADAPT_S)
    assert faults(detector, [defocus(image, 8, rng) for image in parts("board")[:3]]) == [OUT_OF_FOCUS] * 3


def test_few_frames_are_not_enough_to_call_one_blurred(rng):
    detector = FaultDetector(live=True)
    faults(detector, parts("cap")[: MIN_HISTORY - 1])
    assert faults(detector, [defocus(parts("cap")[0], 8, rng)]) == [""]


def test_a_softer_product_is_healthy_after_a_while(rng):
    detector = FaultDetector(live=True)
    faults(detector, parts("gear") * 5)
    period_s = ADAPT_S / ADAPT_FRAMES
    soft = [defocus(parts("cap")[n % 40], 8, rng) for n in range(ADAPT_FRAMES + 31)]
    found = faults(detector, soft, period_s)
    assert found == [OUT_OF_FOCUS] * (ADAPT_FRAMES + 1) + [""] * 30
    assert set(
        faults(detector, [image for pair in zip(soft[:40], parts("gear"), strict=True) for image in pair])
    ) == {""}


def test_many_blurred_frames_in_a_short_time_stay_a_fault(rng):
    detector = FaultDetector(live=True)
    faults(detector, parts("gear"))
    soft = [defocus(parts("gear")[0], 8, rng) for _ in range(2 * ADAPT_FRAMES)]
    assert set(faults(detector, soft, period_s=0.4 * ADAPT_S / ADAPT_FRAMES)) == {OUT_OF_FOCUS}


def test_a_sharper_product_is_healthy_at_once(rng):
    detector = FaultDetector(live=True)
    faults(detector, [defocus(image, 4, rng) for image in parts("cap")])
    assert set(faults(detector, parts("board"))) == {""}


def test_another_size_starts_anew(rng):
    detector = FaultDetector(live=True)
    faults(detector, parts("gear"))
    blurred = defocus(parts("gear")[0], 8, rng)
    assert faults(detector, [blurred, blurred[:200].copy()]) == [OUT_OF_FOCUS, ""]


@given(st.integers(2, 20), st.floats(0.05, 4), st.booleans(), seeds)
@settings(deadline=None, max_examples=50)
def test_repeated_frames_are_frozen_if_live_and_long_enough(frames, period_s, live, seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(60, 200, (48, 64, 3)).astype(np.uint8)
    detector = FaultDetector(live)
    found = faults(detector, [image.copy() for _ in range(frames)], period_s)
    expected = [FROZEN if live and n >= 2 and n * period_s >= FROZEN_S else "" for n in range(frames)]
    assert found == expected
    image[:] ^= rng.integers(0, 2, image.shape, np.uint8)  # the noise of the next exposure
    assert faults(detector, [image]) == [""]


def test_a_camera_that_repeats_a_black_frame_is_called_black():
    image = np.zeros((48, 64, 3), np.uint8)
    assert set(faults(FaultDetector(live=True), [image] * 20, period_s=1)) == {BLACK}


def test_a_repeated_frame_teaches_nothing(rng):
    """Else a frozen camera would fill the history, and its blurred frame would become the new normal."""
    detector = FaultDetector(live=False)
    faults(detector, parts("gear"))
    blurred = defocus(parts("gear")[0], 8, rng)
    assert set(faults(detector, [blurred] * (4 * ADAPT_FRAMES), period_s=ADAPT_S)) == {OUT_OF_FOCUS}


@given(sizes, st.booleans(), seeds)
@settings(deadline=None, max_examples=50)
def test_every_size_and_layout_can_be_checked(size, mirrored, seed):
    image = np.random.default_rng(seed).integers(40, 200, (*size, 3)).astype(np.uint8)
    before = image.copy()
    view = image[:, ::-1] if mirrored else image
    assert faults(FaultDetector(live=True), [view, view]) == ["", ""]
    assert np.array_equal(image, before)


def test_a_buffer_that_is_filled_again_is_not_frozen(rng):
    """A camera may give the same memory each time: what was seen must have been copied."""
    buffer = np.empty((1, 64, 3), np.uint8)  # one row, of which no copy is needed to make it contiguous
    detector, found = FaultDetector(live=True), []
    for n in range(20):
        buffer[:] = rng.integers(40, 200, buffer.shape)
        found.append(detector.check(Frame(buffer, n, float(n), "camera")))
    assert set(found) == {""}
