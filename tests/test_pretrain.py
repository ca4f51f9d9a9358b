"""Pre-training on procedural pictures, and the backbone that comes with the package."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from omniad_edge import pretrain as pretrain_module
from omniad_edge.backbone import ResNet
from omniad_edge.errors import BundleError, InputError, TrainingError
from omniad_edge.model import initialise
from omniad_edge.pictures import CHANGES, alter_picture, draw_change, draw_picture
from omniad_edge.pretrain import at, contrast, grow, movements, pretrain, view
from omniad_edge.weights import load_backbone, read_tensors


def test_pictures_repeat_with_the_seed_and_differ_otherwise():
    first, again = (draw_picture(np.random.default_rng(3)) for _ in range(2))
    assert first.shape == (96, 96, 3) and first.dtype == np.uint8
    assert (first == again).all()
    assert (first != draw_picture(np.random.default_rng(4))).any()


def test_a_defect_is_where_the_mask_says_and_nowhere_else():
    rng = np.random.default_rng(5)
    picture, other = draw_picture(rng), draw_picture(rng)
    shares = []
    for _ in range(40):
        altered, changed = alter_picture(picture, other, rng)
        difference = np.abs(altered.astype(int) - picture).max(axis=2)
        assert altered.dtype == np.uint8 and changed.shape == (96, 96)
        assert (difference[~changed] <= 12).all() and (difference[changed] > 12).all()
        shares.append(changed.mean())
    assert np.median(shares) > 0.001 and max(shares) < 0.5


def test_each_kind_of_change_is_drawn():
    rng = np.random.default_rng(6)
    picture, other = (draw_picture(rng).astype(np.float32) for _ in range(2))
    seen = [draw_change(picture, other, rng) for _ in range(20 * len(CHANGES))]
    assert all(change.shape == picture.shape for change in seen)
    assert any((change == other).all() for change in seen)
    assert any(np.ptp(change, axis=(0, 1)).max() == 0 for change in seen)
    assert not any((change == picture).all() for change in seen)


def test_contrast_is_low_where_views_agree_and_chance_where_they_do_not():
    torch.manual_seed(0)
    a, none = torch.randn(64, 64), torch.empty(0, 64)
    assert contrast(a, a, none) < 0.1
    assert contrast(a, torch.randn(64, 64), none) > np.log(64) - 1


def test_a_defect_that_looks_like_the_sound_place_costs():
    torch.manual_seed(0)
    a = torch.randn(64, 64)
    assert contrast(a, a, torch.randn(9, 64)) < 0.1
    assert contrast(a, a, a[:32]) > 0.5 * np.log(2)


def test_a_movement_is_undone_by_its_inverse():
    torch.manual_seed(0)
    there, back = movements(8)
    smooth = F.interpolate(torch.rand(8, 1, 4, 4), size=(64, 64), mode="bicubic")
    moved = F.grid_sample(smooth, F.affine_grid(there, [8, 1, 64, 64], align_corners=False), align_corners=False)
    again = F.grid_sample(moved, F.affine_grid(back, [8, 1, 64, 64], align_corners=False), align_corners=False)
    middle = (..., slice(20, 44), slice(20, 44))
    assert (again - smooth)[middle].abs().max() < 0.02
    assert (moved - smooth)[middle].abs().max() > 0.2


def test_features_are_taken_at_the_chosen_positions():
    features = torch.arange(2 * 3 * 2 * 2).view(2, 3, 2, 2)
    rows = at(features, torch.tensor([[3], [0]]))
    assert rows.tolist() == [features[0, :, 1, 1].tolist(), features[1, :, 0, 0].tolist()]


@torch.inference_mode()
@pytest.mark.parametrize(("small", "large"), [("resnet18", "resnet34"), ("resnet50", "resnet50")])
def test_a_grown_backbone_begins_as_the_smaller_one(small, large):
    torch.manual_seed(0)
    source, grown = ResNet(small).apply(initialise).eval(), ResNet(large).apply(initialise).eval()
    grow(grown, source.state_dict())
    pixels = torch.rand(1, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(source(pixels), grown(pixels), strict=True))


def test_a_backbone_of_other_blocks_is_refused_as_a_start(tmp_path):
    save_file(ResNet("resnet50").state_dict(), tmp_path / "r50.safetensors")
    with pytest.raises(BundleError, match="smaller ResNet of the same kind"):
        grow(ResNet("resnet34"), read_tensors(tmp_path / "r50.safetensors"))


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (lambda name: name.startswith("layer1.0."), "conv1.weight"),
        (lambda name: name != "layer2.0.downsample.0.weight", r"1 \(layer2\.0\.downsample\.0\.weight\) missing"),
        (lambda name: name != "layer3.1.bn2.bias", r"1 \(layer3\.1\.bn2\.bias\) missing"),
        (lambda name: False, "missing"),
    ],
    ids=["one block", "part of a first block", "part of another", "nothing"],
)
def test_a_start_that_leaves_parts_at_random_is_refused(kept, said):
    tensors = {name: t for name, t in ResNet("resnet18").state_dict().items() if kept(name)}
    with pytest.raises(BundleError, match=rf"smaller ResNet of the same kind; none do not fit, .*{said}"):
        grow(ResNet("resnet34"), tensors)


@pytest.mark.parametrize(
    "spoil", [lambda x: x * torch.nan, lambda x: x + (x.detach() * 0 * x).sqrt()], ids=["loss", "gradient"]
)
def test_a_loss_that_is_not_finite_writes_nothing(tmp_path, monkeypatch, spoil):
    loss = pretrain_module.contrastive_loss
    monkeypatch.setattr(pretrain_module, "contrastive_loss", lambda *arguments: spoil(loss(*arguments)))
    with pytest.raises(TrainingError, match="not finite in step 1 of 1; nothing was written"):
        pretrain(tmp_path / "x.safetensors", steps=1, pictures=8, batch_size=2)
    assert not list(tmp_path.iterdir())


def test_pretrain_writes_a_backbone_that_loads_and_repeats(tmp_path):
    steps = []
    for name in ("a", "b"):
        options = {"steps": 2, "pictures": 8, "batch_size": 2}
        pretrain(tmp_path / name, **options, progress=lambda done, loss: steps.append(done))
    assert steps == [1, 2, 1, 2]
    a, b = load_file(tmp_path / "a"), load_file(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert {t.dtype for t in a.values()} == {torch.float16}
    (tmp_path / "a").rename(tmp_path / "a.safetensors")
    load_backbone(ResNet("resnet18"), "resnet18", str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"backbone": "vgg"}, "resnet18"),
        ({"steps": 0}, "at least 1"),
        ({"pictures": 0}, "pictures: expected at least 1"),
        ({"seed": -1}, "seed: expected a whole number from 0 on; got -1"),
        ({"seed": 10**23}, f"seed: expected a whole number from 0 to {2**63 - 1}"),
    ],
)
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
        load_backbone(ResNet("resnet50"), "resnet50", "procedural")
