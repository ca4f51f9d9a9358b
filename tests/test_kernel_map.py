"""cosine and anomaly_map against float64; interpreted on the CPU, compiled on a GPU."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

from guarded import empty, guarded, unharmed  # noqa: E402

from omniad_edge.anomaly_map import SCALE, resample_matrix  # noqa: E402
from omniad_edge.kernels.jit import run  # noqa: E402
from omniad_edge.kernels.map import (  # noqa: E402
    REACH,
    STRIDES,
    TILE,
    anomaly_map_call,
    anomaly_map_reference,
    cosine_call,
    cosine_reference,
    tiles,
    window,
)
from omniad_edge.kernels.plan import Launch  # noqa: E402

DTYPES = (torch.float16, torch.float32)
NAN = float("nan")
DISTANCES = ("d0", "d1", "d2")
RESAMPLE = (("r0", "c0"), ("r1", "c1"), ("r2", "c2"))


def launch(call, tensors, **shapes):
    """The call's fp32 results, by name; what is around them must stay as it was."""
    made = {name: empty(*shape) for name, shape in shapes.items()}
    run(Launch((call,)), made | {name: guarded(value) for name, value in tensors.items()})
    for y in made.values():
        assert unharmed(y)
    return [y.cpu() for y in made.values()]


def check(y, truth, plain):
    """The error to float64 is at most twice that of plain torch in fp32, and one rounding."""
    error, base = ((v.double() - truth).abs().max() for v in (y, plain))
    assert error <= 2 * base + torch.finfo(torch.float32).eps * truth.abs().max(), (error, base)


# ---- cosine


def features(rng, batch, positions, channels, dtype):
    """Teacher and student; of the student's positions some are equal to the teacher's, some far, some 0."""
    teacher = torch.tensor(rng.normal(size=(batch, positions, channels)))
    student = teacher + torch.tensor(
        rng.choice([0, 0.01, 3], (batch, positions, 1)) * rng.normal(size=teacher.shape)
    )
    student[:, ::5] = 0
    return {"t": teacher.to(dtype), "s": student.to(dtype)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("positions", "channels"),
    [
        (1, 64),
        (3, 256),  # tile - 1
        (4, 256),  # tile
        (5, 256),  # tile + 1
        (6, 96),
        (35, 1024),
        (4, 2048),
        (64 * 64, 64),
        (32 * 32, 128),
        (16 * 16, 256),
        pytest.param(16 * 16, 1024, marks=pytest.mark.slow),
    ],
)
def test_cosine_is_as_exact_as_torch(rng, dtype, positions, channels):
    tensors = features(rng, 1, positions, channels, dtype)
    call = cosine_call("t", "s", "d", positions, channels, 1)
    (distance,) = launch(call, tensors, d=(1, positions))
    truth, plain = (
        cosine_reference(tensors["t"].to(of), tensors["s"].to(of)) for of in (torch.double, torch.float)
    )
    check(distance, truth, plain)


def test_cosine_of_features_that_are_0_is_torchs():
    zeros, ones = torch.zeros(1, 4, 64), torch.ones(1, 4, 64)
    for t, s, expected in (
        (zeros, ones, 1),
        (ones, zeros, 1),
        (zeros, zeros, 1),
        (ones, ones, 0),
        (ones, -ones, 2),
    ):
        (distance,) = launch(cosine_call("t", "s", "d", 4, 64, 1), {"t": t, "s": s}, d=(1, 4))
        assert (distance - expected).abs().max() <= 1e-6


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter's NumPy
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_cosine_keeps_what_is_broken(rng, value):
    tensors = features(rng, 1, 9, 64, torch.float16)
    tensors["t"][0, 3, 17] = tensors["s"][0, 6, 40] = value
    (distance,) = launch(cosine_call("t", "s", "d", 9, 64, 1), tensors, d=(1, 9))
    assert distance[0].isnan().nonzero().flatten().tolist() == [3, 6]


