"""benchmarks/accuracy.py with a tiny network, and peers that are stand-ins; anomalib itself where there is one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peer_stand_in import make_python

from omniad_edge.bundle import read_bundle, write_bundle
from omniad_edge.data import find_samples, load_images
from omniad_edge.errors import InputError, OmniADError
from omniad_edge.evaluate import Predictions, evaluate, evaluate_model, predict_images
from omniad_edge.metrics import METRICS
from omniad_edge.model import ModelConfig, OmniAD, normalise
from omniad_edge.products import write_line
from omniad_edge.weights import load_run, save_checkpoint

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SIZE = 64
TINY = ("--preset", "small", "--size", str(SIZE), "--epochs", "1", "--backbone-weights", "procedural")


@pytest.fixture(scope="module", autouse=True)
def benchmark_modules():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two products with six good training images each."""
    folder = tmp_path_factory.mktemp("accuracy")
    write_line(folder, n_train=6, n_calibration=0, n_test_good=3, n_test_per_kind=1, size_px=72)
    shutil.rmtree(folder / "data" / "gear")
    return folder / "data"


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    return make_python(tmp_path_factory.mktemp("peers"))


@pytest.fixture(scope="module")
def measured(data, python, tmp_path_factory):
    """The JSON, the HTML and the run's folder; every case is timed twice only."""
    import accuracy
    import detection
    import one_image

    out = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_image, "SAMPLES", 2)
        patch.setattr(one_image, "WARM_UP", 0)
        patch.setattr(detection, "ENGINES", (("onnxruntime", "fp32"), ("fused", "fp16")))
        files = ("--json", str(out / "a.json"), "--report", str(out / "a.html"))
        arguments = ("--data", str(data), "--out", str(out), "--peers", str(python), "--threads", "1", *files)
        assert accuracy.main([*arguments, *TINY]) == 0
    return json.loads((out / "a.json").read_text()), (out / "a.html").read_text(), out / "seed-42"


def test_every_method_has_the_metrics_of_every_product(measured, data):
    report, _, run = measured
    [result] = report["runs"]
    methods = {method["name"]: method for method in result["methods"]}
    graph = "onnxruntime, fp16 graph"
    assert list(methods) == ["torch fp32", "onnxruntime fp32", graph, "PaDiM", "PatchCore"]
    assert [method["models"] for method in methods.values()] == [1, 1, 1, 2, 2]
    reference = methods["torch fp32"]
    for product, metrics in zip(reference["products"], evaluate_model(run, data).metrics, strict=True):
        assert product == metrics.to_dict()
    for name in ("image_auroc", "pixel_ap", "aupro", "mad"):
        assert reference["mean"][name] == pytest.approx(np.mean([one[name] for one in reference["products"]]))
    assert "changes" not in reference and "changes" not in methods["PaDiM"]
    for name in ("onnxruntime fp32", graph):
        assert methods[name]["changes"]["verdict_flips"] == 0
        assert 0 < methods[name]["changes"]["map"] < 1e-3


def test_what_does_not_open_says_why(measured):
    report, html, _ = measured
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    reason = report["runs"][0]["left_out"]["fused fp16"]
    assert "GPU" in reason and "not here: fused fp16" in html


def test_one_image_is_timed_of_what_a_user_can_run(measured):
    report, html, run = measured
    rows = {row["name"]: row for row in report["runs"][0]["one_image"]}
    assert list(rows)[:2] == ["torch fp32", "onnxruntime fp32"]
    assert {"PaDiM, cpu", "PatchCore, cpu"} < set(rows) and "onnxruntime, fp16 graph" not in rows
    for row in rows.values():
        assert len(row["samples_ms"]) == 2 and 0 < row["p50_ms"] <= row["p90_ms"] and row["peak_mib"] > 50
    assert rows["torch fp32"]["stored_bytes"] == (run / "model.safetensors").stat().st_size
    assert rows["PaDiM, cpu"]["stored_bytes"] > 4 * 2.7e6  # the backbone's parameters
    assert all(f">{name}<" in html for name in rows)


