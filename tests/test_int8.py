"""int8 and fp8 from the export's gate to an engine: what is measured, what is refused, whose thresholds apply."""

import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cuda.bindings
import fake_tensorrt as trt
import numpy as np
import pytest
from fake_cuda import FakeCuda, check_all_freed
from test_parity import predictions

from omniad_edge import Detector, native
from omniad_edge.bundle import Bundle, read_bundle, write_bundle
from omniad_edge.cli import main
from omniad_edge.data import Sample, find_samples, load_images
from omniad_edge.engine import OnnxRuntimeEngine, open_engine
from omniad_edge.errors import BundleError, EngineError, ExportError, MissingDependencyError
from omniad_edge.evaluate import good_samples, held_out_samples
from omniad_edge.export import bundle_export, parity
from omniad_edge.export.bundle_export import (
    CALIBRATION_IMAGES,
    calibration_samples,
    check_measurable,
    export_bundle,
)
from omniad_edge.export.parity import DETECTION_LIMITS, DetectionLimits, compare, detection_loss
from omniad_edge.plan_cache import default_cache_dir
from omniad_edge.recognition import MARGIN
from omniad_edge.self_test import MAX_MAP_ERROR, read_self_test
from omniad_edge.weights import load_run

# ---- the gate


def with_maps(scores, masks: np.ndarray, monkeypatch):
    """Predictions of two good and two defective images, whose maps are their scores in the mask."""
    maps = np.asarray(scores, np.float32)[:, None, None] * np.where(masks, 1.0, 0.5).astype(np.float32)
    monkeypatch.setattr(parity, "load_masks", lambda samples, height, width: masks)
    return predictions(scores, ["good", "good", "dent", "dent"], anomaly_maps=maps)


@pytest.fixture
def masks() -> np.ndarray:
    masks = np.zeros((4, 4, 4), bool)
    masks[2:, 1:3, 1:3] = True
    return masks


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_what_counts_is_what_is_detected(masks, monkeypatch, precision):
    reference = with_maps([0.1, 0.2, 0.5, 0.6], masks, monkeypatch)
    doubled = replace(reference, anomaly_maps=2 * reference.anomaly_maps, pred_scores=2 * reference.pred_scores)
    report = compare(reference, doubled, precision)
    assert report["passed"] and report["limits"] == {"auroc_loss": 0.005, "aupro_loss": 0.01}
    assert report["measured"]["auroc_loss"] == report["measured"]["aupro_loss"] == 0
    assert report["measured"]["score_error"] is None and report["measured"]["map_error"] == pytest.approx(0.6)


def test_the_image_auroc_that_is_lost(masks, monkeypatch):
    reference = with_maps([0.1, 0.2, 0.5, 0.6], masks, monkeypatch)
    engine = replace(reference, pred_scores=np.float32([0.1, 0.55, 0.5, 0.6]))  # one of four pairs
    report = compare(reference, engine, "int8")
    assert report["failures"] == ["auroc loss is 0.25, the limit is 0.005"]
    gained = compare(engine, reference, "int8")
    assert gained["passed"] and gained["measured"]["auroc_loss"] == -0.25


def test_the_aupro_that_is_lost(masks, monkeypatch):
    reference = with_maps([0.1, 0.2, 0.5, 0.6], masks, monkeypatch)
    maps = reference.anomaly_maps.copy()
    maps[3] = 0
    report = compare(reference, replace(reference, anomaly_maps=maps), "int8")
    (failure,) = report["failures"]
    assert failure.startswith("aupro loss is 0.") and report["measured"]["aupro_loss"] > 0.01


def test_the_product_that_loses_most_counts(monkeypatch):
    kinds, products = ["good", "dent"] * 2, ["cap", "cap", "gear", "gear"]
    monkeypatch.setattr(parity, "load_masks", lambda samples, height, width: np.zeros((4, 4, 4), bool))
    reference = predictions([0.1, 0.2, 0.2, 0.1], kinds, products)
    engine = predictions([0.2, 0.1, 0.1, 0.2], kinds, products)
    assert detection_loss(reference, engine) == {"auroc_loss": 1.0, "aupro_loss": 0.0}


