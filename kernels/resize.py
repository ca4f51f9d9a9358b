"""`..preprocess.resize` in one pass on the GPU, for a frame of any size.

Halving and Pillow's triangle filter are linear and separable, so a pixel is a weighted sum of a rectangle of the
frame, its weights the product of a row's and a column's: pixels = round(rows frame columns^T). The CPU rounds to
whole grey levels after each halving and between the axes, this only once: up to 0.33 levels apart in the mean and
2 at most for 256 x 256 of up to 3840 x 2160.

Frames of 2^31 bytes or more are refused, and those of which a pixel needs more than MAX_TAPS rows or columns.
"""

from dataclasses import dataclass

import numpy as np
import triton
import triton.language as tl

from ..errors import InputError
from .plan import Call

# Of the frame's rows or columns for one pixel, about twice the scale: enough for 7680 x 4320 -> 64 x 64, and for
# sides up to 250 times the network's.
MAX_TAPS = 512
TILE = 16  # pixels a side: 256 programs for 256 x 256, and the smallest that tl.dot takes
CHUNK = 64  # columns of the frame at a time; a tile needs 138 of 1920 for 256


@triton.jit
def resize(
    pid,
    frame_ptr,  # (rows, columns, 3) uint8 BGR
    geometry_ptr,  # (4,) int32: rows, columns, taps_y, taps_x
    row_start_ptr,  # (H,) int32: each pixel's first row of the frame; start + taps_y <= rows
    row_weight_ptr,  # (H, MAX_TAPS) fp32, the first taps_y are used
    column_start_ptr,  # (W,) int32
    column_weight_ptr,  # (W, MAX_TAPS) fp32
    pixels_ptr,  # (H, W, 3) uint8 RGB
    H: tl.constexpr,
    W: tl.constexpr,
    MAX_TAPS: tl.constexpr,
    BM: tl.constexpr,  # rows of a tile; divides H
    BN: tl.constexpr,  # columns of a tile; divides W
    BK: tl.constexpr,  # columns of the frame at a time
):
    TILES_N: tl.constexpr = W // BN
    y = pid // TILES_N * BM + tl.arange(0, BM)
    x = pid % TILES_N * BN + tl.arange(0, BN)
    columns = tl.load(geometry_ptr + 1)
    taps_y = tl.load(geometry_ptr + 2)
    taps_x = tl.load(geometry_ptr + 3)
    row = tl.load(row_start_ptr + y)
    start = tl.load(column_start_ptr + x)
    column = tl.min(start, 0)
    end = tl.max(start, 0) + taps_x
    blue = tl.zeros((BM, BN), tl.float32)
    green = tl.zeros((BM, BN), tl.float32)
    red = tl.zeros((BM, BN), tl.float32)
    while column < end:  # not range(): the interpreter cannot take its bounds from memory
        k = column + tl.arange(0, BK)
        real = (k < end)[None, :]
        b = tl.zeros((BM, BK), tl.float32)
        g = tl.zeros((BM, BK), tl.float32)
        r = tl.zeros((BM, BK), tl.float32)
        tap = 0
        while tap < taps_y:
            weight = tl.load(row_weight_ptr + y * MAX_TAPS + tap)[:, None]
            pixel_ptr = frame_ptr + ((row + tap)[:, None] * columns + k[None, :]) * 3
            b += weight * tl.load(pixel_ptr, mask=real, other=0).to(tl.float32)
            g += weight * tl.load(pixel_ptr + 1, mask=real, other=0).to(tl.float32)
            r += weight * tl.load(pixel_ptr + 2, mask=real, other=0).to(tl.float32)
            tap += 1
        tap_x = k[:, None] - start[None, :]
        used = (tap_x >= 0) & (tap_x < taps_x)
        weights = tl.load(column_weight_ptr + x[None, :] * MAX_TAPS + tap_x, mask=used, other=0.0)
        blue = tl.dot(b, weights, blue, input_precision="ieee")
        green = tl.dot(g, weights, green, input_precision="ieee")
        red = tl.dot(r, weights, red, input_precision="ieee")
        column += BK
    out_ptr = pixels_ptr + (y[:, None] * W + x[None, :]) * 3
    tl.store(out_ptr, grey_level(red))
    tl.store(out_ptr + 1, grey_level(green))
    tl.store(out_ptr + 2, grey_level(blue))


@triton.jit
def grey_level(value):
    return tl.minimum(tl.maximum(tl.floor(value + 0.5), 0.0), 255.0).to(tl.uint8)


def resize_call(
    frame: str,
    geometry: str,
    row_start: str,
    row_weight: str,
    column_start: str,
    column_weight: str,
    pixels: str,
    height: int,
    width: int,
) -> Call:
    """One frame, of the size that the tables are made for; buffers by name."""
    if height % TILE or width % TILE:
        raise ValueError(f"expected height and width in multiples of {TILE}, got {height} x {width}")
    return Call(
        op="resize.resize",
        buffers=(frame, geometry, row_start, row_weight, column_start, column_weight, pixels),
        constants=(height, width, MAX_TAPS, TILE, TILE, CHUNK),
        programs=height // TILE * (width // TILE),
    )


# ---- tables, with NumPy


