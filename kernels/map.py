"""From teacher and student features to the anomaly map.

cosine:      distance = 1 - t s / (max(|t|, 1e-8) max(|s|, 1e-8)) at each position, in fp32
anomaly_map: map = sum over three scales of rows_i distance_i columns_i^T, and the largest value of each tile

The matrices of `..anomaly_map.resample_matrix` are banded: an output row comes from the Gaussian's reach of
upsampled rows, and each of these from two rows of the distance. So a tile needs only a small window of the
distance, 16 x 32 of it for 16 x 32 outputs at stride 4, whatever the size of the image.

Offsets are int32: every buffer of the whole batch must have fewer than 2^31 elements.
"""

from collections.abc import Sequence
from math import gcd

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ..anomaly_map import SIGMA_PX, TRUNCATE
from .plan import Call

STRIDES = (4, 8, 16)
REACH = int(TRUNCATE * SIGMA_PX + 0.5)  # of the Gaussian, in output rows; beyond it the matrices are 0
TILE = (16, 32)  # rows and columns of a tile: 128 programs for 256 x 256, and 16 x 16 windows from stride 8 on


@triton.jit
def cosine(
    pid,
    teacher_ptr,  # (N, HW, C) fp16 or fp32
    student_ptr,  # (N, HW, C), dtype of teacher
    distance_ptr,  # (N, HW) fp32
    HW: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,  # positions of a tile
    BC: tl.constexpr,  # channels at a time; divides C
):
    TILES: tl.constexpr = (HW + BM - 1) // BM
    image = pid // TILES
    m = pid % TILES * BM + tl.arange(0, BM)
    real = m < HW
    offsets = (image * HW + m)[:, None] * C + tl.arange(0, BC)[None, :]
    ts = tl.zeros((BM, BC), tl.float32)
    tt = tl.zeros((BM, BC), tl.float32)
    ss = tl.zeros((BM, BC), tl.float32)
    for channel in tl.static_range(0, C, BC):
        t = tl.load(teacher_ptr + offsets + channel, mask=real[:, None], other=0.0).to(tl.float32)
        s = tl.load(student_ptr + offsets + channel, mask=real[:, None], other=0.0).to(tl.float32)
        ts += t * s
        tt += t * t
        ss += s * s
    # What is NaN stays NaN through the product, even if a maximum takes the other number.
    norms = tl.maximum(tl.sqrt(tl.sum(tt, 1)), 1e-8) * tl.maximum(tl.sqrt(tl.sum(ss, 1)), 1e-8)
    tl.store(distance_ptr + image * HW + m, 1.0 - tl.sum(ts, 1) / norms, mask=real)


@triton.jit
def window_start(first, N_IN: tl.constexpr, N_OUT: tl.constexpr, REACH: tl.constexpr):
    """The first input that the outputs from `first` on can take a part of.

    One less than the exact position's whole part: `resample_matrix` computes positions in floating point.
    """
    position = tl.maximum(first - REACH, 0) * (N_IN - 1) // (N_OUT - 1)
    return tl.maximum(position - 1, 0)


@triton.jit
def resample(
    acc,  # (BM, BN) fp32
    image,
    row,  # first of the tile
    column,
    distance_ptr,  # (N, IN_H IN_W) fp32
    rows_ptr,  # (H, IN_H) fp32
    columns_ptr,  # (W, IN_W) fp32
    IN_H: tl.constexpr,
    IN_W: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    REACH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    KM: tl.constexpr,  # size of the window
    KN: tl.constexpr,
):
    """acc + the tile of rows distance columns^T"""
    i = window_start(row, IN_H, H, REACH) + tl.arange(0, KM)
    j = window_start(column, IN_W, W, REACH) + tl.arange(0, KN)
    real_i = i < IN_H
    real_j = j < IN_W
    distance = tl.load(
        distance_ptr + image * (IN_H * IN_W) + i[:, None] * IN_W + j[None, :],
        mask=real_i[:, None] & real_j[None, :],
        other=0.0,
    )
    m = row + tl.arange(0, BM)
    n = column + tl.arange(0, BN)
    rows = tl.load(rows_ptr + m[:, None] * IN_H + i[None, :], mask=real_i[None, :], other=0.0)
    columns = tl.load(columns_ptr + n[None, :] * IN_W + j[:, None], mask=real_j[:, None], other=0.0)
    half = tl.dot(rows, distance, input_precision="ieee")
    return tl.dot(half, columns, acc, input_precision="ieee")


