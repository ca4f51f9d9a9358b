"""From a run to a bundle: what is in it, and when it is not written."""

import hashlib
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from small_run import CONFIG

from omniad_edge import Detector
from omniad_edge.bundle import read_bundle
from omniad_edge.data import Sample, find_samples
from omniad_edge.engine import OnnxRuntimeEngine
from omniad_edge.errors import BundleError, DataError, ExportError, MissingDependencyError
from omniad_edge.evaluate import open_model
from omniad_edge.export import bundle_export
from omniad_edge.export.bundle_export import IMAGES_PER_KIND, export_bundle
from omniad_edge.train import train
from omniad_edge.weights import load_checkpoint, save_checkpoint


@pytest.fixture
def without_openvino(monkeypatch):
    def cpu_has_bf16():
        raise MissingDependencyError("OpenVINO", "openvino")

    monkeypatch.setattr(bundle_export, "cpu_has_bf16", cpu_has_bf16)


def facts_of(run) -> dict:
    return load_checkpoint(run.folder / "model.safetensors")[1]


def rewritten(run, folder: Path, **changes) -> Path:
    """The checkpoint of the run with other facts."""
    model, facts = load_checkpoint(run.folder / "model.safetensors")
    save_checkpoint(folder / "model.safetensors", model, facts | changes)
    return folder


# ---- what a bundle holds


def test_a_bundle_of_fp32(small_run, small_bundle):
    bundle = read_bundle(small_bundle)
    manifest = bundle.manifest
    assert sorted(bundle.parts) == ["graphs/cpu.onnx", "recognition.npz", "weights.onnx"]
    assert (bundle.precision, bundle.height, bundle.width) == ("fp32", 64, 64)
    assert manifest["model"]["depths"] == [1, 1, 1, 1]
    assert manifest["model"]["backbone_weights"] == "none (random, seed 42)"
    assert {"omniad-edge", "torch", "onnxruntime"} <= manifest["versions"].keys()
    assert manifest["history"] == []
    assert {name: c.n_good for name, c in bundle.products.items()} == {"board": 1, "cap": 1, "gear": 1}
    report = manifest["parity"]["engines"]["onnxruntime fp32"]
    assert report["passed"] and report["images"] == 3 + 6 + 14  # held out, good and defective test images
    assert 0 < report["measured"]["map_error"] < 1e-5


def test_a_bundle_knows_what_was_trained_on(small_run, small_bundle):
    held_out = {small_run.data / name for name in facts_of(small_run)["holdout"]}
    trained = {s.path for s in find_samples(small_run.data, "train")} - held_out
    digests = {hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in trained}
    manifest = read_bundle(small_bundle).manifest
    assert len(digests) == 9 and set(manifest["trained_on"]) == digests
    checkpoint = (small_run.folder / "model.safetensors").read_bytes()
    assert manifest["checkpoint"] == hashlib.sha256(checkpoint).hexdigest()


@pytest.fixture(scope="module")
def half_bundle(small_run, tmp_path_factory):
    """Path of the fp16 bundle, the export's report and what it told on the way."""
    told = []
    path = tmp_path_factory.mktemp("half") / "half.omniad"
    report = export_bundle(small_run.folder, path, fp16=True, report=lambda *each: told.append(each))
    return path, report, told


def test_a_bundle_of_fp16_has_half_the_size_and_one_graph_more(half_bundle, small_bundle):
    bundle = read_bundle(half_bundle[0])
    graphs = ["graphs/cpu.onnx", "graphs/fp16.onnx"]
    assert sorted(bundle.parts) == ["fused/self_test.onnx", *graphs, "recognition.npz", "weights.onnx"]
    assert bundle.precision == "fp16"
    assert 0.5 < half_bundle[0].stat().st_size / small_bundle.stat().st_size < 0.53


def test_the_exports_report(half_bundle):
    path, report, told = half_bundle
    assert (report.path, report.size_bytes) == (path, path.stat().st_size)
    assert list(report.engines.items()) == told
    names = [name for name, _ in told]
    assert names[:2] == ["onnxruntime fp32", "onnxruntime fp16"]
    assert set(names[2:]) <= {"openvino fp32", "openvino bf16"}
    assert all(engine["passed"] for name, engine in told if "bf16" not in name)
    bundle = read_bundle(path)
    assert bundle.manifest["parity"] == {"engines": report.engines} and bundle.products == report.calibrations


def test_fp16_and_fp32_give_the_same_verdicts(half_bundle, small_bundle, small_run):
    full, half = Detector(small_bundle, "onnxruntime"), Detector(half_bundle[0], "onnxruntime")
    labels = []
    for sample in find_samples(small_run.data, "test"):
        frame = cv2.imread(str(sample.path))
        a, b = full(frame, sample.product), half(frame, sample.product)
        assert a.pred_label == b.pred_label and 0 < abs(a.pred_score - b.pred_score) < 3e-4
        labels.append(a.pred_label)
    assert {"good", "defective"} == {*labels}  # not all alike, which would prove nothing


# ---- data


