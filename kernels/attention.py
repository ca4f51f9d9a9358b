"""Attention of learnable tokens, 8 heads of d channels.

Learnable queries gather from all positions: o = softmax(q K) V + pe (sum of V), in parts as flash decoding does
(Dao et al. 2023); then, merged, tokens = W o + bias. Every position asks learnable keys and values:
o = softmax((Q x + tokens, spread) k) v.

pe (sum of V) can be 400 times the softmax part: it never passes through fp16, W takes it in fp32.
"""

from math import isqrt

import torch
import triton
import triton.language as tl
from torch import Tensor

from .mix import spread_reference
from .norm import silu, tile_columns, tile_rows
from .plan import Call

HEADS = 8
HEADS_ = tl.constexpr(HEADS)
SMALLEST_DOT = 16  # rows, columns and depth of tl.dot


@triton.jit
def attend_tokens(
    pid,
    x_ptr,  # (N, HW, C) fp16 or fp32
    q_ptr,  # (HEADS, T, d), dtype of x, scaled by 1/sqrt(d)
    key_ptr,  # (C, C), dtype of x
    value_ptr,  # (C, C), dtype of x
    part_max_ptr,  # (N, SPLITS, HEADS, T) fp32: largest logit of this part of the positions
    part_sum_ptr,  # (N, SPLITS, HEADS, T) fp32: sum of exp(logit - largest)
    part_o_ptr,  # (N, SPLITS, HEADS, T, d) fp32: sum of exp(logit - largest) V
    part_v_ptr,  # (N, SPLITS, HEADS, d) fp32: sum of V
    HW: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,  # positions of a part, a multiple of BM
    TP: tl.constexpr,  # T and d as tl.arange and tl.dot take them
    DP: tl.constexpr,
    BM: tl.constexpr,  # positions at a time
    BK: tl.constexpr,  # divides C
):
    D: tl.constexpr = C // HEADS_
    dtype = x_ptr.dtype.element_ty
    part = pid // HEADS_  # of all images
    head = pid % HEADS_
    image = part // SPLITS
    t = tl.arange(0, TP)
    d = tl.arange(0, DP)
    k = tl.arange(0, BK)
    q = tl.load(
        q_ptr + (head * T + t)[:, None] * D + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0
    )
    row = (head * D + d)[None, :] * C  # of both weights
    largest = tl.full((TP,), float("-inf"), tl.float32)
    total = tl.zeros((TP,), tl.float32)
    o = tl.zeros((TP, DP), tl.float32)
    sum_v = tl.zeros((DP,), tl.float32)
    for start in range(0, ROWS, BM):
        m = part % SPLITS * ROWS + start + tl.arange(0, BM)
        key = tl.zeros((BM, DP), tl.float32)
        value = tl.zeros((BM, DP), tl.float32)
        for first in range(0, C, BK):
            at = (image * HW + m)[:, None] * C + (first + k)[None, :]
            x = tl.load(x_ptr + at, mask=(m < HW)[:, None], other=0.0)
            weight_at = row + (first + k)[:, None]
            weight = tl.load(key_ptr + weight_at, mask=(d < D)[None, :], other=0.0)
            key = tl.dot(x, weight, key, input_precision="ieee")
            weight = tl.load(value_ptr + weight_at, mask=(d < D)[None, :], other=0.0)
            value = tl.dot(x, weight, value, input_precision="ieee")
        logits = tl.dot(q, tl.trans(key.to(dtype)), input_precision="ieee")
        logits = tl.where((m < HW)[None, :], logits, float("-inf"))
        new = tl.maximum(largest, tl.max(logits, 1))
        p = tl.exp(logits - new[:, None])
        before = tl.exp(largest - new)
        total = total * before + tl.sum(p, 1)
        o = tl.dot(p.to(dtype), value.to(dtype), o * before[:, None], input_precision="ieee")
        sum_v += tl.sum(value, 0)  # of positions beyond the image x is 0, and there is no bias
        largest = new
    at = pid * T + t
    tl.store(part_max_ptr + at, largest, mask=t < T)
    tl.store(part_sum_ptr + at, total, mask=t < T)
    tl.store(part_o_ptr + at[:, None] * D + d[None, :], o, mask=(t < T)[:, None] & (d < D)[None, :])
    tl.store(part_v_ptr + pid * D + d, sum_v, mask=d < D)


