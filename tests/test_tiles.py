"""Tiles: cut so that they cover everything, merged without a seam, and the same from training to the line."""

import json
import random
import shutil
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from small_run import facts

from omniad_edge import Detector
from omniad_edge import train as train_module
from omniad_edge.bundle import TILED_RESIZE, Bundle, describe_input, read_bundle, write_bundle
from omniad_edge.cli import main
from omniad_edge.data import find_samples, load_images
from omniad_edge.distributed import World
from omniad_edge.engine import OnnxRuntimeEngine, TiledEngine
from omniad_edge.errors import BundleError, ExportError, InputError
from omniad_edge.evaluate import calibrate_bundle, evaluate_model, open_model, predict_images
from omniad_edge.export import bundle_export
from omniad_edge.export.bundle_export import candidates, export_bundle, fit_products
from omniad_edge.export.fused_parts import self_test
from omniad_edge.export.triton_repository import write_triton_repository
from omniad_edge.image import read_image
from omniad_edge.model import ModelConfig, OmniAD
from omniad_edge.preprocess import resize
from omniad_edge.recognition import LIGHT_COPIES, fit, other_light
from omniad_edge.self_test import SELF_TEST, read_self_test
from omniad_edge.tiles import Tiling, overlap, starts, weights
from omniad_edge.train import Trainer, train
from omniad_edge.weights import load_checkpoint, save_checkpoint

SIDES = [(64, 64), (65, 64), (96, 64), (112, 64), (113, 64), (128, 64), (200, 64), (512, 256), (1000, 96)]
TILINGS = [Tiling(128, 64, 64, 64), Tiling(150, 201, 96, 64), Tiling(65, 300, 64, 96)]


# ---- where the tiles lie


@pytest.mark.parametrize("total, tile", SIDES)
def test_tiles_cover_everything_and_overlap_enough(total, tile):
    first = starts(total, tile)
    assert first[0] == 0 and first[-1] == total - tile
    steps = [b - a for a, b in pairwise(first)]
    assert all(0 < step <= tile - overlap(tile) for step in steps)
    assert not steps or max(steps) - min(steps) <= 1
    fewer = len(first) - 1
    assert fewer == 0 or fewer * tile - (fewer - 1) * overlap(tile) < total  # with one tile less they would not


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_each_tile_is_the_image_at_its_place(tiling, rng):
    image = rng.integers(0, 256, (*tiling.size, 3), dtype=np.uint8)
    tiles = tiling.cut(image)
    assert tiles.shape == (tiling.count, tiling.height, tiling.width, 3)
    for tile, (rows, columns) in zip(tiles, tiling.places, strict=True):
        assert (tile == image[rows, columns]).all()
    assert (tiles[0] == image[: tiling.height, : tiling.width]).all()
    assert (tiles[-1] == image[-tiling.height :, -tiling.width :]).all()


def test_tiles_are_numbered_image_by_image(rng):
    tiling = TILINGS[0]
    images = rng.integers(0, 256, (3, *tiling.size, 3), dtype=np.uint8)
    numbers = tiling.tiles_of(np.array([2, 0]))
    assert numbers.tolist() == [6, 7, 8, 0, 1, 2]
    expected = np.concatenate([tiling.cut(images[2]), tiling.cut(images[0])])
    assert (tiling.pick(images, numbers) == expected).all()


def test_how_a_tiling_is_told():
    assert str(Tiling(64, 96, 64, 96)) == "96x64"
    assert str(Tiling(448, 448, 256, 256)) == "448x448 in 4 tiles of 256x256"
    assert str(Tiling(512, 512, 256, 256)) == "512x512 in 9 tiles of 256x256"


# ---- merging