def test_peers_get_our_images_and_weights(measured, data):
    """The stand-in's method computed here: of the run's backbone, of the images that it was trained on."""
    report, _, run = measured
    network, facts = load_run(run)
    held_out = {(data / path).resolve() for path in facts["holdout"]}
    assert held_out
    training = [sample for sample in find_samples(data, "train") if sample.path.resolve() not in held_out]
    expected = []
    for product in facts["products"]:
        train, test = (
            load_images([sample for sample in samples if sample.product == product], SIZE, SIZE)
            for samples in (training, find_samples(data, "test"))
        )
        mean = features(network, train.pixels).mean((0, 2, 3))[:, None, None]

        def predict(pixels: np.ndarray, mean=mean) -> tuple[np.ndarray, np.ndarray]:
            distance = (features(network, pixels) - mean).square().sum(1, keepdim=True)
            maps = torch.nn.functional.interpolate(distance, (SIZE, SIZE))[:, 0]
            return maps.numpy(), maps.amax((1, 2)).numpy()

        expected += evaluate(predict_images(predict, test))
    methods = {method["name"]: method for method in report["runs"][0]["methods"]}
    for name in ("PaDiM", "PatchCore"):
        for ours, theirs in zip(expected, methods[name]["products"], strict=True):
            for metric in METRICS:
                assert theirs[metric] == pytest.approx(getattr(ours, metric), rel=1e-6), (name, metric)


@torch.no_grad()
def features(network: OmniAD, pixels: np.ndarray) -> torch.Tensor:
    return network.teacher(normalise(torch.from_numpy(pixels), torch.zeros(())))[0]


def test_a_finished_run_is_loaded_and_gives_the_same(measured, data, tmp_path, monkeypatch, capsys):
    import accuracy

    first, _, run = measured
    path = tmp_path / "again.json"
    monkeypatch.setattr(accuracy, "time_in_turns", lambda commands: {})
    arguments = ("--data", str(data), "--torch-only", "--paper", "mvtec", "--json", str(path), "--threads", "1")
    assert accuracy.main([*arguments, "--run", str(run)]) == 0
    report = json.loads(path.read_text())
    [result] = report["runs"]
    assert result["methods"] == first["runs"][0]["methods"][:1]
    published = evaluate_model(run, data, published=True).metrics
    assert result["published"]["aupro"] == pytest.approx(np.mean([one.aupro for one in published]))
    assert report["paper"]["figures"]["image_auroc"] == 0.99
    shown = capsys.readouterr().out
    assert "the paper" in shown and "99.0" in shown


def test_the_paper_s_training(monkeypatch, tmp_path):
    import accuracy

    calls = []
    monkeypatch.setattr(accuracy, "train", lambda *args, **settings: calls.append((args, settings)))
    args = accuracy.parse(["--data", "D", "--out", str(tmp_path), "--paper", "real-iad"])
    assert accuracy.trained(args, 43) == tmp_path / "seed-43"
    (tmp_path / "seed-43").mkdir()
    (tmp_path / "seed-43" / "last.safetensors").touch()
    accuracy.trained(args, 43)
    for ((_, out, config), settings), resumed in zip(calls, (False, True), strict=True):
        assert (out, config) == (tmp_path / "seed-43", ModelConfig())
        assert settings == {
            "epochs": 100,
            "backbone_weights": "imagenet",
            "holdout": 0,
            "seed": 43,
            "resume": resumed,
        }


def test_the_paper_s_figures_are_whole():
    from accuracy import PAPERS

    for paper in PAPERS.values():
        *seven, mad = paper.figures
        assert len(seven) == 7 and abs(np.mean(seven) - mad) <= 0.05 + 1e-9  # it prints one digit


def test_verdict_flips_are_counted_in_images(data):
    from detection import changes

    samples = [sample for sample in find_samples(data, "test") if sample.product == "board"]
    images = load_images(samples, SIZE, SIZE)
    scores = np.where([sample.is_good for sample in samples], 1.0, 2.0).astype(np.float32)
    maps = np.broadcast_to(scores[:, None, None], (len(samples), SIZE, SIZE))
    missed = np.where(np.arange(len(samples)) == int(scores.argmax()), np.float32(0.5), scores)
    pair = Predictions(images, maps, scores), Predictions(images, maps + np.float32(0.25), missed)
    moved = changes(*pair, *(evaluate(one)[0] for one in pair))
    assert moved["verdict_flips"] == 1 and moved["map"] == 0.25 and moved["image_auroc"] > 0


