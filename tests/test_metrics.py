"""Metrics against published values, against plain loops over every threshold, and on bad input."""

import json
import subprocess
import sys

import numpy as np
import pytest
from scipy import ndimage
from scipy.integrate import trapezoid

from omniad_edge.errors import InputError
from omniad_edge.metrics import (
    METRICS,
    ProductMetrics,
    aupro,
    aupro_grid,
    auroc,
    average_precision,
    evaluate_maps,
    f1_max,
    f1_max_grid,
    mean_metrics,
    roc_curve,
)

EIGHT_CONNECTED = np.ones((3, 3))


@pytest.fixture(params=["continuous", "ties", "constant", "integers"])
def scored(request, rng):
    """Scores (60,) and labels (60,): distinct, with many ties across classes, all equal, uint8."""
    labels = rng.random(60) < 0.4
    scores = rng.normal(size=60) + labels
    if request.param == "ties":
        scores = np.round(scores)
    elif request.param == "constant":
        scores = np.full(60, 0.25, np.float32)
    elif request.param == "integers":
        scores = np.clip(100 * scores + 120, 0, 255).astype(np.uint8)
    return scores, labels


@pytest.fixture(params=["continuous", "ties", "constant"])
def mapped(request, rng):
    """Maps (5, 9, 11) float32 and masks with touching, diagonal and border regions; one empty mask."""
    masks = rng.random((5, 9, 11)) < 0.12
    masks[1] = False
    masks[2, :3, :4] = True
    maps = (rng.random((5, 9, 11)) + 0.4 * masks).astype(np.float32)
    if request.param == "ties":
        maps = np.round(maps * 6) / np.float32(6)
    elif request.param == "constant":
        maps = np.full_like(maps, 0.5)
    return maps, masks


def slow_auroc(scores, labels):
    good, bad = scores[~labels].tolist(), scores[labels].tolist()
    return sum((b > g) + 0.5 * (b == g) for b in bad for g in good) / (len(good) * len(bad))


def slow_counts(scores, labels):
    """(tp, fp) of `score >= threshold` for every distinct score from the highest down."""
    pairs = list(zip(scores.ravel().tolist(), labels.ravel().tolist(), strict=True))
    for threshold in sorted({score for score, _ in pairs}, reverse=True):
        called = [label for score, label in pairs if score >= threshold]
        yield sum(called), len(called) - sum(called)


def slow_average_precision(scores, labels):
    area, before = 0.0, 0
    for tp, fp in slow_counts(scores, labels):
        area += (tp - before) / labels.sum() * tp / (tp + fp)
        before = tp
    return area


def slow_f1_max(scores, labels):
    return max(2 * tp / (tp + fp + labels.sum()) for tp, fp in slow_counts(scores, labels))


def slow_aupro(maps, masks, limit):
    """Every distinct value as a threshold, every region measured, trapezoids up to the limit."""
    regions = []
    for image, mask in enumerate(masks):
        found, n_found = ndimage.label(mask, EIGHT_CONNECTED)
        regions += [(image, found == index) for index in range(1, n_found + 1)]
    area, x, y = 0.0, 0.0, 0.0
    for threshold in sorted(set(maps.ravel().tolist()), reverse=True):
        called = maps >= threshold
        new_x = (called & ~masks).sum() / (~masks).sum()
        new_y = np.mean([called[image][region].mean() for image, region in regions])
        if new_x > limit:
            new_y = y + (limit - x) / (new_x - x) * (new_y - y)
            return (area + (limit - x) * (y + new_y) / 2) / limit
        area += (new_x - x) * (y + new_y) / 2
        x, y = new_x, new_y
    return area / limit


