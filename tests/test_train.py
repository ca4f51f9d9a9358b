"""Training: what it writes, that it repeats, resumes and shares its work exactly, and how it fails."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from omniad_edge import run_folder, training_images
from omniad_edge import train as train_module
from omniad_edge.data import Sample
from omniad_edge.distributed import GlobalBatchNorm, World, processes, total
from omniad_edge.errors import DataError, InputError, TrainingError
from omniad_edge.model import ATTENTIONS, BRANCHES, ModelConfig, OmniAD, reconstruction_loss
from omniad_edge.progress import plain_lines, progress_display
from omniad_edge.train import Trainer, train
from omniad_edge.training_images import split_holdout
from omniad_edge.weights import load_checkpoint, read_tensors

TINY = ModelConfig(backbone="resnet18", depths=(1, 1, 1, 1), height=64, width=64)
HERE = Path(__file__).parent

pytestmark = pytest.mark.filterwarnings("ignore:the teacher has random weights")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two products: 6 and 4 good images."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(1)
    for product, count in (("bolt", 6), ("nut", 4)):
        (folder / product / "good").mkdir(parents=True)
        for i in range(count):
            image = cv2.resize(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8), (80, 72))
            cv2.imwrite(str(folder / product / "good" / f"{i}.png"), image)
    return folder


def quiet(report: dict) -> None:
    pass


def tiny_run(data, out, **options):
    defaults = {"epochs": 2, "backbone_weights": "none", "batch_size": 4, "device": "cpu", "progress": quiet}
    return train(data, out, TINY, **defaults | options)


def history(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run of 5 epochs, never interrupted."""
    out = tmp_path_factory.mktemp("run") / "a"
    return out, tiny_run(data, out, epochs=5, validate_every=2)


def test_what_a_run_leaves(finished, data):
    out, result = finished
    assert sorted(p.name for p in out.iterdir()) == ["history.jsonl", "last.safetensors", "model.safetensors"]
    assert result.checkpoint == out / "model.safetensors"
    assert (result.trained_on, result.held_out, result.broken) == (8, 2, 0)
    lines = history(out)
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["lr"] for line in lines] == [1e-3, 1e-3, 1e-3, 1e-3, 1e-4]  # dropped at 80 %
    assert ["val_loss" in line for line in lines] == [False, True, False, True, True]
    assert lines[4]["loss"] == result.loss < lines[0]["loss"]
    best = min((line for line in lines if "val_loss" in line), key=lambda line: line["val_loss"])
    assert (result.best_epoch, result.val_loss) == (best["epoch"], best["val_loss"])


def test_the_checkpoint_knows_its_training(finished, data):
    model, facts = load_checkpoint(finished[0] / "model.safetensors")
    assert model.config == TINY
    assert facts["products"] == ["bolt", "nut"] and facts["data"] == str(data)
    assert (facts["epochs"], facts["seed"], facts["backbone"]) == (5, 42, "none (random, seed 42)")
    assert facts["versions"]["torch"] == version("torch")
    assert (facts["epoch"], facts["val_loss"]) == (finished[1].best_epoch, finished[1].val_loss)
    held_out = facts["holdout"]
    assert [name.split("/")[0] for name in held_out] == ["bolt", "nut"]
    digests = {
        p.relative_to(data).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()[:16]
        for p in data.rglob("*.png")
    }
    assert sorted(facts["trained_on"]) == sorted(d for name, d in digests.items() if name not in held_out)


