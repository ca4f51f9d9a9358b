"""Verdict, regions and picture from anomaly maps with known contents."""

import json
import sys
from dataclasses import FrozenInstanceError
from fractions import Fraction
from math import ceil, floor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniad_edge.calibration import Calibration
from omniad_edge.errors import EngineError, InputError
from omniad_edge.result import MAX_REGIONS, Result, decide, find_regions

F32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
SCORE = st.floats(0, width=32, allow_nan=False, allow_infinity=False)
SIZES = st.integers(1, 5000)


def calibration(threshold: float, map_floor: float = 0.0) -> Calibration:
    return Calibration(threshold, 10, None, 0.26, 0.95, 0.0, 0.0, map_floor)


def make_result(anomaly_map, threshold=0.5, map_floor=0.0, height=None, width=None) -> Result:
    anomaly_map = np.asarray(anomaly_map, np.float32)
    size = (height or anomaly_map.shape[0], width or anomaly_map.shape[1])
    decision = decide(anomaly_map, anomaly_map.max(), calibration(threshold, map_floor), *size)
    speed_ms = {"preprocess": 1.0, "engine": 2.0, "postprocess": 0.5, "total": 3.5}
    rest = {"backend": "onnxruntime", "precision": "fp32"}
    return Result(**decision, product="gear", product_assumed=False, speed_ms=speed_ms, **rest)


def blobs(height: int, width: int, *boxes: tuple[int, int, int, int, float]) -> np.ndarray:
    """A map of zeros with boxes (x, y, width, height, value)."""
    anomaly_map = np.zeros((height, width), np.float32)
    for x, y, w, h, value in boxes:
        anomaly_map[y : y + h, x : x + w] = value
    return anomaly_map


# ---- verdict


def test_a_score_at_the_threshold_is_good_and_the_next_float_is_defective():
    threshold = float(np.float32(0.3))
    at = make_result(np.full((4, 4), 0.3), threshold)
    assert (at.pred_label, at.is_defective, at.regions) == ("good", False, ()) and not at.pred_mask.any()
    above = np.full((4, 4), 0.3, np.float32)
    above[1, 2] = np.nextafter(np.float32(0.3), np.float32(1))
    above = make_result(above, threshold)
    assert (above.pred_label, above.is_defective) == ("defective", True)
    assert np.argwhere(above.pred_mask).tolist() == [[1, 2]] and len(above.regions) == 1


@pytest.mark.parametrize("towards, label", [(1.0, "good"), (0.0, "defective")])
def test_thresholds_between_two_float32_numbers_count(towards, label):
    value = np.float32(0.3)
    threshold = np.nextafter(np.float64(value), towards)
    assert np.float32(threshold) == value  # in float32 they are the same
    result = make_result(np.full((2, 2), value), threshold)
    assert result.pred_label == label
    assert result.pred_mask.any() == bool(result.regions) == result.is_defective


@given(st.lists(F32, min_size=4, max_size=4), st.floats(allow_nan=False, allow_infinity=False), st.integers(0, 3))
def test_label_mask_and_regions_never_disagree(values, threshold, at):
    anomaly_map = np.array(values, np.float32).reshape(2, 2)
    for limit in (threshold, float(anomaly_map.flat[at])):
        result = make_result(anomaly_map, limit)
        assert result.pred_score == max(values) and result.threshold == limit
        assert result.is_defective == (max(values) > limit) == result.pred_mask.any() == bool(result.regions)
        assert np.isfinite(result.heatmap()).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_map_that_is_not_finite_is_no_verdict(bad):
    anomaly_map = np.zeros((4, 4), np.float32)
    anomaly_map[2, 3] = bad
    with pytest.raises(EngineError, match=r"expected finite values; got 1 others and a score of 0\.1"):
        decide(anomaly_map, np.float32(0.1), calibration(0.5), 4, 4)  # an engine whose maximum skips NaN
    with pytest.raises(EngineError, match=r"a score of (nan|inf|-inf)"):
        decide(np.zeros((4, 4), np.float32), np.float32(bad), calibration(0.5), 4, 4)


# ---- regions


def test_regions_are_in_pixels_of_a_larger_frame():
    anomaly_map = blobs(64, 96, (3, 2, 4, 6, 0.7), (80, 60, 16, 4, 0.9))
    anomaly_map[5, 4] = 0.8
    result = make_result(anomaly_map, height=480, width=1280)  # times 7.5 and 40 / 3
    second, first = result.regions[1], result.regions[0]
    # 80 * 40 / 3 = 1066.7; the peak is the first pixel of the plateau, its centre 80.5 * 40 / 3
    assert (first.x, first.y, first.width, first.height) == (1066, 450, 214, 30)
    assert (first.peak_x, first.peak_y, first.peak_score) == (1073, 453, pytest.approx(0.9))
    assert first.area_px == 16 * 4 * 100
    assert (second.x, second.y, second.width, second.height) == (40, 15, 54, 45)
    assert (second.peak_x, second.peak_y, second.peak_score) == (60, 41, pytest.approx(0.8))
    assert second.area_px == 4 * 6 * 100


