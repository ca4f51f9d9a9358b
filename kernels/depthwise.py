"""The 3x3 and the 5x5 depthwise convolution of one map, sharing their loads, and statistics for their norm."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .norm import store_stats, tile_columns, tile_rows
from .plan import Call


@triton.jit
def depthwise(
    pid,
    x_ptr,  # (N, H W, C) fp16 or fp32
    weight3_ptr,  # (9, C), dtype of x
    weight5_ptr,  # (25, C), dtype of x
    y_ptr,  # (N, H W, 2C), dtype of x: 3x3, then 5x5; zero padding
    stats_ptr,  # (N, tiles, 2, 2C) fp32, of tiles of BM rows
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,  # divides C
):
    HW: tl.constexpr = H * W
    TILES: tl.constexpr = (HW + BM - 1) // BM
    TILES_C: tl.constexpr = C // BC
    image = pid // (TILES * TILES_C)
    tile = pid % (TILES * TILES_C) // TILES_C
    c = pid % TILES_C * BC + tl.arange(0, BC)
    m = tile * BM + tl.arange(0, BM)
    row, column = m // W, m % W
    y3 = tl.zeros((BM, BC), tl.float32)
    y5 = tl.zeros((BM, BC), tl.float32)
    for tap in tl.static_range(25):
        dy = tap // 5 - 2
        dx = tap % 5 - 2
        valid = (row + dy >= 0) & (row + dy < H) & (column + dx >= 0) & (column + dx < W)
        at = (image * HW + m + (dy * W + dx))[:, None] * C + c[None, :]
        x = tl.load(x_ptr + at, mask=valid[:, None], other=0.0).to(tl.float32)
        y5 += x * tl.load(weight5_ptr + tap * C + c)[None, :].to(tl.float32)
        if tap // 5 % 4 > 0 and tap % 5 % 4 > 0:  # the middle 3 x 3; on tap alone, so that it is decided now
            y3 += x * tl.load(weight3_ptr + ((tap // 5 - 1) * 3 + tap % 5 - 1) * C + c)[None, :].to(tl.float32)
    inside = (m < HW)[:, None]
    at = (image * HW + m)[:, None] * (2 * C) + c[None, :]
    tl.store(y_ptr + at, y3.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + at + C, y5.to(y_ptr.dtype.element_ty), mask=inside)
    tile_ptr = stats_ptr + (image * TILES + tile) * (4 * C)
    count = tl.minimum(tile * -BM + HW, BM).to(tl.float32)
    store_stats(tile_ptr, y3, inside, count, c, 2 * C)
    store_stats(tile_ptr, y5, inside, count, c + C, 2 * C)


def depthwise_call(
    x: str, weight3: str, weight5: str, y: str, stats: str, height: int, width: int, channels: int, batch: int
) -> Call:
    """Statistics of tiles of tile_rows(height * width) rows."""
    bm = tile_rows(height * width)
    tiles = -(-height * width // bm)
    bc = min(32, tile_columns(tiles, channels))
    return Call(
        op="depthwise.depthwise",
        buffers=(x, weight3, weight5, y, stats),
        constants=(height, width, channels, bm, bc),
        programs=batch * tiles * (channels // bc),
        num_warps=8 if bm >= 64 else 4,  # with 4 the larger tiles spill registers
    )


def depthwise_reference(x: Tensor, weight3: Tensor, weight5: Tensor, height: int, width: int) -> Tensor:
    """x (N, H W, C), weights (k k, C) -> (N, H W, 2C)"""
    image = x.transpose(1, 2).unflatten(2, (height, width))
    parts = [
        F.conv2d(image, w.T.reshape(-1, 1, k, k), padding=k // 2, groups=x.shape[2])
        for w, k in ((weight3, 3), (weight5, 5))
    ]
    return torch.cat(parts, 1).flatten(2).transpose(1, 2)