@pytest.mark.parametrize("total, tile", SIDES)
def test_weights_sum_to_one_and_change_gradually(total, tile):
    sums = np.zeros(total)
    spread = np.zeros((len(starts(total, tile)), total))
    for row, of_tile, first in zip(spread, weights(total, tile), starts(total, tile), strict=True):
        row[first : first + tile] = of_tile
        sums += row
    assert spread.min() >= 0 and np.abs(sums - 1).max() < 1e-6
    # A raised cosine over half of the overlap rises by half of pi over its length, at most.
    assert np.abs(np.diff(spread, axis=1)).max() <= np.pi / 2 / (overlap(tile) / 2) + 1e-6
    border = overlap(tile) // 4  # which a neighbour sees better
    for row, first in zip(spread, starts(total, tile), strict=True):
        assert first == 0 or not row[: first + border].any()
        assert first + tile == total or not row[first + tile - border :].any()


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_tiles_of_one_map_merge_to_that_map(tiling, rng):
    whole = rng.random(tiling.size, dtype=np.float32)
    merged = tiling.merge(tiling.cut(whole))
    assert merged.dtype == np.float32 and merged.shape == tiling.size
    np.testing.assert_allclose(merged, whole, rtol=1e-6)
    np.testing.assert_allclose(
        tiling.merge(np.full((tiling.count, tiling.height, tiling.width), 0.3)), 0.3, rtol=1e-6
    )


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_no_seam_between_tiles_that_disagree(tiling, rng):
    """Each tile has a level of its own: neighbouring pixels differ by no more than the change of weights gives."""
    levels = rng.random(tiling.count).astype(np.float32)
    merged = tiling.merge(np.broadcast_to(levels[:, None, None], (tiling.count, tiling.height, tiling.width)))
    assert levels.min() - 1e-6 <= merged.min() and merged.max() <= levels.max() + 1e-6
    for axis, side in enumerate((tiling.height, tiling.width)):
        steepest = np.pi / overlap(side) * np.ptp(levels)
        assert np.abs(np.diff(merged, axis=axis)).max() <= steepest + 1e-6


def test_one_tile_is_the_image_itself(rng):
    tiling = Tiling(64, 96, 64, 96)
    pixels = rng.integers(0, 256, (3, 64, 96, 3), dtype=np.uint8)
    given = []
    assert tiling.count == 1
    assert tiling.predict(lambda x: given.append(x) or "as it is", pixels) == "as it is" and given[0] is pixels


def test_an_images_map_does_not_depend_on_its_neighbours_and_calls_are_small(rng):
    tiling = Tiling(128, 144, 64, 64)
    pixels = rng.integers(0, 256, (3, *tiling.size, 3), dtype=np.uint8)
    calls = []

    def network(tiles):
        calls.append(len(tiles))
        maps = tiles[..., 0] / np.float32(255) + len(tiles)
        return maps, maps.max((1, 2))

    anomaly_maps, scores = tiling.predict(network, pixels)
    assert tiling.count == 12 and calls == [8, 4] * 3
    assert (scores == anomaly_maps.max((1, 2))).all() and scores.shape == (3,)
    assert (anomaly_maps[1] == tiling.predict(network, pixels[1:2])[0][0]).all()


def test_a_map_that_is_not_finite_stays_so(rng):
    """decide() refuses such a frame; weights of zero must not hide it."""
    tiling = TILINGS[0]
    maps = rng.random((tiling.count, tiling.height, tiling.width), dtype=np.float32)
    maps[0, -1, -1] = np.nan
    assert np.isnan(tiling.merge(maps)).any()


# ---- the definition, as it is stored


@pytest.mark.parametrize("tiles", [(64, 64), (32, 128), (128, 63), (128, 16385)])
def test_tiles_that_are_none(tiles):
    with pytest.raises(InputError, match=rf"larger image than the input's 64 x 64.* got {tiles[0]} x {tiles[1]}"):
        ModelConfig(height=64, width=64, tiles=tiles)


def test_a_config_with_tiles_and_one_without():
    tiled = ModelConfig(height=64, width=96, tiles=[128, 96])
    assert tiled.tiling == Tiling(128, 96, 64, 96)
    assert ModelConfig(**json.loads(json.dumps(tiled.to_dict()))) == tiled
    whole = ModelConfig(height=64, width=96)
    assert whole.tiling.size == (64, 96) and whole.tiling.count == 1
    assert "tiles" not in whole.to_dict()  # so that what was written before tiles is resumed and read


# ---- from training to the line


TILED = ModelConfig(backbone="resnet18", depths=(1, 1, 1, 1), height=64, width=64, tiles=(96, 64))


@dataclass(frozen=True)
class TiledRun:
    """data: one product, 4 good images to train on; folder: of an untrained run; bundle: of that run, in fp32."""

    data: Path
    folder: Path
    bundle: Path


