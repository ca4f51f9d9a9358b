"""The command line as a user types it: what it prints where, and its exit codes."""

import json
import shutil
import subprocess
import sys

import pytest

from omniad_edge.bundle import read_bundle
from omniad_edge.cli import main
from omniad_edge.products import write_line


@pytest.fixture
def bundle(small_bundle, tmp_path):
    return shutil.copy(small_bundle, tmp_path / "line3.omniad")


def test_train_export_evaluate_predict(tmp_path, capsys):
    write_line(tmp_path / "line", n_train=6, n_calibration=2, n_test_good=2, n_test_per_kind=1, size_px=72)
    data, run, out = tmp_path / "line" / "data", tmp_path / "run", tmp_path / "line3.omniad"
    train = ["train", "--data", data, "--out", run, "--preset", "small", "--size", "64"]
    train += ["--epochs", "1", "--backbone-weights", "procedural"]
    assert run_main(*train) == 0
    assert "model.safetensors: epoch 1" in capsys.readouterr().out
    assert run_main(*train) == 1
    assert "already holds a training run" in capsys.readouterr().err
    assert run_main(*train, "--resume") == 0
    capsys.readouterr()

    assert run_main("export", run, "--out", out) == 0
    printed = capsys.readouterr().out
    assert "parity      onnxruntime fp32" in printed and "threshold   gear" in printed and "MB, fp32" in printed

    report, table = tmp_path / "report.html", tmp_path / "metrics.json"
    assert run_main("evaluate", out, "--data", data, "--report", report, "--json", table) == 0
    assert "AUROC" in capsys.readouterr().out
    assert json.loads(table.read_text())["products"] and report.stat().st_size > 10_000
    assert run_main("evaluate", run, "--data", data) == 0


def test_evaluate_without_masks(small_bundle, small_run, tmp_path, capsys):
    data = tmp_path / "data" / "gear"
    shutil.copytree(small_run.data / "gear" / "train" / "good", data / "good")
    shutil.copytree(small_run.data / "gear" / "test", data / "test")
    report, table, rows = (tmp_path / name for name in ("report.html", "metrics.json", "metrics.csv"))
    outputs = "--report", report, "--json", table, "--csv", rows
    assert run_main("evaluate", small_bundle, "--data", data.parent, *outputs) == 0
    printed = capsys.readouterr().out
    assert "good rejected: " in printed and "defects missed: " in printed
    assert "n/a" in printed and "no pixel metrics: gear: 5 defective images without a mask" in printed
    (gear,), facts = (json.loads(table.read_text())[name] for name in ("products", "facts"))
    assert facts["defects missed"].endswith(" of 5") and facts["good rejected"].endswith(" of 2")
    assert 0 <= gear["image_auroc"] <= 1 and gear["pixel_auroc"] is gear["aupro"] is gear["mad"] is None
    assert rows.read_text().splitlines()[1].endswith(",,,,,")
    assert "n/a" in report.read_text() and "5 defective images without a mask" in report.read_text()


def test_predict_prints_a_line_an_image_and_counts_every_one(bundle, small_run, tmp_path, capsys):
    folder = tmp_path / "images"
    shutil.copytree(small_run.data / "gear" / "test" / "good", folder)
    (folder / "broken.png").write_text("this is no picture")
    assert run_main("predict", bundle, folder, "--product", "gear", "--save", tmp_path / "out") == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 and "gear" in out
    assert "broken.png" in err and "3 images: " in err and "1 unreadable" in err
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["product"] for line in lines] == ["gear", "gear"]
    assert len(list((tmp_path / "out").glob("*.jpg"))) == 2
    assert run_main("predict", bundle, small_run.data / "gear" / "test" / "good", "--json") == 0
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (first["product"], first["product_shown"], first["product_assumed"]) == ("gear", "gear", False)


def test_a_mistyped_command_leaves_the_last_results(bundle, small_run, tmp_path, capsys):
    images, results = small_run.data / "gear" / "test" / "good", tmp_path / "out" / "results.jsonl"
    assert run_main("predict", bundle, images, "--save", tmp_path / "out") == 0
    before = results.read_text()
    assert run_main("predict", bundle, images, "--save", tmp_path / "out", "--product", "gaer") == 1
    assert run_main("predict", tmp_path / "none.omniad", images, "--save", tmp_path / "out") == 1
    assert results.read_text() == before and before