def stop_in_epoch(epoch: int):
    def report(progress: dict) -> None:
        if progress["epoch"] == epoch:
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize("save_every_s", [0.0, 60.0], ids=["each epoch", "first epoch only"])
def test_an_interrupted_run_resumes_to_the_same_bits(finished, data, tmp_path, monkeypatch, capsys, save_every_s):
    monkeypatch.setattr(run_folder, "SAVE_EVERY_S", save_every_s)
    with pytest.raises(KeyboardInterrupt):
        tiny_run(data, tmp_path, epochs=5, validate_every=2, progress=stop_in_epoch(4))
    saved = 3 if save_every_s == 0 else 1
    assert (
        f"interrupted in epoch 4; {tmp_path / 'last.safetensors'} holds epoch {saved}" in capsys.readouterr().err
    )
    result = tiny_run(data, tmp_path, epochs=5, validate_every=2, resume=True)
    out, uninterrupted = finished
    for name in ("model.safetensors", "last.safetensors"):
        ours, truth = read_tensors(tmp_path / name), read_tensors(out / name)
        assert ours.keys() == truth.keys() and all(torch.equal(ours[k], truth[k]) for k in truth)
    assert history(tmp_path) == history(out)
    assert (result.best_epoch, result.val_loss) == (uninterrupted.best_epoch, uninterrupted.val_loss)


def test_resuming_a_finished_run_changes_nothing(finished, data):
    out, result = finished
    before = {p: p.read_bytes() for p in out.iterdir()}
    again = tiny_run(data, out, epochs=5, validate_every=2, resume=True)
    assert again == result
    assert all(p.read_bytes() == content for p, content in before.items())


def test_runs_do_not_overwrite_each_other(finished, data, tmp_path):
    out = finished[0]
    with pytest.raises(TrainingError, match="already holds a training run"):
        tiny_run(data, out)
    with pytest.raises(TrainingError, match="nothing to resume"):
        tiny_run(data, tmp_path, resume=True)


def test_resuming_something_else_is_refused(finished, data, tmp_path):
    out = finished[0]
    same = {"epochs": 5, "validate_every": 2, "resume": True}
    for options, said in (
        ({"epochs": 6}, "epochs: the run has 5, now 6"),
        ({"seed": 7, "batch_size": 2}, "batch_size: the run has 4, now 2; seed: the run has 42, now 7"),
    ):
        with pytest.raises(TrainingError, match=said):
            tiny_run(data, out, **same | options)
    with pytest.raises(TrainingError, match="tokens: the run has 64, now 16"):
        train(data, out, ModelConfig(**TINY.to_dict() | {"tokens": 16}), **same)
    image = data / "nut" / "good" / "extra.png"
    cv2.imwrite(str(image), np.zeros((9, 9, 3), np.uint8))
    try:
        with pytest.raises(TrainingError, match=r"trained_on: \d of 8 are gone, \d are new"):
            tiny_run(data, out, batch_size=4, backbone_weights="none", **same)
    finally:
        image.unlink()


def bad_loss(step: int, spoil):
    """The loss, spoiled from the given step on."""
    calls = []

    def loss(teacher, student):
        calls.append(None)
        value = reconstruction_loss(teacher, student)
        return spoil(value) if len(calls) >= step else value

    return loss


@pytest.mark.parametrize(
    "spoil",
    [lambda x: x * torch.nan, lambda x: x * torch.inf, lambda x: x + (x.detach() * 0 * x).sqrt()],
    ids=["nan", "inf", "gradient"],
)
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_epoch(data, tmp_path, monkeypatch, spoil):
    monkeypatch.setattr(train_module, "reconstruction_loss", bad_loss(6, spoil))
    monkeypatch.setattr(run_folder, "SAVE_EVERY_S", 0)
    last = tmp_path / "last.safetensors"
    with pytest.raises(TrainingError, match=f"epoch 3: .* not finite in step 2 of 2; {last} holds epoch 2"):
        tiny_run(data, tmp_path, epochs=4, holdout=0)
    assert all(t.isfinite().all() for t in read_tensors(last).values())
    assert len(history(tmp_path)) == 2


def test_a_validation_loss_that_is_not_finite_stops(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "reconstruction_loss", bad_loss(3, lambda x: x * torch.nan))
    with pytest.raises(TrainingError, match="epoch 1: the loss on held-out images is not finite"):
        tiny_run(data, tmp_path, validate_every=1)
    assert not (tmp_path / "model.safetensors").exists()


