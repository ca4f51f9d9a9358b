"""What the kernel in `resize.py` reads besides the frame, for one size of frame; with NumPy alone.

Frames of 2^31 bytes or more are refused, and those of which a pixel needs more than MAX_TAPS rows or columns.
"""

from dataclasses import dataclass, fields

import numpy as np

from ..errors import InputError

# Of the frame's rows or columns for one pixel, about twice the scale: enough for 7680 x 4320 -> 64 x 64, and for
# sides up to 250 times the network's.
MAX_TAPS = 512


@dataclass(frozen=True)
class Tables:
    """Fields as the kernel's arguments, of which it says the shapes."""

    geometry: np.ndarray
    row_start: np.ndarray
    row_weight: np.ndarray
    column_start: np.ndarray
    column_weight: np.ndarray


TABLES = tuple(field.name for field in fields(Tables))


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