def test_the_bundle_of_another_run_is_refused(small_bundle, small_run, tmp_path):
    from detection import bundle_of_run, open_engines

    bundle = bundle_of_run(small_bundle, small_run.folder)
    assert bundle_of_run(small_bundle, small_run.folder / "model.safetensors").manifest == bundle.manifest
    engines, left_out = open_engines(bundle, 1)
    assert "onnxruntime fp32" in engines and "onnxruntime int8" not in {**engines, **left_out}
    network, facts = load_run(small_run.folder)
    with torch.no_grad():  # a training with another seed, on the same images
        next(network.parameters()).mul_(1.01)
    save_checkpoint(tmp_path / "model.safetensors", network, facts)
    with pytest.raises(InputError, match="of another"):
        bundle_of_run(small_bundle, tmp_path)


def test_a_bundle_that_does_not_name_its_run_is_refused(small_bundle, small_run, tmp_path):
    from detection import bundle_of_run

    bundle = read_bundle(small_bundle)
    old = {key: value for key, value in bundle.manifest.items() if key != "checkpoint"}
    write_bundle(tmp_path / "old.omniad", old, bundle.parts)
    with pytest.raises(InputError, match="from before that: export it again"):
        bundle_of_run(tmp_path / "old.omniad", small_run.folder)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--paper", "mvtec", "--size", "128"), "leave them out"),
        (("--run", "r", "--epochs", "3"), "leave them out"),
        (("--run", "r", "s", "--bundle", "b"), "one run"),
        (("--threads", "0"), "at least 1"),
        (("--peers", "no/python"), "there is no no/python"),
    ],
)
def test_usage(arguments, words, capsys):
    import accuracy

    with pytest.raises(SystemExit) as stop:
        accuracy.main(["--data", "D", *arguments])
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_peers_that_fail_say_why(tmp_path):
    from peer_runs import Peers

    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no anomalib here >&2\nexit 3\n")
    python.chmod(0o755)
    network = OmniAD(ModelConfig(backbone="resnet18", depths=(1, 1, 1, 1), height=SIZE, width=SIZE))
    peers = Peers(python, tmp_path, network, "board", seed=0, threads=1)
    images = load_images([], SIZE, SIZE)
    with pytest.raises(OmniADError, match=r"failed on board; see peers\.py for their set-up:\nno anomalib here"):
        peers.fit("board", images, images)


def test_a_method_that_ends_before_it_is_timed_is_named():
    from one_image import time_in_turns

    with pytest.raises(OmniADError, match="quitter: its process ended"):
        time_in_turns({"quitter": [sys.executable, "-c", "pass"]})


def test_anomalib_sees_our_features(tmp_path, rng):
    """timm's ResNet, as anomalib builds it, filled with our weights, against float64."""
    python = os.environ.get("OMNIAD_PEERS")
    if not python:
        pytest.skip("set OMNIAD_PEERS to a Python that has anomalib (benchmarks/peers.py)")
    from peer_runs import Peers

    network, pixels = (
        OmniAD(ModelConfig(backbone="resnet34")).eval(),
        np.uint8(rng.integers(0, 256, (2, 96, 64, 3))),
    )
    peers = Peers(Path(python), tmp_path, network, "", seed=0, threads=1)
    np.save(tmp_path / "pixels.npy", pixels)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import numpy as np, peers\n"
        "from pathlib import Path; folder = Path(sys.argv[2])\n"
        "model = peers.build('padim', folder / 'backbone.safetensors')\n"
        "image = peers.normalised(np.load(folder / 'pixels.npy'), 'cpu')\n"
        "np.savez(folder / 'f.npz', *(f.numpy() for f in model.feature_extractor(image).values()))\n"
    )
    subprocess.run([python, "-c", code, BENCHMARKS, tmp_path], check=True)
    assert peers.backbone == tmp_path / "backbone.safetensors"
    with torch.no_grad(), np.load(tmp_path / "f.npz", allow_pickle=False) as theirs:
        plain = network.teacher(normalise(torch.from_numpy(pixels), torch.zeros(())))
        truth = network.teacher.double()(normalise(torch.from_numpy(pixels), torch.zeros((), dtype=torch.float64)))
        for index, (ours, exact) in enumerate(zip(plain, truth, strict=True)):
            base = (ours - exact).abs().max()
            error = (torch.from_numpy(theirs[f"arr_{index}"]) - exact).abs().max()
            assert error <= 2 * base + torch.finfo(torch.float32).eps * exact.abs().max()