@triton.jit
def anomaly_map(
    pid,
    distance0_ptr,  # (N, H/4 W/4) fp32
    distance1_ptr,  # (N, H/8 W/8) fp32
    distance2_ptr,  # (N, H/16 W/16) fp32
    rows0_ptr,  # (H, H/4) fp32, banded, with the map's scale
    columns0_ptr,  # (W, W/4) fp32, banded
    rows1_ptr,  # (H, H/8)
    columns1_ptr,  # (W, W/8)
    rows2_ptr,  # (H, H/16)
    columns2_ptr,  # (W, W/16)
    map_ptr,  # (N, H, W) fp32
    peak_ptr,  # (N, TILES) fp32: the largest value of each tile, NaN if one is NaN
    H: tl.constexpr,
    W: tl.constexpr,
    REACH: tl.constexpr,  # in outputs, of the matrices' band
    BM: tl.constexpr,  # rows of a tile; divides H
    BN: tl.constexpr,  # columns of a tile; divides W
    KM0: tl.constexpr,  # rows of the window of distance0 that a tile needs
    KN0: tl.constexpr,
    KM1: tl.constexpr,
    KN1: tl.constexpr,
    KM2: tl.constexpr,
    KN2: tl.constexpr,
):
    TILES_N: tl.constexpr = W // BN
    TILES: tl.constexpr = (H // BM) * TILES_N
    image = pid // TILES
    tile = pid % TILES
    i = tile // TILES_N * BM
    j = tile % TILES_N * BN
    total = tl.zeros((BM, BN), tl.float32)
    total = resample(
        total, image, i, j, distance2_ptr, rows2_ptr, columns2_ptr, H // 16, W // 16, H, W, REACH, BM, BN, KM2, KN2
    )
    total = resample(
        total, image, i, j, distance1_ptr, rows1_ptr, columns1_ptr, H // 8, W // 8, H, W, REACH, BM, BN, KM1, KN1
    )
    total = resample(
        total, image, i, j, distance0_ptr, rows0_ptr, columns0_ptr, H // 4, W // 4, H, W, REACH, BM, BN, KM0, KN0
    )
    offsets = (i + tl.arange(0, BM))[:, None] * W + (j + tl.arange(0, BN))[None, :]
    tl.store(map_ptr + image * (H * W) + offsets, total)
    # A maximum may drop NaN: a broken image would pass as a good one.
    broken = total != total
    peak = tl.max(tl.max(tl.where(broken, 0.0, total), 1), 0)
    any_broken = tl.max(tl.max(broken.to(tl.int32), 1), 0) > 0
    tl.store(peak_ptr + pid, tl.where(any_broken, float("nan"), peak))


# ---- calls


def cosine_call(teacher: str, student: str, distance: str, positions: int, channels: int, batch: int) -> Call:
    """distance (N, positions) fp32 of the features (N, positions, channels) in these buffers."""
    bc = gcd(channels, 256)
    # 2048 elements are one 16-byte load in fp16 for each thread; fewer positions where 128 programs need that.
    bm = 2048 // bc
    while bm > 4 and -(-positions // bm) < 128:
        bm //= 2
    return Call(
        op="map.cosine",
        buffers=(teacher, student, distance),
        constants=(positions, channels, bm, bc),
        programs=batch * -(-positions // bm),
    )


def anomaly_map_call(
    distances: Sequence[str],
    resample: Sequence[tuple[str, str]],
    anomaly_map: str,
    peaks: str,
    height: int,
    width: int,
    batch: int,
) -> Call:
    """distances: at strides 4, 8, 16; resample: rows (H, h), scaled, and columns (W, w) for each.

    These must be `resample_matrix`, smooth or not; peaks is (N, tiles(height, width)), all fp32.
    """
    bm, bn = TILE
    windows = (window(size, stride) for stride in STRIDES for size in TILE)
    return Call(
        op="map.anomaly_map",
        buffers=(*distances, *(name for pair in resample for name in pair), anomaly_map, peaks),
        constants=(height, width, REACH, bm, bn, *windows),
        programs=batch * tiles(height, width),
    )


def tiles(height: int, width: int) -> int:
    """How many peaks an image has."""
    if height % 32 or width % 32 or min(height, width) < 64:
        raise ValueError(f"expected height and width in multiples of 32 from 64 on, got {height} x {width}")
    return height // TILE[0] * (width // TILE[1])


def window(size: int, stride: int) -> int:
    """Inputs that `size` outputs in a row can take a part of, rounded up to what tl.dot takes."""
    # Two inputs for each of the positions, which are less than 1 / stride apart, and one as in window_start.
    needed = -(-(size - 1 + 2 * REACH) // stride) + 3
    return max(16, 1 << (needed - 1).bit_length())


# ---- the same with plain torch


def cosine_reference(teacher: Tensor, student: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(teacher, student, dim=-1)


def anomaly_map_reference(
    distances: Sequence[Tensor], resample: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """distances (N, h, w) -> map (N, H, W), peaks (N, tiles)."""
    parts = (rows @ d @ columns.T for d, (rows, columns) in zip(distances, resample, strict=True))
    total = sum(parts)
    return total, total.unflatten(1, (-1, TILE[0])).unflatten(3, (-1, TILE[1])).amax((2, 4)).flatten(1)
