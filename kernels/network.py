"""The folded network, written once over a small set of operations.

`TorchOps` computes it (the float64 reference of every kernel and export); the ONNX export passes operations
that emit graph nodes instead, so there is one definition of inference.

Layouts: images and backbone (N, C, H, W); decoder (N, C, H*W); tokens (N, C, T). Channels stand before
positions throughout, so that depthwise convolutions, instance norms and heads need no transposition.
"""

from math import isqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from ..anomaly_map import SCALE
from ..model import HEADS
from .fold import EPS, MIX_SCALE, Array, Block, Conv, KeyValue, Local, Network, Query, Residual, Step


def forward(ops, network: Network, pixels):
    """pixels (N, H, W, 3) uint8 RGB -> anomaly_map (N, H, W), smoothed, and pred_score (N,), its maximum."""
    teacher = backbone(ops, network, pixels)
    student = decoder(ops, network, neck(ops, network, *teacher))
    total = None
    for t, s, (rows, columns) in zip(teacher, student, network.resample, strict=True):
        part = ops.resample(ops.cosine_distance(t, s), rows * SCALE, columns)
        total = part if total is None else ops.add(total, part)
    return total, ops.max(total)


def backbone(ops, network: Network, pixels):
    weights = network.backbone
    x = ops.max_pool(ops.conv(ops.image(pixels, weights.mean), weights.stem, relu=True))
    features = []
    for layer in weights.layers:
        for block in layer:
            x = residual(ops, block, x)
        features.append(x)
    return features


def residual(ops, block: Residual, x):
    shortcut = x if block.project is None else ops.conv(x, block.project)
    *first, last = block.convs
    for conv in first:
        x = ops.conv(x, conv, relu=True)
    return ops.relu(ops.add(ops.conv(x, last), shortcut))


def neck(ops, network: Network, f0, f1, f2):
    weights = network.neck
    a = ops.add(ops.conv(f0, weights.down0, relu=True), ops.conv(f1, weights.lateral1, relu=True))
    b = ops.add(ops.conv(a, weights.down1, relu=True), ops.conv(f2, weights.lateral2, relu=True))
    x = ops.conv(b, weights.fuse, relu=True)
    for block in weights.blocks:
        x = residual(ops, block, x)
    return x


def decoder(ops, network: Network, x):
    """-> student features ordered as the teacher's, (N, C, H*W) each."""
    height, width = network.height // 32, network.width // 32
    x = ops.flatten(x, height, width)
    students = []
    for index, stage in enumerate(network.stages):
        if index:
            weights = network.expands[index - 1]
            x = ops.expand(x, weights.weight, weights.gamma, weights.beta, height, width)
            height, width = 2 * height, 2 * width
        for block in stage:
            x = omni_block(ops, block, x, height, width)
        students.append(x)
    return students[:0:-1]


def omni_block(ops, weights: Block, x, height: int, width: int):
    mixed = None
    y = None if weights.local is None else local(ops, weights.local, x, height, width)
    if weights.step1 is not None:
        m = ops.add(step(ops, weights.step1, x, height, width), x)
        mixed = step(ops, weights.step2, m, height, width, weights.mix_step2)
        g = ops.add(m, x)
        y = g if y is None else ops.add(g, y)
    direct = ops.pointwise(y, weights.mix)
    mixed = direct if mixed is None else ops.add(direct, mixed)
    mixed = ops.norm_silu(mixed, EPS * MIX_SCALE**2)
    return ops.add(x, ops.pointwise(mixed, weights.out, weights.out_bias))


def local(ops, weights: Local, x, height: int, width: int):
    z = [
        ops.norm_silu(
            ops.pointwise(ops.norm_silu(ops.depthwise(x, depthwise, height, width), EPS), pointwise), EPS
        )
        for depthwise, pointwise in (
            (weights.depthwise3, weights.pointwise3),
            (weights.depthwise5, weights.pointwise5),
        )
    ]
    return ops.norm_silu(ops.pointwise(ops.concat(*z), weights.mix), EPS)


def step(ops, weights: Step, x, height: int, width: int, then: Array | None = None):
    """One attention step behind its output map, (N, C, H*W); `then` is a further matrix on top of it."""
    attend = weights.attend
    if isinstance(attend, Query):
        o = ops.query_attention(attend, ops.pointwise(x, attend.key), ops.pointwise(x, attend.value))
    elif isinstance(attend, KeyValue):
        o = ops.key_value_attention(attend, ops.pointwise(x, attend.query, attend.query_bias))
    else:
        query = ops.pointwise(x, attend.query, attend.query_bias)
        o = ops.self_attention(query, ops.pointwise(x, attend.key), ops.pointwise(x, attend.value))
    if weights.hidden is not None:
        o = ops.silu(ops.pointwise(o, weights.hidden, weights.hidden_bias))
    if weights.project is not None:
        o = ops.pointwise(o, weights.project, weights.project_bias)
    elif weights.project_bias is not None and weights.project_bias.any():
        o = ops.add_channel(o, weights.project_bias)
    if then is not None:
        o = ops.pointwise(o, then)
    if isinstance(attend, Query):
        o = ops.spread(o, nearest(attend.q.shape[1], height, width))
    return o


