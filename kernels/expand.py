"""Twice finer: y = layer norm(pixel shuffle(E x)). The 4D outputs of a position are (2 rows, 2 columns, D)."""

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .plan import Call

EPS = tl.constexpr(1e-5)


@triton.jit
def expand(
    pid,
    x_ptr,  # (N, H W, 2D) fp16 or fp32
    weight_ptr,  # (4D, 2D), dtype of x
    gamma_ptr,  # (D,) fp32
    beta_ptr,  # (D,) fp32
    y_ptr,  # (N, 2H 2W, D), dtype of x
    H: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,  # divides 2D
):
    HW: tl.constexpr = H * W
    TILES: tl.constexpr = (HW + BM - 1) // BM
    K: tl.constexpr = 2 * D
    image = pid // (4 * TILES)
    part = pid % 4  # of the 2 x 2 finer positions
    m = pid % (4 * TILES) // 4 * BM + tl.arange(0, BM)
    n = tl.arange(0, D)  # all of them, so that the norm is this program's own
    inside = (m < HW)[:, None]
    acc = tl.zeros((BM, D), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(x_ptr + (image * HW + m)[:, None] * K + k[None, :], mask=inside, other=0.0)
        weight = tl.load(weight_ptr + (part * D + n)[None, :] * K + k[:, None])
        acc = tl.dot(x, weight, acc, input_precision="ieee")
    acc -= (tl.sum(acc, 1) / D)[:, None]
    acc *= 1.0 / tl.sqrt(tl.sum(acc * acc, 1) / D + EPS)[:, None]
    acc = acc * tl.load(gamma_ptr + n)[None, :] + tl.load(beta_ptr + n)[None, :]
    row, column = 2 * (m // W) + part // 2, 2 * (m % W) + part % 2
    at = (image * (4 * HW) + row * (2 * W) + column)[:, None] * D + n[None, :]
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=inside)


def expand_call(
    x: str, weight: str, gamma: str, beta: str, y: str, height: int, width: int, channels: int, batch: int
) -> Call:
    """channels: D, of the finer map."""
    bm = 16 if height * width <= 1024 else 32
    tiles = -(-height * width // bm)
    return Call(
        op="expand.expand",
        buffers=(x, weight, gamma, beta, y),
        constants=(height, width, channels, bm, 16 if channels > 512 else 32),
        programs=4 * batch * tiles,
        num_warps=8 if channels >= 256 else 4,
    )


def expand_reference(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, size: tuple[int, int]) -> Tensor:
    """x (N, H W, 2D), size: H and W -> (N, 4 H W, D)"""
    height, width = size
    y = (x @ weight.T).view(len(x), height, width, 2, 2, len(gamma)).permute(0, 1, 3, 2, 4, 5)
    return F.layer_norm(y.reshape(len(x), 4 * height * width, -1), gamma.shape, gamma, beta)
