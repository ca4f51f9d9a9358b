"""Parts of the network as plans of their own, in Triton's interpreter, against float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton: pip install 'omniad-edge[kernels]'")

from golden import golden_model
from omniad_edge.errors import ExportError
from omniad_edge.kernels.fold import Network, fold, named_arrays
from omniad_edge.kernels.jit import JitPlan
from omniad_edge.kernels.network import TorchOps, decoder, omni_block
from omniad_edge.kernels.network_plan import build_plan
from omniad_edge.kernels.pack import pack
from omniad_edge.kernels.plan import Plan
from omniad_edge.kernels.plugin_plan import block_plan, decoder_plan, plugin_plans
from omniad_edge.kernels.schedule import for_batch
from omniad_edge.model import ModelConfig, OmniAD

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of rows beyond the image
SMALL = {"backbone": "resnet18", "depths": (1, 1, 1, 1), "height": 64, "width": 96}
FEW = {"branches": "global", "tokens": 16}  # a third of the work, which takes the interpreter minutes


def finer_stages(network: Network, first: int) -> Network:
    """A network whose decoder begins at a finer stage, but with the smallest maps."""
    smaller = replace(network, height=32, width=64)
    return replace(smaller, stages=network.stages[first:], expands=network.expands[first:])


@torch.inference_mode()
def expect_equal(plan: Plan, network: Network, part) -> None:
    """part(ops, x): the outputs of the plan in plain torch."""
    shape, dtype = plan.buffers["x"].shape, getattr(torch, plan.buffers["x"].dtype)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal(shape)).to(dtype)
    jit = JitPlan(plan, pack(plan, named_arrays(network)), DEVICE)
    jit.tensors["x"].copy_(x)
    jit.launch()
    image = x.transpose(1, 2).unflatten(2, (plan.height, plan.width))
    truth, plain = part(TorchOps(), image.double()), part(TorchOps(dtype), image)
    outputs = [name for name, buffer in plan.buffers.items() if buffer.kind == "output"]
    for name, true, rounded in zip(outputs, truth, plain, strict=True):
        made = jit.tensors[name].double().cpu().transpose(1, 2).reshape(true.shape)
        base = float((rounded.double() - true).abs().max())
        assert (made - true).abs().max() <= 2 * base + torch.finfo(dtype).eps * true.abs().max()


@pytest.mark.parametrize(
    "sizes, first, half",
    [(FEW, 1, False), pytest.param({}, 0, True, marks=pytest.mark.slow)],
    ids=["finer stages, fp32", "all, fp16"],
)
def test_the_decoder(sizes, first, half):
    network = finer_stages(fold(golden_model(**(SMALL | sizes))), first)
    expect_equal(decoder_plan(network, half=half), network, lambda ops, x: decoder(ops, network, x))


@pytest.mark.parametrize("stage", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_block(stage):
    network = finer_stages(fold(golden_model(**(SMALL | FEW | {"branches": "both"}))), 2)
    weights = network.stages[stage][0]
    expect_equal(block_plan(network, stage, 0), network, lambda ops, x: [omni_block(ops, weights, x)])


def test_what_the_default_networks_plans_take_and_give():
    network = fold(OmniAD(ModelConfig()))
    plan, *blocks = plugin_plans(network)
    assert plan == decoder_plan(network) and len(blocks) == 28
    assert (plan.batch, plan.height, plan.width, plan.front) == (1, 8, 8, None)
    of_kind = {
        kind: [(buffer.shape, buffer.dtype) for buffer in plan.buffers.values() if buffer.kind == kind]
        for kind in ("input", "output")
    }
    assert of_kind["input"] == [((1, 64, 512), "float16")]
    finest_first = [(1, 4096, 64), (1, 1024, 128), (1, 256, 256)]
    assert of_kind["output"] == [(shape, "float16") for shape in finest_first]
    assert [(b.height, b.buffers["x"].shape[1:]) for b in (blocks[0], blocks[-1])] == [
        (8, (64, 512)),
        (64, (4096, 64)),
    ]
    assert for_batch(plan, 3).buffers["x"].shape == (3, 64, 512)


def test_nearly_all_kernels_are_the_whole_networks():
    network = fold(OmniAD(ModelConfig()))
    whole = build_plan(network, batch=1)
    keys = {whole.kernel_key(launch) for launch in whole.launches}
    others = {plan.kernel_key(launch) for plan in plugin_plans(network) for launch in plan.launches}
    assert len(others - keys) <= 2 < len(others & keys)


def test_other_attention_orders_are_refused_in_words():
    network = fold(golden_model(**(SMALL | {"attention": "kv+q"})))
    for make in (decoder_plan, lambda network: block_plan(network, 0, 0)):
        with pytest.raises(ExportError, match=r"learnable queries, then .*without --targets"):
            make(network)
