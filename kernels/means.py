"""A feature map's mean over its positions, of which the teacher's three make the embedding of an image.

sums:  parts (N, PARTS, C) fp32, each the sum of the features of PART positions; the last may have fewer
means: embedding (N, C0 + C1 + C2) fp32, the parts of three maps added and divided by their positions

Two steps, because few programs that read a whole map would take longer than any launch they stand beside.
Offsets are int32: every buffer of the whole batch must have fewer than 2^31 elements.
"""

from collections.abc import Sequence

import triton
import triton.language as tl

from .plan import Call

PART = 512  # positions: 8 parts of 64 x 64, and 128 of the largest maps
ROWS = 64  # positions or parts at a time
COLUMNS = 32  # channels of a program; divides those of every ResNet


@triton.jit
def column_sums(x_ptr, first, END, columns, STRIDE: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr):
    """Sums of x's rows from `first` on, COUNT of them or up to END -> as `columns`, fp32"""
    total = tl.zeros((ROWS, columns.shape[0]), tl.float32)
    for start in range(0, COUNT, ROWS):
        row = start + tl.arange(0, ROWS)
        real = (row < COUNT) & (first + row < END)
        at = x_ptr + (first + row)[:, None] * STRIDE + columns[None, :]
        total += tl.load(at, mask=real[:, None], other=0.0).to(tl.float32)
    return tl.sum(total, 0)


@triton.jit
def sums(
    pid,
    x_ptr,  # (N, HW, C) fp16 or fp32
    parts_ptr,  # (N, PARTS, C) fp32
    HW: tl.constexpr,
    C: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # divides C
):
    BLOCKS: tl.constexpr = C // COLUMNS
    PARTS: tl.constexpr = (HW + PART - 1) // PART
    part = pid // BLOCKS  # of all images
    columns = pid % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    image = part // PARTS
    total = column_sums(x_ptr + image * (HW * C), part % PARTS * PART, HW, columns, C, PART, ROWS)
    tl.store(parts_ptr + part * C + columns, total)


@triton.jit
def means(
    pid,
    parts0_ptr,  # (N, PARTS, C) fp32, of the finest map
    parts1_ptr,
    parts2_ptr,
    embedding_ptr,  # (N, C0 + C1 + C2) fp32
    HW0: tl.constexpr,
    C0: tl.constexpr,
    HW1: tl.constexpr,
    C1: tl.constexpr,
    HW2: tl.constexpr,
    C2: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # divides each C
):
    BLOCKS: tl.constexpr = (C0 + C1 + C2) // COLUMNS
    image = pid // BLOCKS
    block = pid % BLOCKS
    column = block * COLUMNS  # of the embedding
    here = tl.arange(0, COLUMNS)
    if column < C0:
        P0: tl.constexpr = (HW0 + PART - 1) // PART
        mean = column_sums(parts0_ptr + image * (P0 * C0), 0, P0, column + here, C0, P0, ROWS) / HW0
    elif column < C0 + C1:
        P1: tl.constexpr = (HW1 + PART - 1) // PART
        mean = column_sums(parts1_ptr + image * (P1 * C1), 0, P1, column - C0 + here, C1, P1, ROWS) / HW1
    else:
        P2: tl.constexpr = (HW2 + PART - 1) // PART
        mean = column_sums(parts2_ptr + image * (P2 * C2), 0, P2, column - C0 - C1 + here, C2, P2, ROWS) / HW2
    tl.store(embedding_ptr + image * (C0 + C1 + C2) + column + here, mean)


# ---- calls


def sums_call(x: str, parts: str, positions: int, channels: int, batch: int) -> Call:
    """x (N, positions, channels) -> parts (N, parts_of(positions), channels) fp32."""
    return Call(
        op="means.sums",
        buffers=(x, parts),
        constants=(positions, channels, PART, ROWS, COLUMNS),
        programs=batch * parts_of(positions) * (channels // COLUMNS),
    )


def means_call(parts: Sequence[str], embedding: str, sizes: Sequence[tuple[int, int]], batch: int) -> Call:
    """parts of three maps, whose (positions, channels) are `sizes` -> embedding (N, channels of all) fp32."""
    return Call(
        op="means.means",
        buffers=(*parts, embedding),
        constants=(*(number for size in sizes for number in size), PART, ROWS, COLUMNS),
        programs=batch * sum(channels for _, channels in sizes) // COLUMNS,
    )


def parts_of(positions: int) -> int:
    return -(-positions // PART)
