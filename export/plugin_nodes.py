"""The folded network as `graphs/plugin.onnx`: see `plugin_graph.py` for what is in it.

The graph packs a node's weights out of the arrays that all graphs share, so nothing is stored twice; an engine
does that once, while it is built. The functions take each array out again: their bodies are the same definition of
inference as that of every graph.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from onnx import AttributeProto, FunctionProto, NodeProto, helper, numpy_helper

from ..kernels.fold import Array, Network, named_arrays
from ..kernels.network import anomaly_map, backbone, decoder, neck, omni_block
from ..kernels.plan import Buffer, Plan
from ..kernels.plugin_plan import block_plan, decoder_plan
from .onnx_graph import OPSET, TOKENS, OnnxOps, Value, model_of
from .plugin_graph import BLOCK, DECODER, DOMAIN, VERSION

PLUGIN = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}  # TensorRT's parser looks it up by these


def build_plugin_graph(network: Network, half: bool = True) -> tuple[bytes, dict[str, np.ndarray]]:
    """The graph and the weights it takes, both as `build_graph` returns them, and the same weights.

    half: in fp16, with half_weights; or, for tests, wholly in fp32. Needs Triton, whose kernels it plans with.
    Raises ExportError for a network that they do not cover.
    """
    plan, ops = decoder_plan(network, half=half), OnnxOps(network, half, half_weights=half)
    teacher = backbone(ops, network, "pixels")
    x = neck(ops, network, *teacher)
    arrays = named_arrays(network)
    weights = [packed(ops, buffer, arrays) for buffer in weight_buffers(plan).values()]
    functions, students = decoder_functions(network, plan, half)
    ops.nodes.append(plugin_node(DECODER, "decoder", plan, [x, *weights], students))
    model = model_of(ops, network, *anomaly_map(ops, network, teacher, students), ops.means(teacher))
    model.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
    model.functions.extend(functions)
    return model.SerializeToString(), ops.weights


def plugin_node(
    op: str, name: str, plan: Plan, inputs: Sequence[Value], outputs: Sequence[Value], **parameters
) -> NodeProto:
    names = [[value.name for value in values] for values in (inputs, outputs)]
    attributes = PLUGIN | {"plan": json.dumps(plan.to_dict())} | parameters
    return helper.make_node(op, *names, name, domain=DOMAIN, **attributes)


def weight_buffers(plan: Plan) -> dict[str, Buffer]:
    return {name: buffer for name, buffer in plan.buffers.items() if buffer.kind == "weight"}


def tensor_type(buffer: Buffer) -> int:
    return helper.np_dtype_to_tensor_dtype(np.dtype(buffer.dtype))


# ---- weights, packed for a node


def packed(ops: OnnxOps, buffer: Buffer, arrays: Mapping[str, Array]) -> Value:
    """What is in a weight buffer; the recipes do what those of `kernels/pack.py` do."""
    recipe, *sources = buffer.recipe
    return PACKED[recipe](ops, tensor_type(buffer), *(arrays[source] if source else None for source in sources))


def same(ops: OnnxOps, type: int, value: Array) -> Value:
    return ops.weight(value, type)


def depthwise(ops: OnnxOps, type: int, weight: Array) -> Value:
    rows = ops.emit("Reshape", ops.weight(weight, type), ops.integers(0, -1))
    return ops.emit("Transpose", rows, perm=[1, 0])


def stack(ops: OnnxOps, type: int, *matrices: Array) -> Value:
    return ops.emit("Concat", *(ops.weight(matrix, type) for matrix in matrices), axis=0)


def half_bias(ops: OnnxOps, type: int, bias: Array) -> Value:
    return ops.emit("Concat", ops.weight(bias, type), ops.constant(np.zeros_like(bias)), axis=0)


def token_bias(
    ops: OnnxOps, type: int, constant: Array, project: Array, bias: Array | None, mix: Array | None = None
) -> Value:
    tokens = ops.emit("Transpose", replace(ops.weight(constant, type), layout=TOKENS), perm=[1, 0, 2])
    tokens = ops.emit("Reshape", tokens, ops.integers(0, -1))
    queries = ops.pointwise(tokens, project, bias)
    return queries if mix is None else ops.emit("Concat", queries, ops.pointwise(tokens, mix), axis=1)


PACKED = {function.__name__: function for function in (same, depthwise, stack, half_bias, token_bias)}


# ---- functions, which take them apart


class BodyOps(OnnxOps):
    """Emits the body of a function of x and, behind it, the packed weights of a plan."""

    def __init__(self, network: Network, plan: Plan, half: bool) -> None:
        super().__init__(network, half, half_weights=half)
        shape = plan.buffers["x"].shape
        self.x = Value("x", self.compute, TOKENS, shape[2], plan.height, plan.width)
        self.inputs: dict[str, Value] = {}  # by weight buffer
        self.packed: dict[str, tuple[Value, str, int]] = {}  # by array: the buffer it is in, its recipe and place
        self.token_bias: dict[str, tuple[Value, int, int]] = {}  # by matrix: what follows it, place, of how many
        for name, buffer in weight_buffers(plan).items():
            value = self.inputs[name] = Value(f"weight_{len(self.inputs)}", tensor_type(buffer))
            recipe, *sources = buffer.recipe
            if recipe == "token_bias":
                matrices = [sources[1], *sources[3:]]
                self.token_bias |= {matrix: (value, i, len(matrices)) for i, matrix in enumerate(matrices)}
            else:
                self.packed |= {source: (value, recipe, i) for i, source in enumerate(sources)}

    def function(self, op: str, outputs: Sequence[Value], parameters: Sequence[str] = ()) -> FunctionProto:
        inputs, made = ([value.name for value in values] for values in ((self.x, *self.inputs.values()), outputs))
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
        return helper.make_function(DOMAIN, op, inputs, made, self.nodes, opsets, parameters)

    def constant(self, value, dtype=np.float32) -> Value:
        """A node: a function has no initializers. Equal ones are not shared, they may differ in another block."""
        array, name = np.asarray(value, dtype=dtype), f"constant_{len(self.nodes)}"
        self.nodes.append(helper.make_node("Constant", [], [name], name, value=numpy_helper.from_array(array)))
        return Value(name, helper.np_dtype_to_tensor_dtype(array.dtype))

    def weight(self, value: Array, type: int) -> Value:
        name = self.names[id(value)]
        if name.endswith(".constant"):
            return self.constant(0)  # see `pointwise`
        x, recipe, place = self.packed[name]
        if recipe in ("stack", "half_bias"):
            x = self.part(x, place, 2, axis=0)
        elif recipe == "depthwise":
            rows = self.emit("Transpose", x, perm=[1, 0])
            x = self.emit("Reshape", rows, self.integers(0, 1, *value.shape[2:]))
        return self.cast(x, type)

    def part(self, x: Value, place: int, parts: int, axis: int) -> Value:
        names = [f"{x.name}_{i}" for i in range(parts)]
        if names[0] not in self.emitted:
            self.emitted[names[0]] = names[0]
            self.nodes.append(helper.make_node("Split", [x.name], names, names[0], axis=axis))
        return Value(names[place], x.type)

    def pointwise(self, x: Value, weight: Array, bias: Array | None = None) -> Value:
        name = self.names[id(weight)]
        if name not in self.token_bias:
            return super().pointwise(x, weight, bias)
        # Of tokens; their bias also has what the attention would add to them before.
        return self.emit("Add", super().pointwise(x, weight), self.part(*self.token_bias[name], axis=1))


def decoder_functions(network: Network, plan: Plan, half: bool) -> tuple[list[FunctionProto], list[Value]]:
    """OmniDecoder and OmniBlock; what the decoder gives. plan: of the decoder."""
    places = [(stage, index) for stage, blocks in enumerate(network.stages) for index in range(len(blocks))]
    plans = [block_plan(network, *place, half=half) for place in places]
    bodies = [BodyOps(network, plan, half) for plan in plans]
    made = [
        omni_block(ops, network.stages[stage][index], ops.x)
        for ops, (stage, index) in zip(bodies, places, strict=True)
    ]
    parameters = generalise([ops.nodes for ops in bodies])
    in_order = iter(zip(places, plans, parameters, strict=True))

    def block_node(ops: BodyOps, _, x: Value) -> Value:
        (stage, index), plan, own = next(in_order)
        y = replace(x, name=f"block_{stage}_{index}")
        weights = [ops.inputs[buffer] for buffer in weight_buffers(plan)]
        ops.nodes.append(plugin_node(BLOCK, y.name, plan, [x, *weights], [y], **own))
        return y

    ops = BodyOps(network, plan, half)
    students = decoder(ops, network, ops.x, block=block_node)
    return [
        ops.function(DECODER, students),
        bodies[0].function(BLOCK, made[:1], list(parameters[0])),
    ], students


def generalise(bodies: Sequence[Sequence[NodeProto]]) -> list[dict]:
    """Makes the first body that of all: attributes that differ become parameters. -> each block's values."""
    parameters, names = [{} for _ in bodies], {}
    for nodes in zip(*bodies, strict=True):
        for attributes in zip(*(node.attribute for node in nodes), strict=True):
            values = tuple(attribute.SerializeToString() for attribute in attributes)
            if len(set(values)) == 1:
                continue
            first = attributes[0]
            name = names.setdefault(values, f"{nodes[0].name}_{first.name}")
            for own, attribute in zip(parameters, attributes, strict=True):
                own[name] = helper.get_attribute_value(attribute)
            first.CopyFrom(AttributeProto(name=first.name, type=first.type, ref_attr_name=name))
    return parameters