@pytest.fixture(scope="module")
def data(small_run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiled") / "data"
    shutil.copytree(small_run.data / "gear", folder / "gear")
    return folder


@pytest.fixture(scope="module")
def tiled(data) -> TiledRun:
    torch.manual_seed(0)
    run = TiledRun(data, data.parent / "run", data.parent / "tiled.omniad")
    known = facts(data, 0.25) | {"model": TILED.to_dict()}
    save_checkpoint(run.folder / "model.safetensors", OmniAD(TILED), known)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(bundle_export, "candidates", lambda parts: islice(candidates(parts), 1))
        export_bundle(run.folder, run.bundle)
    return run


def test_the_bundle_has_the_checkpoints_definition(tiled):
    bundle = read_bundle(tiled.bundle)
    config = load_checkpoint(tiled.folder / "model.safetensors")[0].config
    assert config.tiling == bundle.tiling == Tiling(96, 64, 64, 64)
    entry = bundle.manifest["input"]
    assert entry["tiles"] == {"rows": 96, "columns": 64, "overlap_px": 64} and entry["resize"] == TILED_RESIZE
    assert (bundle.height, bundle.width) == (64, 64)
    (report,) = bundle.manifest["parity"]["engines"].values()
    assert report["passed"] and 0 < report["measured"]["map_error"] < 1e-5


def test_gpus_are_tested_with_tiles(tiled):
    model, tiling = load_checkpoint(tiled.folder / "model.safetensors")[0], TILED.tiling
    images = load_images(find_samples(tiled.data, "train"), *tiling.size)
    predictions = predict_images(partial(tiling.predict, model.predict), images)
    test = read_self_test(Bundle({}, {SELF_TEST: self_test(predictions, model)}))
    assert (test.pixels == tiling.pick(images.pixels, np.array([0, 2, 4, 7]))).all()
    assert (test.anomaly_maps == model.predict(test.pixels)[0]).all()


def test_the_detector_merges_what_the_network_finds(tiled):
    detector = Detector(tiled.bundle, "onnxruntime", threads=1)
    assert repr(detector).startswith("Detector(64x96 in 2 tiles of 64x64, onnxruntime fp32")
    frame = cv2.resize(read_image(find_samples(tiled.data, "test")[0].path), (200, 300))
    result = detector(frame)
    network, tiling = OnnxRuntimeEngine(read_bundle(tiled.bundle).onnx("cpu"), threads=1), TILED.tiling
    tiles, _ = network.run(tiling.cut(resize(frame, *tiling.size)))
    assert (result.anomaly_map == tiling.merge(tiles)).all()
    assert result.pred_score == result.anomaly_map.max()
    assert result.pred_mask.shape == (96, 64) and result.draw(frame).shape == frame.shape
    together = detector([frame, frame[::-1]])
    assert (together[0].anomaly_map == result.anomaly_map).all()  # whatever is beside it


def test_products_are_fitted_to_an_image_and_a_few_tiles_at_a_time(data, monkeypatch):
    torch.manual_seed(0)
    model, samples = OmniAD(replace(TILED, tiles=(160, 160))), find_samples(data, "train")
    tiling, embed, tiles, read = model.config.tiling, model.embed, [], []
    monkeypatch.setattr(model, "embed", lambda pixels: tiles.append(len(pixels)) or embed(pixels))
    monkeypatch.setattr(
        bundle_export, "load_images", lambda some, *s: read.append(len(some)) or load_images(some, *s)
    )
    space = fit_products(model, samples, samples[:1])
    assert (tiling.count, {*tiles}, read) == (16, {8}, [1, 1, 1])
    chosen = random.Random(0).sample(samples[1:], 3)
    images, rng = load_images(chosen, *tiling.size).pixels, np.random.default_rng(0)
    copies = [other_light(image, rng) for image in images for _ in range(LIGHT_COPIES)]
    together = fit({"gear": np.stack([embed(tiling.cut(image)).mean(0) for image in (*images, *copies)])})
    np.testing.assert_allclose(space.centre, together.centre, rtol=1e-5)
    np.testing.assert_allclose(space.whitening, together.whitening, rtol=1e-3, atol=1e-3)


def test_evaluation_and_calibration_see_tiles_too(tiled, small_run, tmp_path):
    run, bundle = open_model(tiled.folder, tiled.data), open_model(tiled.bundle, tiled.data)
    assert run.size == bundle.size == (96, 64)
    thresholds = [model.calibrations["gear"].threshold for model in (run, bundle)]
    assert thresholds[0] == pytest.approx(thresholds[1], abs=1e-5)
    evaluation = evaluate_model(tiled.bundle, tiled.data)
    assert evaluation.predictions.anomaly_maps.shape[1:] == (96, 64) and len(evaluation.metrics) == 1
    copy = tmp_path / "copy.omniad"
    copy.write_bytes(tiled.bundle.read_bytes())
    good = shutil.copytree(small_run.data.parent / "calibration" / "gear", tmp_path / "good" / "gear")
    made, _, _ = calibrate_bundle(copy, good.parent)
    images = load_images(find_samples(good.parent, "train"), 96, 64)
    scores = bundle.predict(images.pixels)[1]
    assert made["gear"].threshold == pytest.approx(scores.max(), abs=2e-6)


def test_a_frame_on_a_gpu_is_refused(tiled):
    engine = TiledEngine(OnnxRuntimeEngine(read_bundle(tiled.bundle).onnx("cpu"), threads=1), TILED.tiling)
    with pytest.raises(InputError, match="frame: expected a uint8 BGR array"):
        engine.frame_size(torch.zeros(96, 64, 3, dtype=torch.uint8))


def test_a_server_is_not_given_tiles(tiled, tmp_path):
    with pytest.raises(ExportError, match="64x96 in 2 tiles of 64x64; a model repository cuts no tiles"):
        write_triton_repository(tiled.bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line_tells_of_tiles(tiled, capsys):
    assert main(["info", str(tiled.bundle)]) == 0
    assert "input       64x96 in 2 tiles of 64x64\n" in capsys.readouterr().out
    assert main(["train", "--data", "x", "--out", "y", "--size", "128", "--tiles", "96"]) == 1
    assert "larger image than the input's 128 x 128" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"tiles": None}, "input tiles must be an object"),
        ({"tiles": {"rows": 96, "columns": 64}}, "overlap_px must be 64"),
        ({"tiles": {"rows": 32, "columns": 64, "overlap_px": 64}}, "rows must be a whole number from 64"),
        ({"tiles": {"rows": 96, "columns": True, "overlap_px": 64}}, "columns must be a whole number from 64"),
        ({"resize": "area-halved pillow-bilinear"}, "input resize must be .* cut into tiles"),
    ],
)
def test_a_manifest_with_other_tiles_is_refused(tiled, tmp_path, changes, words):
    bundle = read_bundle(tiled.bundle)
    manifest = bundle.manifest | {"input": bundle.manifest["input"] | changes}
    with pytest.raises(BundleError, match=words):
        write_bundle(tmp_path / "a.omniad", manifest, bundle.parts)