@triton.jit
def merge_tokens(
    pid,
    part_max_ptr,  # these four as attend_tokens leaves them
    part_sum_ptr,
    part_o_ptr,
    part_v_ptr,
    weight_ptr,  # (COUT, C) fp16 or fp32
    pe_ptr,  # (HEADS, T) fp32
    bias_ptr,  # (T, COUT) fp32
    y_ptr,  # (N, T, COUT)
    C: tl.constexpr,
    T: tl.constexpr,
    COUT: tl.constexpr,
    SPLITS: tl.constexpr,
    SILU: tl.constexpr,
    DP: tl.constexpr,
    BT: tl.constexpr,  # tokens of a tile
    BN: tl.constexpr,  # divides COUT
):
    D: tl.constexpr = C // HEADS_
    TILES_N: tl.constexpr = COUT // BN
    TILES_T: tl.constexpr = (T + BT - 1) // BT
    image = pid // (TILES_T * TILES_N)
    t = pid % (TILES_T * TILES_N) // TILES_N * BT + tl.arange(0, BT)
    n = pid % TILES_N * BN + tl.arange(0, BN)
    d = tl.arange(0, DP)
    acc = tl.zeros((BT, BN), tl.float32)
    for head in range(HEADS_):
        largest = tl.full((BT,), float("-inf"), tl.float32)
        for split in range(SPLITS):
            at = t + ((image * SPLITS + split) * HEADS_ + head) * T
            largest = tl.maximum(largest, tl.load(part_max_ptr + at, mask=t < T, other=0.0))
        total = tl.zeros((BT,), tl.float32)
        o = tl.zeros((BT, DP), tl.float32)
        sum_v = tl.zeros((DP,), tl.float32)
        for split in range(SPLITS):
            part = (image * SPLITS + split) * HEADS_ + head
            scale = tl.exp(tl.load(part_max_ptr + part * T + t, mask=t < T, other=0.0) - largest)
            total += scale * tl.load(part_sum_ptr + part * T + t, mask=t < T, other=1.0)
            valid = (t < T)[:, None] & (d < D)[None, :]
            at = (part * T + t)[:, None] * D + d[None, :]
            o += scale[:, None] * tl.load(part_o_ptr + at, mask=valid, other=0.0)
            sum_v += tl.load(part_v_ptr + part * D + d, mask=d < D, other=0.0)
        weight = tl.load(weight_ptr + n[None, :] * C + (d + head * D)[:, None], mask=(d < D)[:, None], other=0.0)
        acc = tl.dot((o / total[:, None]).to(weight.dtype), weight, acc, input_precision="ieee")
        of_sum = tl.sum(weight.to(tl.float32) * sum_v[:, None], 0)
        pe = tl.load(pe_ptr + head * T + t, mask=t < T, other=0.0)
        acc += pe[:, None] * of_sum[None, :]
    valid = (t < T)[:, None]
    acc += tl.load(bias_ptr + t[:, None] * COUT + n[None, :], mask=valid, other=0.0)
    if SILU:
        acc = silu(acc)
    at = (image * T + t)[:, None] * COUT + n[None, :]
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit
def attend_positions(
    pid,
    x_ptr,  # (N, H W, C) fp16 or fp32
    query_ptr,  # (C, C), dtype of x, scaled by 1/sqrt(d)
    tokens_ptr,  # (N, GRID GRID, TOKENS_STRIDE) fp32; columns 0 to C are added to the queries
    k_ptr,  # (HEADS, d, T), dtype of x
    v_ptr,  # (HEADS, T, d), dtype of x
    o_ptr,  # (N, H W, C), dtype of x
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    GRID: tl.constexpr,
    TOKENS_STRIDE: tl.constexpr,
    TP: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,  # divides C
):
    D: tl.constexpr = C // HEADS_
    HW: tl.constexpr = H * W
    TILES: tl.constexpr = (HW + BM - 1) // BM
    dtype = x_ptr.dtype.element_ty
    image = pid // (TILES * HEADS_)
    head = pid % HEADS_
    m = pid % (TILES * HEADS_) // HEADS_ * BM + tl.arange(0, BM)
    t = tl.arange(0, TP)
    d = tl.arange(0, DP)
    valid = (m < HW)[:, None] & (d < D)[None, :]
    query = tl.zeros((BM, DP), tl.float32)
    for first in range(0, C, BK):
        k = first + tl.arange(0, BK)
        x = tl.load(x_ptr + (image * HW + m)[:, None] * C + k[None, :], mask=(m < HW)[:, None], other=0.0)
        weight = tl.load(query_ptr + (head * D + d)[None, :] * C + k[:, None], mask=(d < D)[None, :], other=0.0)
        query = tl.dot(x, weight, query, input_precision="ieee")
    token = m // W * GRID // H * GRID + m % W * GRID // W
    at = (image * (GRID * GRID) + token)[:, None] * TOKENS_STRIDE + (head * D + d)[None, :]
    query += tl.load(tokens_ptr + at, mask=valid, other=0.0)
    keys = tl.load(
        k_ptr + (head * D + d)[:, None] * T + t[None, :], mask=(d < D)[:, None] & (t < T)[None, :], other=0.0
    )
    values = tl.load(
        v_ptr + (head * T + t)[:, None] * D + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0
    )
    logits = tl.dot(query.to(dtype), keys, input_precision="ieee")
    logits = tl.where((t < T)[None, :], logits, float("-inf"))
    p = tl.exp(logits - tl.max(logits, 1)[:, None])
    p = p / tl.sum(p, 1)[:, None]
    o = tl.dot(p.to(dtype), values, input_precision="ieee")
    at = (image * HW + m)[:, None] * C + (head * D + d)[None, :]
    tl.store(o_ptr + at, o.to(dtype), mask=valid)