def test_where_it_loses_too_much_the_export_says_so_and_stops(small_run, tmp_path, monkeypatch, without_openvino):
    told = []
    monkeypatch.setitem(DETECTION_LIMITS, "fp8", DetectionLimits(-2.0, 1.0))  # less than can be lost
    with pytest.raises(ExportError) as raised:
        export_bundle(
            small_run.folder,
            tmp_path / "a.omniad",
            fp16=True,
            report=lambda *each: told.append(each),
            quantise="fp8",
        )
    words = str(raised.value)
    assert words.startswith("in 8 bits this network detects too much worse; nothing was written. Export without")
    assert "onnxruntime fp8: auroc loss is " in words and "the limit is -2" in words
    assert [name for name, _ in told] == ["onnxruntime fp32", "onnxruntime fp16", "onnxruntime fp8"]
    assert not list(tmp_path.iterdir())


def test_without_defects_it_is_refused_before_anything_is_computed(small_run, tmp_path, monkeypatch):
    test = [sample for sample in find_samples(small_run.data, "test") if sample.is_good]
    monkeypatch.setattr(bundle_export, "test_samples", lambda data: test)
    monkeypatch.setattr(bundle_export, "load_images", None)
    with pytest.raises(
        ExportError, match=r"--int8: .* no product has good and defective test images \(PRODUCT/te"
    ):
        export_bundle(small_run.folder, tmp_path / "a.omniad", quantise="int8")


def test_without_masks_too(small_run):
    samples = [replace(sample, mask_path=None) for sample in find_samples(small_run.data, "test")]
    with pytest.raises(ExportError, match=r"--fp8: .* has no mask; nothing was written\. Add them"):
        check_measurable(samples, "fp8")


def test_fp8_needs_fp16(small_run, tmp_path):
    with pytest.raises(ExportError, match="fp8 is computed by TensorRT, in a graph of fp16; export with --fp16"):
        export_bundle(small_run.folder, tmp_path / "a.omniad", quantise="fp8")


def test_ranges_are_of_images_that_were_trained_on(small_run):
    samples = find_samples(small_run.data, "train")
    chosen = calibration_samples(samples, samples[::4])
    assert not {*chosen} & {*samples[::4]} and {s.product for s in chosen} == {"board", "cap", "gear"}
    assert calibration_samples(samples, samples) == samples  # none was held out


@pytest.mark.parametrize("each", [30, 47, 500])
def test_ranges_are_of_every_product_alike(each):
    products = "board", "cap", "gear"
    samples = [Sample(Path(f"{product}/{i}.png"), product, "good") for product in products for i in range(each)]
    chosen = calibration_samples(samples, [])
    assert Counter(sample.product for sample in chosen) == dict.fromkeys(products, CALIBRATION_IMAGES // 3)
    assert len({*chosen}) == CALIBRATION_IMAGES


# ---- engines


def no_openvino() -> bool:
    raise MissingDependencyError("OpenVINO", "openvino")


@pytest.fixture
def without_openvino(monkeypatch):
    monkeypatch.setattr(bundle_export, "cpu_has_bf16", no_openvino)


@pytest.fixture(scope="module")
def int8_file(small_run, tmp_path_factory) -> Path:
    """In fp16 and int8, of an untrained network: without the gate's limits, and as if OpenVINO had passed it."""
    path = tmp_path_factory.mktemp("int8") / "line3.omniad"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DETECTION_LIMITS, "int8", DetectionLimits(1.0, 1.0))
        patch.setattr(bundle_export, "cpu_has_bf16", no_openvino)
        export_bundle(small_run.folder, path, fp16=True, quantise="int8")
    made = read_bundle(path)
    engines = made.manifest["parity"]["engines"]
    engines["openvino int8"] = engines["onnxruntime int8"]
    write_bundle(path, made.manifest, made.parts)
    return path