def test_the_best_measured_epoch_is_kept(data, tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(Trainer, "validation_loss", lambda self: next(losses))
    result = tiny_run(data, tmp_path, epochs=3, validate_every=1)
    assert (result.best_epoch, result.val_loss) == (2, 1.0)
    assert load_checkpoint(result.checkpoint)[1]["epoch"] == 2


def test_without_holdout_and_with_fewer_images_than_a_batch(data, tmp_path):
    result = tiny_run(data, tmp_path, batch_size=16, holdout=0)
    assert (result.trained_on, result.held_out, result.val_loss, result.best_epoch) == (10, 0, None, 2)
    tensors, last = read_tensors(result.checkpoint), read_tensors(tmp_path / "last.safetensors")
    assert all(torch.equal(tensor, last[f"model.{name}"]) for name, tensor in tensors.items())


def test_every_epoch_has_its_own_order(data, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Trainer, "step", lambda self, rows: seen.append(rows.tolist()) or torch.ones(()))
    monkeypatch.setattr(run_folder.RunFolder, "write", lambda *args, **kwargs: None)
    tiny_run(data, tmp_path, epochs=4, batch_size=3)
    assert len(seen) == 8  # two whole batches of the eight images
    orders = [tuple(seen[2 * i] + seen[2 * i + 1]) for i in range(4)]
    assert len(set(orders)) == 4 and all(len(set(order)) == 6 for order in orders)


def test_broken_images(data, tmp_path):
    broken = data / "bolt" / "good" / "broken.png"
    broken.write_bytes(b"not a picture")
    try:
        with pytest.raises(DataError, match=r"broken\.png"):
            tiny_run(data, tmp_path)
        result = tiny_run(data, tmp_path, epochs=1, on_broken="skip")
        assert (result.trained_on + result.held_out, result.broken) == (10, 1)
    finally:
        broken.unlink()


def test_memory_is_checked_before_it_is_taken(data, tmp_path, monkeypatch):
    monkeypatch.setattr(training_images, "free_memory_bytes", lambda: 200_000)
    with pytest.raises(TrainingError, match=r"10 images of 64 x 64 take 0\.00 GB; .* half of the 0\.00 GB"):
        tiny_run(data, tmp_path)
    monkeypatch.setattr(training_images, "free_memory_bytes", lambda: 1_500_000)
    with pytest.raises(TrainingError, match="the features of 8 images take"):
        tiny_run(data, tmp_path, cache_features=True)
    assert training_images.free_memory_bytes.__name__ == "<lambda>" and not list(tmp_path.iterdir())


def raised_by_torch(loss) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    "take",
    [lambda loss: torch.empty(1 << 50), lambda loss: np.empty(1 << 50), raised_by_torch],
    ids=["CPU", "NumPy", "CUDA"],
)
def test_memory_that_runs_out_is_told_with_what_to_change(data, tmp_path, monkeypatch, take):
    monkeypatch.setattr(train_module, "reconstruction_loss", bad_loss(1, take))
    said = r"out of memory with batches of 4 at 64x64: use a smaller batch size, .* \(.*allocate"
    with pytest.raises(TrainingError, match=said) as raised:
        tiny_run(data, tmp_path)
    assert "\n" not in str(raised.value)


def test_other_errors_of_torch_are_not_taken_for_memory(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "reconstruction_loss", bad_loss(1, lambda loss: loss.view(7, 7)))
    with pytest.raises(RuntimeError, match="shape"):
        tiny_run(data, tmp_path)


def test_the_largest_seed_trains(data, tmp_path):
    tiny_run(data, tmp_path, epochs=1, seed=2**63 - 1)


