"""Convolutions of the backbone and the neck on channels-last maps, with the batch norm in weights and bias.

conv:     y = relu(conv(x) + bias [+ x2 w2] [+ add]), or relu(conv(x) + bias) + add; an implicit GEMM with
          K = taps * CI. x2 w2 is the 1x1 convolution on the shortcut of a residual block, more of the same sum.
stem:     y = relu(conv(pixels - mean) + bias), 7x7, stride 2
max_pool: y = maximum of 3x3, stride 2, of a map that a ReLU made

Offsets are int32: every map of the whole batch must have fewer than 2^31 elements.
"""

from math import gcd

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from . import pack
from .plan import Call

pack_conv = pack.convolution
pack_stem = pack.first_convolution


@triton.jit
def multiply(acc, x_rows, inside, weight_ptr, n, CO: tl.constexpr, SLICES: tl.constexpr, BK: tl.constexpr):
    """acc + x w: acc (BM, BN) fp32, or (SLICES, BM, BN), where each warp then has its own part of K.

    x_rows (BM,): pointers to SLICES BK values, 0 where not inside; weight_ptr (SLICES BK, CO), columns n (BN,).
    A small tile gives a warp one or two tensor core products per 16 of K, each waiting for the one before; a slice
    gives it the whole tile, so more that do not depend on each other, and a chain as many times shorter.
    """
    k = tl.arange(0, BK)
    if SLICES == 1:
        x = tl.load(x_rows[:, None] + k[None, :], mask=inside[:, None], other=0.0)
        w = tl.load(weight_ptr + k[:, None] * CO + n[None, :])
    else:
        k = tl.arange(0, SLICES)[:, None] * BK + k[None, :]
        x = tl.load(x_rows[None, :, None] + k[:, None, :], mask=inside[None, :, None], other=0.0)
        w = tl.load(weight_ptr + k[:, :, None] * CO + n[None, None, :])
    return tl.dot(x, w, acc, input_precision="ieee")