@pytest.fixture(scope="module")
def fp8_file(int8_file, tmp_path_factory) -> Path:
    """The same under fp8's names, as the stand-in for TensorRT computes what it is given."""
    path = tmp_path_factory.mktemp("fp8") / "line3.omniad"
    made = read_bundle(int8_file)
    made.parts["graphs/fp8.onnx"] = made.parts.pop("graphs/int8_fp16.onnx")
    engines = made.manifest["parity"]["engines"]
    engines["onnxruntime fp8"] = engines.pop("onnxruntime int8_fp16")
    keys = "quantised", "quantised_recognition"
    renamed = {key: {"fp8": made.manifest[key]["int8_fp16"]} for key in keys}
    write_bundle(path, made.manifest | renamed, made.parts)
    return path


@pytest.fixture(scope="module")
def bundle(int8_file) -> Bundle:
    return read_bundle(int8_file)


@pytest.fixture(scope="module")
def pixels(bundle, small_run) -> np.ndarray:
    """Of images that the gate saw."""
    return load_images(find_samples(small_run.data, "test")[:3], bundle.height, bundle.width).pixels


def test_a_bundle_of_int8(bundle):
    graphs = sorted(name for name in bundle.parts if name.startswith("graphs/"))
    assert graphs == [f"graphs/{name}.onnx" for name in ("cpu", "fp16", "int8", "int8_fp16")]
    assert bundle.manifest["quantised"].keys() == {"int8", "int8_fp16"}
    engines = bundle.manifest["parity"]["engines"]
    assert {"onnxruntime int8", "onnxruntime int8_fp16"} <= engines.keys()
    assert engines["onnxruntime int8"]["measured"].keys() >= {"auroc_loss", "aupro_loss", "verdict_flips"}


def test_auto_takes_it_never(bundle):
    assert open_engine(bundle).precision in ("fp32", "bf16")
    assert "graphs/int8" not in open_engine(bundle).reason


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_it_computes_in_int8(bundle, pixels, backend):
    pytest.importorskip(backend)
    opened = open_engine(bundle, backend, "int8", threads=1)
    assert (opened.backend, opened.precision) == (backend, "int8")
    maps, scores = opened.run(pixels)
    truth = OnnxRuntimeEngine(bundle.onnx("cpu"), threads=1).run(pixels)[0]
    error = np.abs(maps - truth).max()
    limit = 2 * bundle.manifest["parity"]["engines"]["onnxruntime int8"]["measured"]["map_error"]
    assert 1e-4 < error < limit and (scores == maps.max((1, 2))).all()


def test_auto_takes_openvino_where_it_passed(bundle, monkeypatch):
    pytest.importorskip("openvino")
    assert open_engine(bundle, precision="int8").backend == "openvino"
    engines = {k: v for k, v in bundle.manifest["parity"]["engines"].items() if k != "openvino int8"}
    untested = replace(bundle, manifest=bundle.manifest | {"parity": {"engines": engines}})
    other = open_engine(untested, precision="int8")
    assert other.backend == "onnxruntime" and "not OpenVINO, because the bundle was not tested" in other.reason
    with pytest.raises(EngineError, match="precision int8: the bundle was not tested on it in int8"):
        open_engine(untested, "openvino", "int8")