def test_regions_are_in_pixels_of_a_smaller_frame():
    result = make_result(blobs(64, 64, (0, 0, 1, 1, 0.9), (62, 63, 2, 1, 0.8)), height=10, width=20)
    assert [(r.x, r.y, r.width, r.height, r.area_px) for r in result.regions] == [
        (0, 0, 1, 1, 1),
        (19, 9, 1, 1, 1),
    ]
    assert [(r.peak_x, r.peak_y) for r in result.regions] == [(0, 0), (19, 9)]


@given(SIZES, SIZES, st.integers(0, 95), st.integers(0, 63), st.data())
def test_boxes_cover_exactly_the_pixels_that_the_area_touches(height, width, x, y, data):
    w, h = data.draw(st.integers(1, 96 - x)), data.draw(st.integers(1, 64 - y))
    (region,) = make_result(blobs(64, 96, (x, y, w, h, 0.9)), height=height, width=width).regions
    sx, sy = Fraction(width, 96), Fraction(height, 64)
    assert (region.x, region.x + region.width) == (floor(x * sx), ceil((x + w) * sx))
    assert (region.y, region.y + region.height) == (floor(y * sy), ceil((y + h) * sy))
    assert region.x + region.width <= width and region.y + region.height <= height
    assert (region.peak_x, region.peak_y) == (floor((x + Fraction(1, 2)) * sx), floor((y + Fraction(1, 2)) * sy))
    assert 0 <= region.peak_x - region.x < region.width and 0 <= region.peak_y - region.y < region.height
    assert region.area_px == max(1, round(w * h * sx * sy))


def test_pixels_that_touch_at_a_corner_are_one_region():
    assert len(make_result(np.eye(5)).regions) == 1


def test_a_peak_is_of_its_own_region_not_of_another_in_its_box():
    anomaly_map = blobs(10, 10, (0, 0, 8, 1, 0.6), (0, 0, 1, 8, 0.6), (4, 4, 2, 2, 0.9))
    inner, corner = make_result(anomaly_map).regions
    assert (inner.x, inner.y, inner.peak_score) == (4, 4, pytest.approx(0.9))
    assert (corner.width, corner.height, corner.peak_score) == (8, 8, pytest.approx(0.6))
    assert corner.area_px == 15


def test_the_hundred_highest_peaks_are_kept_highest_first(rng):
    anomaly_map = np.zeros((64, 64), np.float32)
    peaks = 1 + rng.permutation(144).astype(np.float32)
    anomaly_map[2:62:5, 2:62:5] = peaks.reshape(12, 12)
    regions = make_result(anomaly_map).regions
    assert [region.peak_score for region in regions] == sorted(peaks.tolist(), reverse=True)[:MAX_REGIONS]
    assert MAX_REGIONS == 100


def test_no_mask_no_regions():
    assert find_regions(np.ones((8, 8), np.float32), np.zeros((8, 8), bool), 100, 100) == ()


# ---- heatmap


@given(SCORE, SCORE, st.lists(SCORE, min_size=1, max_size=8))
def test_the_threshold_has_the_same_colour_in_every_image(threshold, map_floor, others):
    anomaly_map = np.array([[threshold, *others]], np.float32)
    heat = make_result(anomaly_map, float(threshold), map_floor).heatmap()
    assert heat.dtype == np.float32 and heat.shape == anomaly_map.shape
    assert heat.min() >= 0 and heat.max() <= 1
    if threshold > map_floor or threshold > 0:
        assert heat[0, 0] == 0.5
    assert (heat[anomaly_map > threshold] >= 0.5).all()


def test_the_heatmaps_scale_runs_from_the_floor_to_as_far_above_the_threshold():
    result = make_result([[0.1, 0.2, 0.3, 0.4, 0.5, 9.0]], threshold=0.3, map_floor=0.2)
    np.testing.assert_allclose(result.heatmap(), [[0, 0, 0.5, 1, 1, 1]], atol=1e-6)


def test_a_floor_above_a_threshold_set_by_hand_leaves_the_scale_at_zero():
    result = make_result([[0.0, 0.1, 0.2]], threshold=0.1, map_floor=0.2)
    np.testing.assert_allclose(result.heatmap(), [[0, 0.5, 1]], atol=1e-6)


def test_a_threshold_of_zero_makes_every_anomaly_hot():
    assert make_result([[0.0, 1e-3, 5.0]], threshold=0.0).heatmap().tolist() == [[0, 1, 1]]


# ---- picture