@dataclass(frozen=True)
class Tables:
    """What `resize` reads besides the frame, for one size of frame; fields as its arguments."""

    geometry: np.ndarray
    row_start: np.ndarray
    row_weight: np.ndarray
    column_start: np.ndarray
    column_weight: np.ndarray


def resample_tables(rows: int, columns: int, height: int, width: int) -> Tables:
    """For frames of (rows, columns) and images of (height, width). Raises InputError beyond the limits above."""
    if rows * columns * 3 >= 2**31:
        raise InputError(f"frame: expected less than 2 GiB, got {columns} x {rows} pixels; send a part of it")
    halvings, small_rows, small_columns = 0, rows, columns
    while small_rows >= 4 * height and small_columns >= 4 * width:
        halvings, small_rows, small_columns = halvings + 1, small_rows // 2, small_columns // 2
    row_start, row_weight = taps(rows, height, halvings)
    column_start, column_weight = taps(columns, width, halvings)
    taps_y, taps_x = row_weight.shape[1], column_weight.shape[1]
    if max(taps_y, taps_x) > MAX_TAPS:
        raise InputError(
            f"frame: {columns} x {rows} pixels are too many for {width} x {height} on the GPU: a pixel would need "
            f"{taps_x} x {taps_y} of them, {MAX_TAPS} a side are the limit; resize the frame before"
        )
    geometry = np.array((rows, columns, taps_y, taps_x), np.int32)
    return Tables(geometry, row_start, padded(row_weight), column_start, padded(column_weight))


def padded(weight: np.ndarray) -> np.ndarray:
    return np.pad(weight, ((0, 0), (0, MAX_TAPS - weight.shape[1])))


def taps(n_in: int, n_out: int, halvings: int) -> tuple[np.ndarray, np.ndarray]:
    """One axis: halved so many times, then Pillow's BILINEAR. -> start (n_out,) int32, weight (n_out, taps) fp32.

    Output i is the sum over t of weight[i, t] * input[start[i] + t]; start + taps <= n_in.
    """
    sizes = [n_in >> level for level in range(halvings + 1)]
    start, weight = triangle(sizes[-1], n_out)
    for fine, coarse in zip(sizes[-2::-1], sizes[:0:-1], strict=True):
        start, weight = before_halving(start, weight, fine, coarse)
    return start.astype(np.int32), weight.astype(np.float32)


def triangle(n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray]:
    """A triangle as wide as two outputs, or two inputs where these are wider; cut at the border, sum 1."""
    scale = n_in / n_out
    support = max(scale, 1.0)
    center = (np.arange(n_out) + 0.5) * scale
    first = np.maximum(np.floor(center - support + 0.5), 0).astype(np.int64)
    last = np.minimum(np.floor(center + support + 0.5), n_in).astype(np.int64)
    start, index = rectangle(first, last, n_in)
    weight = np.maximum(1 - np.abs(index + 0.5 - center[:, None]) / support, 0)
    weight[(index < first[:, None]) | (index >= last[:, None])] = 0
    return start, weight / weight.sum(1, keepdims=True)


def before_halving(start: np.ndarray, weight: np.ndarray, fine: int, coarse: int) -> tuple[np.ndarray, np.ndarray]:
    """The same outputs from `fine` pixels, of which the `coarse` ones are averages by area."""
    n_taps = weight.shape[1]
    first, last = start * fine // coarse, -((start + n_taps) * fine // -coarse)
    fine_start, index = rectangle(first, last, fine)
    # In units of 1 / fine of a coarse pixel, fine pixel i is [i coarse, (i + 1) coarse): parts of two coarse ones.
    j = index * coarse // fine
    part = np.minimum((j + 1) * fine, (index + 1) * coarse) - index * coarse
    made = np.zeros(index.shape)
    for tap, share in ((j - start[:, None], part), (j + 1 - start[:, None], coarse - part)):
        inside = (tap >= 0) & (tap < n_taps)
        value = np.take_along_axis(weight, np.clip(tap, 0, n_taps - 1), 1)
        made += np.where(inside, value * share / fine, 0)
    return fine_start, made


def rectangle(first: np.ndarray, last: np.ndarray, n_in: int) -> tuple[np.ndarray, np.ndarray]:
    """-> start (n,) and indices (n, taps), as many for all, that hold [first, last) and stay within n_in."""
    n_taps = int((last - first).max())
    start = np.minimum(first, n_in - n_taps)
    return start, start[:, None] + np.arange(n_taps)


def resize_reference(frame: np.ndarray, tables: Tables) -> np.ndarray:
    """(H, W, 3) float64 RGB before rounding, from the same tables."""
    rows, columns, taps_y, taps_x = tables.geometry
    matrices = []
    for start, weight, n_in, n_taps in (
        (tables.row_start, tables.row_weight, rows, taps_y),
        (tables.column_start, tables.column_weight, columns, taps_x),
    ):
        matrix = np.zeros((len(start), n_in))
        index = start[:, None] + np.arange(n_taps)
        np.put_along_axis(matrix, index, weight[:, :n_taps].astype(np.float64), 1)
        matrices.append(matrix)
    by_rows = np.tensordot(matrices[0], frame[..., ::-1].astype(np.float64), 1)  # (H, columns, 3)
    return np.einsum("wc,hcb->hwb", matrices[1], by_rows, optimize=True)