def test_a_bundle_without_tiles_says_nothing_of_them():
    entry = describe_input(Tiling(64, 96, 64, 96))
    assert entry["resize"] == "area-halved pillow-bilinear" and "tiles" not in entry


# ---- training


def test_every_tile_of_the_training_images_is_trained_on(data, tmp_path, monkeypatch):
    made = []

    class Watched(Trainer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(train_module, "Trainer", Watched)
    options = {"epochs": 1, "backbone_weights": "none", "batch_size": 2, "device": "cpu"}
    with pytest.warns(UserWarning, match="random weights"):
        result = train(data, tmp_path, TILED, holdout=0.25, progress=lambda report: None, **options)
    (trainer,) = made
    assert (result.trained_on, result.held_out) == (3, 1)  # images
    assert (len(trainer.training), len(trainer.held_out), trainer.steps) == (3 * 2, 1 * 2, 3)
    assert not {*(trainer.training // 2).tolist()} & {*(trainer.held_out // 2).tolist()}  # never a part of one
    assert load_checkpoint(result.checkpoint)[0].config == TILED


def test_the_trainer_sees_the_tiles_that_the_line_sees(data):
    tiling, world = TILED.tiling, World(torch.device("cpu"))
    images = load_images(find_samples(data, "train")[:2], *tiling.size)
    torch.manual_seed(0)
    seen = [tiling.tiles_of(np.array([image])) for image in (0, 1)]
    trainer = Trainer(OmniAD(TILED), images.pixels, *seen, 4, world)
    features = trainer.see(trainer.held_out)
    pixels = torch.from_numpy(tiling.cut(images.pixels[1]))
    expected = trainer.model.teacher(train_module.normalise(pixels, trainer.parameters[0]).contiguous())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(features, expected, strict=True))
