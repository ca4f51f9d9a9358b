"""The folded network as ONNX: the operations of `kernels.network`, each emitting graph nodes.

A model is stored as graphs without weights plus one `weights.onnx`. Serialised protobuf messages of one type
concatenate to their merge, so `graph bytes + weights bytes` is a complete ONNX model; several graphs (another
layout or precision) share the weights without storing them twice. Only standard operators, opset 17.
"""

from dataclasses import dataclass, replace
from math import isqrt

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from ..engine import DISTANCES
from ..kernels.fold import Array, Conv, Expand, KeyValue, Network, Query, named_arrays
from ..kernels.network import forward
from ..model import HEADS

OPSET = 17
IR_VERSION = 8  # of opset 17; newer ones are refused by older runtimes
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
IMAGE, TOKENS = "image", "tokens"


def build_graph(network: Network, half: bool, half_weights: bool) -> tuple[bytes, dict[str, np.ndarray]]:
    """One graph and the weights it takes.

    half:         compute in fp16 what is safe in it; the rest, and both outputs, stay fp32
    half_weights: matrices are stored in fp16; a graph that computes in fp32 casts them, which runtimes do
                  once while loading
    Returns a serialised ModelProto without weights, and the weights by name. Its input is `pixels`
    (N, H, W, 3) uint8 RGB with any N, its outputs are `anomaly_map` (N, H, W), `pred_score` (N,) and
    `embedding` (N, D), fp32.
    """
    ops = OnnxOps(network, half, half_weights)
    made = forward(ops, network, "pixels")
    return model_of(ops, network, *made).SerializeToString(), ops.weights


def model_of(
    ops: "OnnxOps", network: Network, anomaly_map: "Value", pred_score: "Value", embedding: "Value"
) -> ModelProto:
    """What `ops` emitted, as a model without weights."""
    outputs = (("anomaly_map", anomaly_map), ("pred_score", pred_score), ("embedding", embedding))
    nodes = ops.nodes + [helper.make_node("Identity", [made.name], [name]) for name, made in outputs]
    size = (network.height, network.width)
    graph = helper.make_graph(
        nodes,
        "omniad",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ("N", *size, 3))],
        [
            helper.make_tensor_value_info("anomaly_map", FLOAT, ("N", *size)),
            helper.make_tensor_value_info("pred_score", FLOAT, ("N",)),
            helper.make_tensor_value_info("embedding", FLOAT, ("N", embedding.channels)),
        ],
        [numpy_helper.from_array(value, name) for name, value in ops.constants.items()],
    )
    opset = [helper.make_opsetid("", ops.opset)]
    return helper.make_model(graph, opset_imports=opset, ir_version=ops.ir_version, producer_name="omniad-edge")


def weights_message(weights: dict[str, np.ndarray]) -> bytes:
    """A serialised ModelProto that holds the weights alone."""
    model = ModelProto()
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return model.SerializeToString()


@dataclass(frozen=True)
class Value:
    """A tensor of the graph. As a map it is an image (N, C, H, W) or tokens (N, H*W, C)."""

    name: str
    type: int
    layout: str = ""
    channels: int = 0
    height: int = 0
    width: int = 0