def test_free_memory_is_plausible():
    free = training_images.free_memory_bytes()
    assert free is None or 1 << 20 < free < 1 << 50


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": 0}, "epochs: expected a whole number from 1 on; got 0"),
        ({"batch_size": 2.5}, "batch_size: .* got 2.5"),
        ({"validate_every": -1}, "validate_every"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, f"seed: expected a whole number from 0 to {2**63 - 1}; got {2**63}"),
        ({"holdout": 1.0}, "holdout: expected a part"),
        ({"holdout": float("nan")}, "holdout"),
        ({"device": "tpu"}, "device: expected"),
        ({"device": "cuda:99"}, "device: expected the CPU or one of the"),
        ({"device": "mps"}, "device: expected the CPU"),
        ({"on_broken": "ignore"}, "on_broken"),
        ({"backbone_weights": "imagnet"}, 'expected "procedural", "imagenet", "none" or a file'),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_in_words(data, tmp_path, options, said):
    with pytest.raises(InputError, match=said):
        tiny_run(data, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def samples(**counts) -> list[Sample]:
    return [Sample(Path(f"{p}/good/{i}.png"), p, "good") for p, n in counts.items() for i in range(n)]


def test_holdout_takes_its_part_of_each_product():
    training, held_out = split_holdout(samples(a=50, b=7, c=2, d=1), 0.1, 42)
    assert sorted([*training, *held_out]) == list(range(60))
    assert list(np.bincount(np.searchsorted([50, 57, 59], held_out, side="right"), minlength=4)) == [
        5,
        1,
        1,
        0,
    ]
    assert len(split_holdout(samples(a=3), 0.99, 42)[0]) == 1
    assert len(split_holdout(samples(a=3), 0, 42)[1]) == 0


def test_holdout_of_a_product_depends_on_seed_and_product_only():
    alone = split_holdout(samples(b=40), 0.2, 42)[1]
    assert np.array_equal(split_holdout(samples(a=13, b=40), 0.2, 42)[1][3:] - 13, alone)
    assert not np.array_equal(split_holdout(samples(b=40), 0.2, 43)[1], alone)


def tiny_trainer(pixels: np.ndarray, config: ModelConfig = TINY, batch_size: int = 4) -> Trainer:
    torch.manual_seed(0)
    training, held_out = np.arange(8), np.arange(8, len(pixels))
    return Trainer(OmniAD(config), pixels, training, held_out, batch_size, World(torch.device("cpu")))


def epoch_losses(trainer: Trainer, epochs: int = 3) -> list[float]:
    torch.manual_seed(1)
    return [loss for _ in range(epochs) for _, loss in trainer.epoch(1e-3)]


@pytest.fixture
def pixels(rng) -> np.ndarray:
    return rng.integers(0, 256, (10, 64, 64, 3), dtype=np.uint8)


def test_held_out_images_do_not_teach(pixels):
    others = pixels.copy()
    others[8:] = 255 - others[8:]
    one, other = tiny_trainer(pixels), tiny_trainer(others)
    assert epoch_losses(one) == epoch_losses(other)
    assert one.validation_loss() != other.validation_loss()


def test_cached_features_teach_the_same(pixels):
    plain, cached = tiny_trainer(pixels), tiny_trainer(pixels)
    cached.cache_features()
    cached.pixels = None  # no longer needed for training
    np.testing.assert_allclose(epoch_losses(cached), epoch_losses(plain), rtol=1e-4)


@pytest.mark.parametrize("sizes", [*({"attention": a} for a in ATTENTIONS), *({"branches": b} for b in BRANCHES)])
def test_every_trained_parameter_gets_a_gradient(pixels, sizes):
    # Several processes wait for ever for one that gets none.
    trainer = tiny_trainer(pixels, ModelConfig(**TINY.to_dict() | sizes), batch_size=2)
    trainer.model.train()
    trainer.step(torch.arange(2))
    assert all(p.grad is not None for p in trainer.parameters)


def start_process(rank: int, port: int, code: str) -> subprocess.Popen:
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    others = {"OMP_NUM_THREADS": 1, "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [sys.executable, "-c", f"import test_train; test_train.{code}"],
        cwd=HERE,
        env=os.environ | {name: str(value) for name, value in (world | address | others).items()},
        stderr=subprocess.PIPE,
        text=True,
    )


def run_two_processes(code: str) -> None:
    """Call a function of this file in two processes, with the variables that torchrun sets."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = [start_process(rank, port, code) for rank in range(2)]
    try:
        for process in started:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in started:
            process.kill()
            process.communicate()


def test_two_processes_equal_one_with_the_doubled_batch(data, tmp_path):
    tiny_run(data, tmp_path / "one", epochs=4, batch_size=8)
    run_two_processes(f"tiny_run({str(data)!r}, {str(tmp_path / 'two')!r}, epochs=4, batch_size=4)")
    one, two = history(tmp_path / "one"), history(tmp_path / "two")
    errors = [abs(b["loss"] / a["loss"] - 1) for a, b in zip(one, two, strict=True)]
    # AdamW makes whole steps of gradients that are mere rounding, as those of biases before a norm.
    assert errors[0] < 1e-6 and max(errors) < 1e-3, errors
    assert two[-1]["val_loss"] == pytest.approx(one[-1]["val_loss"], rel=1e-2)


def check_global_batch_norm() -> None:
    """In each of two processes: output, gradients and statistics are those of the whole batch."""
    torch.manual_seed(3)
    x, target = torch.randn(2, 6, 5, 3, 4) * 3 + 1
    plain, ours = nn.BatchNorm2d(5), GlobalBatchNorm(5)
    nn.init.normal_(plain.weight)
    ours.load_state_dict(plain.state_dict())
    x.requires_grad_()
    y = plain(x)
    (y - target).square().mean().backward()
    with processes("cpu") as world:
        half = slice(3 * world.rank, 3 * world.rank + 3)
        part = x.detach()[half].requires_grad_()
        z = ours(part)
        (z - target[half]).square().mean().backward()
        gradients = [total(p.grad) / 2 for p in ours.parameters()]  # as DistributedDataParallel averages
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    close(z, y[half])
    close(part.grad / 2, x.grad[half])
    close(gradients, [p.grad for p in plain.parameters()])
    close(ours.state_dict(), plain.state_dict())


def test_batch_norm_over_processes_is_that_of_the_whole_batch():
    run_two_processes("check_global_batch_norm()")


def test_too_few_images_for_the_processes(pixels):
    with pytest.raises(TrainingError, match=r"3 processes with batches of 4 need 12 images .* there are 8"):
        Trainer(OmniAD(TINY), pixels, np.arange(8), np.arange(8, 10), 4, World(torch.device("cpu"), 0, 3, 3))


def test_a_process_that_finds_no_others(data, tmp_path, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(TrainingError, match="process 0 of 2 cannot join"):
        tiny_run(data, tmp_path)


def test_plain_lines_are_few(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("omniad_edge.progress.time.monotonic", lambda: clock[0])
    line = plain_lines()
    for epoch in range(1, 101):
        clock[0] += 1
        line({"epoch": epoch, "epochs": 100, "step": 1, "steps": 2, "loss": 1.0, "lr": 1e-3})
        line({"epoch": epoch, "epochs": 100, "step": 2, "steps": 2, "loss": 0.5, "lr": 1e-3, "seconds": 1})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "epoch 1/100, loss 0.5000, lr 0.001, 1 s, 99 s left"
    assert lines[1].startswith("epoch 6/100") and lines[-1].startswith("epoch 100/100")
    assert len(lines) == 21


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with progress_display() as report:
        report({"epoch": 3, "epochs": 4, "step": 2, "steps": 2, "loss": 0.25, "lr": 1e-3, "val_loss": 0.5})
    said = capsys.readouterr().err
    assert "epoch 3/4, loss 0.2500, lr 0.001, held out 0.5000" in said and "━" in said


def test_training_tells_what_it_does(data, tmp_path, capsys):
    tiny_run(data, tmp_path, epochs=1, progress=None, cache_features=True)
    said = capsys.readouterr().err
    assert "10 good images of 2 product(s), 0 MB in memory" in said
    assert "epoch 1/1, loss " in said and "held out " in said
