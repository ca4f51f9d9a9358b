"""The whole network as a plan in Triton's interpreter, against the float64 reference."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton: pip install 'omniad-edge[kernels]'")

from golden import golden_model
from omniad_edge.errors import ExportError
from omniad_edge.export.onnx_graph import build_graph, weights_message
from omniad_edge.kernels.fold import fold, named_arrays
from omniad_edge.kernels.jit import JitPlan
from omniad_edge.kernels.network import TorchOps, forward
from omniad_edge.kernels.network_plan import build_plan
from omniad_edge.kernels.pack import pack
from omniad_edge.kernels.schedule import for_batch
from omniad_edge.model import ATTENTION_OUTPUTS, BRANCHES
from omniad_edge.onnx_weights import read_weights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"backbone": "resnet18", "depths": (1, 1, 1, 1), "height": 64, "width": 96}


def random_pixels(model, batch: int) -> np.ndarray:
    config = model.config
    return np.random.default_rng(1).integers(0, 256, (batch, config.height, config.width, 3), dtype=np.uint8)


@torch.inference_mode()
def reference(network, pixels: np.ndarray, dtype=torch.float64) -> np.ndarray:
    return forward(TorchOps(dtype), network, torch.from_numpy(pixels))[0].double().numpy()


@pytest.mark.parametrize(
    "sizes",
    [
        *({"attention_output": output} for output in ATTENTION_OUTPUTS),
        *({"branches": branches} for branches in BRANCHES if branches != "both"),
        {"tokens": 36},
    ],
    ids=str,
)
def test_equals_the_reference_in_fp32(sizes):
    model = golden_model(**(SMALL | sizes))
    network, pixels = fold(model), random_pixels(model, 1)
    truth, torch_fp32 = reference(network, pixels), reference(network, pixels, torch.float32)
    plan = build_plan(network, batch=1, half=False)
    maps, scores = JitPlan(plan, pack(plan, named_arrays(network)), DEVICE).run(pixels)
    rounding = np.finfo(np.float32).eps * np.abs(truth).max()
    assert np.abs(maps - truth).max() <= 2 * np.abs(torch_fp32 - truth).max() + rounding
    assert (scores == maps.max((1, 2))).all()