@pytest.fixture
def frame(rng) -> np.ndarray:
    return rng.integers(0, 256, (120, 200, 3), dtype=np.uint8)


def test_a_good_part_is_shown_as_it_is(frame):
    before = frame.copy()
    picture = make_result(np.full((64, 64), 0.1), map_floor=0.1, height=120, width=200).draw(frame)
    assert picture.shape == frame.shape and picture.dtype == np.uint8
    assert (frame == before).all() and not np.shares_memory(picture, frame)
    assert (picture[20:] == frame[20:]).all()  # below the verdict's line
    assert (picture[:20] != frame[:20]).any()


def test_heat_and_outline_are_where_the_defect_is(frame):
    result = make_result(blobs(60, 100, (50, 30, 10, 10, 0.9)), height=120, width=200)
    changed = (result.draw(frame)[20:] != frame[20:]).any(axis=2)
    rows, columns = np.nonzero(changed)
    assert changed[60 - 20 : 80 - 20, 100:120].all()
    # the heat fades over one map pixel, that is 2 of the frame
    assert rows.min() + 20 >= 57 and rows.max() + 20 < 83 and columns.min() >= 97 and columns.max() < 123
    assert (result.draw(frame)[60, 100:120] == 255).all()  # the mask's upper edge


def test_the_same_value_is_painted_alike_whatever_else_is_in_the_image():
    frame = np.full((64, 64, 3), 128, np.uint8)
    quiet = blobs(64, 64, (30, 30, 20, 20, 0.5))
    loud = np.maximum(quiet, blobs(64, 64, (0, 50, 10, 10, 40.0)))
    pictures = [make_result(anomaly_map, threshold=0.5).draw(frame) for anomaly_map in (quiet, loud)]
    assert (pictures[0][32:48, 32:48] == pictures[1][32:48, 32:48]).all()
    assert (pictures[0][40, 40] != 128).any()


def test_a_mirrored_view_is_drawn_as_its_copy(frame):
    result = make_result(blobs(60, 100, (50, 30, 10, 10, 0.9)), height=120, width=200)
    view = frame[:, ::-1, ::-1]
    assert (result.draw(view) == result.draw(view.copy())).all()


@pytest.mark.parametrize("height, width", [(1, 1), (5, 3), (30, 1000), (1000, 30)])
def test_frames_of_any_size_can_be_drawn_on(height, width):
    result = make_result(blobs(64, 64, (5, 5, 50, 50, 0.9)), height=height, width=width)
    assert result.draw(np.zeros((height, width, 3), np.uint8)).shape == (height, width, 3)


@pytest.mark.parametrize(
    "other, came",
    [
        (np.zeros((64, 65, 3), np.uint8), r"expected the inspected frame, \(64, 64, 3\); got \(64, 65, 3\)"),
        (np.zeros((64, 64), np.uint8), "got uint8 \\(64, 64\\)"),
        (np.zeros((64, 64, 3), np.float32), "got float32"),
        (None, "got NoneType"),
    ],
    ids=["other size", "gray", "float", "none"],
)
def test_another_frame_than_the_inspected_one_is_refused(other, came):
    with pytest.raises(InputError, match=came):
        make_result(np.zeros((64, 64))).draw(other)


# ---- the result as a value


def test_to_dict_is_json_and_has_a_version():
    result = make_result(blobs(64, 64, (5, 5, 3, 2, 0.9)), height=128, width=128)
    values = result.to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values == {
        "schema": 2,
        "pred_label": "defective",
        "pred_score": float(np.float32(0.9)),
        "threshold": 0.5,
        "product": "gear",
        "product_assumed": False,
        "product_shown": None,
        "product_distance": None,
        "frame_height": 128,
        "frame_width": 128,
        "speed_ms": {"preprocess": 1.0, "engine": 2.0, "postprocess": 0.5, "total": 3.5},
        "backend": "onnxruntime",
        "precision": "fp32",
        "regions": [
            {
                "x": 10,
                "y": 10,
                "width": 6,
                "height": 4,
                "area_px": 24,
                "peak_score": float(np.float32(0.9)),
                "peak_x": 11,
                "peak_y": 11,
            }
        ],
    }


def test_results_are_frozen_compare_by_identity_and_print_short():
    result, same = make_result(np.zeros((64, 64))), make_result(np.zeros((64, 64)))
    with pytest.raises(FrozenInstanceError):
        result.pred_label = "good"
    assert result != same and result == result and {result: 1}[result] == 1
    assert "pred_label='good'" in repr(result) and "array" not in repr(result) and len(repr(result)) < 400


def test_a_huge_score_is_drawn_too():
    largest = float(np.finfo(np.float32).max)
    result = make_result([[largest, 0.0]], threshold=sys.float_info.min)
    assert result.is_defective and result.heatmap().tolist() == [[1, 0]]
