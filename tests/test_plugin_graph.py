"""The graph for TensorRT's plugin: in ONNX Runtime the same numbers in every reading; what the plugin is given."""

import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

pytest.importorskip("triton", reason="the kernels' plans need Triton: pip install 'omniad-edge[kernels]'")

from test_onnx_graph import SMALL, random_pixels, reference, run

from golden import golden_model
from omniad_edge.errors import ExportError
from omniad_edge.export.onnx_graph import build_graph, weights_message
from omniad_edge.export.plugin_graph import block_nodes, inlined, plan_of, with_kernels, without_functions
from omniad_edge.export.plugin_nodes import build_plugin_graph
from omniad_edge.kernels.fold import fold
from omniad_edge.kernels.pack import RECIPES, pack
from omniad_edge.kernels.plugin_plan import block_plan, decoder_plan, plugin_plans
from omniad_edge.model import BRANCHES
from omniad_edge.onnx_weights import read_weights

READINGS = {"as it is": lambda model: model, "blocks": block_nodes, "inlined": inlined}


@pytest.fixture(scope="module")
def network():
    return fold(golden_model(**(SMALL | {"depths": (1, 1, 2, 1), "attention_output": "mlp"})))


@pytest.fixture(scope="module")
def model(network) -> onnx.ModelProto:
    return complete(*build_plugin_graph(network))


def complete(graph: bytes, weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    return onnx.load_from_string(graph + weights_message(weights))


def plugin_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.domain]


def attributes(node: onnx.NodeProto) -> dict:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


# ---- the same numbers


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    "sizes",
    [
        *({"branches": branches} for branches in BRANCHES),
        {"tokens": 16, "attention_output": "mlp"},
        {"tokens": 36, "attention_output": "none"},
    ],
    ids=str,
)
def test_equals_the_plain_graph(sizes, half):
    trained = golden_model(**(SMALL | sizes))
    network, pixels = fold(trained), random_pixels(trained, 2)
    truth = reference(trained, pixels)
    plain, weights = build_graph(network, half, half_weights=half)
    base = np.abs(run(plain + weights_message(weights), pixels)[0] - truth).max()
    maps, scores, _ = run(complete(*build_plugin_graph(network, half)).SerializeToString(), pixels)
    assert np.abs(maps - truth).max() <= 2 * base + np.finfo(np.float32).eps * np.abs(truth).max()
    assert (scores == maps.max((1, 2))).all()


def test_all_readings_are_valid_and_give_the_same(model):
    pixels = np.random.default_rng(1).integers(0, 256, (1, 64, 96, 3), dtype=np.uint8)
    maps = {}
    for name, reading in READINGS.items():
        read = reading(model)
        onnx.checker.check_model(read, full_check=True)
        maps[name] = run(read.SerializeToString(), pixels)[0]
    for name in READINGS:
        np.testing.assert_array_equal(maps[name], maps["as it is"], err_msg=name)


def test_the_readings_have_the_nodes_they_say(model):
    assert [node.op_type for node in plugin_nodes(model)] == ["OmniDecoder"]
    assert [node.op_type for node in plugin_nodes(block_nodes(model))] == 5 * ["OmniBlock"]
    plain = inlined(model)
    assert not plugin_nodes(plain) and not plain.functions
    assert [(opset.domain, opset.version) for opset in plain.opset_import] == [("", 17)]
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17), ("omniad", 1)]
    assert model.ir_version == 8


def test_norms_stay_in_fp32(model):
    """TensorRT computes a norm in the type of its input."""
    plain = onnx.shape_inference.infer_shapes(inlined(model), strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in plain.graph.value_info}
    norms = [n for n in plain.graph.node if n.op_type in ("InstanceNormalization", "LayerNormalization")]
    assert len(norms) == 5 * 6 + 3
    assert {types[node.input[0]] for node in norms} == {onnx.TensorProto.FLOAT}


# ---- what the plugin is given


@pytest.mark.parametrize("reading, which", [(lambda model: model, slice(1)), (block_nodes, slice(1, None))])
def test_nodes_take_a_plans_weights_and_give_its_outputs(model, network, reading, which):
    read = without_functions(reading(model))
    onnx.checker.check_model(read)
    assert not read.functions
    for node, plan in zip(plugin_nodes(read), list(plugin_plans(network))[which], strict=True):
        kinds = [buffer.kind for buffer in plan.buffers.values()]
        assert (len(node.input), len(node.output)) == (1 + kinds.count("weight"), kinds.count("output"))
        given = attributes(node)
        assert (given["plugin_namespace"], given["plugin_version"]) == (b"omniad", b"1")
        assert plan_of(node) == plan
        assert not {"arch", "kernel_index", "kernels"} & given.keys()