def slow_published(maps, masks, n_thresholds, limit):
    """(pixel F1-max, AUPRO) on the evaluator's two grids, as described in metrics.py."""
    low, high = maps.min(), maps.max()
    f1 = []
    for step in range(21):
        called = (maps - low) / (high - low) > step * 0.05
        f1.append(2 * (called & masks).sum() / (called.sum() + masks.sum()))
    curve = []
    for step in range(n_thresholds):
        called = maps > low + step * (high - low) / n_thresholds
        overlaps = []
        for image, mask in zip(called, masks, strict=True):
            regions, n_regions = ndimage.label(mask, EIGHT_CONNECTED)
            overlaps += [image[regions == index].mean() for index in range(1, n_regions + 1)]
        curve.append(((called & ~masks).sum() / (~masks).sum(), np.mean(overlaps)))
    fpr, pro = np.array([point for point in curve if point[0] < limit])[::-1].T
    return max(f1), trapezoid(pro, (fpr - fpr.min()) / (fpr.max() - fpr.min()))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_published_values_are_reproduced(golden_dir, dtype):
    with np.load(golden_dir / "metrics.npz", allow_pickle=False) as golden:
        maps, masks, labels = golden["maps"].astype(dtype), golden["masks"] > 0, golden["labels"] > 0
        names = ("AUROC_sp_max", "AP_sp_max", "F1_max_sp_max", "AUROC_px", "AP_px", "F1_max_px", "AUPRO_px")
        expected = [float(golden[f"m{name}"]) for name in names]
    ours = evaluate_maps("random", maps, masks, maps.max(axis=(1, 2)), labels, published=True)
    assert [getattr(ours, name) for name in METRICS] == pytest.approx(expected, abs=1e-8)
    exact = evaluate_maps("random", maps, masks, maps.max(axis=(1, 2)), labels)
    assert exact.pixel_f1_max > ours.pixel_f1_max + 1e-3
    assert abs(exact.aupro - ours.aupro) > 1e-3
    assert [getattr(exact, name) for name in METRICS[:5]] == [getattr(ours, name) for name in METRICS[:5]]


def test_image_metrics_equal_plain_loops(scored):
    scores, labels = scored
    assert auroc(scores, labels) == pytest.approx(slow_auroc(scores, labels), abs=1e-12)
    assert average_precision(scores, labels) == pytest.approx(slow_average_precision(scores, labels), abs=1e-12)
    assert f1_max(scores, labels) == pytest.approx(slow_f1_max(scores, labels), abs=1e-12)


@pytest.mark.parametrize("limit", [0.01, 0.3, 1.0])
def test_aupro_equals_plain_loops(mapped, limit):
    maps, masks = mapped
    assert aupro(maps, masks, limit) == pytest.approx(slow_aupro(maps, masks, limit), abs=1e-12)


def test_pixel_metrics_of_a_product_equal_plain_loops(mapped):
    maps, masks = mapped
    ours = evaluate_maps("part", maps, masks, maps.max(axis=(1, 2)), masks.any(axis=(1, 2)))
    assert ours.pixel_auroc == pytest.approx(slow_auroc(maps, masks), abs=1e-12)
    assert ours.pixel_ap == pytest.approx(slow_average_precision(maps, masks), abs=1e-12)
    assert ours.pixel_f1_max == pytest.approx(slow_f1_max(maps, masks), abs=1e-12)
    assert ours.aupro == pytest.approx(slow_aupro(maps, masks, 0.3), abs=1e-12)
    assert (ours.n_good, ours.n_defective) == (1, 4)


def test_values_worked_by_hand():
    scores = np.array([0.9, 0.8, 0.8, 0.1])
    labels = np.array([True, True, False, False])
    assert auroc(scores, labels) == (1 + 1 + 0.5 + 1) / 4
    assert average_precision(scores, labels) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert f1_max(scores, labels) == 2 * 2 / (3 + 2)


def test_regions_weigh_alike_and_join_at_corners():
    mask = np.zeros((1, 10, 10), bool)
    mask[0, 0, 0] = mask[0, 1, 1] = True  # one region of two pixels, joined at a corner
    mask[0, 5:, 5:] = True  # one region of 25
    found_large = np.where(mask, 0.0, 0.5)
    found_large[0, 5:, 5:] = 1.0
    assert aupro(found_large, mask) == pytest.approx(0.5)
    found_corner = np.where(mask, 0.0, 0.5)
    found_corner[0, 0, 0] = 1.0
    assert aupro(found_corner, mask) == pytest.approx(0.25)


def test_perfect_and_inverted_maps():
    masks = np.zeros((2, 16, 16), bool)
    masks[0, 2:9, 3:6] = masks[1, 10:, 10:] = True
    labels = np.array([True, False])
    assert auroc(np.array([2.0, 1.0]), labels) == average_precision(np.array([2.0, 1.0]), labels) == 1.0
    perfect = masks.astype(np.float32)
    assert aupro(perfect, masks) == auroc(perfect, masks) == f1_max(perfect, masks) == 1.0
    assert aupro(-perfect, masks) == auroc(-perfect, masks) == 0.0