def test_cosine_of_an_image_does_not_depend_on_the_batch(rng):
    tensors = features(rng, 3, 35, 128, torch.float16)
    call = cosine_call("t", "s", "d", 35, 128, 3)
    (whole,) = launch(call, tensors, d=(3, 35))
    assert torch.equal(launch(call, tensors, d=(3, 35))[0], whole)
    single = replace(call, programs=call.programs // 3)
    for image in range(3):
        of = {name: value[image : image + 1] for name, value in tensors.items()}
        assert torch.equal(launch(single, of, d=(1, 35))[0], whole[image : image + 1])


# ---- anomaly_map


def map_case(rng, height, width, batch=1, smooth=True):
    """-> call, fp32 tensors, shapes of the results"""
    tensors = {}
    for d, (rows, columns), stride in zip(DISTANCES, RESAMPLE, STRIDES, strict=True):
        h, w = height // stride, width // stride
        tensors[d] = torch.tensor(rng.uniform(0, 2, (batch, h * w))).float()
        tensors[rows] = torch.tensor(SCALE * resample_matrix(h, height, smooth)).float()
        tensors[columns] = torch.tensor(resample_matrix(w, width, smooth)).float()
    call = anomaly_map_call(DISTANCES, RESAMPLE, "map", "peaks", height, width, batch)
    return call, tensors, {"map": (batch, height, width), "peaks": (batch, tiles(height, width))}


def reference(tensors, height, dtype):
    distances = [
        tensors[d].to(dtype).unflatten(1, (height // stride, -1))
        for d, stride in zip(DISTANCES, STRIDES, strict=True)
    ]
    return anomaly_map_reference(distances, [[tensors[name].to(dtype) for name in pair] for pair in RESAMPLE])


@pytest.mark.parametrize(
    ("height", "width", "smooth"),
    [
        (64, 64, True),
        (64, 64, False),
        (96, 160, True),
        (256, 256, True),
        (64, 512, True),
        pytest.param(256, 256, False, marks=pytest.mark.slow),
        pytest.param(1024, 64, True, marks=pytest.mark.slow),
        pytest.param(1024, 512, True, marks=pytest.mark.slow),
    ],
)
def test_map_is_as_exact_as_torch(rng, height, width, smooth):
    call, tensors, shapes = map_case(rng, height, width, smooth=smooth)
    made = launch(call, tensors, **shapes)
    for y, truth, plain in zip(
        made, *(reference(tensors, height, dtype) for dtype in (torch.double, torch.float)), strict=True
    ):
        check(y, truth, plain)
    anomaly_map, peaks = made
    assert peaks.max() == anomaly_map.max()


def test_map_of_an_image_does_not_depend_on_the_batch(rng):
    call, tensors, shapes = map_case(rng, 64, 96, batch=3)
    whole = launch(call, tensors, **shapes)
    assert all(map(torch.equal, launch(call, tensors, **shapes), whole))
    single = replace(call, programs=call.programs // 3)
    for image in range(3):
        of = tensors | {d: tensors[d][image : image + 1] for d in DISTANCES}
        alone = launch(single, of, **{name: (1, *shape[1:]) for name, shape in shapes.items()})
        assert all(torch.equal(a, w[image : image + 1]) for a, w in zip(alone, whole, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter's NumPy
@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_what_is_broken_reaches_the_peak(rng, name, value):
    """One position of the second image; the first image stays whole."""
    call, tensors, shapes = map_case(rng, 64, 64, batch=2)
    for position in (0, tensors[name].shape[1] // 2, -1):
        broken = tensors[name].clone()
        broken[1, position] = value
        anomaly_map, peaks = launch(call, tensors | {name: broken}, **shapes)
        assert peaks[0].isfinite().all() and anomaly_map[0].isfinite().all()
        assert not np.isfinite(peaks[1].numpy().max())  # as the host takes it; NumPy's maximum keeps NaN
        by_tile = anomaly_map[1].unflatten(0, (-1, TILE[0])).unflatten(2, (-1, TILE[1]))
        assert torch.equal(peaks[1].isnan(), by_tile.isnan().any(3).any(1).flatten())


@pytest.mark.parametrize("smooth", [True, False])
def test_windows_hold_all_that_a_tile_needs(smooth):
    """At every size up to 1024: what the kernel's window leaves out of the matrices is 0."""
    for n_out in range(64, 1025, 32):
        for stride in STRIDES:
            n_in = n_out // stride
            matrix = resample_matrix(n_in, n_out, smooth)
            for size in TILE:
                first = np.arange(0, n_out, size)
                start = np.maximum(np.maximum(first - REACH, 0) * (n_in - 1) // (n_out - 1) - 1, 0)
                index = np.arange(n_in)
                inside = (index >= start[:, None]) & (index < start[:, None] + window(size, stride))
                assert not matrix[~np.repeat(inside, size, axis=0)].any(), (n_out, stride, size)


def test_sizes_of_the_tiles():
    assert tiles(256, 256) == 128
    assert [window(size, stride) for stride in STRIDES for size in TILE] == [16, 32, 16, 16, 16, 16]
    assert cosine_call("t", "s", "d", 64 * 64, 64, 1).programs == 128
    assert cosine_call("t", "s", "d", 16 * 16, 256, 2).programs == 128
    for height, width in ((32, 64), (64, 32), (64, 80), (72, 64)):
        with pytest.raises(ValueError, match="multiples of 32"):
            tiles(height, width)
