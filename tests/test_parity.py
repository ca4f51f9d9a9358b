"""The parity gate on made-up predictions: each limit by itself."""

import json
from dataclasses import replace

import numpy as np
import pytest

from omniad_edge.data import Images, Sample
from omniad_edge.evaluate import Predictions
from omniad_edge.export import parity
from omniad_edge.export.parity import (
    DETECTION_LIMITS,
    FEWEST_RANKS,
    FEWEST_SCORES,
    LIMITS,
    auroc_difference,
    compare,
    over_threshold,
    rank_loss,
    score_deviation,
)
from omniad_edge.recognition import ProductSpace

# Where each channel deviates by 0.2, whitened and divided by the root of their number.
WHITENING = (np.eye(3) / 0.2 / np.sqrt(3)).astype(np.float32)
SPACE = ProductSpace(("gear",), np.zeros(3, np.float32), WHITENING, np.zeros((1, 3), np.float32))
N = 40  # good and as many defective images


def predictions(pred_scores, kinds, products=None, anomaly_maps=None) -> Predictions:
    count = len(pred_scores)
    samples = [
        Sample(f"{i}.png", product, kind)
        for i, (kind, product) in enumerate(zip(kinds, products or ["gear"] * count, strict=True))
    ]
    if anomaly_maps is None:
        anomaly_maps = np.zeros((count, 4, 4), np.float32)
    images = Images(np.zeros((count, 4, 4, 3), np.uint8), samples, [])
    return Predictions(images, anomaly_maps, np.asarray(pred_scores, np.float32))


def line(good, defective) -> Predictions:
    """One product's."""
    return predictions([*good, *defective], ["good"] * len(good) + ["dent"] * len(defective))


@pytest.fixture
def reference() -> Predictions:
    return line(np.linspace(0.1, 0.3, N), np.linspace(0.25, 0.9, N))


def scores_changed(base: Predictions, change) -> Predictions:
    return Predictions(base.images, base.anomaly_maps, base.pred_scores + np.asarray(change, np.float32))


@pytest.mark.parametrize("precision", LIMITS)
def test_identical_predictions_pass(reference, precision):
    reference = replace(reference, embeddings=np.ones((2 * N, 3), np.float32))
    report = compare(reference, reference, precision, SPACE)
    assert report["passed"] is True and report["failures"] == [] and report["images"] == 2 * N
    assert report["measured"] == dict.fromkeys(report["limits"], 0.0)
    measured = {"map_error", "score_error", "verdict_flips", "auroc_difference", "rank_loss", "product_error"}
    assert report["limits"].keys() == measured
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def only_failure(reference: Predictions, engine: Predictions, precision: str = "fp32") -> str:
    report = compare(reference, engine, precision)
    assert report["passed"] is False
    (failure,) = report["failures"]
    json.dumps(report, allow_nan=False)
    return failure


def test_map_error(reference):
    maps = reference.anomaly_maps.copy()
    maps[7, 1, 2] = 1e-3
    engine = Predictions(reference.images, maps, reference.pred_scores)
    assert only_failure(reference, engine) == "map error is 0.001, the limit is 0.0003"
    assert compare(reference, engine, "bf16")["passed"]
    maps[7, 1, 2] = 2e-4
    assert compare(reference, engine, "fp32")["passed"]


def test_product_error_is_a_distance_between_embeddings(reference):
    embeddings = np.ones((2 * N, 3), np.float32)
    reference, engine = replace(reference, embeddings=embeddings), replace(reference, embeddings=embeddings.copy())
    engine.embeddings[5] += 0.02  # of each channel a tenth of its deviation
    failures = compare(reference, engine, "fp32", SPACE)["failures"]
    assert failures == ["product error is 0.1, the limit is 0.02"]
    assert compare(reference, engine, "bf16", SPACE)["passed"]


