"""Scores of many images, evaluation of runs and bundles, calibration from predictions."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from omniad_edge import Detector
from omniad_edge.bundle import read_bundle, set_thresholds
from omniad_edge.data import Images, Sample, find_samples, load_images, load_masks
from omniad_edge.errors import BundleError, CalibrationError, DataError, InputError
from omniad_edge.evaluate import (
    Predictions,
    calibrate_bundle,
    calibrate_products,
    evaluate,
    evaluate_model,
    first_calibrations,
    good_samples,
    held_out_samples,
    judge,
    mistakes,
    open_model,
    predict_images,
    report_evaluation,
)
from omniad_edge.image import read_image
from omniad_edge.metrics import mean_metrics
from omniad_edge.weights import load_checkpoint, load_run


def made_up(rng, products: list[str], kinds: list[str] | None = None) -> Predictions:
    count = len(products)
    kinds = kinds or ["good"] * count
    samples = [Sample(f"{i}.png", p, k) for i, (p, k) in enumerate(zip(products, kinds, strict=True))]
    maps = rng.random((count, 8, 8), dtype=np.float32)
    return Predictions(Images(np.zeros((count, 8, 8, 3), np.uint8), samples, []), maps, maps.max((1, 2)))


# ---- predictions


@pytest.mark.parametrize("count, parts", [(0, []), (1, [1]), (8, [8]), (11, [8, 3])])
def test_images_are_predicted_in_batches_and_in_order(rng, count, parts):
    pixels = rng.integers(0, 256, (count, 4, 5, 3), dtype=np.uint8)
    seen, done = [], []

    def predict(batch):
        seen.append(len(batch))
        return batch[..., 0].astype(np.float32), batch[:, 0, 0, 1].astype(np.float32)

    predictions = predict_images(predict, Images(pixels, [None] * count, []), progress=done.append)
    assert seen == parts and done == list(np.cumsum(parts))
    assert (predictions.anomaly_maps == pixels[..., 0]).all() and predictions.anomaly_maps.dtype == np.float32
    assert (predictions.pred_scores == pixels[:, 0, 0, 1]).all()


def test_predictions_by_product(rng):
    predictions = made_up(rng, ["nut", "cap", "nut"], ["good", "good", "dent"])
    assert predictions.products == ("nut", "cap")
    assert predictions.of("nut").tolist() == [0, 2] and predictions.of("bolt").tolist() == []
    assert predictions.labels.dtype == bool and predictions.labels.tolist() == [False, False, True]


# ---- calibration


def test_each_product_is_calibrated_on_its_own_images(rng):
    predictions = made_up(rng, ["nut", "cap", "nut", "cap", "cap"])
    calibrations = calibrate_products(predictions)
    assert list(calibrations) == ["nut", "cap"]
    for product, calibration in calibrations.items():
        of = predictions.of(product)
        assert calibration.threshold == predictions.pred_scores[of].max()
        assert calibration.map_floor == np.median(predictions.anomaly_maps[of])
        assert calibration.n_good == len(of)


def test_every_product_that_cannot_support_the_wish_is_named(rng):
    predictions = made_up(rng, ["nut"] * 5 + ["cap"] * 60 + ["bolt"] * 3)
    with pytest.raises(CalibrationError) as raised:
        calibrate_products(predictions, max_false_reject=0.05)
    lines = str(raised.value).splitlines()
    assert len(lines) == 2
    assert "59 good images of 'nut', 5 came" in lines[0] and "59 good images of 'bolt', 3 came" in lines[1]


def test_scores_that_are_not_finite_are_refused(rng):
    predictions = made_up(rng, ["nut", "cap"])
    predictions.pred_scores[1] = np.nan
    with pytest.raises(InputError, match="scores of 'cap': expected finite numbers"):
        calibrate_products(predictions)


# ---- metrics


def test_perfect_maps_have_perfect_metrics(small_run):
    samples = [s for s in find_samples(small_run.data, "test") if s.product == "gear"]
    images = load_images(samples, 64, 64)
    maps = load_masks(samples, 64, 64).astype(np.float32)
    (metrics,) = evaluate(Predictions(images, maps, maps.max((1, 2))))
    assert (metrics.product, metrics.n_good, metrics.n_defective) == ("gear", 2, 5)
    assert metrics.image_auroc == metrics.pixel_auroc == metrics.pixel_f1_max == 1
    (worst,) = evaluate(Predictions(images, 1 - maps, 1 - maps.max((1, 2))))
    assert worst.image_auroc == worst.pixel_auroc == 0


@pytest.mark.parametrize("published", [False, True])
def test_a_product_that_lacks_a_mask_has_the_metrics_of_images_only(small_run, published):
    samples = find_samples(small_run.data, "test")
    lacking = next(i for i, sample in enumerate(samples) if sample.product == "cap" and not sample.is_good)
    masks = load_masks(samples, 64, 64).astype(np.float32)  # as maps: perfect ones
    samples[lacking] = replace(samples[lacking], mask_path=None)
    predictions = Predictions(load_images(samples, 64, 64), masks, masks.max((1, 2)))
    metrics = {one.product: one for one in evaluate(predictions, published)}
    assert all(one.image_auroc == one.image_ap == one.image_f1_max == 1 for one in metrics.values())
    of_pixels = ("pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro", "mad")
    assert all(np.isnan(getattr(metrics["cap"], name)) for name in of_pixels)
    assert metrics["board"].pixel_auroc == metrics["gear"].pixel_auroc == 1
    assert mean_metrics([*metrics.values()]).pixel_auroc == 1


def test_a_mask_that_cannot_be_read_stops_the_evaluation(rng):
    predictions = made_up(rng, ["nut", "nut"], ["good", "dent"])
    predictions.images.samples[1] = Sample("1.png", "nut", "dent", Path("gone.png"))
    with pytest.raises(DataError, match=r"mask of 1\.png: .*gone\.png"):
        evaluate(predictions)


# ---- the images that training held out


def test_held_out_images_are_found(small_run):
    _, facts = load_checkpoint(small_run.folder / "model.safetensors")
    assert len(facts["holdout"]) == 3
    samples = held_out_samples(good_samples(small_run.data, facts), small_run.data, facts["holdout"])
    assert [s.path.relative_to(small_run.data).as_posix() for s in samples] == sorted(facts["holdout"])


def test_a_product_without_held_out_images_gives_all_it_has(small_run):
    """Training holds none out of a product with a single image; the bundle needs its threshold all the same."""
    _, facts = load_checkpoint(small_run.folder / "model.safetensors")
    without_cap = [name for name in facts["holdout"] if not name.startswith("cap/")]
    samples = good_samples(small_run.data, facts)
    counts = Counter(sample.product for sample in held_out_samples(samples, small_run.data, without_cap))
    assert counts == {"board": 1, "cap": 4, "gear": 1}
    assert held_out_samples(samples, small_run.data, []) == samples and len(samples) == 12


def test_thresholds_from_images_that_were_trained_on_promise_nothing(small_run):
    _, facts = load_checkpoint(small_run.folder / "model.safetensors")
    without_cap = [name for name in facts["holdout"] if not name.startswith("cap/")]
    samples = held_out_samples(good_samples(small_run.data, facts), small_run.data, without_cap)
    images = load_images(samples, 64, 64)
    n = len(images.pixels)
    predictions = Predictions(images, np.zeros((n, 64, 64), np.float32), np.linspace(1, 2, n))
    made = first_calibrations(predictions, small_run.data, without_cap)
    assert {product: c.source for product, c in made.items()} == {
        "board": "calibrated",
        "cap": "training",
        "gear": "calibrated",
    }
    assert made["cap"].false_reject_bound is None and made["gear"].false_reject_bound is not None


def test_held_out_images_that_are_gone(small_run, tmp_path):
    samples, holdout = good_samples(small_run.data, {}), ["cap/train/good/000.png", "cap/train/good/gone.png"]
    with pytest.raises(DataError, match=r"1 of the 2 images held out of training are not there; .* with --data"):
        held_out_samples(samples, small_run.data, holdout)
    with pytest.raises(DataError, match=r"moved: the data set that was trained on is not there; .* with --data"):
        good_samples(tmp_path / "moved", {})


# ---- runs and bundles


def test_a_run_and_its_bundle_are_one_model(small_run, small_bundle):
    run, bundle = open_model(small_run.folder, small_run.data), open_model(small_bundle, small_run.data)
    assert run.size == bundle.size == (64, 64)
    assert run.calibrations.keys() == bundle.calibrations.keys() == {"board", "cap", "gear"}
    for product, calibration in run.calibrations.items():
        assert bundle.calibrations[product].threshold == pytest.approx(calibration.threshold, abs=1e-6)
        assert bundle.calibrations[product].n_good == calibration.n_good == 1
    assert "torch in fp32" in run.facts["engine"] and "OpenVINO in" in bundle.facts["engine"]
    assert run.facts["backbone weights"] == bundle.facts["backbone weights"] == "none (random, seed 42)"


def test_evaluation_of_a_bundle_and_its_report(small_run, small_bundle, tmp_path):
    evaluation = evaluate_model(small_bundle, small_run.data)
    assert [(m.product, m.n_good) for m in evaluation.metrics] == [("board", 2), ("cap", 2), ("gear", 2)]
    assert all(0 <= m.image_auroc <= 1 and 0 <= m.aupro <= 1 for m in evaluation.metrics)
    assert evaluation.facts["pixel F1-max and AUPRO"] == "exact"
    report_evaluation(tmp_path / "report.html", "title", evaluation)
    text = (tmp_path / "report.html").read_text()
    assert all(product in text for product in ("board", "cap", "gear"))
    assert evaluate_model(small_bundle, small_run.data, published=True).facts != evaluation.facts


def test_verdicts_are_those_of_a_detector_that_is_asked_for_the_product(small_run, bundle, tmp_path, rng):
    gear, cap, test = small_run.data / "gear", small_run.data / "cap", tmp_path / "data" / "gear" / "test"
    shutil.copytree(gear / "train" / "good", tmp_path / "data" / "gear" / "good")
    shutil.copytree(gear / "test" / "good", test / "good")
    shutil.copytree(cap / "test" / "good", test / "mixed up")
    shutil.copy(cap / "train" / "good" / "000.png", test / "good" / "mixed up.png")
    (test / "no part").mkdir()
    cv2.imwrite(str(test / "no part" / "0.png"), rng.integers(0, 256, (72, 72, 3), dtype=np.uint8))
    high = read_bundle(bundle).products["gear"].with_threshold(100)  # no score says anything
    set_thresholds(bundle, {"gear": high}, "by hand")
    evaluation, detector = evaluate_model(bundle, tmp_path / "data"), Detector(bundle)
    samples = evaluation.predictions.images.samples
    assert evaluation.pred_labels == [detector(read_image(s.path), "gear").pred_label for s in samples]
    assert [s.kind for s in samples] == ["good"] * 3 + ["mixed up"] * 2 + ["no part"]
    assert evaluation.pred_labels == ["good"] * 2 + ["wrong product"] * 3 + ["unknown product"]
    assert (evaluation.facts["defects missed"], evaluation.facts["good rejected"]) == ("0 of 3", "1 of 3")
    report_evaluation(tmp_path / "report.html", "title", evaluation)
    text = (tmp_path / "report.html").read_text()
    assert "<td>0 of 3 (0.0 %)</td><td>1 of 3 (33.3 %)</td>" in text and ">MISS<" not in text
    assert '<span class="mark">FALSE REJECT</span> good, verdict wrong product' in text


def test_scores_are_judged_as_a_detector_does(rng):
    predictions = made_up(rng, ["nut", "nut", "bolt"], ["good", "dent", "good"])
    # 0.3 is not a float32; the score nearest to it is above it, and NumPy alone would call the two equal.
    predictions.pred_scores[:] = 0.3
    nut = calibrate_products(predictions)["nut"].with_threshold(0.3)
    labels = judge(predictions, {"nut": nut}, None)
    assert labels == ["defective", "defective", ""]
    assert mistakes(predictions, labels) == {"defects missed": "0 of 1", "good rejected": "1 of 1"}
    nut = nut.with_threshold(float(np.float32(0.3)))
    assert judge(predictions, {"nut": nut}, None) == ["good", "good", ""]
    assert mistakes(predictions, ["", "", ""]) == {}


def test_what_cannot_be_evaluated(small_run, small_bundle, tmp_path):
    with pytest.raises(BundleError, match="does not exist"):
        evaluate_model(tmp_path / "none.omniad", small_run.data)
    with pytest.raises(DataError, match=r"expected test images .*, there are none"):
        evaluate_model(small_bundle, small_run.data.parent / "calibration")


# ---- thresholds of a bundle


@pytest.fixture
def bundle(small_bundle, tmp_path):
    path = tmp_path / "line.omniad"
    path.write_bytes(small_bundle.read_bytes())
    return path


def test_a_bundle_is_calibrated_on_unseen_images(bundle, small_run):
    before = read_bundle(bundle)
    calibrations, _, left_out = calibrate_bundle(bundle, small_run.data.parent / "calibration")
    after = read_bundle(bundle)
    assert left_out == 0 and after.products == calibrations and after.parts == before.parts
    assert {c.n_good for c in calibrations.values()} == {4}
    history = after.manifest["history"]
    assert [(h["product"], h["old_threshold"], h["new_threshold"]) for h in history] == [
        (name, before.products[name].threshold, calibrations[name].threshold) for name in calibrations
    ]
    assert all("calibrated with" in h["action"] for h in history)


def test_images_that_were_trained_on_are_left_out(bundle, small_run):
    calibrations, _, left_out = calibrate_bundle(bundle, small_run.data)
    assert left_out == 9 and {c.n_good for c in calibrations.values()} == {1}


def test_images_that_cannot_calibrate(bundle, small_run, tmp_path):
    before = bundle.read_bytes()
    with pytest.raises(CalibrationError, match="of 'gear', 4 came"):
        calibrate_bundle(bundle, small_run.data.parent / "calibration", max_false_reject=0.01)
    good = tmp_path / "good"
    for product in ("bolt", "gear"):
        (good / product / "good").mkdir(parents=True)
        trained = small_run.data / "gear" / "train" / "good"
        _, facts = load_checkpoint(small_run.folder / "model.safetensors")
        (path,) = [p for p in sorted(trained.iterdir()) if f"gear/train/good/{p.name}" not in facts["holdout"]][:1]
        (good / product / "good" / "0.png").write_bytes(path.read_bytes())
    with pytest.raises(InputError, match="product bolt: the bundle has board, cap, gear"):
        calibrate_bundle(bundle, good)
    with pytest.raises(CalibrationError, match="every image of gear was trained on"):
        calibrate_bundle(bundle, good / "gear")
    assert bundle.read_bytes() == before


def test_a_bundle_is_known_whatever_it_is_called(bundle, small_run, tmp_path):
    renamed = bundle.rename(tmp_path / "line3")
    assert open_model(renamed, small_run.data).recogniser is not None
    with pytest.raises(BundleError, match=r"line3: expected a training run's folder .*; this is a bundle"):
        load_run(renamed)


def test_copies_of_an_image_count_once(bundle, small_run, tmp_path, capsys):
    good = tmp_path / "good"
    shutil.copytree(small_run.data.parent / "calibration" / "gear", good / "gear")
    (first, *_) = sorted((good / "gear" / "good").iterdir())
    for index in range(60):
        shutil.copy(first, first.with_name(f"again{index}.png"))
    calibrations, _, left_out = calibrate_bundle(bundle, good)
    assert calibrations["gear"].n_good == 4 and left_out == 0
    assert "left out 60 copies" in capsys.readouterr().err
