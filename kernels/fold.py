"""A trained model in, inference weights out: everything constant is computed once, in float64.

Exact folds, tested against the plain model to 1e-12 (`network.py` says how the weights are used):
- batch norm into the convolution before it; pixel scaling and ImageNet normalisation into the first one
- projections of learnable tokens; the softmax scale; the key bias (a softmax does not see a constant)
- pe, added behind a softmax: of learnable queries pe (sum of V), of learnable keys a constant per channel
- biases in front of an instance norm, which removes them
- the attention outputs' last projections into what follows them, the queries of the second step and `mix`
- upsampling, Gaussian and weights of the anomaly map into one matrix per axis and scale
"""

from dataclasses import dataclass, fields, is_dataclass, replace
from math import prod

import numpy as np
import torch
from torch import nn

from ..anomaly_map import SCALE, resample_matrix
from ..backbone import Bottleneck
from ..model import (
    HEADS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    KeyValueAttention,
    OmniAD,
    OmniBlock,
    QueryAttention,
)

Array = np.ndarray

# What `mix` gives reaches 2e4 in trained networks, close to fp16's limit of 6.5e4. A power of two in the
# weights, and its square in the instance norm's eps, changes nothing else.
MIX_SCALE = 1 / 64
EPS = 1e-5


@dataclass(frozen=True)
class Conv:
    """weight (C_out, C_in, k, k), bias (C_out,); padding keeps the size before the stride."""

    weight: Array
    bias: Array
    stride: int = 1


@dataclass(frozen=True)
class Residual:
    """A ResNet block: convs in a row, ReLU between; project is the residual's 1x1, if any."""

    convs: tuple[Conv, ...]
    project: Conv | None


@dataclass(frozen=True)
class Backbone:
    mean: Array  # (3,), subtracted from the pixels 0..255 so that zero padding stays exact
    stem: Conv
    layers: tuple[tuple[Residual, ...], ...]


@dataclass(frozen=True)
class Neck:
    down0: Conv
    lateral1: Conv
    down1: Conv
    lateral2: Conv
    fuse: Conv
    blocks: tuple[Residual, ...]


@dataclass(frozen=True)
class Query:
    """Learnable queries: o = softmax(q K) V + pe (sum of V) + constant, K = key x, V = value x."""

    q: Array  # (heads, T, d), scaled by 1/sqrt(d)
    key: Array  # (C, C)
    value: Array  # (C, C)
    pe: Array  # (heads, T, 1)
    constant: Array  # (heads, T, d): value bias times (1 + H W pe)


@dataclass(frozen=True)
class KeyValue:
    """Learnable keys and values: o = softmax(Q k) v, Q = query x + query_bias."""

    query: Array  # (C, C), scaled by 1/sqrt(d)
    query_bias: Array | None  # (C,)
    k: Array  # (heads, d, T)
    v: Array  # (heads, T, d)


@dataclass(frozen=True)
class Self:
    """All from the input: o = softmax(Q K) V."""

    query: Array
    query_bias: Array
    key: Array
    value: Array


@dataclass(frozen=True)
class Step:
    """One attention step: attend, then (mlp output only) SiLU(hidden o + hidden_bias), then project.

    project is None for output "none"; project_bias then holds what the attention still lacks. The second step
    has neither: its projection is in the block's mix2, and an instance norm removes the bias.
    """

    attend: Query | KeyValue | Self
    hidden: Array | None
    hidden_bias: Array | None
    project: Array | None
    project_bias: Array | None


@dataclass(frozen=True)
class Local:
    depthwise3: Array  # (C, 1, 3, 3)
    pointwise3: Array  # (C, C)
    depthwise5: Array  # (C, 1, 5, 5)
    pointwise5: Array  # (C, C)
    mix: Array  # (C, 2C)


