"""benchmarks/latency.py as a user runs it, with a tiny network; and the networks it compares."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from omniad_edge.model import ModelConfig, normalise

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
ON_CPU = ("--device", "cpu")
QUICK = (*ON_CPU, "--preset", "small", "--size", "64", "--samples", "2", "--warm-up", "0", "--threads", "2")


def run(*arguments, hidden: Path | None = None) -> subprocess.CompletedProcess:
    """hidden: a folder of modules that shadow the installed ones."""
    environment = os.environ | ({"PYTHONPATH": str(hidden)} if hidden else {})
    command = [sys.executable, BENCHMARKS / "latency.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def hide(folder: Path, module: str) -> Path:
    """A folder that makes `module` look as if it were not installed."""
    (folder / f"{module}.py").write_text(f"raise ModuleNotFoundError('hidden', name='{module}')")
    return folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("latency") / "latency.json"
    only = ("ours/onnxruntime-fp32", "ours-fp16/onnxruntime-fp32", "paper/onnxruntime-fp32")
    done = run(*QUICK, "--batch", "1", "2", "--paced", "--only", *only, "--json", path)
    assert done.returncode == 0, done.stderr
    return only, done, json.loads(path.read_text())


@pytest.fixture
def benchmark_modules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_every_case_has_a_row_per_batch_size(measured):
    only, done, report = measured
    rows = {(row["case"], row["batch"]): row for row in report["latency"]}
    assert set(rows) == {(case, batch) for case in only for batch in (1, 2)}
    for (case, batch), row in rows.items():
        samples = row["samples_ms"]
        assert len(samples) == 2
        assert [row["p50_ms"], row["max_ms"]] == pytest.approx([np.mean(samples), max(samples)], abs=1e-3)
        assert row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"] <= row["max_ms"]
        assert row["images_per_s"] == pytest.approx(1e3 * batch / row["p50_ms"], rel=0.01)
        plain_ms = np.array(rows["paper/onnxruntime-fp32", batch]["samples_ms"])
        assert row["speedup_paper"] == pytest.approx(np.median(plain_ms / samples), abs=1e-3)
        assert row["speedup_module"] is None
        assert row["reference"] == only[0]
        line = next(line for line in done.stdout.splitlines() if line.split()[:2] == [case, str(batch)])
        assert line.split()[2:4] == [f"{row['p50_ms']:.1f}", f"{row['p90_ms']:.1f}"]
    assert rows[only[0], 1]["max_error"] == 0
    assert 0 < rows[only[1], 1]["max_error"] < 1e-3  # rounded weights
    assert 0 < rows[only[2], 1]["max_error"] < 1e-5


def test_stages_memory_and_import_are_reported(measured):
    only, done, report = measured
    assert [row["case"] for row in report["stages"]] == list(only[:2])
    for row in report["stages"]:
        around = row["preprocess"]["p50_ms"] + row["postprocess"]["p50_ms"]
        assert row["share_of_engine"] == pytest.approx(around / row["engine"]["p50_ms"], abs=1e-3)
        assert len(row["total"]["samples_ms"]) == 2
    assert [row["case"] for row in report["processes"]] == list(only)
    assert all(50 < row["resident_mib"] <= row["peak_mib"] and row["ready_s"] > 0 for row in report["processes"])
    assert report["import_s"] > 0
    assert f"import omniad_edge: {report['import_s']:.2f} s" in done.stdout
    assert "round 2 of 2" in done.stderr
    assert "round 2" not in done.stdout


def test_the_header_names_machine_software_and_conditions(measured):
    header = measured[2]["header"]
    assert header["network"]["backbone"] == "resnet18"
    assert (header["input"], header["weights"]) == ([64, 64], "seeded")
    assert (header["threads"], header["samples"], header["warm_up"], header["batch"]) == (2, 2, 0, [1, 2])
    assert header["versions"]["torch"] == torch.__version__.split("+")[0] or torch.__version__
    assert header["cores"] == os.cpu_count()
    for key in ("date", "commit", "cpu", "memory_mib", "system", "python", "load_before", "load_after"):
        assert header[key], key
    full, half = header["bundle_bytes"]["ours"], header["bundle_bytes"]["ours-fp16"]
    assert half < 0.6 * full


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--samples", "0"), "expected at least 1"),
        (("--samples", "many"), "invalid"),
        (("--warm-up", "-1"), "expected at least 0"),
        (("--batch", "1", "0"), "expected at least 1"),
        (("--size", "100"), "multiple of 32"),
        (("--preset", "huge"), "invalid choice"),
        (("--only", "ours", "theirs"), "paper/openvino-bf16"),
        (("--bundle", "x.omniad", "--size", "64"), "leave them out"),
        (("--sampels", "3"), "unrecognized"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_arguments_are_usage_errors(arguments, reason, benchmark_modules, capsys):
    from latency import main

    with pytest.raises(SystemExit) as stop:
        main([*ON_CPU, *arguments])
    assert stop.value.code == 2
    assert reason in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_benchmark_without_a_gpu_fails_in_words():
    pytest.importorskip("triton")
    done = run("--device", "cuda")
    assert (done.returncode, done.stdout) == (1, "") and "no NVIDIA GPU" in done.stderr


def test_a_missing_bundle_is_a_failure_without_traceback(tmp_path):
    done = run("--bundle", tmp_path / "none.omniad")
    assert (done.returncode, done.stdout) == (1, "")
    assert "none.omniad: does not exist" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_openvino_its_rows_are_left_out_with_the_command(tmp_path):
    """And a bundle of one's own is measured without torch, for which it needs none."""
    pytest.importorskip("openvino")
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from networks import seeded_model, write_seeded_bundle
    finally:
        sys.path.remove(str(BENCHMARKS))
    bundle = tmp_path / "line.omniad"
    write_seeded_bundle(bundle, seeded_model(ModelConfig("resnet18", (1, 1, 1, 1), height=64, width=64)), False)
    hidden = hide(hide(tmp_path, "openvino"), "torch")
    done = run("--bundle", bundle, "--samples", "1", "--warm-up", "0", "--batch", "1", hidden=hidden)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("left out: ")]
    assert any("torch, paper, module" in line and 'pip install "omniad-edge[train]"' in line for line in lines)
    assert any("ours/openvino-bf16" in line and 'pip install "omniad-edge[openvino]"' in line for line in lines)
    assert "ours/onnxruntime-fp32" in done.stdout

    nothing = run(*QUICK, hidden=hidden)
    assert nothing.returncode == 1
    assert 'give a --bundle, or: torch is not installed; run: pip install "omniad-edge[train]"' in nothing.stderr