def test_an_output_that_cannot_be_written_is_told_before_the_work(bundle, small_run, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    for command, words in (
        (("train", "--data", tmp_path / "none", "--out", file), "expected a folder"),
        (("train", "--data", tmp_path / "none", "--out", file / "run"), "is no folder"),
        (("export", tmp_path / "none", "--out", tmp_path), "expected a file"),
        (("pretrain", "--out", tmp_path), "expected a file"),
        (("evaluate", bundle, "--data", tmp_path / "none", "--csv", tmp_path), "expected a file"),
    ):
        assert run_main(*command) == 1
        assert words in " ".join(capsys.readouterr().err.split())
    assert file.read_text() == "mine"


@pytest.mark.parametrize("size", ["64x", "x64", "64X64", "big"])
def test_a_size_is_one_number_or_two(size, capsys):
    with pytest.raises(SystemExit) as exc:
        run_main("train", "--data", "d", "--out", "o", "--size", size)
    assert exc.value.code == 2 and "expected a size such as 256 or 256x320" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--epochs", "--batch-size"])
def test_a_count_is_a_whole_number_from_one_on(option, capsys):
    for value in ("0", "-1", "1.5", "many"):
        with pytest.raises(SystemExit) as exc:
            run_main("train", "--data", "d", "--out", "o", f"{option}={value}")
        assert exc.value.code == 2 and "expected a whole number from 1 on" in capsys.readouterr().err


def test_pictures_of_equally_named_images_do_not_replace_each_other(bundle, small_run, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    source = next((small_run.data / "gear" / "test" / "good").iterdir())
    for name in ("part.png", "part.jpg"):
        shutil.copy(source, folder / name)
    assert run_main("predict", bundle, folder, "--save", tmp_path / "out") == 0
    assert len(list((tmp_path / "out").glob("*.jpg"))) == 2


def test_calibrate_leaves_out_what_was_trained_on(bundle, small_run, capsys):
    assert run_main("calibrate", bundle, "--good", small_run.data) == 0
    out, err = capsys.readouterr()
    assert "threshold   gear" in out and "trained on" in err
    history = read_bundle(bundle).manifest["history"]
    assert len(history) == 3 and "calibrated with" in history[0]["action"]


def test_calibrate_says_how_many_images_a_wish_needs_and_changes_nothing(bundle, small_run, capsys):
    before = bundle.read_bytes()
    good = small_run.data.parent / "calibration"
    assert run_main("calibrate", bundle, "--good", good, "--max-false-reject", "0.5%") == 1
    assert "598" in capsys.readouterr().err
    assert bundle.read_bytes() == before


def test_threshold_by_hand(bundle, capsys):
    assert run_main("threshold", bundle, "--product", "gear", "0.31") == 0
    assert "-> 0.31" in capsys.readouterr().out
    assert read_bundle(bundle).products["gear"].threshold == 0.31
    assert run_main("threshold", bundle, "--product", "bolt", "0.31") == 1
    assert "gear" in capsys.readouterr().err
    assert run_main("info", bundle) == 0
    assert "set by hand" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["34.3", "-0.1", "nan", "inf"])
def test_a_threshold_that_no_score_can_pass_is_refused(bundle, capsys, value):
    before = bundle.read_bytes()
    assert run_main("threshold", bundle, "--product=gear", "--", value) == 1
    assert "expected 0 to 0.667, where all scores lie" in " ".join(capsys.readouterr().err.split())
    assert bundle.read_bytes() == before


def test_info_prints_the_manifest(bundle, capsys):
    assert run_main("info", bundle, "--json") == 0
    assert json.loads(capsys.readouterr().out)["format"] == "omniad-bundle"


def test_pictures_are_not_saved_among_those_that_are_read(bundle, small_run, capsys):
    assert run_main("predict", bundle, small_run.data, "--save", small_run.data / "out") == 1
    assert "take another folder" in capsys.readouterr().err
    assert not (small_run.data / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("", "usage:"),
        ("unknown", "invalid choice"),
        ("train --data x", "--out"),
        ("train --data x --out y --preset huge", "invalid choice"),
        ("train --data x --out y --size wide", "expected a size such as 256 or 256x320; got 'wide'"),
        ("train --data x --out y --device tpu", "invalid choice"),
        ("calibrate b --good g --max-false-reject many", "expected a share such as 5% or 0.05, below 100%"),
        ("calibrate b --good g --max-false-reject 150%", "got '150%'"),
        ("calibrate b --good g --max-false-reject 5", "got '5'"),
        ("threshold b --product p high", "invalid float"),
        ("predict b i --backend foo", "invalid choice"),
    ],
)
def test_wrong_usage_exits_2(arguments, reason, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments.split())
    assert exit.value.code == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", "{}/missing.omniad"],
        ["predict", "{}/missing.omniad", "{}"],
        ["train", "--data", "{}/missing", "--out", "{}/run"],
        ["export", "{}/missing", "--out", "{}/line.omniad"],
        ["evaluate", "{}/missing.omniad", "--data", "{}"],
        ["calibrate", "{}/missing.omniad", "--good", "{}"],
    ],
    ids=lambda a: a[0],
)
def test_failures_exit_1_with_a_message_and_no_traceback(arguments, tmp_path, capsys):
    assert main([a.format(tmp_path) for a in arguments]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "error:" in err and "Traceback" not in err


def test_the_commands_are_installed():
    for command in ("omniad", "omniad-export"):
        found = shutil.which(command, path=str(sys.prefix) + "/bin")
        assert found, command
        shown = subprocess.run([found, "--help"], capture_output=True, text=True, check=True)
        assert shown.stdout.startswith("usage: omniad")


def run_main(*arguments) -> int:
    return main([str(argument) for argument in arguments])
