"""The tables of resize against preprocess.resize, and the kernel against the tables in float64."""

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

from omniad_edge.errors import InputError  # noqa: E402
from omniad_edge.kernels.jit import run  # noqa: E402
from omniad_edge.kernels.plan import Launch  # noqa: E402
from omniad_edge.kernels.resize import resize_call  # noqa: E402
from omniad_edge.kernels.resize_tables import (  # noqa: E402
    MAX_TAPS,
    TABLES,
    resample_tables,
    resize_reference,
    taps,
)
from omniad_edge.preprocess import resize  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUARD = 4096


def noise(rng, rows, columns):
    return rng.integers(0, 256, (rows, columns, 3), np.uint8)


def smooth(rng, rows, columns):
    return cv2.resize(noise(rng, 9, 12), (columns, rows), interpolation=cv2.INTER_CUBIC)


def rounded(value):
    return np.floor(value + 0.5).clip(0, 255)


def guarded(value):
    """The array on the device; around it bytes of 255: NaN as fp32, white as pixels."""
    memory = torch.full((value.nbytes + 2 * GUARD,), 255, dtype=torch.uint8, device=DEVICE)
    view = memory[GUARD:-GUARD].view(getattr(torch, str(value.dtype))).view(value.shape)
    view.copy_(torch.tensor(value))
    return memory, view


def launch(frame, tables, height, width):
    memory, pixels = guarded(np.full((height, width, 3), 255, np.uint8))
    tensors = {name: guarded(getattr(tables, name))[1] for name in TABLES}
    call = resize_call("frame", *TABLES, "pixels", height, width)
    run(Launch((call,)), tensors | {"frame": guarded(frame)[1], "pixels": pixels})
    assert (memory[:GUARD] == 255).all() and (memory[-GUARD:] == 255).all()
    return pixels.cpu().numpy()


# ---- tables


@pytest.mark.parametrize("image", [noise, smooth])
@pytest.mark.parametrize(
    "size",
    [(1080, 1920), (480, 640), (100, 200), (1201, 1603), (2160, 3840), (300, 3000), (1, 1), (5, 3), (1025, 1031)],
)
def test_tables_are_the_product_s_resampling(rng, size, image):
    frame = image(rng, *size)
    difference = np.abs(
        rounded(resize_reference(frame, resample_tables(*size, 256, 256))) - resize(frame, 256, 256)
    )
    assert difference.mean() <= 0.5 and difference.max() <= 2


@pytest.mark.parametrize("target", [(64, 64), (256, 64), (64, 320), (96, 160)])
@pytest.mark.parametrize("size", [(517, 1290), (600, 400), (1283, 259)])
def test_tables_of_other_shapes(rng, size, target):
    """Both axes decide together how often is halved."""
    frame = noise(rng, *size)
    difference = np.abs(rounded(resize_reference(frame, resample_tables(*size, *target))) - resize(frame, *target))
    assert difference.mean() <= 0.5 and difference.max() <= 2


@pytest.mark.parametrize(
    ("n_in", "halvings"),
    [(1, 0), (2, 0), (2, 1), *((n_in, h) for n_in in (63, 64, 65, 257, 515, 1031, 4320) for h in range(3))],
)
@pytest.mark.parametrize("n_out", [64, 96, 256])
def test_weights_sum_to_1_within_the_frame(n_in, n_out, halvings):
    start, weight = taps(n_in, n_out, halvings)
    assert start.dtype == np.int32 and weight.dtype == np.float32
    assert start.shape == (n_out,) and weight.shape[0] == n_out
    assert start.min() >= 0 and (start + weight.shape[1]).max() <= n_in
    assert (weight >= 0).all() and np.abs(weight.astype(float).sum(1) - 1).max() < 1e-6
    assert (np.diff(start) >= 0).all()


def test_the_same_size_is_a_copy(rng):
    frame = noise(rng, 64, 96)
    assert (resize_reference(frame, resample_tables(64, 96, 64, 96)) == frame[..., ::-1]).all()


def test_frames_of_8k_fit_and_what_does_not_is_refused():
    tables = resample_tables(4320, 7680, 64, 64)
    assert tables.geometry.tolist() == [4320, 7680, 160, 256]
    assert tables.row_weight.shape == (64, MAX_TAPS) and tables.row_weight.dtype == np.float32
    assert tables.geometry.dtype == tables.row_start.dtype == np.int32
    with pytest.raises(InputError, match=r"20000 x 100 pixels are too many for 64 x 64 .* 512 a side"):
        resample_tables(100, 20000, 64, 64)
    with pytest.raises(InputError, match="less than 2 GiB"):
        resample_tables(40000, 20000, 256, 256)
    with pytest.raises(ValueError, match="multiples of 16"):
        resize_call("frame", *TABLES, "pixels", 64, 72)


# ---- kernel


@pytest.mark.parametrize(
    ("size", "target"),
    [
        ((300, 400), (64, 96)),  # halved once
        ((259, 513), (64, 64)),  # odd, halved once
        ((40, 50), (64, 64)),  # enlarged
        ((1, 1), (64, 64)),
        ((64, 96), (64, 96)),
        ((70, 1000), (64, 32)),  # as wide as needs several chunks of columns
        pytest.param((1080, 1920), (64, 64), marks=pytest.mark.slow),
        pytest.param((480, 640), (256, 256), marks=pytest.mark.slow),
    ],
)
def test_kernel_rounds_what_the_tables_give(rng, size, target):
    frame, tables = noise(rng, *size), resample_tables(*size, *target)
    truth = resize_reference(frame, tables)
    pixels = launch(frame, tables, *target)
    # fp32 sums of up to 255 with weights of relative error 2^-24 each: far below this, but for a rounding tie.
    tie = np.abs(truth - np.floor(truth) - 0.5) < 1e-3
    difference = np.abs(pixels - rounded(truth))
    assert (difference[~tie] == 0).all() and difference.max() <= 1
    assert (launch(frame, tables, *target) == pixels).all()


def test_kernel_keeps_the_grey_levels_of_a_plain_frame():
    tables = resample_tables(150, 130, 64, 32)
    for level in ((0, 0, 0), (255, 255, 255), (10, 128, 254)):
        frame = np.full((150, 130, 3), level, np.uint8)
        assert (launch(frame, tables, 64, 32) == level[::-1]).all()