class OnnxOps:
    """Emits each operation in the layout it needs, with a transposition where its input has the other.

    The decoder's residual stream and its matrix products are tokens, its convolutions and norms images. Of the
    layouts tried (also: all channels first; the stream as an image) the fastest on ONNX Runtime and OpenVINO.
    """

    opset, ir_version = OPSET, IR_VERSION

    def __init__(self, network: Network, half: bool, half_weights: bool) -> None:
        self.names = {id(array): name for name, array in named_arrays(network).items()}
        self.compute = HALF if half else FLOAT
        self.half_weights = half_weights
        self.nodes = []
        self.weights: dict[str, np.ndarray] = {}
        self.constants: dict[str, np.ndarray] = {}
        self.emitted: dict[tuple, str] = {}

    # ---- nodes, types and layouts

    def emit(self, op: str, *inputs: Value | str, like: Value | None = None, **attributes) -> Value:
        """A node; the result has the type and layout of `like` (default: of the first input).

        The same operation on the same inputs is emitted once.
        """
        names = [i if isinstance(i, str) else i.name for i in inputs]
        key = (op, *names, repr(attributes))
        if key not in self.emitted:
            self.emitted[key] = f"{op.lower()}_{len(self.nodes)}"
            self.nodes.append(helper.make_node(op, names, [self.emitted[key]], self.emitted[key], **attributes))
        return replace(inputs[0] if like is None else like, name=self.emitted[key])

    def cast(self, x: Value, type: int) -> Value:
        return x if x.type == type else self.emit("Cast", x, like=replace(x, type=type), to=type)

    def weight(self, value: Array, type: int) -> Value:
        name = self.names[id(value)]
        # The anomaly map's matrices stay fp32: the score is read off their product. So do pe and the constant of
        # the tokens, small arrays that stand beside a sum over all positions.
        exact = name.startswith("resample") or name.endswith((".pe", ".constant"))
        half = self.half_weights and value.ndim > 1 and not exact
        self.weights[name] = np.ascontiguousarray(value, dtype=np.float16 if half else np.float32)
        return self.cast(Value(name, HALF if half else FLOAT), type)

    def constant(self, value, dtype=np.float32) -> Value:
        value = np.asarray(value, dtype=dtype)
        key = ("constant", value.dtype.str, value.shape, value.tobytes())
        if key not in self.emitted:
            self.emitted[key] = f"constant_{len(self.constants)}"
            self.constants[self.emitted[key]] = value
        return Value(self.emitted[key], helper.np_dtype_to_tensor_dtype(value.dtype))

    def integers(self, *values: int) -> Value:
        return self.constant(values, np.int64)

    def image(self, x: Value) -> Value:
        if x.layout == IMAGE:
            return x
        y = self.emit("Transpose", x, perm=[0, 2, 1])
        return self.emit("Reshape", y, self.integers(0, 0, x.height, x.width), like=replace(x, layout=IMAGE))

    def tokens(self, x: Value) -> Value:
        if x.layout == TOKENS:
            return x
        y = self.emit("Reshape", x, self.integers(0, 0, x.height * x.width))
        return self.emit("Transpose", y, like=replace(x, layout=TOKENS), perm=[0, 2, 1])

    def decoder_input(self, x: Value) -> Value:
        return self.tokens(x)

    # ---- backbone and neck

    def pixels(self, pixels: str, mean: Array, height: int, width: int) -> Value:
        x = self.emit("Cast", pixels, like=Value("", FLOAT, IMAGE, 3, height, width), to=FLOAT)
        x = self.emit("Sub", x, self.weight(mean, FLOAT))
        return self.cast(self.emit("Transpose", x, perm=[0, 3, 1, 2]), self.compute)

    def conv(self, x: Value, conv: Conv, relu: bool = False) -> Value:
        pads, strides = [conv.weight.shape[-1] // 2] * 4, [conv.stride] * 2
        shape = {"height": -(-x.height // conv.stride), "width": -(-x.width // conv.stride)}
        like, filters = replace(x, channels=len(conv.bias), **shape), self.weight(conv.weight, x.type)
        y = self.convolve(x, filters, conv.weight, conv.bias, like, pads=pads, strides=strides)
        return self.relu(y) if relu else y

    def convolve(
        self, x: Value, filters: Value, weight: Array, bias: Array | None, like: Value, **attributes
    ) -> Value:
        """filters: `weight` as a value (outputs, inputs, rows, columns)"""
        biases = [] if bias is None else [self.weight(bias, x.type)]
        return self.emit("Conv", x, filters, *biases, like=like, **attributes)

    def multiply(self, x: Value, matrix: Value, weight: Array, like: Value) -> Value:
        """matrix: `weight` as a value (inputs, outputs)"""
        return self.emit("MatMul", x, matrix, like=like)

    def max_pool(self, x: Value) -> Value:
        like = replace(x, height=x.height // 2, width=x.width // 2)
        return self.emit("MaxPool", x, like=like, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)

    def relu(self, x: Value) -> Value:
        return self.emit("Relu", x)

    # ---- decoder

    def silu(self, x: Value) -> Value:
        return self.emit("Mul", x, self.emit("Sigmoid", x))

    def add(self, a: Value, b: Value) -> Value:
        if a.layout != b.layout:
            b = self.image(b) if a.layout == IMAGE else self.tokens(b)
        return self.emit("Add", a, self.cast(b, a.type))

    def add_bias(self, x: Value, bias: Array) -> Value:
        return self.emit("Add", self.tokens(x), self.weight(bias, x.type))

    def concat(self, a: Value, b: Value) -> Value:
        a, b = self.image(a), self.image(b)
        return self.emit("Concat", a, b, like=replace(a, channels=a.channels + b.channels), axis=1)

    def pointwise(self, x: Value, weight: Array, bias: Array | None = None) -> Value:
        like, matrix = replace(x, channels=len(weight)), self.weight(weight, x.type)
        if x.layout == TOKENS:
            y = self.multiply(x, self.emit("Transpose", matrix, perm=[1, 0]), weight, like)
            return y if bias is None else self.add_bias(y, bias)
        return self.convolve(x, self.emit("Unsqueeze", matrix, self.integers(2, 3)), weight, bias, like)

    def depthwise(self, x: Value, weight: Array) -> Value:
        x, pads = self.image(x), [weight.shape[-1] // 2] * 4
        return self.emit("Conv", x, self.weight(weight, x.type), group=x.channels, pads=pads)

    def norm_silu(self, x: Value, eps: float) -> Value:
        x = self.cast(self.image(x), FLOAT)
        one, zero = self.constant(np.ones(x.channels)), self.constant(np.zeros(x.channels))
        y = self.emit("InstanceNormalization", x, one, zero, epsilon=eps)
        return self.cast(self.silu(y), self.compute)

    def heads(self, x: Value, weight: Array, bias: Array | None = None, part: Value | None = None) -> Value:
        """Projects x, adds the map `part` and splits it: (N, H*W, heads, d)."""
        y = self.pointwise(self.tokens(x), weight, bias)
        y = y if part is None else self.add(y, part)
        return self.emit("Reshape", y, self.integers(0, 0, HEADS, len(weight) // HEADS))

    def merge(self, o: Value, like: Value) -> Value:
        """(N, heads, H*W, d) -> tokens."""
        o = self.emit("Transpose", o, perm=[0, 2, 1, 3])
        like = replace(like, type=o.type, layout=TOKENS)
        return self.emit("Reshape", o, self.integers(0, 0, like.channels), like=like)

    def attention(self, query: Value, key: Value, value: Value) -> Value:
        """query (N, heads, n, d), key (N, heads, d, m), value (N, heads, m, d) -> (N, heads, n, d)"""
        p = self.emit("Softmax", self.cast(self.emit("MatMul", query, key), FLOAT), axis=3)
        return self.emit("MatMul", self.cast(p, value.type), value)

    def learnt(self, value: Array) -> Value:
        # With a batch axis, and keys stored as the product takes them: otherwise OpenVINO 2026.4 fuses an
        # attention that gives NaN in bf16.
        return self.emit("Unsqueeze", self.weight(value, self.compute), self.integers(0))

    def query_attention(self, attend: Query, key: Value, value: Value) -> Value:
        value = self.emit("Transpose", value, perm=[0, 2, 1, 3])
        o = self.attention(self.learnt(attend.q), self.emit("Transpose", key, perm=[0, 2, 3, 1]), value)
        # The sum over all positions is far larger than the softmax part: it and the tokens stay fp32.
        total = self.emit("ReduceSum", self.cast(value, FLOAT), self.integers(2), keepdims=1)
        total = self.emit("Mul", total, self.weight(attend.pe, FLOAT))
        total = self.emit("Add", total, self.weight(attend.constant, FLOAT))
        grid = isqrt(attend.q.shape[1])
        like = replace(value, type=FLOAT, height=grid, width=grid)
        return self.merge(self.emit("Add", self.cast(o, FLOAT), total), like)

    def key_value_attention(self, attend: KeyValue, query: Value, x: Value) -> Value:
        query = self.emit("Transpose", query, perm=[0, 2, 1, 3])
        return self.merge(self.attention(query, self.learnt(attend.k), self.learnt(attend.v)), x)

    def self_attention(self, query: Value, key: Value, value: Value, x: Value) -> Value:
        query, value = (self.emit("Transpose", t, perm=[0, 2, 1, 3]) for t in (query, value))
        return self.merge(self.attention(query, self.emit("Transpose", key, perm=[0, 2, 3, 1]), value), x)

    def spread(self, t: Value, like: Value) -> Value:
        rows, columns = (np.arange(n) * grid // n for n, grid in ((like.height, t.height), (like.width, t.width)))
        index = self.constant((rows[:, None] * t.width + columns).ravel(), np.int64)
        like = replace(like, type=self.compute, layout=TOKENS)
        return self.emit("Gather", self.cast(self.tokens(t), self.compute), index, like=like, axis=1)

    def expand(self, x: Value, weights: Expand) -> Value:
        d, height, width = len(weights.gamma), x.height, x.width
        y = self.pointwise(self.tokens(x), weights.weight)
        y = self.emit("Reshape", y, self.integers(0, height, width, 2, 2, d))
        y = self.cast(self.emit("Transpose", y, perm=[0, 1, 3, 2, 4, 5]), FLOAT)
        like = replace(y, layout=TOKENS, channels=d, height=2 * height, width=2 * width)
        y = self.emit("Reshape", y, self.integers(0, 4 * height * width, d), like=like)
        gamma, beta = self.weight(weights.gamma, FLOAT), self.weight(weights.beta, FLOAT)
        y = self.emit("LayerNormalization", y, gamma, beta, axis=-1, epsilon=1e-5)
        return self.cast(y, self.compute)

    # ---- anomaly map

    def cosine_distance(self, teacher: Value, student: Value) -> Value:
        t, s = (self.cast(self.image(x), FLOAT) for x in (teacher, student))
        dot = self.emit("ReduceSum", self.emit("Mul", t, s), self.integers(1), keepdims=0)
        norms = (self.reduce("ReduceL2", x, 1) for x in (t, s))
        norms = [self.emit("Max", norm, self.constant(1e-8)) for norm in norms]  # torch's cosine_similarity
        cosine = self.emit("Div", dot, self.emit("Mul", *norms))
        # Named, as an engine may compute up to here in a lower precision than from here on.
        name = DISTANCES[sum(node.output[0] in DISTANCES for node in self.nodes)]
        self.nodes.append(helper.make_node("Sub", [self.constant(1).name, cosine.name], [name], name))
        return replace(cosine, name=name)

    def resample(self, x: Value, rows: Array, columns: Array) -> Value:
        y = self.emit("MatMul", self.weight(rows, FLOAT), x)
        return self.emit("MatMul", y, self.emit("Transpose", self.weight(columns, FLOAT), perm=[1, 0]))

    def max(self, anomaly_map: Value) -> Value:
        return self.reduce("ReduceMax", anomaly_map, 1, 2)

    def means(self, maps: list[Value]) -> Value:
        means = [self.reduce("ReduceMean", self.cast(self.image(x), FLOAT), 2, 3) for x in maps]
        return self.emit("Concat", *means, like=replace(means[0], channels=sum(x.channels for x in maps)), axis=1)

    def reduce(self, op: str, x: Value, *axes: int) -> Value:
        if self.opset < 18:
            return self.emit(op, x, axes=axes, keepdims=0)
        return self.emit(op, x, self.integers(*axes), keepdims=0)