def test_small_dtypes_do_not_overflow(rng):
    labels = rng.random(300) < 0.3
    for dtype in (np.int8, np.float16):
        scores = (60 * rng.normal(size=300)).astype(dtype)
        wide = scores.astype(np.float64)
        for metric in (auroc, average_precision, f1_max, f1_max_grid):
            assert metric(scores, labels) == metric(wide, labels)


@pytest.mark.parametrize("label", [False, True])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_one_class_gives_nan(label, count):
    scores, labels = np.arange(count, dtype=np.float32), np.full(count, label)
    for metric in (auroc, average_precision, f1_max, f1_max_grid):
        assert np.isnan(metric(scores, labels))
    assert [len(axis) for axis in roc_curve(scores, labels)] == [0, 0]


@pytest.mark.parametrize("mask", [False, True])
def test_masks_of_one_class_give_nan(rng, mask):
    maps, masks = rng.random((2, 4, 5)), np.full((2, 4, 5), mask)
    assert np.isnan(aupro(maps, masks))
    assert np.isnan(aupro_grid(maps, masks))
    ours = evaluate_maps("part", maps, masks, maps.max(axis=(1, 2)), np.array([True, True]))
    assert np.isnan([getattr(ours, name) for name in METRICS]).all()
    assert np.isnan(ours.mad)


def test_published_forms_are_nan_where_the_evaluator_divides_by_zero():
    masks = np.zeros((1, 4, 4), bool)
    masks[0, 0, 0] = True
    assert np.isnan(f1_max_grid(np.full((1, 4, 4), 0.5), masks))
    assert np.isnan(aupro_grid(np.full((1, 4, 4), 0.5), masks))
    assert np.isnan(aupro_grid(np.where(masks, 0.0, 1.0), masks))  # no rate below 0.3
    assert np.isnan(aupro_grid(np.where(masks, 1.0, 0.0), masks))  # a single rate, 0


@pytest.mark.parametrize("limit", [0.25, 0.3, 1.0])
def test_published_forms_equal_plain_loops(rng, limit):
    # Scores are sixteenths, so they meet both grids; of 192 good pixels a quarter exceeds 11/16.
    masks = rng.permuted(np.arange(256) < 64).reshape(4, 8, 8)
    maps = np.empty(masks.shape)
    maps[~masks] = rng.permuted(np.repeat(np.arange(16), 12)) / 16
    maps[masks] = rng.permuted(np.repeat(np.arange(1, 17), 4)) / 16
    expected = slow_published(maps, masks, 16, limit)
    assert f1_max_grid(maps, masks) == pytest.approx(expected[0], abs=1e-12)
    assert aupro_grid(maps, masks, 16, limit) == pytest.approx(expected[1], abs=1e-12)


def test_more_thresholds_bring_the_grid_to_the_exact_value(rng):
    masks = rng.random((3, 20, 20)) < 0.05
    maps = rng.random((3, 20, 20)) + 0.5 * masks
    exact = aupro(maps, masks)
    assert abs(aupro_grid(maps, masks, 20_000) - exact) < 0.002 < abs(aupro_grid(maps, masks, 10) - exact)


def test_roc_curve_is_thinned_but_keeps_its_area(rng):
    labels = rng.random(20_000) < 0.3
    scores = rng.normal(size=20_000) + labels
    fpr, tpr = roc_curve(scores, labels)
    assert len(fpr) == len(tpr) <= 500
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert (np.diff(fpr) >= 0).all()
    assert (np.diff(tpr) >= 0).all()
    assert trapezoid(tpr, fpr) == pytest.approx(auroc(scores, labels), abs=1e-3)


def test_roc_curve_of_few_images_is_whole(scored):
    scores, labels = scored
    fpr, tpr = roc_curve(scores, labels)
    assert trapezoid(tpr, fpr) == pytest.approx(auroc(scores, labels), abs=1e-12)


def test_inputs_are_not_changed(mapped):
    maps, masks = mapped
    maps.flags.writeable = masks.flags.writeable = False
    kept = maps.copy()
    evaluate_maps("part", maps, masks, maps.max(axis=(1, 2)), masks.any(axis=(1, 2)), published=True)
    assert np.array_equal(maps, kept)


def test_a_missing_mask_of_a_defect_is_accepted(rng):
    maps, masks = rng.random((2, 4, 4)), np.zeros((2, 4, 4), bool)
    ours = evaluate_maps("part", maps, masks, np.array([0.0, 1.0]), np.array([False, True]))
    assert ours.image_auroc == 1.0
    assert np.isnan(ours.aupro)