# ---- calls


def padded(n: int) -> int:
    """The next power of two that tl.dot takes."""
    return max(SMALLEST_DOT, 1 << (n - 1).bit_length())


def token_splits(positions: int) -> tuple[int, int]:
    """Into how many parts of how many positions the tokens gather; none is empty. 64 x 64: 16 parts of 256."""
    rows = -(-positions // max(1, isqrt(positions) // 4))
    rows = -(-rows // token_rows(rows)) * token_rows(rows)
    return -(-positions // rows), rows


def token_rows(part: int) -> int:
    """Positions at a time."""
    return min(64, padded(part))


def attend_tokens_call(
    x: str,
    q: str,
    key: str,
    value: str,
    parts: tuple[str, str, str, str],
    *,
    positions: int,
    channels: int,
    tokens: int,
    batch: int,
) -> Call:
    """parts: buffers of part_shapes."""
    splits, rows = token_splits(positions)
    bm = token_rows(rows)
    sizes = (padded(tokens), padded(channels // HEADS), bm, 64 if channels // HEADS <= 32 else 32)
    return Call(
        op="attention.attend_tokens",
        buffers=(x, q, key, value, *parts),
        constants=(positions, channels, tokens, splits, rows, *sizes),
        programs=batch * splits * HEADS,
    )


def part_shapes(positions: int, channels: int, tokens: int) -> tuple[tuple[int, ...], ...]:
    """Of one image's part_max, part_sum, part_o and part_v, all fp32."""
    splits, _ = token_splits(positions)
    d = channels // HEADS
    return (splits, HEADS, tokens), (splits, HEADS, tokens), (splits, HEADS, tokens, d), (splits, HEADS, d)


def merge_tokens_call(
    parts: tuple[str, str, str, str],
    weight: str,
    pe: str,
    bias: str,
    y: str,
    *,
    positions: int,
    channels: int,
    tokens: int,
    c_out: int,
    batch: int,
    silu: bool = False,
) -> Call:
    """positions, channels: of the map that the tokens gathered from."""
    splits, _ = token_splits(positions)
    tiles = -(-tokens // SMALLEST_DOT)
    bn = tile_columns(tiles, c_out)
    return Call(
        op="attention.merge_tokens",
        buffers=(*parts, weight, pe, bias, y),
        constants=(channels, tokens, c_out, splits, silu, padded(channels // HEADS), SMALLEST_DOT, bn),
        programs=batch * tiles * (c_out // bn),
    )


def attend_positions_call(
    x: str,
    query: str,
    tokens: str,
    k: str,
    v: str,
    o: str,
    *,
    height: int,
    width: int,
    channels: int,
    n_tokens: int,
    tokens_stride: int,
    batch: int,
) -> Call:
    bm = tile_rows(height * width)
    tiles = -(-height * width // bm)
    sizes = (padded(n_tokens), padded(channels // HEADS), bm, 64)
    return Call(
        op="attention.attend_positions",
        buffers=(x, query, tokens, k, v, o),
        constants=(height, width, channels, n_tokens, isqrt(n_tokens), tokens_stride, *sizes),
        programs=batch * tiles * HEADS,
    )


# ---- the same with plain torch


def tokens_reference(
    x: Tensor, q: Tensor, key: Tensor, value: Tensor, weight: Tensor, pe: Tensor, bias: Tensor, exact=None
) -> Tensor:
    """attend_tokens and merge_tokens together: (N, T, COUT). exact: dtype of pe (sum of V), x's if None."""
    exact = exact or x.dtype
    k, v = (split_heads(x @ w.T) for w in (key, value))
    o = (q @ k.transpose(2, 3)).softmax(-1) @ v  # (N, heads, T, d)
    rank_one = pe[..., None].to(exact) * split_heads(x.to(exact) @ value.T.to(exact)).sum(2, keepdim=True)
    return merge_heads(o) @ weight.T + merge_heads(rank_one) @ weight.T.to(exact) + bias.to(exact)


def positions_reference(x: Tensor, query: Tensor, tokens: Tensor, k: Tensor, v: Tensor, size) -> Tensor:
    """tokens (N, T, C); size: height and width."""
    asked = split_heads(x @ query.T + spread_reference(tokens, size))
    return merge_heads((asked @ k).softmax(-1) @ v)


def split_heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    return torch.flatten(x.transpose(1, 2), 2)
