"""The whole network as a plan in Triton's interpreter, against the float64 reference."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton: pip install 'omniad-edge[kernels]'")

from golden import golden_model
from omniad_edge.errors import ExportError
from omniad_edge.export.onnx_graph import build_graph, weights_message
from omniad_edge.kernels.fold import fold, named_arrays
from omniad_edge.kernels.jit import JitPlan
from omniad_edge.kernels.network import TorchOps, forward, omni_block
from omniad_edge.kernels.network_plan import Map, Recorder, build_plan
from omniad_edge.kernels.network_plan import omni_block as plan_block
from omniad_edge.kernels.pack import pack
from omniad_edge.kernels.schedule import for_batch
from omniad_edge.model import ATTENTION_OUTPUTS, BRANCHES, ModelConfig, OmniAD
from omniad_edge.onnx_weights import read_weights
from omniad_edge.self_test import MAX_EMBEDDING_ERROR

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of rows beyond the image
SMALL = {"backbone": "resnet18", "depths": (1, 1, 1, 1), "height": 64, "width": 96}


def random_pixels(model, batch: int) -> np.ndarray:
    config = model.config
    return np.random.default_rng(1).integers(0, 256, (batch, config.height, config.width, 3), dtype=np.uint8)


@torch.inference_mode()
def reference(network, pixels: np.ndarray, dtype=torch.float64) -> np.ndarray:
    return forward(TorchOps(dtype), network, torch.from_numpy(pixels))[0].double().numpy()


@torch.inference_mode()
def embedding_error(network, pixels: np.ndarray, embedding: np.ndarray) -> float:
    """Of the largest value."""
    truth = forward(TorchOps(), network, torch.from_numpy(pixels))[2].numpy()
    return np.abs(embedding - truth).max() / np.abs(truth).max()


def fp32_error(model, truth, maps: np.ndarray, pixels: np.ndarray) -> None:
    plain = reference(fold(model), pixels, torch.float32)
    rounding = np.finfo(np.float32).eps * np.abs(truth).max()
    assert np.abs(maps - truth).max() <= 2 * np.abs(plain - truth).max() + rounding


@pytest.mark.slow  # two minutes each in the interpreter
@pytest.mark.parametrize(
    "sizes",
    [
        *({"attention_output": output} for output in ATTENTION_OUTPUTS),
        *({"branches": branches} for branches in BRANCHES if branches != "both"),
        {"tokens": 36},
        {"backbone": "resnet50", "width": 64},
    ],
    ids=str,
)
def test_a_network_in_fp32(sizes):
    model = golden_model(**(SMALL | sizes))
    network, pixels = fold(model), random_pixels(model, 1)
    truth = reference(network, pixels)
    plan = build_plan(network, batch=1, half=False)
    maps, scores, embedding = JitPlan(plan, pack(plan, named_arrays(network)), DEVICE).run(pixels)
    fp32_error(model, truth, maps, pixels)
    assert (scores == maps.max((1, 2))).all()
    assert embedding_error(network, pixels, embedding) <= 1e-5


@pytest.mark.slow
def test_a_network_in_fp16_from_stored_weights():
    """As a line has it: two images in a batch, weights as the bundle stores them."""
    model = golden_model(**SMALL)
    network, pixels = fold(model), random_pixels(model, 2)
    plan = for_batch(build_plan(network, batch=1), 2)
    _, stored = build_graph(network, half=True, half_weights=True)
    maps, _, embedding = JitPlan(plan, pack(plan, read_weights(weights_message(stored))), DEVICE).run(pixels)
    assert np.abs(maps - reference(network, pixels)).max() <= 3e-4
    assert embedding_error(network, pixels, embedding) <= MAX_EMBEDDING_ERROR


@pytest.mark.slow
def test_fp16_has_room_for_an_input_four_times_as_large():
    """More contrast than any image has; nothing overflows."""
    network = fold(golden_model(**(SMALL | {"width": 64})))
    stem = network.backbone.stem  # takes the pixels less their mean
    larger = replace(network.backbone, stem=replace(stem, weight=4 * stem.weight))
    network = replace(network, backbone=larger)
    pixels = np.random.default_rng(1).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    plan = build_plan(network, batch=1)
    maps, scores, embedding = JitPlan(plan, pack(plan, named_arrays(network)), DEVICE).run(pixels)
    assert np.isfinite(scores).all() and np.isfinite(embedding).all()
    assert np.abs(maps - reference(network, pixels)).max() <= 3e-4


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("sizes", [{}, pytest.param({"attention_output": "mlp"}, marks=pytest.mark.slow)], ids=str)
@torch.inference_mode()
def test_a_block_of_each_stage(stage, sizes, rng):
    """With its real channels on a small map, in fp32."""
    network = fold(golden_model(**(SMALL | sizes)))
    block, c, (height, width) = network.stages[stage][0], 512 >> stage, (2, 3) if stage < 2 else (4, 6)
    x = rng.standard_normal((1, height * width, c))
    image = torch.from_numpy(x).transpose(1, 2).unflatten(2, (height, width))
    truth, plain = (omni_block(TorchOps(t), block, image.to(t)).double() for t in (torch.float64, torch.float32))
    r = Recorder(network, 1, half=False)
    given = Map(r.scratch(height * width, c, kind="input", name="x"), height, width, c)
    made = plan_block(r, block, given, network.tokens)
    plan = r.plan(height, width)
    jit = JitPlan(plan, pack(plan, named_arrays(network)), DEVICE)
    jit.tensors["x"].copy_(torch.from_numpy(x))
    jit.launch()
    got = jit.tensors[made.name].double().cpu().numpy()
    error = np.abs(got - truth.flatten(2).transpose(1, 2).numpy()).max()
    base = float((plain - truth).abs().max())
    assert error <= 2 * base + np.finfo(np.float32).eps * float(truth.abs().max())


def test_the_default_network_takes_few_launches():
    """Of 277 calls, an eager network has some 1,900."""
    plan = build_plan(fold(OmniAD(ModelConfig())), batch=1)
    assert len(plan.launches) <= 190
    weights = sum(b.size_bytes for b in plan.buffers.values() if b.kind == "weight")
    assert weights < 66e6 and plan.arena_bytes < weights + 10e6
    megabytes = f"{plan.arena_bytes / 1e6:.0f} MB, {weights / 1e6:.0f} MB of them weights"
    readme = " ".join((Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").split())
    assert f"{len(plan.launches)} launches in one CUDA graph, over one allocation of {megabytes}" in readme


def test_batches_share_weights_and_kernels():
    plan = build_plan(fold(golden_model(**SMALL)), batch=1)
    eight = for_batch(plan, 8)
    assert [eight.kernel_key(launch) for launch in eight.launches] == [plan.kernel_key(la) for la in plan.launches]
    assert all(e.programs == 8 * p.programs for e, p in zip(eight.launches, plan.launches, strict=True))
    assert eight.buffers["anomaly_map"].shape == (8, 64, 96)
    assert eight.front == plan.front and eight.buffers["row_start"].shape == (64,)
    assert for_batch(eight, 1) == plan


def test_other_attention_orders_are_refused_in_words():
    network = fold(golden_model(**(SMALL | {"attention": "kv+q"})))
    with pytest.raises(ExportError, match=r"learnable queries, then .*without --targets"):
        build_plan(network, batch=1)
