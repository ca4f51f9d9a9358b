"""The folded network's arrays, by name, in the order in which the kernels read them.

A weight buffer's recipe is a function of this file and the names of the arrays it takes ("" for one that the
network does not have). So a bundle stores each array once, whatever engine runs it.
"""

from collections.abc import Mapping

import numpy as np

from .plan import Plan

Array = np.ndarray

KERNEL_ROW = 32  # entries of one row of the first convolution: 7 columns of 4 channels, padded to a power of two


def pack(plan: Plan, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The content of the plan's weight buffers; arrays: the folded network's by name. Raises KeyError."""
    made = {}
    for name, buffer in plan.buffers.items():
        if buffer.kind == "weight":
            function, *sources = buffer.recipe
            value = RECIPES[function](*(arrays[source] if source else None for source in sources))
            made[name] = np.ascontiguousarray(value, dtype=buffer.dtype).reshape(buffer.shape)
    return made


def same(value: Array) -> Array:
    return value


def convolution(weight: Array) -> Array:
    """(C_out, C_in, k, k) -> (k k, C_in, C_out)"""
    c_out, c_in = weight.shape[:2]
    return weight.transpose(2, 3, 1, 0).reshape(-1, c_in, c_out)


def first_convolution(weight: Array) -> Array:
    """(C_out, 3, 7, 7) -> (7 KERNEL_ROW, C_out): each row 7 columns of 4 channels, what is missing is 0."""
    c_out, _, k, _ = weight.shape
    columns = np.zeros((k, KERNEL_ROW // 4, 4, c_out), weight.dtype)
    columns[:, :k, :3] = weight.transpose(2, 3, 1, 0)
    return columns.reshape(k * KERNEL_ROW, c_out)


def pixel_mean(mean: Array) -> Array:
    return np.append(mean, 0)


def depthwise(weight: Array) -> Array:
    """(C, 1, k, k) -> (k k, C)"""
    return weight.reshape(len(weight), -1).T


def stack(*matrices: Array) -> Array:
    """Matrices of the same input, below each other."""
    return np.concatenate(matrices)


def added(*biases: Array) -> Array:
    return np.sum(np.float64(biases), axis=0)


def token_bias(constant: Array, project: Array, bias: Array | None, mix: Array | None = None) -> Array:
    """constant (heads, T, d), what attention adds to each token, behind the projections: (T, C or 2C)."""
    tokens = np.float64(constant).transpose(1, 0, 2).reshape(constant.shape[1], -1)
    queries = tokens @ np.float64(project).T + (0 if bias is None else np.float64(bias))
    return queries if mix is None else np.concatenate((queries, tokens @ np.float64(mix).T), axis=1)


def half_bias(bias: Array) -> Array:
    """A bias for the upper half of the outputs; the lower half has none."""
    return np.append(bias, np.zeros_like(bias))


RECIPES = {
    function.__name__: function
    for function in (
        same,
        convolution,
        first_convolution,
        pixel_mean,
        depthwise,
        stack,
        added,
        token_bias,
        half_bias,
    )
}