def test_a_run_whose_data_moved(small_run, tmp_path, without_openvino):
    run = rewritten(small_run, tmp_path / "run", data=str(tmp_path / "gone"), holdout=[])
    with pytest.raises(DataError, match=r"gone: the data set that was trained on is not there; .* --data"):
        export_bundle(run, tmp_path / "a.omniad")
    assert not (tmp_path / "a.omniad").exists()
    # Its new place, and, as nothing was held out, thresholds from training images.
    report = export_bundle(run, tmp_path / "a.omniad", data=small_run.data)
    assert {c.n_good for c in report.calibrations.values()} == {4}
    assert list(report.engines) == ["onnxruntime fp32"]


def test_held_out_images_that_are_gone(small_run, tmp_path):
    run = rewritten(small_run, tmp_path / "run", holdout=["gear/train/good/gone.png"])
    with pytest.raises(DataError, match=r"1 of the 1 images held out of training are not there; .* --data"):
        export_bundle(run, tmp_path / "a.omniad")


@pytest.mark.filterwarnings("ignore:the teacher has random weights")
def test_images_that_training_skipped_as_broken_are_skipped_again(small_run, tmp_path, without_openvino):
    data = tmp_path / "data"
    shutil.copytree(small_run.data, data)
    (data / "cap" / "train" / "good" / "001.png").write_bytes(b"not a picture")
    options = {"epochs": 1, "backbone_weights": "none", "on_broken": "skip", "progress": lambda report: None}
    train(data, tmp_path / "run", CONFIG, holdout=0, **options)  # nothing held out: all that was read is used
    data.rename(tmp_path / "moved")
    report = export_bundle(tmp_path / "run", tmp_path / "a.omniad", data=tmp_path / "moved")
    n_good = {product: c.n_good for product, c in report.calibrations.items()}
    assert n_good == {"board": 4, "cap": 3, "gear": 4}
    run = open_model(tmp_path / "run", tmp_path / "moved")
    assert {product: c.n_good for product, c in run.calibrations.items()} == n_good


def test_there_is_no_run(tmp_path):
    with pytest.raises(BundleError, match="there is no such file"):
        export_bundle(tmp_path, tmp_path / "a.omniad")


def test_the_gate_looks_at_32_images_of_a_kind(monkeypatch, tmp_path):
    kinds = [("cap", "good", 40), ("cap", "dent", 20), ("cap", "stain", 20), ("gear", "good", 3)]
    samples = [Sample(Path(f"{p}/{k}/{i}"), p, k) for p, k, count in kinds for i in range(count)]
    monkeypatch.setattr(bundle_export, "find_samples", lambda data, split: samples)
    chosen = bundle_export.test_samples(tmp_path)
    assert chosen == bundle_export.test_samples(tmp_path) and len({*chosen}) == len(chosen)
    counts = [sum(s.product == "cap" and s.is_good is good for s in chosen) for good in (True, False)]
    assert counts == [IMAGES_PER_KIND] * 2 == [32, 32] and len(chosen) == 32 + 32 + 3
    assert {s.kind for s in chosen} == {"good", "dent", "stain"}


# ---- the gate


class Wrong(OnnxRuntimeEngine):
    """An engine that is off by as much as no rounding is."""

    def run_all(self, pixels):
        maps, scores, embedding = super().run_all(pixels)
        return maps + np.float32(1e-2), scores + np.float32(1e-2), embedding


@pytest.mark.parametrize("before", [None, b"an older bundle"])
def test_the_export_of_a_wrong_engine_writes_nothing(small_run, tmp_path, monkeypatch, without_openvino, before):
    monkeypatch.setattr(bundle_export, "OnnxRuntimeEngine", Wrong)
    out = tmp_path / "out" / "a.omniad"
    out.parent.mkdir()
    if before:
        out.write_bytes(before)
    with pytest.raises(ExportError) as raised:
        export_bundle(small_run.folder, out)
    assert "nothing was written" in str(raised.value)
    assert "onnxruntime fp32: map error is 0.01, the limit is 0.0003" in str(raised.value)
    assert [path.read_bytes() for path in out.parent.iterdir()] == ([before] if before else [])


def test_fp16_has_to_pass_too(small_run, tmp_path, monkeypatch, without_openvino):
    calls = []

    def engine(model):
        calls.append(model)
        return (OnnxRuntimeEngine if len(calls) == 1 else Wrong)(model)

    monkeypatch.setattr(bundle_export, "OnnxRuntimeEngine", engine)
    with pytest.raises(ExportError, match=r"onnxruntime fp16: map error is 0\.01") as raised:
        export_bundle(small_run.folder, tmp_path / "a.omniad", fp16=True)
    assert "onnxruntime fp32" not in str(raised.value) and not list(tmp_path.iterdir())


def test_bf16_that_fails_is_written_down_but_stops_nothing(small_run, tmp_path, monkeypatch):
    def engine(model, precision):
        return (Wrong if precision == "bf16" else OnnxRuntimeEngine)(model)

    monkeypatch.setattr(bundle_export, "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(bundle_export, "OpenVinoEngine", engine)
    export_bundle(small_run.folder, tmp_path / "a.omniad")
    engines = read_bundle(tmp_path / "a.omniad").manifest["parity"]["engines"]
    passed = {name: report["passed"] for name, report in engines.items()}
    assert passed == {"onnxruntime fp32": True, "openvino fp32": True, "openvino bf16": False}
    assert engines["openvino bf16"]["failures"][0] == "map error is 0.01, the limit is 0.003"
