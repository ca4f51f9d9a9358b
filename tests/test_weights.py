"""Checkpoints, published weights, the teacher's weights: what loads, what is refused, in which words."""

import json
import pickle
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from golden import golden_model
from omniad_edge import weights
from omniad_edge.backbone import ResNet
from omniad_edge.errors import BundleError, InputError
from omniad_edge.model import ModelConfig, OmniAD
from omniad_edge.published import published_name
from omniad_edge.weights import (
    load_backbone,
    load_checkpoint,
    load_published,
    load_run,
    read_tensors,
    save_checkpoint,
    write_tensors,
)

TINY = ModelConfig(backbone="resnet18", depths=(1, 1, 1, 1), height=64, width=96)
FACTS = {"products": ["screw"], "epochs": 3, "loss": 0.5}


@pytest.fixture(scope="module")
def model() -> OmniAD:
    torch.manual_seed(0)
    return OmniAD(TINY).eval()


@pytest.fixture
def checkpoint(model, tmp_path):
    save_checkpoint(tmp_path / "model.safetensors", model, FACTS)
    return tmp_path / "model.safetensors"


def test_a_checkpoint_gives_back_the_model_and_its_facts(model, checkpoint):
    loaded, facts = load_checkpoint(checkpoint)
    assert facts == FACTS and loaded.config == TINY and not loaded.training
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(p.requires_grad for p in loaded.teacher.parameters())
    assert all(p.requires_grad for p in loaded.decoder.parameters())
    pixels = np.zeros((1, 64, 96, 3), np.uint8)
    assert (loaded.predict(pixels)[0] == model.predict(pixels)[0]).all()


def test_a_loaded_model_does_not_follow_the_file(model, checkpoint):
    loaded, _ = load_checkpoint(checkpoint)
    checkpoint.write_bytes(bytes(checkpoint.stat().st_size))  # in place, as `cp` does
    assert torch.equal(loaded.decoder.stages[0][0].mix.weight, model.decoder.stages[0][0].mix.weight)


def test_a_run_is_loaded_by_folder_or_file(model, tmp_path):
    facts = {"data": "/data", "holdout": [], "trained_on": [], "backbone": "none"}
    with pytest.raises(BundleError, match="is this a training run, and did it end"):
        load_run(tmp_path)
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, model, facts)
    assert load_run(tmp_path)[1] == load_run(path)[1] == facts
    save_checkpoint(path, model, FACTS)
    with pytest.raises(BundleError, match="lack data, holdout, trained_on, backbone"):
        load_run(path)


def test_float64_is_saved_as_float32(tmp_path):
    save_checkpoint(tmp_path / "m.safetensors", golden_model(**TINY.to_dict()), {})
    tensors = read_tensors(tmp_path / "m.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32, torch.int64}


def config_json(**changes) -> str:
    return json.dumps(TINY.to_dict() | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "other"}, "not an omniad checkpoint"),
        ({"format": None}, "not an omniad checkpoint"),
        ({"schema": "2"}, r"schema 2, this one reads up to 1\): upgrade"),
        ({"schema": "one"}, "header is damaged"),
        ({"schema": None}, "header is damaged"),
        ({"config": None}, "header is damaged"),
        ({"config": "{"}, "header is damaged"),
        ({"config": "[1]"}, "header is damaged"),
        ({"config": config_json(colour="red")}, "header is damaged"),
        ({"config": config_json(tokens="64")}, "header is damaged"),
        ({"config": config_json(tokens=60)}, "square number"),
        ({"config": config_json(depths=[10**9, 1, 1, 1])}, "cannot be the blocks"),
        ({"facts": "7"}, "header is damaged"),
    ],
    ids=str,
)
def test_a_damaged_header_is_refused(tmp_path, changes, said):
    header = {"format": "omniad-checkpoint", "schema": "1", "config": config_json(), "facts": "{}"} | changes
    tensors = {str(i): torch.zeros(1) for i in range(4)}
    write_tensors(tmp_path / "m.safetensors", tensors, {k: v for k, v in header.items() if v is not None})
    with pytest.raises(BundleError, match=said):
        load_checkpoint(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens": 10**12}, r"tokens: expected shape"),
        ({"depths": (1, 1, 1, 2)}, "30 .* missing, none unexpected"),
        ({"attention_output": "none"}, r"none missing, 16 \(.*out"),
    ],
    ids=str,
)
def test_tensors_of_another_network_are_refused(model, tmp_path, changes, said, monkeypatch):
    monkeypatch.setattr(model, "config", replace(TINY, **changes))
    save_checkpoint(tmp_path / "m.safetensors", model, {})
    with pytest.raises(BundleError, match=said):
        load_checkpoint(tmp_path / "m.safetensors")


@pytest.mark.parametrize("size", [0, 7, 100, 10_000, -1])
def test_a_truncated_checkpoint_is_refused(checkpoint, size):
    checkpoint.write_bytes(checkpoint.read_bytes()[:size])
    with pytest.raises(BundleError, match="damaged"):
        load_checkpoint(checkpoint)


def test_files_that_are_no_checkpoint(tmp_path):
    with pytest.raises(BundleError, match="no such file"):
        load_checkpoint(tmp_path / "none.safetensors")
    with pytest.raises(BundleError, match="damaged"):
        load_checkpoint(tmp_path)
    claim = tmp_path / "claim.safetensors"
    claim.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(BundleError, match="damaged"):
        load_checkpoint(claim)