def nearest(tokens: int, height: int, width: int) -> list[int]:
    """For each position the token whose cell of the square grid it lies in, row by row."""
    grid = isqrt(tokens)
    return [
        row * grid // height * grid + column * grid // width
        for row in range(height)
        for column in range(width)
    ]


class TorchOps:
    """Computes each operation with plain torch, in the input's device and the given dtype."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype

    def weight(self, value: Array) -> Tensor:
        return torch.tensor(value, dtype=self.dtype)

    def image(self, pixels: Tensor, mean: Array) -> Tensor:
        return pixels.to(self.dtype).permute(0, 3, 1, 2) - self.weight(mean)[:, None, None]

    def conv(self, x: Tensor, conv: Conv, relu: bool = False) -> Tensor:
        kernel = conv.weight.shape[-1]
        y = F.conv2d(x, self.weight(conv.weight), self.weight(conv.bias), conv.stride, kernel // 2)
        return F.relu(y) if relu else y

    def max_pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 2, 1)

    def relu(self, x: Tensor) -> Tensor:
        return F.relu(x)

    def silu(self, x: Tensor) -> Tensor:
        return F.silu(x)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def add_channel(self, x: Tensor, bias: Array) -> Tensor:
        return x + self.weight(bias)[:, None]

    def concat(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat((a, b), dim=1)

    def flatten(self, x: Tensor, height: int, width: int) -> Tensor:
        return x.flatten(2)

    def pointwise(self, x: Tensor, weight: Array, bias: Array | None = None) -> Tensor:
        y = self.weight(weight) @ x
        return y if bias is None else self.add_channel(y, bias)

    def depthwise(self, x: Tensor, weight: Array, height: int, width: int) -> Tensor:
        x = x.unflatten(2, (height, width))
        return F.conv2d(x, self.weight(weight), padding=weight.shape[-1] // 2, groups=x.shape[1]).flatten(2)

    def norm_silu(self, x: Tensor, eps: float) -> Tensor:
        return F.silu(F.instance_norm(x, eps=eps))

    def query_attention(self, attend: Query, key: Tensor, value: Tensor) -> Tensor:
        heads, _, d = attend.q.shape
        key, value = (t.unflatten(1, (heads, d)) for t in (key, value))  # (N, heads, d, H*W)
        p = (self.weight(attend.q) @ key).softmax(-1)  # (N, heads, T, H*W)
        total = value.sum(-1)[:, :, None]  # (N, heads, 1, d)
        o = p @ value.transpose(2, 3) + self.weight(attend.pe) * total + self.weight(attend.constant)
        return o.transpose(2, 3).flatten(1, 2)  # (N, C, T)

    def key_value_attention(self, attend: KeyValue, query: Tensor) -> Tensor:
        heads, _, d = attend.k.shape
        query = query.unflatten(1, (heads, d))  # (N, heads, d, H*W)
        p = (self.weight(attend.k) @ query).softmax(2)  # (N, heads, T, H*W)
        return (self.weight(attend.v).transpose(1, 2) @ p).flatten(1, 2)

    def self_attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (t.unflatten(1, (HEADS, -1)) for t in (query, key, value))
        p = (query.transpose(2, 3) @ key).softmax(-1)
        return (value @ p.transpose(2, 3)).flatten(1, 2)

    def spread(self, tokens: Tensor, index: list[int]) -> Tensor:
        return tokens[:, :, index]

    def expand(self, x: Tensor, weight: Array, gamma: Array, beta: Array, height: int, width: int) -> Tensor:
        d = len(gamma)
        y = (self.weight(weight) @ x).reshape(-1, 2, 2, d, height, width)
        y = F.layer_norm(y.permute(0, 4, 1, 5, 2, 3), (d,), self.weight(gamma), self.weight(beta))
        return y.permute(0, 5, 1, 2, 3, 4).flatten(2)

    def cosine_distance(self, teacher: Tensor, student: Tensor) -> Tensor:
        distance = 1 - F.cosine_similarity(teacher.flatten(2), student, dim=1)
        return distance.unflatten(1, teacher.shape[2:])

    def resample(self, x: Tensor, rows: Array, columns: Array) -> Tensor:
        return self.weight(rows) @ x @ self.weight(columns).T

    def max(self, anomaly_map: Tensor) -> Tensor:
        return anomaly_map.amax((1, 2))
