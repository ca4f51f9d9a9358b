"""The folded network, written once over a small set of operations.

`TorchOps` computes it (the float64 reference of every kernel and export); the ONNX export passes operations
that emit graph nodes instead, so there is one definition of inference. To both, a value is a map with
channels, rows and columns; how it lies in memory is their affair.
"""

from math import isqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model import HEADS
from .fold import EPS, MIX_SCALE, Array, Block, Conv, Expand, KeyValue, Local, Network, Query, Residual, Step


def forward(ops, network: Network, pixels):
    """pixels (N, H, W, 3) uint8 RGB -> anomaly_map (N, H, W), smoothed, pred_score (N,), its maximum; embedding.

    embedding (N, D): the teacher's features averaged over all positions, strides 4, 8, 16 side by side.
    """
    teacher = backbone(ops, network, pixels)
    student = decoder(ops, network, neck(ops, network, *teacher))
    return *anomaly_map(ops, network, teacher, student), ops.means(teacher)


def anomaly_map(ops, network: Network, teacher, student):
    total = None
    for t, s, (rows, columns) in zip(teacher, student, network.resample, strict=True):
        part = ops.resample(ops.cosine_distance(t, s), rows, columns)
        total = part if total is None else ops.add(total, part)
    return total, ops.max(total)


def backbone(ops, network: Network, pixels):
    """-> features at strides 4, 8, 16."""
    weights = network.backbone
    x = ops.pixels(pixels, weights.mean, network.height, network.width)
    x = ops.max_pool(ops.conv(x, weights.stem, relu=True))
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
    return ops.decoder_input(x)


def decoder(ops, network: Network, x, block=None):
    """-> student features, ordered as the teacher's. block: what does an Omni-block, if not `omni_block`."""
    students = []
    for index, stage in enumerate(network.stages):
        if index:
            x = ops.expand(x, network.expands[index - 1])
        for weights in stage:
            x = (block or omni_block)(ops, weights, x)
        students.append(x)
    return students[:0:-1]


def omni_block(ops, weights: Block, x):
    y = None if weights.local is None else local(ops, weights.local, x)
    if weights.step1 is None:
        u = ops.pointwise(y, weights.mix)
    elif weights.mix1 is None:
        m = ops.add(spread(ops, weights.step1, project(ops, weights.step1, attend(ops, weights.step1, x)), x), x)
        o = ops.pointwise(attend(ops, weights.step2, m), weights.mix2)
        u = ops.add(ops.pointwise(plus(ops, ops.add(m, x), y), weights.mix), spread(ops, weights.step2, o, x))
    else:
        o = attend(ops, weights.step1, x)
        query = ops.spread(project(ops, weights.step1, o), x)
        o2 = attend(ops, weights.step2, x, query)
        u = ops.add(ops.pointwise(plus(ops, ops.add(x, x), y), weights.mix), ops.pointwise(o2, weights.mix2))
        u = ops.add(u, ops.spread(ops.pointwise(o, weights.mix1), x))
    u = ops.norm_silu(u, EPS * MIX_SCALE**2)
    return ops.add(x, ops.pointwise(u, weights.out, weights.out_bias))


def plus(ops, a, b):
    return a if b is None else ops.add(a, b)


def local(ops, weights: Local, x):
    z3, z5 = (
        ops.norm_silu(ops.pointwise(ops.norm_silu(ops.depthwise(x, depthwise), EPS), pointwise), EPS)
        for depthwise, pointwise in (
            (weights.depthwise3, weights.pointwise3),
            (weights.depthwise5, weights.pointwise5),
        )
    )
    return ops.norm_silu(ops.pointwise(ops.concat(z3, z5), weights.mix), EPS)


def attend(ops, weights: Step, x, query_part=None):
    """One attention step, up to its last projection: on the tokens if these are its queries, else as fine as x.

    query_part: a map added to the queries of learnable keys and values.
    """
    of = weights.attend
    if isinstance(of, Query):
        o = ops.query_attention(of, ops.heads(x, of.key), ops.heads(x, of.value))
    elif isinstance(of, KeyValue):
        o = ops.key_value_attention(of, ops.heads(x, of.query, of.query_bias, query_part), x)
    else:
        query = ops.heads(x, of.query, of.query_bias)
        o = ops.self_attention(query, ops.heads(x, of.key), ops.heads(x, of.value), x)
    if weights.hidden is not None:
        o = ops.silu(ops.pointwise(o, weights.hidden, weights.hidden_bias))
    return o