def published_state(**sizes) -> tuple[OmniAD, dict]:
    model = golden_model(**TINY.to_dict() | sizes).float()
    return model, {published_name(name): tensor for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"net": s}, lambda s: {"state_dict": s, "epoch": 7}])
def test_published_weights(tmp_path, wrap):
    model, state = published_state(attention_output="none")
    extra = {"net_t.fc.bias": torch.zeros(1000), "net_t.layer4.0.conv1.weight": torch.zeros(1)}
    torch.save(wrap({f"module.{name}": t for name, t in (state | extra).items()}), tmp_path / "net.pth")
    loaded = load_published(tmp_path / "net.pth", replace(TINY, attention_output="none"))
    pixels = np.full((1, 64, 96, 3), 99, np.uint8)
    assert (loaded.predict(pixels)[0] == model.predict(pixels)[0]).all()


@pytest.mark.parametrize("output", ["linear", "mlp"])
def test_published_weights_with_an_attention_output(tmp_path, output):
    model, state = published_state(attention_output=output)
    save_file(state, tmp_path / "net.safetensors")
    loaded = load_published(tmp_path / "net.safetensors", replace(TINY, attention_output=output))
    pixels = np.full((1, 64, 96, 3), 99, np.uint8)
    assert (loaded.predict(pixels)[0] == model.predict(pixels)[0]).all()


def test_published_weights_that_do_not_fit(tmp_path):
    _, state = published_state(attention_output="none")
    path = tmp_path / "net.pth"
    torch.save(state, path)
    with pytest.raises(BundleError, match=r'16 \(.*ffn1.*\) missing, none unexpected.*output="none"'):
        load_published(path, TINY)
    none = replace(TINY, attention_output="none")
    with pytest.raises(BundleError, match=r"missing, none unexpected\.$"):
        load_published(path, replace(none, depths=(1, 1, 1, 2)))
    with pytest.raises(BundleError, match="expected shape"):
        load_published(path, replace(none, tokens=16))
    with pytest.raises(InputError, match='attention "q\\+kv"'):
        load_published(path, replace(none, attention="kv+q"))


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemError('this code must not run')",)


@pytest.mark.parametrize(
    "content",
    [pickle.dumps(Evil(), 2), pickle.dumps({"net": Evil()}, 2), b"", b"PK\3\4 cut", b"<html>"],
    ids=["code", "wrapped code", "empty", "cut", "html"],
)
def test_nothing_is_unpickled(tmp_path, content):
    (tmp_path / "net.pth").write_bytes(content)
    with pytest.raises(BundleError, match=r"net\.pth: not a file of weights that can be read without"):
        load_published(tmp_path / "net.pth", TINY)


def test_a_pth_that_is_no_state_dict(tmp_path):
    torch.save([1, 2], tmp_path / "net.pth")
    with pytest.raises(BundleError, match="dictionary of tensors"):
        load_published(tmp_path / "net.pth", TINY)
    with pytest.raises(BundleError, match="no such file"):
        load_published(tmp_path / "gone.pth", TINY)


def torchvision_state() -> dict:
    torch.manual_seed(7)
    state = {name: torch.rand_like(t.float()) for name, t in ResNet("resnet18").state_dict().items()}
    return state | {"fc.weight": torch.zeros(1000, 512), "layer4.0.conv1.weight": torch.zeros(1)}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_backbone_from_a_file(tmp_path, suffix):
    state, path = torchvision_state(), tmp_path / f"r18.{suffix}"
    torch.save(state, path) if suffix == "pth" else save_file(state, path)
    teacher = ResNet("resnet18")
    words = load_backbone(teacher, "resnet18", str(path))
    assert words == f"file r18.{suffix} (sha256 {weights.file_sha256(path)[:8]}...)"
    assert torch.equal(teacher.layer3[1].conv2.weight, state["layer3.1.conv2.weight"])
    assert torch.equal(teacher.bn1.running_var, state["bn1.running_var"])
    with pytest.raises(BundleError, match="as resnet34"):
        load_backbone(ResNet("resnet34"), "resnet34", str(path))


def test_backbone_from_imagenet_by_name(tmp_path, monkeypatch):
    state, asked = torchvision_state(), []
    torch.save(state, tmp_path / "r18.pth")
    monkeypatch.setattr(
        weights, "fetch", lambda *args, **kwargs: asked.append((args, kwargs)) or tmp_path / "r18.pth"
    )
    teacher = ResNet("resnet18")
    words = load_backbone(teacher, "resnet18", "imagenet")
    assert words == "ImageNet (torchvision resnet18-f37072fd)"
    url = "https://download.pytorch.org/models/resnet18-f37072fd.pth"
    assert asked == [((url, "f37072fd"), {"size_mb": 45})]
    assert torch.equal(teacher.conv1.weight, state["conv1.weight"])


def test_backbone_without_weights_warns_and_stays():
    torch.manual_seed(42)
    teacher = ResNet("resnet18")
    before = teacher.conv1.weight.clone()
    with pytest.warns(UserWarning, match="random weights"):
        assert load_backbone(teacher, "resnet18", "none") == "none (random, seed 42)"
    assert torch.equal(teacher.conv1.weight, before)


def test_backbone_misspelled():
    with pytest.raises(InputError, match='"procedural", "imagenet", "none" or a file; there is no imagnet'):
        load_backbone(ResNet("resnet18"), "resnet18", "imagnet")


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError, match=r"w\.safetensors: could not be written: .*No space left on device"):
        weights.write_tensors(tmp_path / "w.safetensors", {"x": torch.zeros(1)}, {})
    assert not list(tmp_path.iterdir())
