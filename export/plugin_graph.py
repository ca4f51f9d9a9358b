"""What an engine builder does with `graphs/plugin.onnx`, the fp16 graph whose decoder the TensorRT plugin can do.

The decoder is one node `omniad.OmniDecoder`, a function of the model made of `omniad.OmniBlock` nodes, and those
are a function of standard operators; so the file as it is runs in ONNX Runtime. TensorRT gets one of three
readings of it, the same with every version of its parser: `without_functions` leaves the decoder to the plugin,
`block_nodes` before it leaves each Omni-block to it, and `inlined` leaves it nothing.

A node's inputs are x (N, positions, C) and its plan's weight buffers, in their order and packed as there; its
outputs are the plan's (N, positions, C), finest first. The plugin reads these attributes:

    plan          JSON of the plan for one image, see `kernels/plan.py`
    arch          of the GPU, like "sm_87"; with the two below, put in by `with_kernels`
    kernel_index  JSON, kernel key -> name, offset, bytes, shared_bytes, num_warps
    kernels       machine code, an int8 tensor (bytes,)
"""

import json
from collections.abc import Iterator, Mapping

import numpy as np
from onnx import ModelProto, NodeProto, helper, inliner, numpy_helper

from ..errors import ExportError
from ..kernels.plan import Plan

DOMAIN, VERSION = "omniad", 1
DECODER, BLOCK = "OmniDecoder", "OmniBlock"


def without_functions(model: ModelProto) -> ModelProto:
    """For an engine with the plugin. Before TensorRT 10.7 the parser would prefer the functions to it."""
    made = copy(model)
    del made.functions[:]
    return made


def inlined(model: ModelProto) -> ModelProto:
    """For an engine without the plugin: standard operators alone."""
    made = inliner.inline_local_functions(model)
    kept = [opset for opset in made.opset_import if opset.domain != DOMAIN]
    del made.opset_import[:]
    made.opset_import.extend(kept)
    return made


def block_nodes(model: ModelProto) -> ModelProto:
    """One OmniBlock node for each Omni-block, what is between them in standard operators."""
    return inliner.inline_selected_functions(model, [(DOMAIN, DECODER)])


def with_kernels(model: ModelProto, arch: str, kernel_index: Mapping[str, dict], kernels: bytes) -> ModelProto:
    """Every plugin node with the kernels of its plan, for one architecture.

    arch: like "sm_87"; kernel_index: "kernels" of a bundle's `fused/sm_87.json`; kernels: its `fused/sm_87.bin`.
    Raises ExportError if they lack one.
    """
    made = copy(model)
    for node in plugin_nodes(made):
        index, code = kernels_of(plan_of(node), arch, kernel_index, kernels)
        tensor = numpy_helper.from_array(np.frombuffer(code, np.int8), "kernels")
        attributes = {"arch": arch, "kernel_index": json.dumps(index), "kernels": tensor}
        kept = [attribute for attribute in node.attribute if attribute.name not in attributes]
        del node.attribute[:]
        node.attribute.extend(kept + [helper.make_attribute(*attribute) for attribute in attributes.items()])
    return made


def kernels_of(
    plan: Plan, arch: str, kernel_index: Mapping[str, dict], kernels: bytes
) -> tuple[dict[str, dict], bytes]:
    """The plan's part of the index and of the machine code."""
    index, code = {}, bytearray()
    for key in dict.fromkeys(plan.kernel_key(launch) for launch in plan.launches):
        if key not in kernel_index:
            raise ExportError(
                f"the bundle's kernels for {arch} are not those of its plugin graph; export it again"
            )
        entry = kernel_index[key]
        index[key] = entry | {"offset": len(code)}
        code += kernels[entry["offset"] : entry["offset"] + entry["bytes"]]
    return index, bytes(code)


def plugin_nodes(model: ModelProto) -> Iterator[NodeProto]:
    return (node for node in model.graph.node if node.domain == DOMAIN)


def plan_of(node: NodeProto) -> Plan:
    (plan,) = (helper.get_attribute_value(a) for a in node.attribute if a.name == "plan")
    return Plan.from_dict(json.loads(plan))


def copy(model: ModelProto) -> ModelProto:
    made = ModelProto()
    made.CopyFrom(model)
    return made