def test_cases_that_compute_something_else_are_not_timed(benchmark_modules):
    import cpu
    from cases import Case

    pixels = np.zeros((1, 4, 4, 3), np.uint8)
    ours, other = (Case(name, Path("x.omniad"), "onnxruntime", "fp32") for name in ("ours/a", "torch/b"))
    runs = {ours: lambda x: (np.zeros((1, 4, 4)), None), other: lambda x: (np.full((1, 4, 4), 0.01), None)}
    args = cpu.parse(["--batch", "1"])
    with pytest.raises(cpu.OmniADError, match="torch/b does not compute what ours/a does"):
        cpu.output_errors(runs, {(1, False): pixels}, args)
    runs[other] = lambda x: (np.full((1, 4, 4), np.nan), None)
    with pytest.raises(cpu.OmniADError, match="differs by nan"):
        cpu.output_errors(runs, {(1, False): pixels}, args)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"attention": "kv+q", "attention_output": "mlp"},
        {"attention": "self", "branches": "global"},
        {"branches": "local"},
    ],
    ids=str,
)
def test_the_plain_networks_are_the_same_network(sizes, benchmark_modules, rng):
    from networks import PlainNetwork, seeded_model

    model = seeded_model(ModelConfig("resnet18", (1, 1, 1, 1), height=64, width=96, **sizes)).double()
    pixels = rng.integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
    truth, truth_score = model.predict(pixels)
    image = normalise(torch.from_numpy(pixels), torch.zeros((), dtype=torch.float64))
    for form in ("paper", "module"):
        with torch.inference_mode():
            anomaly_map, pred_score = PlainNetwork(model, form).double()(image)
        assert np.abs(anomaly_map.numpy() - truth).max() < 1e-7  # the Gaussian's kernel was computed in fp32
        assert np.abs(pred_score.numpy() - truth_score).max() < 1e-7


def test_seeded_weights_are_reproducible_and_leave_nothing_zero(benchmark_modules):
    from networks import seeded_model

    config = ModelConfig("resnet18", (1, 1, 1, 1), height=64, width=64)
    first, second = (seeded_model(config).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(parameter.any() for _, parameter in seeded_model(config).named_parameters())


def test_paced_arrivals_have_their_rows(measured):
    _, done, report = measured
    rows = [row for row in report["paced"] if row["case"] == "ours/onnxruntime-fp32"]
    assert rows[0]["arrivals"] == "back to back" and rows[1]["arrivals"] == "1 per s"
    assert all(len(row["samples_ms"]) == 2 and row["p50_ms"] > 0 for row in rows)
    assert f"{rows[1]['ratio']:.2f} times back to back" in done.stdout


def test_the_stream_benchmark_misses_no_frame(tmp_path):
    path = tmp_path / "stream.json"
    command = [sys.executable, BENCHMARKS / "stream.py", "--seconds", "0.2", "--json", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert [row["frames"] for row in rows] == [200, 200, 200] and all(
        row["overhead_ms"]["p50"] > 0 for row in rows
    )