@triton.jit
def conv(
    pid,
    x_ptr,  # (N, H W, CI) fp16 or fp32
    weight_ptr,  # (KS KS, CI, CO), dtype of x
    bias_ptr,  # (CO,) fp32; the sum of both biases if there is x2
    add_ptr,  # None or (N, OH OW, CO), dtype of x
    x2_ptr,  # None or (N, H2 W2, CI2), dtype of x
    weight2_ptr,  # None or (CI2, CO), dtype of x
    y_ptr,  # (N, OH OW, CO), OH = ceil(H / STRIDE), OW likewise
    H: tl.constexpr,
    W: tl.constexpr,
    CI: tl.constexpr,
    CO: tl.constexpr,
    KS: tl.constexpr,
    STRIDE: tl.constexpr,
    H2: tl.constexpr,
    W2: tl.constexpr,
    CI2: tl.constexpr,
    STRIDE2: tl.constexpr,
    RELU_FIRST: tl.constexpr,  # add comes behind the ReLU
    BM: tl.constexpr,  # positions of a tile
    BN: tl.constexpr,  # channels of a tile; divides CO
    SLICES: tl.constexpr,  # parts of K that are summed apart, see multiply
    BK: tl.constexpr,  # input channels of a slice; SLICES BK divides CI
    BK2: tl.constexpr,  # of x2: SLICES BK2 divides CI2
    STAGES: tl.constexpr,  # of the pipeline of loads
):
    OH: tl.constexpr = (H + STRIDE - 1) // STRIDE
    OW: tl.constexpr = (W + STRIDE - 1) // STRIDE
    M: tl.constexpr = OH * OW
    TILES_N: tl.constexpr = CO // BN
    TILES: tl.constexpr = ((M + BM - 1) // BM) * TILES_N
    STEPS: tl.constexpr = CI // (SLICES * BK)  # of one tap
    image = pid // TILES
    tile = pid % TILES
    m = tile // TILES_N * BM + tl.arange(0, BM)
    n = tile % TILES_N * BN + tl.arange(0, BN)
    row = m // OW * STRIDE - KS // 2
    column = m % OW * STRIDE - KS // 2
    x_base = x_ptr + image * (H * W * CI)
    acc = tl.zeros((BM, BN), tl.float32) if SLICES == 1 else tl.zeros((SLICES, BM, BN), tl.float32)
    # One loop over taps and channels: a loop per tap would drain the pipeline of loads at each tap.
    for step in tl.range(KS * KS * STEPS, num_stages=STAGES):
        tap = step // STEPS  # the interpreter knows no int % constexpr, and no constexpr + tensor
        channel = (step - tap * STEPS) * (SLICES * BK)
        tap_row = tap // KS
        r = row + tap_row
        c = column + (tap - tap_row * KS)
        inside = (r >= 0) & (r < H) & (c >= 0) & (c < W)  # of this image, for the positions from M on too
        x_rows = x_base + ((r * W + c) * CI + channel)
        acc = multiply(acc, x_rows, inside, weight_ptr + (tap * CI + channel) * CO, n, CO, SLICES, BK)
    if x2_ptr is not None:
        x2_base = x2_ptr + image * (H2 * W2 * CI2)
        x2_rows = x2_base + (m // OW * STRIDE2 * W2 + m % OW * STRIDE2) * CI2
        for step in tl.range(CI2 // (SLICES * BK2), num_stages=STAGES):
            channel = step * (SLICES * BK2)
            acc = multiply(acc, x2_rows + channel, m < M, weight2_ptr + channel * CO, n, CO, SLICES, BK2)
    if SLICES > 1:
        acc = tl.sum(acc, 0)
    acc += tl.load(bias_ptr + n)[None, :]
    if RELU_FIRST:
        acc = tl.maximum(acc, 0.0)
    offsets = (image * M + m)[:, None] * CO + n[None, :]
    stored = (m < M)[:, None]
    if add_ptr is not None:
        acc += tl.load(add_ptr + offsets, mask=stored, other=0.0).to(tl.float32)
    if not RELU_FIRST:
        acc = tl.maximum(acc, 0.0)
    tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=stored)


@triton.jit
def stem(
    pid,
    pixels_ptr,  # (N, H, W, 3) uint8 RGB
    weight_ptr,  # (7 BK, CO) fp16 or fp32, of pack_stem
    bias_ptr,  # (CO,) fp32
    mean_ptr,  # (4,) fp32, in units of the pixels; the last is not used
    y_ptr,  # (N, H/2 W/2, CO), dtype of weight
    H: tl.constexpr,
    W: tl.constexpr,
    CO: tl.constexpr,
    BM: tl.constexpr,  # positions of a tile
    BN: tl.constexpr,  # channels of a tile; divides CO
    BK: tl.constexpr,  # one row of the kernel: columns x 4 channels, padded
):
    OW: tl.constexpr = (W + 1) // 2
    M: tl.constexpr = (H + 1) // 2 * OW
    TILES_N: tl.constexpr = CO // BN
    TILES: tl.constexpr = ((M + BM - 1) // BM) * TILES_N
    image = pid // TILES
    tile = pid % TILES
    m = tile // TILES_N * BM + tl.arange(0, BM)
    n = tile % TILES_N * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    channel = k % 4
    row = m // OW * 2 - 3
    column = (m % OW * 2 - 3)[:, None] + (k // 4)[None, :]
    real = (column >= 0) & (column < W) & ((channel < 3) & (k < 28))[None, :]
    offsets = column * 3 + channel[None, :]
    mean = tl.load(mean_ptr + channel)[None, :]
    base = pixels_ptr + image * (H * W * 3)
    acc = tl.zeros((BM, BN), tl.float32)
    for tap in tl.static_range(7):  # bytes cannot be copied asynchronously: unrolled, their loads overlap
        r = (row + tap)[:, None]
        inside = real & (r >= 0) & (r < H)
        pixels = tl.load(base + r * (W * 3) + offsets, mask=inside, other=0).to(tl.float32)
        x = tl.where(inside, pixels - mean, 0.0).to(weight_ptr.dtype.element_ty)
        w = tl.load(weight_ptr + (k + tap * BK)[:, None] * CO + n[None, :])
        acc = tl.dot(x, w, acc, input_precision="ieee")
    y = tl.maximum(acc + tl.load(bias_ptr + n)[None, :], 0.0)
    y_offsets = (image * M + m)[:, None] * CO + n[None, :]
    tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None])


@triton.jit
def max_pool(
    pid,
    x_ptr,  # (N, H W, C), >= 0: the padding is 0
    y_ptr,  # (N, H/2 W/2, C), dtype of x
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,  # positions of a tile
    BC: tl.constexpr,  # channels of a tile; divides C
):
    OW: tl.constexpr = (W + 1) // 2
    M: tl.constexpr = (H + 1) // 2 * OW
    TILES_C: tl.constexpr = C // BC
    TILES: tl.constexpr = ((M + BM - 1) // BM) * TILES_C
    image = pid // TILES
    tile = pid % TILES
    m = tile // TILES_C * BM + tl.arange(0, BM)
    channel = (tile % TILES_C * BC + tl.arange(0, BC))[None, :]
    base = x_ptr + image * (H * W * C)
    y = tl.zeros((BM, BC), x_ptr.dtype.element_ty)
    for tap in tl.static_range(9):
        r = m // OW * 2 - 1 + tap // 3
        c = m % OW * 2 - 1 + tap % 3
        inside = (r >= 0) & (r < H) & (c >= 0) & (c < W)
        x = tl.load(base + (r * W + c)[:, None] * C + channel, mask=inside[:, None], other=0.0)
        y = tl.maximum(y, x)
    tl.store(y_ptr + (image * M + m)[:, None] * C + channel, y, mask=(m < M)[:, None])


def conv_call(
    x: str,
    weight: str,
    bias: str,
    y: str,
    *,
    height: int,
    width: int,
    c_in: int,
    c_out: int,
    kernel: int,
    stride: int,
    batch: int,
    add: str | None = None,
    relu_first: bool = False,
    x2: str | None = None,
    weight2: str | None = None,
    height2: int = 0,
    width2: int = 0,
    c_in2: int = 0,
    stride2: int = 1,
) -> Call:
    """y = relu(conv(x) [+ conv2(x2)] [+ add]), or relu(conv(x)) + add; buffers by name. Channels: 64, 128, ..."""
    check_channels(c_in, c_out, c_in2)
    positions = -(-height // stride) * -(-width // stride)
    bm, bn = tile(positions, c_out)
    slices = 4 if bm * bn <= 1024 else 1  # one for each warp, or none
    # 128 input channels at a time for a small tile (three stages of 32 x 32 take 48 KB), 64 for a larger one.
    bk, bk2 = (gcd(c, 32 * slices if slices > 1 else 64) // slices for c in (c_in, c_in2 or 64))
    sizes = (height, width, c_in, c_out, kernel, stride, height2, width2, c_in2, stride2)
    buffers, tiles = (x, weight, bias, add, x2, weight2, y), (bm, bn, slices, bk, bk2, 4)
    programs = batch * -(-positions // bm) * (c_out // bn)
    return Call("conv.conv", buffers, (*sizes, relu_first, *tiles), programs)


def stem_call(
    pixels: str, weight: str, bias: str, mean: str, y: str, height: int, width: int, c_out: int, batch: int
) -> Call:
    """The first convolution of (N, height, width, 3) uint8 pixels, with its ReLU."""
    check_channels(c_out)
    bm, bn = 32, 64  # 512 programs for 256 x 256; the unrolled loop of a larger tile spills in fp32
    tiles = -(-(-(-height // 2) * -(-width // 2)) // bm)
    sizes = (height, width, c_out, bm, bn, pack.KERNEL_ROW)
    return Call("conv.stem", (pixels, weight, bias, mean, y), sizes, batch * tiles * (c_out // bn))


def max_pool_call(x: str, y: str, height: int, width: int, channels: int, batch: int) -> Call:
    """3x3, stride 2, padding 1."""
    check_channels(channels)
    bm, bc = 16, 64  # one 16-byte load per thread and tap; 256 programs for an image of 256 x 256
    tiles = -(-(-(-height // 2) * -(-width // 2)) // bm)
    return Call("conv.max_pool", (x, y), (height, width, channels, bm, bc), batch * tiles * (channels // bc))


def tile(positions: int, channels: int) -> tuple[int, int]:
    """Positions and channels of a tile: the largest that gives one image 128 programs, for a GPU of 100+ SMs.

    The batch has no say in it, so an image's result does not depend on the batch.
    """
    for bm, bn in ((64, 64), (32, 64), (32, 32), (16, 32)):
        if -(-positions // bm) * (channels // bn) >= 128:
            return bm, bn
    return 16, 16


def check_channels(*channels: int) -> None:
    if any(c % 64 for c in channels):
        raise ValueError(f"expected channels in multiples of 64, got {channels}")


def conv_reference(
    x: Tensor,  # (N, H W, CI), any floating dtype, as all others
    weight: Tensor,  # (KS KS, CI, CO)
    bias: Tensor,
    width: int,
    stride: int = 1,
    add: Tensor | None = None,
    relu_first: bool = False,
    x2: Tensor | None = None,
    weight2: Tensor | None = None,
    width2: int = 0,
    stride2: int = 1,
) -> Tensor:
    kernel = int(len(weight) ** 0.5)
    oihw = weight.unflatten(0, (kernel, kernel)).permute(3, 2, 0, 1)
    y = F.conv2d(to_map(x, width), oihw, bias, stride, kernel // 2)
    if x2 is not None:
        y = y + F.conv2d(to_map(x2, width2), weight2.T[:, :, None, None], None, stride2)
    y = y.flatten(2).transpose(1, 2)
    if add is None:
        return y.relu()
    return y.relu() + add if relu_first else (y + add).relu()


def stem_reference(pixels: Tensor, weight: Tensor, bias: Tensor, mean: Tensor) -> Tensor:
    """pixels (N, H, W, 3) uint8; weight, bias, mean as `stem` takes them, in any floating dtype."""
    oihw = weight.unflatten(0, (7, 8, 4))[:, :7, :3].permute(3, 2, 0, 1)
    x = (pixels.to(mean.dtype) - mean[:3]).to(weight.dtype).permute(0, 3, 1, 2)
    return F.conv2d(x, oihw, bias, 2, 3).relu().flatten(2).transpose(1, 2)


def max_pool_reference(x: Tensor, width: int) -> Tensor:
    return F.max_pool2d(to_map(x, width), 3, 2, 1).flatten(2).transpose(1, 2)


def to_map(x: Tensor, width: int) -> Tensor:
    """(N, H W, C) -> (N, C, H, W)"""
    return x.unflatten(1, (-1, width)).permute(0, 3, 1, 2)
