"""Networks for inputs that are not square, or large: the same map from torch and both CPU engines."""

import cv2
import numpy as np
import pytest
import torch

from omniad_edge import Detector, training_images
from omniad_edge.data import find_samples
from omniad_edge.engine import OnnxRuntimeEngine, OpenVinoEngine
from omniad_edge.errors import DataError
from omniad_edge.evaluate import evaluate_model
from omniad_edge.export import bundle_export
from omniad_edge.export.bundle_export import export_bundle
from omniad_edge.export.onnx_graph import build_graph, weights_message
from omniad_edge.kernels.fold import fold
from omniad_edge.kernels.network_plan import build_plan
from omniad_edge.model import ModelConfig, OmniAD
from omniad_edge.train import train


def tiny(height: int, width: int) -> ModelConfig:
    return ModelConfig(backbone="resnet18", depths=(1, 1, 1, 1), height=height, width=width)


@pytest.mark.parametrize("height, width", [(64, 160), (512, 512)], ids=str)
def test_every_engine_gives_the_networks_map(rng, height, width):
    torch.manual_seed(0)
    model = OmniAD(tiny(height, width)).eval()
    network = fold(model)
    graph, weights = build_graph(network, half=False, half_weights=False)
    pixels = rng.integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    truth, score = model.predict(pixels)
    for engine in (OnnxRuntimeEngine, OpenVinoEngine):
        if engine is OpenVinoEngine:
            pytest.importorskip("openvino")
        anomaly_map, pred_score = engine(graph + weights_message(weights), threads=1).run(pixels)
        assert anomaly_map.shape == (1, height, width)
        np.testing.assert_allclose(anomaly_map, truth, rtol=0, atol=1e-5)
        np.testing.assert_allclose(pred_score, score, rtol=0, atol=1e-5)
    plan = build_plan(network, batch=1)
    assert plan.buffers["anomaly_map"].shape == (1, height, width)
    assert plan.buffers["row_start"].shape == (height,) and plan.buffers["column_start"].shape == (width,)


@pytest.fixture(scope="module")
def strips(tmp_path_factory):
    """A product as a line camera sees it: 4 good images of 40 x 700 pixels."""
    folder, rng = tmp_path_factory.mktemp("strips") / "data", np.random.default_rng(2)
    (folder / "strip" / "good").mkdir(parents=True)
    for i in range(4):
        image = cv2.resize(rng.integers(0, 256, (3, 40, 3), dtype=np.uint8), (700, 40))
        cv2.imwrite(str(folder / "strip" / "good" / f"{i}.png"), image)
    return folder


@pytest.mark.filterwarnings("ignore:the teacher has random weights")
def test_a_long_strip_from_training_to_the_verdict(strips, tmp_path, monkeypatch):
    options = {"epochs": 1, "backbone_weights": "none", "batch_size": 2, "holdout": 0.25, "device": "cpu"}
    train(strips, tmp_path / "run", tiny(64, 1024), progress=lambda report: None, **options)
    engines = bundle_export.candidates
    monkeypatch.setattr(bundle_export, "candidates", lambda parts: [next(engines(parts))])
    export_bundle(tmp_path / "run", tmp_path / "strip.omniad")
    detector = Detector(tmp_path / "strip.omniad", "onnxruntime", threads=1)
    detector.calibrations = {name: c.with_threshold(0.0) for name, c in detector.calibrations.items()}
    result = detector(cv2.imread(str(find_samples(strips, "train")[0].path)))
    assert result.anomaly_map.shape == (64, 1024) and result.pred_label == "defective"
    (region,) = result.regions  # everything is above 0: the whole frame, in its own pixels
    assert (region.x, region.y, region.width, region.height) == (0, 0, 700, 40)
    assert (region.peak_x, region.peak_y) == tuple(
        int((2 * at + 1) * frame // (2 * made))
        for at, frame, made in zip(
            np.unravel_index(result.anomaly_map.argmax(), (64, 1024))[::-1], (700, 40), (1024, 64), strict=True
        )
    )


def test_maps_that_do_not_fit_into_memory_are_refused_in_words(small_run, small_bundle, monkeypatch):
    monkeypatch.setattr(training_images, "free_memory_bytes", lambda: 1_000_000)
    with pytest.raises(
        DataError, match=r"20 images of 64 x 64 and their maps take 0\.00 GB; .* smaller input size"
    ):
        evaluate_model(small_bundle, small_run.data)