@pytest.mark.parametrize("precision", [*LIMITS, *DETECTION_LIMITS])
def test_an_embedding_that_is_lost_fails(reference, precision, monkeypatch):
    monkeypatch.setattr(parity, "detection_loss", lambda *both: {"auroc_loss": 0.0, "aupro_loss": 0.0})
    embedding = replace(reference, embeddings=np.ones((2 * N, 3), np.float32))
    report = compare(embedding, reference, precision, SPACE)
    assert report["failures"] == ["the engine gives no embedding, the trained network does"]
    assert report["passed"] is False and report["measured"]["product_error"] is None
    assert compare(reference, reference, precision, SPACE)["passed"]
    assert compare(reference, embedding, precision, SPACE)["passed"]  # which nothing asks for


def test_what_cannot_be_measured_is_beyond_the_limit(reference, monkeypatch):
    monkeypatch.setattr(parity, "product_error", lambda *three: float("nan"))
    assert compare(reference, reference, "fp32")["failures"] == ["product error is nan, the limit is 0.02"]


def test_score_error_is_in_standard_deviations(reference):
    deviation = reference.pred_scores.std()
    engine = scores_changed(reference, 0.05 * deviation)  # of all alike: the order stays
    assert only_failure(reference, engine) == "score error is 0.05, the limit is 0.02"
    assert only_failure(reference, engine, "fp16") == "score error is 0.05, the limit is 0.02"
    assert compare(reference, engine, "bf16")["passed"]
    assert compare(reference, scores_changed(reference, 0.019 * deviation), "fp32")["passed"]


def test_verdict_flips():
    """A defect at the threshold itself may flip by rounding and is not counted; one clear of it is."""
    reference = line(np.linspace(0.1, 0.3, N), [0.3 + 1e-6, *np.linspace(0.5, 0.9, N - 1)])
    change = np.zeros(2 * N)
    change[N] = -2e-6  # below the highest good score
    assert compare(reference, scores_changed(reference, change), "fp32")["passed"]
    change[N + 1] = -0.3
    engine = scores_changed(reference, change)
    for precision, limit in (("fp32", "0"), ("bf16", "0.01")):
        failures = compare(reference, engine, precision)["failures"]
        assert f"verdict flips is 0.013, the limit is {limit}" in failures


def test_each_side_has_its_own_thresholds(reference):
    """Scores that are all a little higher give the same verdicts with thresholds from themselves."""
    engine = scores_changed(reference, 0.2)
    assert compare(reference, engine, "fp32")["measured"]["verdict_flips"] == 0
    assert ((over_threshold(reference) > 0) == (over_threshold(engine) > 0)).all()
    assert (over_threshold(reference) > 0).sum() == (reference.pred_scores[N:] > np.float32(0.3)).sum() > 0


def test_thresholds_are_each_products_own():
    kinds, products = ["good", "dent", "good", "dent"], ["cap", "cap", "gear", "gear"]
    distance = over_threshold(predictions([0.1, 0.2, 0.5, 0.4], kinds, products))
    assert (distance > 0).tolist() == [False, True, False, False]


def test_auroc_difference_without_a_flip():
    good = np.linspace(0.1, 0.3, N)
    reference = line(good, good[:-1] + 1e-6)  # every defect beside a good part, all below the threshold
    change = np.concatenate([np.zeros(N), np.full(N - 1, -2e-6)])
    engine = scores_changed(reference, change)
    assert only_failure(reference, engine, "bf16") == "auroc difference is 0.024, the limit is 0.002"
    assert compare(reference, engine, "fp32")["failures"] == [
        "auroc difference is 0.024, the limit is 0.001",
        "rank loss is 0.00095, the limit is 0.0001",
    ]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("precision", [*LIMITS, *DETECTION_LIMITS])
def test_what_is_not_finite_fails(reference, bad, precision):
    maps = reference.anomaly_maps.copy()
    maps[3, 0, 0] = bad
    broken = Predictions(reference.images, maps, reference.pred_scores)
    assert only_failure(reference, broken, precision) == "the engine's anomaly map is not finite"
    assert only_failure(broken, reference, precision) == "the trained network's anomaly map is not finite"
    scores = reference.pred_scores.copy()
    scores[-1] = bad
    broken = Predictions(reference.images, reference.anomaly_maps, scores)
    assert only_failure(reference, broken, precision) == "the engine's anomaly map is not finite"
    assert only_failure(broken, broken, precision) == "the trained network's anomaly map is not finite"
    reference = replace(reference, embeddings=np.ones((2 * N, 3), np.float32))
    broken = replace(reference, embeddings=reference.embeddings.copy())
    broken.embeddings[7, 1] = bad
    assert only_failure(reference, broken, precision) == "the engine's embedding is not finite"
    assert only_failure(broken, reference, precision) == "the trained network's embedding is not finite"


