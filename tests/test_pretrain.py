"""Pre-training on procedural pictures, and the backbone that comes with the package."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from omniad_edge.backbone import ResNet
from omniad_edge.errors import InputError
from omniad_edge.model import initialise
from omniad_edge.pretrain import contrast, draw_picture, pretrain, view
from omniad_edge.weights import load_backbone


def test_pictures_repeat_with_the_seed_and_differ_otherwise():
    first, again = (draw_picture(np.random.default_rng(3)) for _ in range(2))
    assert first.shape == (96, 96, 3) and first.dtype == np.uint8
    assert (first == again).all()
    assert (first != draw_picture(np.random.default_rng(4))).any()


def test_contrast_is_low_where_views_agree_and_chance_where_they_do_not():
    torch.manual_seed(0)
    a = torch.randn(4, 64, 4, 4)
    assert contrast(a, a) < 0.1
    assert contrast(a, torch.randn(4, 64, 4, 4)) > np.log(64) - 1


def test_pretrain_writes_a_backbone_that_loads_and_repeats(tmp_path, monkeypatch):
    monkeypatch.setattr("omniad_edge.pretrain.PICTURES", 8)
    monkeypatch.setattr("omniad_edge.pretrain.PAIRS", 2)
    steps = []
    for name in ("a", "b"):
        pretrain(tmp_path / name, steps=2, progress=lambda done, loss: steps.append(done))
    assert steps == [1, 2, 1, 2]
    a, b = load_file(tmp_path / "a"), load_file(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert {t.dtype for t in a.values()} == {torch.float16}
    (tmp_path / "a").rename(tmp_path / "a.safetensors")
    load_backbone(ResNet("resnet18"), "resnet18", str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize(("arguments", "said"), [({"backbone": "vgg"}, "resnet18"), ({"steps": 0}, "at least 1")])
def test_bad_arguments(arguments, said, tmp_path):
    with pytest.raises(InputError, match=said):
        pretrain(tmp_path / "x", **arguments)


@torch.inference_mode()
def test_the_packaged_backbone_knows_a_place_again_in_another_light():
    rng = np.random.default_rng(11)  # pictures it was not trained on
    pictures = torch.from_numpy(np.stack([draw_picture(rng) for _ in range(8)])).permute(0, 3, 1, 2).float() / 255
    torch.manual_seed(0)
    views = view(pictures), view(pictures)
    packaged, random = ResNet("resnet18").eval(), ResNet("resnet18").apply(initialise).eval()
    words = load_backbone(packaged, "resnet18", "procedural")
    assert "procedural" in words
    assert recognised(packaged, *views) > recognised(random, *views) + 0.2


def recognised(net: ResNet, a: torch.Tensor, b: torch.Tensor) -> float:
    """Share of positions whose most similar position in the other view is the same one, at stride 8."""
    a, b = (torch.nn.functional.normalize(net(x)[1], dim=1).transpose(0, 1).flatten(1) for x in (a, b))
    return float(((a.T @ b).argmax(1) == torch.arange(a.shape[1])).float().mean())


def test_there_are_no_procedural_weights_for_other_backbones():
    with pytest.raises(InputError, match="resnet18"):
        load_backbone(ResNet("resnet34"), "resnet34", "procedural")