def test_the_weights_are_packed_as_for_the_fused_engine(network):
    graph, weights = build_plugin_graph(network)
    _, stored = build_graph(network, half=True, half_weights=True)
    assert weights.keys() == stored.keys()
    assert all(value.dtype == stored[name].dtype for name, value in weights.items())
    message = weights_message(stored)
    model, plan, arrays = onnx.load_from_string(graph + message), decoder_plan(network), read_weights(message)
    packed = pack(plan, arrays)
    for (name, expected), made in zip(packed.items(), given_weights(model, packed), strict=True):
        assert (made.dtype, made.shape) == (expected.dtype, expected.shape)
        if not name.startswith("token_bias"):
            np.testing.assert_array_equal(made, expected, err_msg=name)
            continue
        # The graph multiplies in fp32, what the fused engine does in float64: the bound of a sum of C products.
        recipe, *sources = plan.buffers[name].recipe
        truth, size = (RECIPES[recipe](*(of(arrays[source]) for source in sources)) for of in (np.float64, np.abs))
        terms = arrays[sources[1]].shape[1] + 1
        assert (np.abs(made - truth) <= terms * np.finfo(np.float32).eps * size).all(), name


def given_weights(model: onnx.ModelProto, like: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What the graph gives to its node behind x."""
    cut, (node,) = without_functions(model), plugin_nodes(model)
    del cut.graph.node[list(cut.graph.node).index(node) :], cut.graph.output[:]
    for name, value in zip(node.input[1:], like.values(), strict=True):
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        cut.graph.output.append(helper.make_tensor_value_info(name, kind, value.shape))
    session = onnxruntime.InferenceSession(cut.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(list(node.input[1:]), {"pixels": np.zeros((1, 64, 96, 3), np.uint8)})


def bundle_kernels(*plans) -> tuple[dict[str, dict], bytes]:
    """An index and machine code as a bundle has them, with some of other parts of the network between."""
    index, code = {}, bytearray(b"front")
    for key in {plan.kernel_key(launch) for plan in plans for launch in plan.launches}:
        entry = {"name": "step", "offset": len(code), "bytes": len(key), "shared_bytes": 1024, "num_warps": 4}
        index[key] = entry
        code += key.encode() + b"other"
    return index, bytes(code)


@pytest.mark.parametrize("reading", [lambda model: model, block_nodes], ids=["decoder", "blocks"])
def test_with_kernels_each_node_has_its_own(model, network, reading):
    read = reading(model)
    index, code = bundle_kernels(*map(plan_of, plugin_nodes(read)))
    first = with_kernels(read, "sm_87", {key: entry | {"num_warps": 8} for key, entry in index.items()}, code)
    made = with_kernels(first, "sm_90", index, code)  # of another architecture, instead
    onnx.checker.check_model(made, full_check=True)
    for node, before in zip(plugin_nodes(made), plugin_nodes(read), strict=True):
        given = attributes(node)
        assert given.pop("arch") == b"sm_90"
        kernels, own = numpy_helper.to_array(given.pop("kernels")), json.loads(given.pop("kernel_index"))
        assert kernels.dtype == np.int8
        plan = plan_of(node)
        assert own.keys() == {plan.kernel_key(launch) for launch in plan.launches}
        assert len(kernels) == sum(entry["bytes"] for entry in own.values())
        for key, entry in own.items():
            assert kernels[entry["offset"] :][: entry["bytes"]].tobytes() == key.encode()
            assert entry | {"offset": 0} == index[key] | {"offset": 0}
        assert given == attributes(before)
    assert not any("arch" in attributes(node) for node in plugin_nodes(read))  # the one given is as it was


def test_kernels_of_another_network_are_refused(model, network):
    index, code = bundle_kernels(block_plan(network, 0, 0))
    with pytest.raises(ExportError, match=r"kernels for sm_87 are not those of its plugin graph; export it again"):
        with_kernels(model, "sm_87", index, code)


def test_other_attention_orders_are_refused_in_words():
    with pytest.raises(ExportError, match=r"learnable queries, then .*without --targets"):
        build_plugin_graph(fold(golden_model(**(SMALL | {"attention": "kv+q"}))))


def test_an_engine_is_built_without_torch():
    """On the device, which has TensorRT and neither torch nor Triton."""
    code = "import sys, omniad_edge.export.plugin_graph; print(sorted({'torch', 'triton'} & sys.modules.keys()))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    )