@pytest.mark.parametrize("metric", [auroc, average_precision, f1_max, f1_max_grid, roc_curve])
@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.1, np.nan], [False, True], "finite"),
        ([0.1, np.inf], [False, True], "finite"),
        ([0.1, 0.2], [0, 1], "bool"),
        ([False, True], [False, True], "swapped"),
        (["a", "b"], [False, True], "numbers"),
        ([0.1, 0.2, 0.3], [False, True], r"\(3,\) and \(2,\)"),
    ],
)
def test_bad_scores_are_refused(metric, scores, labels, message):
    with pytest.raises(InputError, match=message):
        metric(np.array(scores), np.array(labels))


@pytest.mark.parametrize("metric", [aupro, aupro_grid])
def test_bad_maps_are_refused(metric):
    maps, masks = np.zeros((2, 4, 4), np.float32), np.zeros((2, 4, 4), bool)
    with pytest.raises(InputError, match="bool"):
        metric(maps, masks.astype(np.uint8))
    with pytest.raises(InputError, match=r"\(N, H, W\)"):
        metric(maps[0], masks[0])
    with pytest.raises(InputError, match=r"\(2, 4, 4\) and \(2, 4, 3\)"):
        metric(maps, masks[..., :3])
    with pytest.raises(InputError, match=r"\(N, H, W\)"):
        metric(maps[:0], masks[:0])
    with pytest.raises(InputError, match="finite"):
        metric(np.where(np.arange(4) == 2, np.nan, maps), masks)
    for limit in (0.0, 1.5, float("nan")):
        with pytest.raises(InputError, match="fpr_limit"):
            metric(maps, masks, fpr_limit=limit)
    with pytest.raises(InputError, match="n_thresholds"):
        aupro_grid(maps, masks, 1)


def test_evaluate_refuses_what_does_not_belong_together(rng):
    maps, masks = rng.random((3, 4, 4)), np.zeros((3, 4, 4), bool)
    masks[1, 2, 2] = True
    with pytest.raises(InputError, match=r"each of the 3 maps.*\(2,\)"):
        evaluate_maps("part", maps, masks, np.zeros(2), np.zeros(2, bool))
    with pytest.raises(InputError, match=r"part: image 1 is labelled good"):
        evaluate_maps("part", maps, masks, np.zeros(3), np.zeros(3, bool))


def test_mean_leaves_out_what_a_product_does_not_have():
    nan = float("nan")
    one = ProductMetrics("one", 10, 5, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
    two = ProductMetrics("two", 4, 3, 0.7, 0.6, 0.5, nan, nan, nan, nan)
    mean = mean_metrics([one, two])
    assert (mean.product, mean.n_good, mean.n_defective) == ("mean", 14, 8)
    assert [mean.image_auroc, mean.pixel_auroc, mean.aupro] == pytest.approx([0.8, 0.6, 0.3])
    assert np.isnan(mean_metrics([two]).pixel_ap)
    assert np.isnan(two.mad)
    assert one.mad == pytest.approx(0.6)
    assert one.to_dict()["mad"] == one.mad
    assert list(one.to_dict())[:3] == ["product", "n_good", "n_defective"]
    with pytest.raises(InputError, match="at least one"):
        mean_metrics([])


BIG = """
import json, resource, time
import numpy as np
from omniad_edge.metrics import evaluate_maps
rng, spent = np.random.default_rng(0), 0.0
for product in range(15):
    masks = np.zeros((115, 256, 256), bool)
    for mask in masks[::2]:
        y, x = rng.integers(0, 200, 2)
        mask[y : y + 40, x : x + 40] = rng.random((40, 40)) < 0.7
    maps = rng.random(masks.shape, np.float32) + 0.3 * masks.astype(np.float32)
    start = time.perf_counter()
    evaluate_maps(str(product), maps, masks, maps.max(axis=(1, 2)), masks.any(axis=(1, 2)))
    spent += time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": spent, "peak_bytes": peak}))
"""


@pytest.mark.slow
def test_the_size_of_mvtec_ad_takes_under_a_minute_and_4_gib():
    done = subprocess.run([sys.executable, "-c", BIG], check=True, capture_output=True, text=True)
    measured = json.loads(done.stdout)
    print(measured)
    assert measured["seconds"] < 60
    assert measured["peak_bytes"] < 4 * 2**30
