"""What an Omni-block's branches give, mixed: u = W2 o + W (2 x + SiLU(instance norm(y))) + tokens, spread.

o: of the attention over learnable keys; x: the block's input, once for each of the global branch's residuals;
y: the local branch's last convolution; tokens: what the learnable queries gathered, already projected.
"""

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .norm import depth, load_norm, silu, store_stats, tile_columns, tile_rows
from .plan import Call
from .pointwise import norm_silu_reference


@triton.jit
def mix(
    pid,
    o_ptr,  # (N, H W, C) fp16 or fp32
    x_ptr,  # (N, H W, C), dtype of o
    y_ptr,  # None or (N, H W, C), dtype of o
    y_stats_ptr,  # (N, tiles, 2, C) fp32, if there is y; of tiles of BM rows
    weight2_ptr,  # (C, C), dtype of o
    weight_ptr,  # (C, C), dtype of o
    tokens_ptr,  # (N, GRID GRID, TOKENS_STRIDE) fp32, from column TOKENS_OFFSET on
    u_ptr,  # (N, H W, C), dtype of o
    u_stats_ptr,  # (N, tiles, 2, C) fp32, of tiles of BM rows
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    GRID: tl.constexpr,
    TOKENS_STRIDE: tl.constexpr,
    TOKENS_OFFSET: tl.constexpr,
    EPS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,  # divides C
    BK: tl.constexpr,  # divides C
):
    HW: tl.constexpr = H * W
    TILES: tl.constexpr = (HW + BM - 1) // BM
    TILES_N: tl.constexpr = C // BN
    image = pid // (TILES * TILES_N)
    tile = pid % (TILES * TILES_N) // TILES_N
    n = pid % TILES_N * BN + tl.arange(0, BN)
    m = tile * BM + tl.arange(0, BM)
    inside = (m < HW)[:, None]
    dtype = o_ptr.dtype.element_ty
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, C, BK):
        k = start + tl.arange(0, BK)
        at = (image * HW + m)[:, None] * C + k[None, :]
        o = tl.load(o_ptr + at, mask=inside, other=0.0)
        acc = tl.dot(o, tl.load(weight2_ptr + n[None, :] * C + k[:, None]), acc, input_precision="ieee")
        z = 2.0 * tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if y_ptr is not None:
            y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
            mean, scale = load_norm(y_stats_ptr + image * (TILES * 2 * C), k, C, HW, BM, EPS)
            z += silu((y - mean[None, :]) * scale[None, :])
        weight = tl.load(weight_ptr + n[None, :] * C + k[:, None])
        acc = tl.dot(z.to(dtype), weight, acc, input_precision="ieee")
    token = m // W * GRID // H * GRID + m % W * GRID // W
    at = (image * (GRID * GRID) + token)[:, None] * TOKENS_STRIDE + TOKENS_OFFSET + n[None, :]
    acc += tl.load(tokens_ptr + at, mask=inside, other=0.0)
    tl.store(u_ptr + (image * HW + m)[:, None] * C + n[None, :], acc.to(dtype), mask=inside)
    count = tl.minimum(tile * -BM + HW, BM).to(tl.float32)
    store_stats(u_stats_ptr + (image * TILES + tile) * (2 * C), acc, inside, count, n, C)


def mix_call(
    o: str,
    x: str,
    y: str | None,
    y_stats: str | None,
    weight2: str,
    weight: str,
    tokens: str,
    u: str,
    u_stats: str,
    *,
    height: int,
    width: int,
    channels: int,
    grid: int,
    tokens_stride: int,
    tokens_offset: int,
    eps: float,
    batch: int,
) -> Call:
    """grid: tokens a side. Statistics are of tiles of tile_rows(height * width) rows."""
    bm = tile_rows(height * width)
    tiles = -(-height * width // bm)
    bn = tile_columns(tiles, channels)
    return Call(
        op="mix.mix",
        buffers=(o, x, y, y_stats, weight2, weight, tokens, u, u_stats),
        constants=(height, width, channels, grid, tokens_stride, tokens_offset, eps, bm, bn, depth(bm, channels)),
        programs=batch * tiles * (channels // bn),
    )


def mix_reference(
    o: Tensor, x: Tensor, y: Tensor | None, weight2: Tensor, weight: Tensor, tokens: Tensor, eps: float, size
) -> Tensor:
    """tokens (N, grid grid, C); size: height and width."""
    z = 2 * x if y is None else 2 * x + norm_silu_reference(y, eps)
    return o @ weight2.T + z @ weight.T + spread_reference(tokens, size)


def spread_reference(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, grid grid, C) -> (N, height width, C), nearest."""
    grid = round(tokens.shape[1] ** 0.5)
    image = tokens.transpose(1, 2).unflatten(2, (grid, grid))
    return F.interpolate(image, size=size, mode="nearest").flatten(2).transpose(1, 2)