def project(ops, weights: Step, o):
    if weights.project is not None:
        return ops.pointwise(o, weights.project, weights.project_bias)
    return o if weights.project_bias is None else ops.add_bias(o, weights.project_bias)


def spread(ops, weights: Step, o, x):
    return ops.spread(o, x) if isinstance(weights.attend, Query) else o


class TorchOps:
    """Computes each operation with plain torch, in one dtype; every map is (N, C, H, W)."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype

    def weight(self, value: Array) -> Tensor:
        return torch.tensor(value, dtype=self.dtype)

    def pixels(self, pixels: Tensor, mean: Array, height: int, width: int) -> Tensor:
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

    def add_bias(self, x: Tensor, bias: Array) -> Tensor:
        return x + self.weight(bias)[:, None, None]

    def concat(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat((a, b), dim=1)

    def decoder_input(self, x: Tensor) -> Tensor:
        return x

    def pointwise(self, x: Tensor, weight: Array, bias: Array | None = None) -> Tensor:
        bias = None if bias is None else self.weight(bias)
        return F.conv2d(x, self.weight(weight)[:, :, None, None], bias)

    def depthwise(self, x: Tensor, weight: Array) -> Tensor:
        return F.conv2d(x, self.weight(weight), padding=weight.shape[-1] // 2, groups=x.shape[1])

    def norm_silu(self, x: Tensor, eps: float) -> Tensor:
        return F.silu(F.instance_norm(x, eps=eps))

    def heads(self, x: Tensor, weight: Array, bias: Array | None = None, part: Tensor | None = None) -> Tensor:
        """Projects x, adds the map `part` and splits it: (N, heads, H*W, d)."""
        y = self.pointwise(x, weight, bias)
        y = y if part is None else y + part
        return y.flatten(2).unflatten(1, (HEADS, -1)).transpose(2, 3)

    def query_attention(self, attend: Query, key: Tensor, value: Tensor) -> Tensor:
        p = (self.weight(attend.q) @ key.transpose(2, 3)).softmax(-1)  # (N, heads, T, H*W)
        o = p @ value + self.weight(attend.pe) * value.sum(2, keepdim=True) + self.weight(attend.constant)
        grid = isqrt(o.shape[2])
        return o.transpose(2, 3).reshape(len(o), -1, grid, grid)

    def key_value_attention(self, attend: KeyValue, query: Tensor, x: Tensor) -> Tensor:
        o = (query @ self.weight(attend.k)).softmax(-1) @ self.weight(attend.v)
        return o.transpose(2, 3).reshape(x.shape)

    def self_attention(self, query: Tensor, key: Tensor, value: Tensor, x: Tensor) -> Tensor:
        o = (query @ key.transpose(2, 3)).softmax(-1) @ value
        return o.transpose(2, 3).reshape(x.shape)

    def spread(self, tokens: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(tokens, size=like.shape[2:], mode="nearest")

    def expand(self, x: Tensor, weights: Expand) -> Tensor:
        n, _, height, width = x.shape
        d = len(weights.gamma)
        y = self.pointwise(x, weights.weight).view(n, 2, 2, d, height, width)
        y = y.permute(0, 4, 1, 5, 2, 3).reshape(n, 2 * height, 2 * width, d)
        return F.layer_norm(y, (d,), self.weight(weights.gamma), self.weight(weights.beta)).permute(0, 3, 1, 2)

    def cosine_distance(self, teacher: Tensor, student: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(teacher, student, dim=1)

    def resample(self, x: Tensor, rows: Array, columns: Array) -> Tensor:
        return self.weight(rows) @ x @ self.weight(columns).T

    def max(self, anomaly_map: Tensor) -> Tensor:
        return anomaly_map.amax((1, 2))

    def means(self, maps: list[Tensor]) -> Tensor:
        return torch.cat([x.mean((2, 3)) for x in maps], dim=1)