@dataclass(frozen=True)
class Block:
    """An Omni-block; mix, mix1 and mix2 carry MIX_SCALE.

    mix1 is there where learnable queries are followed by learnable keys and values, as in the paper. What the
    first step's tokens add to the second step's queries and to mix is then projected on the tokens, not on the
    map: step1.project and its bias give the part of the queries (their own bias too), mix1 the part of mix.
    """

    step1: Step | None
    step2: Step | None
    local: Local | None
    mix: Array  # (C, C)
    mix1: Array | None  # (C, C)
    mix2: Array | None  # (C, C)
    out: Array  # (C, C)
    out_bias: Array  # (C,)


@dataclass(frozen=True)
class Expand:
    weight: Array  # (4D, 2D)
    gamma: Array  # (D,)
    beta: Array  # (D,)


@dataclass(frozen=True)
class Network:
    """Inference weights, float64, of one model for one input size; `stages[0]` is the coarsest."""

    height: int
    width: int
    tokens: int
    backbone: Backbone
    neck: Neck
    stages: tuple[tuple[Block, ...], ...]
    expands: tuple[Expand, ...]
    resample: tuple[tuple[Array, Array], ...]  # rows (H, h), scaled, and columns (W, w)


def fold(model: OmniAD) -> Network:
    """Inference weights of `model`, for its configuration's input size."""
    config = model.config
    height, width = config.height, config.width
    stages = tuple(
        tuple(fold_block(block, prod((height >> 5 - i, width >> 5 - i))) for block in stage)
        for i, stage in enumerate(model.decoder.stages)
    )
    expands = tuple(
        Expand(array(e.expand.weight), array(e.norm.weight), array(e.norm.bias)) for e in model.decoder.expands
    )
    neck = {
        name: fold_conv(getattr(model.neck, name).conv, getattr(model.neck, name).norm)
        for name in ("down0", "lateral1", "down1", "lateral2", "fuse")
    }
    return Network(
        height=height,
        width=width,
        tokens=config.tokens,
        backbone=fold_backbone(model.teacher),
        neck=Neck(**neck, blocks=tuple(map(fold_residual, model.neck.blocks))),
        stages=stages,
        expands=expands,
        resample=tuple(
            (SCALE * resample_matrix(height // s, height), resample_matrix(width // s, width)) for s in (4, 8, 16)
        ),
    )


def fold_backbone(teacher: nn.Module) -> Backbone:
    stem = fold_conv(teacher.conv1, teacher.bn1)
    scale = 255 * np.array(IMAGENET_STD)[:, None, None]
    layers = (teacher.layer1, teacher.layer2, teacher.layer3)
    return Backbone(
        mean=255 * np.array(IMAGENET_MEAN),
        stem=Conv(stem.weight / scale, stem.bias, stem.stride),
        layers=tuple(tuple(map(fold_residual, layer)) for layer in layers),
    )


def fold_residual(block: nn.Module) -> Residual:
    names = ("1", "2", "3") if isinstance(block, Bottleneck) else ("1", "2")
    convs = tuple(fold_conv(getattr(block, f"conv{n}"), getattr(block, f"bn{n}")) for n in names)
    return Residual(convs, None if block.downsample is None else fold_conv(*block.downsample))


def fold_conv(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Conv:
    """Batch norm, in its inference form, into the convolution before it."""
    scale = array(norm.weight) / np.sqrt(array(norm.running_var) + norm.eps)
    bias = 0 if conv.bias is None else array(conv.bias)
    return Conv(
        weight=array(conv.weight) * scale[:, None, None, None],
        bias=(bias - array(norm.running_mean)) * scale + array(norm.bias),
        stride=conv.stride[0],
    )


def fold_block(block: OmniBlock, positions: int) -> Block:
    mix = array(block.mix.weight) * MIX_SCALE
    step1 = step2 = mix1 = mix2 = None
    if block.global_branch is not None:
        step1 = fold_step(block.global_branch.step1, positions)
        step2 = fold_step(block.global_branch.step2, positions)
        mix2 = mix.copy() if step2.project is None else mix @ step2.project
        step2 = replace(step2, project=None, project_bias=None)
        if isinstance(step1.attend, Query) and isinstance(step2.attend, KeyValue):
            step1, step2, mix1 = join(step1, step2, mix)
    local = None
    if block.local_branch is not None:
        local = Local(
            **{n: array(getattr(block.local_branch, n).weight) for n in ("depthwise3", "depthwise5")},
            **{
                n: array(getattr(block.local_branch, n).weight)[:, :, 0, 0]
                for n in ("pointwise3", "pointwise5", "mix")
            },
        )
    return Block(step1, step2, local, mix, mix1, mix2, array(block.out.weight), array(block.out.bias))


def join(step1: Step, step2: Step, mix: Array) -> tuple[Step, Step, Array]:
    """The first step's projection merged with the second's queries, and with mix (mix1)."""
    keys = step2.attend
    project = np.eye(len(mix)) if step1.project is None else step1.project
    bias = np.zeros(len(mix)) if step1.project_bias is None else step1.project_bias
    part = replace(step1, project=keys.query @ project, project_bias=keys.query @ bias + keys.query_bias)
    return part, replace(step2, attend=replace(keys, query_bias=None)), mix @ project


def fold_step(step: nn.Module, positions: int) -> Step:
    attend, constant = fold_attention(step, positions)
    hidden = hidden_bias = project = None
    out = step.out
    if isinstance(out, nn.Sequential):
        hidden, hidden_bias = array(out[0].weight), array(out[0].bias) + array(out[0].weight) @ constant
        project, project_bias = array(out[2].weight), array(out[2].bias)
    elif isinstance(out, nn.Linear):
        project, project_bias = array(out.weight), array(out.bias) + array(out.weight) @ constant
    else:
        project_bias = constant if constant.any() else None
    return Step(attend, hidden, hidden_bias, project, project_bias)


def fold_attention(step: nn.Module, positions: int) -> tuple[Query | KeyValue | Self, Array]:
    """The step's attention and the constant (C,) that is still to be added to its result."""
    dim = step.q.in_features
    scale = (dim // HEADS) ** -0.5
    query, query_bias = scale * array(step.q.weight), scale * array(step.q.bias)
    key, value = np.split(array(step.kv.weight), 2)
    key_bias, value_bias = np.split(array(step.kv.bias), 2)
    if isinstance(step, QueryAttention):
        pe = array(step.pe)[0]
        constant = (1 + positions * pe) * value_bias.reshape(HEADS, 1, -1)
        q = heads(array(step.tokens)[0] @ query.T + query_bias)
        return Query(q, key, value, pe, constant), np.zeros(dim)
    if isinstance(step, KeyValueAttention):
        tokens = array(step.tokens)[0]
        k, v = heads(tokens @ key.T + key_bias), heads(tokens @ value.T + value_bias)
        return KeyValue(query, query_bias, k.transpose(0, 2, 1), v), (array(step.pe)[0] @ v).reshape(dim)
    return Self(query, query_bias, key, value), value_bias


def named_arrays(value, prefix: str = "") -> dict[str, Array]:
    """Path -> array of the nested dataclasses of a folded network, like "stages.0.2.mix"."""
    if isinstance(value, np.ndarray):
        return {prefix: value}
    if is_dataclass(value):
        children = [(field.name, getattr(value, field.name)) for field in fields(value)]
    elif isinstance(value, tuple):
        children = [(str(index), child) for index, child in enumerate(value)]
    else:
        return {}
    named = {}
    for name, child in children:
        named |= named_arrays(child, f"{prefix}.{name}" if prefix else name)
    return named


def heads(tokens: Array) -> Array:
    """(T, C) -> (heads, T, d)"""
    return tokens.reshape(len(tokens), HEADS, -1).transpose(1, 0, 2)


def array(parameter: torch.Tensor) -> Array:
    return parameter.detach().cpu().double().numpy()
