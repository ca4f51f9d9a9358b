"""benchmarks/training.py as a user runs it, with a tiny network."""

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
QUICK = (
    "--preset",
    "small",
    "--depths",
    "1",
    "1",
    "1",
    "1",
    "--size",
    "64",
    "--batch-size",
    "2",
    "--device",
    "cpu",
)


@pytest.fixture
def training(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import training

    return training


def test_every_case_has_its_rate(training, tmp_path, capsys):
    out = tmp_path / "training.json"
    assert training.main([*QUICK, "--samples", "2", "--warm-up", "1", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert [row["case"] for row in report["training"]] == ["images", "cached"]
    for row in report["training"]:
        assert len(row["samples_ms"]) == len(row["samples_cpu_s"]) == 2
        assert row["images_per_s"] == pytest.approx(2 * row["steps_per_s"], rel=0.01)
        assert row["p50_ms"] == pytest.approx(sum(row["samples_ms"]) / 2, abs=0.01)
    assert (report["header"]["batch_size"], report["header"]["device"]) == (2, "cpu")
    assert capsys.readouterr().out.count("cached") == 1


@pytest.mark.parametrize("options", [["--samples", "0"], ["--preset", "huge"]], ids=" ".join)
def test_wrong_arguments_are_usage_errors(training, options, capsys):
    with pytest.raises(SystemExit) as stop:
        training.main(options)
    assert stop.value.code == 2 and options[0] in capsys.readouterr().err
