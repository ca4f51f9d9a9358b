"""`..preprocess.resize` in one pass on the GPU, for a frame of any size.

Halving and Pillow's triangle filter are linear and separable, so a pixel is a weighted sum of a rectangle of the
frame, its weights the product of a row's and a column's: pixels = round(rows frame columns^T). The CPU rounds to
whole grey levels after each halving and between the axes, this only once: up to 0.33 levels apart in the mean and
2 at most for 256 x 256 of up to 3840 x 2160.

The weights and where they begin are tables, made on the host for each size of frame (`resize_tables.py`).
"""

import triton
import triton.language as tl

from .plan import Call
from .resize_tables import MAX_TAPS

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
