"""benchmarks/resolution.py with tiny images: whole and in tiles, the same number of steps, one row each."""

import json
import sys
from pathlib import Path

import pytest

from omniad_edge.model import ModelConfig

pytest.importorskip("openvino")


@pytest.fixture
def resolution(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).resolve().parents[1] / "benchmarks"), *sys.path])
    import resolution

    tiny = ModelConfig(backbone="resnet18", depths=(1, 1, 1, 1))
    monkeypatch.setattr(resolution, "PRESETS", {"small": tiny})
    monkeypatch.setattr(resolution, "CASES", ((64, None), (64, 96)))
    monkeypatch.setattr(resolution, "JUDGED_PX", 64)
    monkeypatch.setattr(resolution, "ROUNDS", 2)
    return resolution


def test_a_row_for_each_case(resolution, small_run, tmp_path, capsys):
    gear = small_run.data / "gear"
    command = ["--data", str(gear), "--steps", "1", "--batch", "2", "--json", str(tmp_path / "made.json")]
    assert resolution.main(command) == 0
    made = json.loads((tmp_path / "made.json").read_text())
    assert [(row["seen"], row["tiles"]) for row in made["rows"]] == [
        ("64x64", 1),
        ("96x96 in 4 tiles of 64x64", 4),
    ]
    for row in made["rows"]:
        assert all(0 <= row[name] <= 1 for name in ("image_auroc", "small_auroc", "pixel_auroc", "aupro"))
        assert len(row["samples_ms"]) == 2 and row["frame"] == "72x72" and row["p50_ms"] > 0
    assert made["steps"] == 1 and {"commit", "versions"} <= made["machine"].keys()
    assert [json.loads(line)["seen"] for line in capsys.readouterr().out.splitlines()] == [
        row["seen"] for row in made["rows"]
    ]


def test_data_without_defects_is_refused(resolution, small_run, tmp_path, capsys):
    good = tmp_path / "cap" / "good"
    good.parent.mkdir()
    good.symlink_to(small_run.data / "cap" / "train" / "good")
    assert resolution.main(["--data", str(tmp_path)]) == 1
    assert "expected good and defective test images" in capsys.readouterr().err
