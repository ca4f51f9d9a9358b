"""The graphs in 8 bits: what is quantised in them, and that their arithmetic is the network's."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from golden import golden_model
from omniad_edge.engine import OnnxRuntimeEngine
from omniad_edge.export.onnx_graph import build_graph, weights_message
from omniad_edge.export.quantised_graph import FORMATS, activation_ranges, build_quantised_graph
from omniad_edge.kernels.fold import fold

NETWORK = {"backbone": "resnet18", "depths": (1, 1, 1, 1), "height": 64, "width": 64}


@pytest.fixture(scope="module")
def network():
    return fold(golden_model(**NETWORK))


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def ranges(network, pixels) -> list[tuple[float, float]]:
    return activation_ranges(network, pixels)


@pytest.fixture(scope="module")
def plain(network) -> tuple[bytes, bytes]:
    """The fp32 graph and the weights of all graphs, which are stored in fp16."""
    graph, weights = build_graph(network, half=False, half_weights=True)
    return graph, weights_message(weights)


@pytest.fixture(params=FORMATS)
def name(request) -> str:
    return request.param


@pytest.fixture
def model(network, plain, ranges, name) -> onnx.ModelProto:
    return onnx.load_from_string(build_quantised_graph(network, name, True, ranges) + plain[1])


def test_it_is_a_valid_model_of_standard_operators_that_shares_the_weights(model, plain, name):
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    stored = {tensor.name for tensor in onnx.load_from_string(plain[1]).graph.initializer}
    own = [tensor for tensor in model.graph.initializer if tensor.name not in stored]
    assert sum(len(tensor.raw_data) for tensor in own) < 300_000


def test_what_multiplies_in_8_bits(model, name):
    made_by = {output: node for node in model.graph.node for output in node.output}
    named = {tensor.name: tensor for tensor in model.graph.initializer}
    quantised, plain = [], []
    for node in model.graph.node:
        if node.op_type in ("Conv", "MatMul"):
            sources = [made_by.get(name) for name in node.input[:2]]
            both = all(source is not None and source.op_type == "DequantizeLinear" for source in sources)
            (quantised if both else plain).append(node)
            if both:  # the weights' scales are one a channel, those of activations single numbers
                shapes = [tuple(named[source.input[1]].dims) for source in sources]
                assert shapes[0] == () and len(shapes[1]) == 1
    first, *others = (node for node in plain if node.op_type == "Conv")
    assert first is next(node for node in model.graph.node if node.op_type == "Conv")
    assert others and all("group" in {attribute.name for attribute in node.attribute} for node in others)
    assert len(quantised) > 50
    types = {named[n.input[2]].data_type for n in model.graph.node if n.op_type == "QuantizeLinear"}
    assert types == {FORMATS[name].type, FORMATS[name].weight_type}


def test_tensorrt_gets_neither_zero_points_nor_uint8_nor_int32(model, name):
    if not FORMATS[name].half:
        pytest.skip("the graph for CPUs has all of them")
    named = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            step, zero = (named[name] for name in node.input[1:])
            assert zero.data_type in (TensorProto.INT8, TensorProto.FLOAT8E4M3FN)
            assert not numpy_helper.to_array(zero).astype(np.float32).any()
            assert (numpy_helper.to_array(step) > 0).all()


def test_its_map_is_the_networks_to_8_bits(model, plain, pixels, name):
    truth = OnnxRuntimeEngine(plain[0] + plain[1], threads=1).run(pixels)[0]
    engine = OnnxRuntimeEngine(model.SerializeToString(), threads=1, as_written=FORMATS[name].half)
    maps, scores = engine.run(pixels)
    assert (scores == maps.max((1, 2))).all()
    error = np.abs(maps - truth).max()
    assert error > 1e-5  # it does compute in 8 bits
    assert error <= 2 * rounded_error(plain, pixels, truth)


def rounded_error(plain, pixels, truth) -> float:
    """How far off the fp32 graph is when its convolutions' and projections' weights alone are rounded to 5 bits.

    An activation of 8 bits is off by half a step of 127, or fp8's by one of 8; a weight so rounded by one of 32.
    """
    model = onnx.load_from_string(plain[1])
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.ndim in (2, 4) and tensor.data_type == TensorProto.FLOAT16:
            step = np.abs(value).reshape(len(value), -1).max(1).reshape(-1, *[1] * (value.ndim - 1)) / 15.5
            rounded = np.round(value / np.maximum(step, 1e-30)) * step
            tensor.CopyFrom(numpy_helper.from_array(rounded.astype(np.float16), tensor.name))
    maps = OnnxRuntimeEngine(plain[0] + model.SerializeToString(), threads=1).run(pixels)[0]
    return np.abs(maps - truth).max()


def test_a_channel_without_weights_keeps_its_bias(pixels):
    """As pruned by its norm: the bias has more steps of such weights than int32 holds."""
    pruned = golden_model(**NETWORK)
    norm = pruned.teacher.layer1[0].bn2
    with torch.no_grad():
        norm.weight[3], norm.bias[3] = 1e-12, 5.0
    network = fold(pruned)
    graph, weights = build_graph(network, half=False, half_weights=True)
    quantised = build_quantised_graph(network, "int8", True, activation_ranges(network, pixels))
    truth, embedding = (
        OnnxRuntimeEngine(one + weights_message(weights), threads=1).run_all(pixels)[2][:, 3]
        for one in (graph, quantised)
    )
    assert (truth > 4).all() and embedding == pytest.approx(truth, rel=0.02)


def test_the_ranges_are_those_of_the_tensors(network, plain, pixels, ranges):
    """Against the graph's own tensors: the input of the first quantised convolution is the pooled stem."""
    model = onnx.load_from_string(plain[0] + plain[1])
    pool = next(node for node in model.graph.node if node.op_type == "MaxPool")
    model.graph.output.append(helper.make_tensor_value_info(pool.output[0], TensorProto.FLOAT, None))
    engine = OnnxRuntimeEngine(model.SerializeToString(), threads=1)
    (values,) = engine.session.run([pool.output[0]], {"pixels": pixels})
    assert ranges[0] == pytest.approx((values.min(), values.max()), rel=1e-3)
