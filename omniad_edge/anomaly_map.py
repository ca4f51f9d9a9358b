"""From teacher and student features to the anomaly map.

Upsampling and smoothing are linear and separable, so a map of size (h, w) becomes A_h m A_w^T with one small
matrix per axis: bilinear with aligned corners, then (optionally) a Gaussian of sigma 4 cut at 4 sigma with
mirrored borders, as the published evaluator does.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SIGMA_PX = 4.0
TRUNCATE = 4.0
SCALE = 1 / 9  # the published evaluator divides the sum by 3 maps x 3 weights of one


@lru_cache(maxsize=64)
def resample_matrix(n_in: int, n_out: int, smooth: bool = True) -> np.ndarray:
    """(n_out, n_in) float64; each row sums to 1. Read-only, shared between callers."""
    position = np.linspace(0, n_in - 1, n_out)
    low = np.clip(np.floor(position).astype(int), 0, max(n_in - 2, 0))
    high = np.minimum(low + 1, n_in - 1)
    matrix = np.zeros((n_out, n_in))
    np.add.at(matrix, (np.arange(n_out), low), 1 - (position - low))
    np.add.at(matrix, (np.arange(n_out), high), position - low)
    if smooth:
        matrix = gaussian_matrix(n_out) @ matrix
    matrix.flags.writeable = False
    return matrix


def gaussian_matrix(n: int) -> np.ndarray:
    """(n, n) float64: scipy.ndimage.gaussian_filter1d(sigma=4, truncate=4, mode="reflect") as a matrix."""
    radius = int(TRUNCATE * SIGMA_PX + 0.5)
    offset = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offset / SIGMA_PX) ** 2)
    index = (np.arange(n)[:, None] + offset) % (2 * n)  # mirrored with the edge repeated: period 2n
    index = np.where(index < n, index, 2 * n - 1 - index)
    matrix = np.zeros((n, n))
    np.add.at(matrix, (np.arange(n)[:, None], index), kernel / kernel.sum())
    return matrix


def anomaly_map(
    teacher: tuple[Tensor, ...], student: tuple[Tensor, ...], height: int, width: int, smooth: bool = True
) -> Tensor:
    """Sum over the scales of (1 - cosine) at each position, brought to the input size, divided by 9.

    teacher, student: three (N, C, h, w) each. Returns (N, height, width), 0 (equal) to 2/3.
    """
    total = 0
    for t, s in zip(teacher, student, strict=True):
        distance = 1 - F.cosine_similarity(t, s, dim=1)  # (N, h, w)
        rows, columns = (
            torch.tensor(resample_matrix(n_in, n_out, smooth)).to(distance)
            for n_in, n_out in ((distance.shape[1], height), (distance.shape[2], width))
        )
        total = total + rows @ distance @ columns.T
    return total * SCALE
