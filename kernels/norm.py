"""Instance norm without a pass of its own: (x - mean) / sqrt(var + eps) per image and channel.

The call that makes x leaves statistics of its tiles, `stats` (N, tiles, 2, C) fp32: mean and sum of squared
deviations from it, each over the tile's rows (the last tile may have fewer). The call that takes x combines them
(Chan, Golub and LeVeque 1983), which loses nothing where the mean is far larger than the deviation.
"""

from math import isqrt

import triton
import triton.language as tl


def tile_rows(positions: int) -> int:
    """Rows of a tile, of the products and of the statistics: as many as there are tiles, 16 to 128.

    16 is the smallest that tl.dot takes. 64 x 64 positions: 64; 32 x 32: 32; fewer: 16.
    """
    rows = 16
    while rows < min(isqrt(positions), 128):
        rows *= 2
    return rows


def tile_columns(tiles: int, columns: int) -> int:
    """Columns of a tile, so that a large GPU has work for each of its 132 multiprocessors."""
    width = 64
    while width > 16 and tiles * (columns // width) < 128:
        width //= 2
    return width


def depth(rows: int, channels: int) -> int:
    """Channels at a time: with 64 tiles' statistics beside them, 64 would not fit into 99 KiB of shared memory."""
    return 32 if rows >= 64 and channels > 64 else 64


@triton.jit
def silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def store_stats(
    tile_ptr,  # this tile's part of stats, (2, C)
    values,  # (rows, columns) fp32, before they are rounded
    rows,  # (rows, 1) bool: which are the image's
    count,  # how many these are
    columns,  # (columns,) channel numbers
    C: tl.constexpr,
):
    mean = tl.sum(tl.where(rows, values, 0.0), 0) / count
    deviation = tl.where(rows, values - mean[None, :], 0.0)
    tl.store(tile_ptr + columns, mean)
    tl.store(tile_ptr + C + columns, tl.sum(deviation * deviation, 0))


@triton.jit
def load_norm(
    image_ptr,  # this image's part of stats, (TILES, 2, C)
    columns,  # (columns,) channel numbers
    C: tl.constexpr,
    POSITIONS: tl.constexpr,
    ROWS: tl.constexpr,  # of a tile
    EPS: tl.constexpr,
):
    """-> mean and 1 / sqrt(var + eps) of these channels, (columns,) fp32"""
    TILES: tl.constexpr = (POSITIONS + ROWS - 1) // ROWS
    CHUNK: tl.constexpr = 16 if TILES <= 16 else (32 if TILES <= 32 else 64)  # tiles combined at a time
    total = (columns * 0).to(tl.float32)
    for start in range(0, TILES, CHUNK):
        tile = start + tl.arange(0, CHUNK)[:, None]
        count = tl.minimum(tl.maximum(tile * -ROWS + POSITIONS, 0), ROWS).to(tl.float32)
        mean = tl.load(image_ptr + tile * (2 * C) + columns[None, :], mask=tile < TILES, other=0.0)
        total += tl.sum(count * mean, 0)
    mean_of_all = total / POSITIONS
    squares = (columns * 0).to(tl.float32)
    for start in range(0, TILES, CHUNK):
        tile = start + tl.arange(0, CHUNK)[:, None]
        count = tl.minimum(tl.maximum(tile * -ROWS + POSITIONS, 0), ROWS).to(tl.float32)
        at = image_ptr + tile * (2 * C) + columns[None, :]
        shift = tl.load(at, mask=tile < TILES, other=0.0) - mean_of_all[None, :]
        squares += tl.sum(tl.load(at + C, mask=tile < TILES, other=0.0) + count * shift * shift, 0)
    return mean_of_all, 1.0 / tl.sqrt(squares / POSITIONS + EPS)
