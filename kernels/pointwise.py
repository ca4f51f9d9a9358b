"""y = [SiLU](W f(x) + bias) [+ residual] at each position, where f is nothing or SiLU(instance norm(x)).

In groups, as two 1x1 convolutions side by side: outputs of group g take the input channels of group g.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .norm import depth, load_norm, silu, store_stats, tile_columns, tile_rows
from .plan import Call


@triton.jit
def pointwise(
    pid,
    x_ptr,  # (N, HW, GROUPS K) fp16 or fp32
    x_stats_ptr,  # None or (N, tiles, 2, GROUPS K) fp32: x is normalised by them, then SiLU
    weight_ptr,  # (COUT, K), dtype of x
    bias_ptr,  # None or (COUT,) fp32
    residual_ptr,  # None or (N, HW, COUT), dtype of x
    y_ptr,  # (N, HW, COUT)
    y_stats_ptr,  # None or (N, tiles, 2, COUT) fp32, of tiles of BM rows
    HW: tl.constexpr,
    K: tl.constexpr,
    COUT: tl.constexpr,
    GROUPS: tl.constexpr,
    X_ROWS: tl.constexpr,  # of a tile of x's statistics
    EPS: tl.constexpr,
    SILU: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,  # divides COUT / GROUPS
    BK: tl.constexpr,  # divides K
):
    TILES: tl.constexpr = (HW + BM - 1) // BM
    TILES_N: tl.constexpr = COUT // BN
    CIN: tl.constexpr = GROUPS * K
    X_TILES: tl.constexpr = (HW + X_ROWS - 1) // X_ROWS
    image = pid // (TILES * TILES_N)
    tile = pid % (TILES * TILES_N) // TILES_N
    n = pid % TILES_N * BN + tl.arange(0, BN)
    m = tile * BM + tl.arange(0, BM)
    inside = (m < HW)[:, None]
    first = pid % TILES_N * BN // (COUT // GROUPS) * K  # input channel of this group
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(x_ptr + (image * HW + m)[:, None] * CIN + (first + k)[None, :], mask=inside, other=0.0)
        if x_stats_ptr is not None:
            mean, scale = load_norm(x_stats_ptr + image * (X_TILES * 2 * CIN), first + k, CIN, HW, X_ROWS, EPS)
            x = silu((x.to(tl.float32) - mean[None, :]) * scale[None, :]).to(x_ptr.dtype.element_ty)
        acc = tl.dot(x, tl.load(weight_ptr + n[None, :] * K + k[:, None]), acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n)[None, :]
    if SILU:
        acc = silu(acc)
    at = (image * HW + m)[:, None] * COUT + n[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=inside)
    if y_stats_ptr is not None:
        tile_ptr = y_stats_ptr + (image * TILES + tile) * (2 * COUT)
        store_stats(tile_ptr, acc, inside, tl.minimum(tile * -BM + HW, BM).to(tl.float32), n, COUT)


def pointwise_call(
    x: str,
    weight: str,
    y: str,
    *,
    positions: int,
    c_in: int,
    c_out: int,
    batch: int,
    groups: int = 1,
    x_stats: str | None = None,
    eps: float = 0.0,
    bias: str | None = None,
    silu: bool = False,
    residual: str | None = None,
    y_stats: str | None = None,
) -> Call:
    """c_in: channels of one group. Statistics, of x and of y, are of tiles of tile_rows(positions) rows."""
    bm = tile_rows(positions)
    tiles = -(-positions // bm)
    bn = tile_columns(tiles, c_out)
    return Call(
        op="pointwise.pointwise",
        buffers=(x, x_stats, weight, bias, residual, y, y_stats),
        constants=(positions, c_in, c_out, groups, bm, eps, silu, bm, bn, depth(bm, c_in)),
        programs=batch * tiles * (c_out // bn),
    )


def pointwise_reference(
    x: Tensor,
    weight: Tensor,
    groups: int = 1,
    eps: float | None = None,
    bias: Tensor | None = None,
    silu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """x (N, HW, groups K); eps: of the norm in front, None without."""
    x = x if eps is None else norm_silu_reference(x, eps)
    parts = zip(x.chunk(groups, 2), weight.chunk(groups), strict=True)
    y = torch.cat([part @ matrix.T for part, matrix in parts], 2)
    y = y if bias is None else y + bias
    y = F.silu(y) if silu else y
    return y if residual is None else y + residual


def norm_silu_reference(x: Tensor, eps: float) -> Tensor:
    return F.silu(F.instance_norm(x.transpose(1, 2), eps=eps)).transpose(1, 2)