def test_several_failures_are_all_told(reference):
    engine = scores_changed(reference, np.linspace(0.5, -0.5, 2 * N))
    words = compare(reference, engine, "bf16")["failures"]
    names = ["score error", "verdict flips", "auroc difference", "rank loss"]
    assert [text.split(" is ")[0] for text in words] == names


def test_a_single_image_has_no_deviation_to_measure_by():
    """One held-out image and no test images: only the map can be compared."""
    reference = line([0.35], [])
    engine = scores_changed(reference, 1e-6)
    report = compare(reference, engine, "fp32")
    assert report["passed"] and report["measured"]["score_error"] is None
    assert report["measured"]["auroc_difference"] is None
    engine = Predictions(reference.images, reference.anomaly_maps + np.float32(1), reference.pred_scores)
    assert only_failure(reference, engine) == "map error is 1, the limit is 0.0003"


def test_auroc_counts_products_with_both_kinds_only_and_the_largest_difference():
    kinds = ["good", "good", "good", "dent", "good", "dent", "dent"]
    products = ["cap", "cap", "gear", "gear", "board", "board", "board"]
    reference = predictions([0.1, 0.2, 0.1, 0.3, 0.5, 0.6, 0.7], kinds, products)
    engine = predictions([0.9, 0.1, 0.1, 0.3, 0.75, 0.6, 0.7], kinds, products)
    assert auroc_difference(reference, engine) == 0.5  # board: both pairs change their order; less one
    one_class = predictions([0.1, 0.2], ["good", "dent"], ["cap", "gear"])
    assert auroc_difference(one_class, one_class) is None


@pytest.mark.parametrize("levels", [1000, 20])
def test_rank_loss_is_what_spearman_lacks_to_1(rng, levels):
    """Of scores with ties too, in either of the two."""
    spearmanr = pytest.importorskip("scipy.stats").spearmanr
    ours = rng.integers(0, levels, 80) / levels
    theirs = np.round(ours + rng.normal(0, 0.1, 80), 2)
    loss = rank_loss(line(ours, []), line(theirs, []))
    assert loss == pytest.approx(1 - spearmanr(np.float32(ours), np.float32(theirs)).statistic, rel=1e-9)
    assert rank_loss(line(ours, []), line(ours, [])) == 0


def test_rank_loss_alone():
    """Neighbours that change places again and again, each by less than the score error allows."""
    good = np.linspace(0.1, 0.9, 100)
    change = np.resize([0.0082, -0.0082], 100)
    change[-2:] = 0  # the threshold stays
    reference = line(good, [])
    report = compare(reference, scores_changed(reference, change), "bf16")
    assert report["passed"] and report["measured"]["rank_loss"] > 1e-4
    report = compare(reference, scores_changed(reference, change * 0.51), "fp32")
    assert report["failures"] == ["rank loss is 0.00059, the limit is 0.0001"]


def test_one_near_tie_of_enough_images_passes():
    scores = np.linspace(0.1, 0.9, FEWEST_RANKS)
    scores[10] = scores[11] - 1e-6
    other = scores.copy()
    other[10] += 2e-6
    report = compare(line(scores, []), line(other, []), "fp32")
    assert report["passed"] and 9e-5 < report["measured"]["rank_loss"] < 1e-4
    few = compare(line(scores[:-1], []), line(other[:-1], []), "fp32")
    assert few["passed"] and few["measured"]["rank_loss"] is None


def test_equal_scores_have_no_ranks_and_no_deviation():
    same = line(np.full(FEWEST_RANKS, 0.5), [])
    assert rank_loss(same, same) is None and score_deviation(same) is None
    scores = np.linspace(0.1, 0.9, FEWEST_SCORES)
    assert score_deviation(line(scores, [])) == pytest.approx(scores.std())
    assert score_deviation(line(scores[1:], [])) is None