def test_without_openvino_it_is_onnx_runtimes(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert open_engine(bundle, precision="int8").backend == "onnxruntime"
    with pytest.raises(MissingDependencyError, match=r'pip install "omniad-edge\[openvino\]"'):
        open_engine(bundle, "openvino", "int8")


def test_a_bundle_without_it(bundle):
    parts = {name: part for name, part in bundle.parts.items() if "int8" not in name}
    with pytest.raises(EngineError, match="precision int8: the bundle has no int8 graph; export it with --int8"):
        open_engine(Bundle(bundle.manifest, parts), precision="int8")


@pytest.mark.parametrize("backend", ["auto", "onnxruntime", "openvino"])
def test_fp8_is_tensorrts_alone(bundle, backend):
    with pytest.raises(EngineError, match="precision fp8: it is computed by TensorRT alone, on a GPU"):
        open_engine(bundle, backend, "fp8")


# ---- thresholds


@pytest.fixture
def file(int8_file, tmp_path) -> Path:
    return shutil.copy(int8_file, tmp_path / "line3.omniad")


def thresholds(path: Path, graph: str) -> dict[str, float]:
    return {name: made.threshold for name, made in read_bundle(path).calibrations_of(graph).items()}


def test_it_has_thresholds_of_its_own_scores(file, small_run):
    """At the start the highest score of a held out image, as its own engine scores it."""
    plain, quantised = (Detector(file, "onnxruntime", precision) for precision in ("fp32", "int8"))
    for precision, detector in (("fp32", plain), ("int8", quantised)):
        made = {name: calibration.threshold for name, calibration in detector.calibrations.items()}
        assert made == thresholds(file, precision)
    assert plain.calibrations != quantised.calibrations
    contents = read_bundle(file)
    assert contents.calibrations_of("int8") != contents.calibrations_of("int8_fp16")


def limits(path: Path, graph: str) -> dict[str, float]:
    return {name: made.limit for name, made in read_bundle(path).recognition_of(graph).items()}


def test_it_has_limits_of_its_own_embeddings(file, small_run):
    """At the start from the one image of each product that was held out, as its own engine sees it."""
    contents, facts = read_bundle(file), load_run(small_run.folder)[1]
    samples = held_out_samples(good_samples(small_run.data, facts), small_run.data, facts["holdout"])
    images = load_images(samples, contents.height, contents.width)
    for precision in ("fp32", "int8"):
        recogniser = Detector(file, "onnxruntime", precision).recogniser
        made = {name: limit.limit for name, limit in recogniser.limits.items()}
        assert made == limits(file, precision)
        engine = open_engine(contents, "onnxruntime", precision)
        for sample, embedding in zip(samples, engine.run_all(images.pixels)[2], strict=True):
            (distance,) = recogniser.space.own_distances(embedding[None], sample.product)
            assert made[sample.product] == pytest.approx(MARGIN * distance, rel=1e-4)
    of_all_others = limits(file, "")
    assert all(made != pytest.approx(of_all_others[name], rel=1e-3) for name, made in limits(file, "int8").items())
    assert limits(file, "int8") != limits(file, "int8_fp16")


def test_a_bundle_from_before_has_the_limits_of_all_others(bundle, file):
    old = {key: value for key, value in bundle.manifest.items() if key != "quantised_recognition"}
    write_bundle(file, old, bundle.parts)
    detector = Detector(file, "onnxruntime", "int8")
    assert detector.not_recognised == "" and detector.recogniser.limits == bundle.recognition


def test_calibrating_it_leaves_the_others_alone(file, small_run, capsys):
    before = {graph: thresholds(file, graph) for graph in ("", "int8", "int8_fp16")}
    limits_before = {graph: limits(file, graph) for graph in before}
    good = str(small_run.data.parent / "calibration")
    command = ["calibrate", str(file), "--good", good, "--backend", "onnxruntime", "--precision", "int8"]
    assert main(command) == 0
    after = {graph: thresholds(file, graph) for graph in before}
    assert after[""] == before[""] and after["int8_fp16"] == before["int8_fp16"]
    assert after["int8"] != before["int8"]
    limits_after = {graph: limits(file, graph) for graph in before}
    assert limits_after == limits_before | {"int8": limits_after["int8"]} != limits_before
    assert "recognised  gear: at most 53 % false unknowns at 95 %" in capsys.readouterr().out
    assert {limit.n_good for limit in read_bundle(file).recognition_of("int8").values()} == {4}
    assert read_bundle(file).manifest["history"][-1]["action"] == "calibrated with onnxruntime in int8"


def test_one_by_hand(file, capsys):
    assert main(["threshold", str(file), "--product", "gear", "0.31", "--precision", "int8"]) == 0
    assert thresholds(file, "int8")["gear"] == thresholds(file, "int8_fp16")["gear"] == 0.31
    assert thresholds(file, "")["gear"] != 0.31
    assert capsys.readouterr().out.count("-> 0.31") == 2
    assert main(["info", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "in int8_fp16:\n" in printed and printed.count("recognised  gear") == 3
    assert "set by hand for int8: gear" in printed
    assert main(["threshold", str(file), "--product", "gear", "0.31", "--precision", "fp8"]) == 1
    assert "the bundle was not exported with --fp8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "quantised", [[], {"int8": []}, {"int8": {}}, {"int8": {"gear": {}}}, {"int8": {"other": {}}}]
)
def test_crafted_thresholds(bundle, tmp_path, quantised):
    for key in ("quantised", "quantised_recognition"):
        with pytest.raises(BundleError, match=f"not written: manifest: ({key}|product)"):
            write_bundle(tmp_path / "a.omniad", bundle.manifest | {key: quantised}, bundle.parts)


# ---- TensorRT, on stand-ins


@pytest.fixture
def machine(monkeypatch, tmp_path) -> Iterator[FakeCuda]:
    driver = FakeCuda()
    monkeypatch.setattr(cuda.bindings, "driver", driver)
    monkeypatch.setattr(native, "why_absent", lambda: "it was not built")
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setenv("OMNIAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OMNIAD_PLUGIN", raising=False)
    trt._reset(driver)
    yield driver
    check_all_freed(driver)


def test_build_in_int8(int8_file, bundle, machine, pixels, capsys):
    assert main(["build", str(int8_file), "--int8"]) == 0
    out = capsys.readouterr().out
    assert "TensorRT in int8; without our plugin: it computes in fp16" in out and "self-test passed" in out
    assert "nor TensorRT: no engine was built" in out  # which `auto` would take: the one in fp16
    opened = open_engine(bundle, precision="int8")
    assert (opened.backend, opened.precision) == ("tensorrt", "int8")
    truth = OnnxRuntimeEngine(bundle.onnx("int8_fp16"), as_written=True)
    assert np.abs(opened.run(pixels)[0] - truth.run(pixels)[0]).max() < 1e-4
    assert len(trt._state.builders) == 1
    del opened


def test_each_precision_has_an_engine_of_its_own(bundle, machine):
    for precision in ("fp16", "int8", "fp16", "int8"):
        assert open_engine(bundle, "tensorrt", precision).precision == precision
    assert len(trt._state.builders) == 2
    assert len([*(default_cache_dir() / "tensorrt").glob("*.plan")]) == 2


def test_build_in_fp8(fp8_file, machine, capsys):
    assert main(["build", str(fp8_file), "--fp8"]) == 0
    assert "TensorRT in fp8" in capsys.readouterr().out


def test_fp8_is_refused_on_an_older_gpu_before_anything_is_built(fp8_file, machine, monkeypatch, capsys):
    monkeypatch.setattr("omniad_edge.tensorrt_engine.device_architecture", lambda: 87)
    assert main(["build", str(fp8_file), "--fp8"]) == 1
    export = ["export", "--fp16", "--fp8", "--engine", "tensorrt", "run", "--out", str(fp8_file)]
    assert main(export) == 1
    err = " ".join(capsys.readouterr().err.split())
    assert err.count("precision fp8: this GPU is sm_87; fp8 is computed from sm_89 on (Ada, Hopper, Thor)") == 2
    assert trt._state.builders == []


def test_export_is_refused_for_a_dla(machine, tmp_path, capsys):
    export = ["export", "--fp16", "--int8", "--engine", "tensorrt", "--device", "dla", "run", "--out"]
    assert main([*export, str(tmp_path / "b")]) == 1
    assert "a DLA has no instance norm" in " ".join(capsys.readouterr().err.split())


def test_a_bundle_without_its_graph(fp8_file, machine):
    with pytest.raises(BundleError, match="no int8 graph for TensorRT; export it with --fp16 --int8"):
        open_engine(read_bundle(fp8_file), "tensorrt", "int8")


def test_the_self_test_allows_twice_what_the_gate_found(bundle, machine):
    measured = bundle.manifest["parity"]["engines"]["onnxruntime int8_fp16"]["measured"]
    test = read_self_test(bundle, "int8_fp16")
    assert test.max_map_error == 2 * measured["map_error"] > MAX_MAP_ERROR
    assert test.max_score_error == 2 * measured["score_error"]
    trt._state.error = 4 * measured["map_error"]
    with pytest.raises(EngineError, match=r"anomaly map of a self-test image is .* off"):
        open_engine(bundle, "tensorrt", "int8")


def test_int8_and_fp8_exclude_each_other(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["build", "b", "--int8", "--fp8"])
    assert exit.value.code == 2 and "not allowed with" in capsys.readouterr().err
