"""benchmarks/ablation.py as a user runs it, on a generated line with tiny networks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from omniad_edge.products import write_line

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
QUICK = ("--size", "64", "--epochs", "1", "--batch-size", "4", "--device", "cpu", "--table", "branches")


@pytest.fixture(scope="module")
def line(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("line")
    write_line(folder, n_train=2, n_calibration=1, n_test_good=1, n_test_per_kind=1, size_px=64)
    return folder / "data"


@pytest.fixture
def ablation(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import ablation

    return ablation


@pytest.fixture(scope="module")
def swept(line, tmp_path_factory):
    """A finished sweep in a process of its own: its output and the file."""
    out = tmp_path_factory.mktemp("sweep") / "ablation.json"
    command = [sys.executable, BENCHMARKS / "ablation.py", "--data", line, "--out", out, "--seeds", "2", *QUICK]
    return subprocess.run(command, capture_output=True, text=True, timeout=300), out


def test_every_variant_is_trained_once_for_each_seed(swept):
    done, out = swept
    assert done.returncode == 0, done.stderr
    runs = json.loads(out.read_text())["runs"]
    turns = [(run["model"]["branches"], run["seed"]) for run in runs]
    assert turns == [(branches, seed) for seed in (0, 1) for branches in ("both", "global", "local")]
    assert len({run["loss"] for run in runs}) == 6
    for run in runs:
        assert [row["product"] for row in run["products"]] == ["board", "cap", "gear", "mean"]
        assert all(0 <= row["image_auroc"] <= 1 for row in run["products"])
    assert "run 6 of 6: " in done.stderr


def test_tables_have_mean_and_spread(swept):
    done, out = swept
    runs = [run for run in json.loads(out.read_text())["runs"] if run["model"]["branches"] == "local"]
    aurocs = [100 * run["products"][3]["image_auroc"] for run in runs]
    said = f"{sum(aurocs) / 2:.1f} ± {abs(aurocs[0] - aurocs[1]) / 2**0.5:.1f}"
    row = next(line for line in done.stdout.splitlines() if line.split()[:2] == ["local", "mean"])
    assert row.split("mean")[1].strip().startswith(said)
    assert "local against both: image AUROC " in done.stdout


def test_an_interrupted_sweep_goes_on(swept, line, tmp_path, ablation, monkeypatch, capsys):
    finished = json.loads(swept[1].read_text())
    out = tmp_path / "ablation.json"
    out.write_text(json.dumps(finished | {"runs": finished["runs"][:3]}))
    command = ["--data", str(line), "--out", str(out), "--seeds", "2", *QUICK]
    run = ablation.Bench.run
    stop = iter([False, True])

    def interrupted(self, config, seed):
        if next(stop):
            raise KeyboardInterrupt
        return run(self, config, seed)

    with monkeypatch.context() as patch:
        patch.setattr(ablation.Bench, "run", interrupted)
        assert ablation.main(command) == 1
    assert "interrupted; the same command goes on" in capsys.readouterr().err
    kept = json.loads(out.read_text())["runs"]
    assert len(kept) == 4
    assert ablation.main(command) == 0
    again = json.loads(out.read_text())["runs"]
    assert again[:4] == kept
    assert [(r["model"], r["seed"]) for r in again] == [(r["model"], r["seed"]) for r in finished["runs"]]


def test_runs_of_other_settings_do_not_mix(swept, line, ablation, capsys):
    command = ["--data", str(line), "--out", str(swept[1]), *QUICK]
    assert ablation.main([*command, "--epochs", "2"]) == 1
    assert "epochs: the run has 1, now 2" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--seeds", "0"], ["--table", "depths"], ["--preset", "huge"]], ids=" ".join)
def test_wrong_arguments_are_usage_errors(ablation, options, capsys):
    with pytest.raises(SystemExit) as stop:
        ablation.main(["--data", "x", "--out", "y", *options])
    assert stop.value.code == 2 and options[0] in capsys.readouterr().err
