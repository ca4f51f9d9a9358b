"""The ONNX graphs against the float64 reference, allowed twice the error of plain torch in fp32."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from golden import golden_model
from omniad_edge.export.onnx_graph import build_graph, weights_message
from omniad_edge.kernels.fold import fold
from omniad_edge.kernels.network import TorchOps, forward
from omniad_edge.model import ATTENTION_OUTPUTS, ATTENTIONS, BRANCHES

SMALL = {"backbone": "resnet18", "depths": (1, 1, 1, 1), "height": 64, "width": 96}


def run(model: bytes, pixels: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(["anomaly_map", "pred_score", "embedding"], {"pixels": pixels})


def random_pixels(model, batch: int) -> np.ndarray:
    config = model.config
    return np.random.default_rng(1).integers(0, 256, (batch, config.height, config.width, 3), dtype=np.uint8)


@torch.inference_mode()
def reference(model, pixels: np.ndarray, dtype=torch.float64, output: int = 0) -> np.ndarray:
    return forward(TorchOps(dtype), fold(model), torch.from_numpy(pixels))[output].double().numpy()


@pytest.mark.parametrize(
    "sizes",
    [
        *({"attention": a, "attention_output": "linear"} for a in ATTENTIONS),
        *({"attention_output": o} for o in ATTENTION_OUTPUTS),
        {"attention": "kv+q", "attention_output": "none"},
        *({"branches": b} for b in BRANCHES),
        *({"tokens": t} for t in (1, 36, 100)),
        {"backbone": "resnet50", "width": 64},
        {"depths": (1, 2, 2, 1), "height": 256, "width": 256},
    ],
    ids=str,
)
def test_equals_the_reference_in_fp32(sizes):
    model = golden_model(**(SMALL | sizes))
    pixels = random_pixels(model, 2)
    graph, weights = build_graph(fold(model), half=False, half_weights=False)
    maps, scores, embedding = run(graph + weights_message(weights), pixels)
    for output, made in ((0, maps), (2, embedding)):
        truth, torch_fp32 = (reference(model, pixels, dtype, output) for dtype in (torch.float64, torch.float32))
        rounding = np.finfo(np.float32).eps * np.abs(truth).max()
        assert np.abs(made - truth).max() <= 2 * np.abs(torch_fp32 - truth).max() + rounding
    assert (scores == maps.max((1, 2))).all()


def test_the_merged_message_is_a_valid_model_of_standard_operators():
    graph, weights = build_graph(fold(golden_model(**SMALL)), half=True, half_weights=True)
    model = onnx.load_from_string(graph + weights_message(weights))
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"


def test_the_result_of_an_image_does_not_depend_on_its_batch():
    model = golden_model(**SMALL)
    graph, weights = build_graph(fold(model), half=False, half_weights=False)
    pixels = random_pixels(model, 3)
    together = run(graph + weights_message(weights), pixels)[0]
    for index in range(3):
        alone = run(graph + weights_message(weights), pixels[index : index + 1])[0]
        np.testing.assert_allclose(together[index], alone[0], rtol=0, atol=1e-6)


def test_graphs_share_their_weights():
    network = fold(golden_model(**SMALL))
    full, weights = build_graph(network, half=False, half_weights=True)
    half, others = build_graph(network, half=True, half_weights=True)
    assert weights.keys() == others.keys()
    assert max(len(full), len(half)) < 300_000
    stored = sum(w.nbytes for w in weights.values())
    numbers = sum(w.size for w in weights.values())
    assert stored < 2.1 * numbers + 300_000  # fp16 but for vectors and the map's matrices


@pytest.mark.parametrize("half", [False, True], ids=["fp16 stored", "fp16 computed"])
def test_fp16_error_is_that_of_fp16(half):
    model = golden_model(**SMALL)
    pixels = random_pixels(model, 2)
    truth = reference(model, pixels)
    graph, weights = build_graph(fold(model), half, half_weights=True)
    maps, scores, embedding = run(graph + weights_message(weights), pixels)
    assert maps.dtype == scores.dtype == embedding.dtype == np.float32
    # fp16 rounds to 2^-11; the plain model with its weights and activations so rounded loses this much.
    plain = reference_in_fp16(model, pixels)
    assert np.abs(maps - truth).max() <= 2 * np.abs(plain - truth).max()


@torch.inference_mode()
def reference_in_fp16(model, pixels: np.ndarray) -> np.ndarray:
    """The unfolded model with torch's own fp16 operations; the map itself in fp32."""
    from omniad_edge.anomaly_map import anomaly_map
    from omniad_edge.model import normalise

    model = model.half()
    teacher, student = model(normalise(torch.from_numpy(pixels), torch.zeros((), dtype=torch.float16)))
    size = model.config.height, model.config.width
    maps = anomaly_map([t.float() for t in teacher], [s.float() for s in student], *size)
    model.double()
    return maps.double().numpy()
