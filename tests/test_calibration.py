"""Thresholds against scipy's distributions, against simulation, and at their edges."""

import json
import math
import re
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom

from omniad_edge.calibration import Calibration, calibrate, false_reject_bound, images_needed
from omniad_edge.errors import CalibrationError, InputError

CONFIDENCES = (0.5, 0.95, 0.99999)


@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("n", [1, 2, 3, 10, 59, 598, 3000, 20_000, 100_000])
def test_bound_is_the_clopper_pearson_limit(n, confidence):
    for m in sorted({0, 1, 2, n // 100, n // 10, n // 2, n - 2, n - 1}):
        if 0 <= m < n:
            bound = false_reject_bound(n, m, confidence)
            assert bound == pytest.approx(beta.ppf(confidence, m + 1, n - m), rel=1e-8), (n, m)
            # P(Bin(n, 1 - p) >= k), the form of the docstring
            assert binom.sf(n - m - 1, n, 1 - bound) == pytest.approx(1 - confidence, rel=1e-5), (n, m)


@pytest.mark.parametrize("n", [60, 598, 599, 2000, 100_000])
@pytest.mark.parametrize("wish", [0.05, 0.005, 0.3, 0.77])
@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_wish_takes_the_smallest_score_that_keeps_it(n, wish, confidence):
    scores = np.arange(n)[::-1]
    if n < images_needed(wish, confidence):
        with pytest.raises(CalibrationError):
            calibrate(scores, 0, wish, confidence)
        return
    m = n - 1 - int(calibrate(scores, 0, wish, confidence).threshold)
    assert binom.cdf(m, n, wish) <= 1 - confidence
    assert binom.cdf(m + 1, n, wish) > 1 - confidence


@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("wish", [0.9, 0.5, 0.1, 0.049, 0.005, 1e-3, 1e-4])
def test_images_needed_is_smallest(wish, confidence):
    n = images_needed(wish, confidence)
    alpha = 1 - confidence
    assert (1 - wish) ** n <= alpha * (1 + 1e-9)
    assert n == 1 or (1 - wish) ** (n - 1) > alpha
    assert calibrate(np.arange(n), 0, wish, confidence).false_reject_bound <= wish
    if n > 1:
        with pytest.raises(CalibrationError, match=f"at least {n} good images, {n - 1} came"):
            calibrate(np.arange(n - 1), 0, wish, confidence)


def test_images_needed_known_values():
    assert images_needed(0.005, 0.95) == 598
    assert images_needed(0.05) == 59
    assert images_needed(0.5, 0.75) == 2  # 0.5^2 is exactly 0.25
    assert images_needed(0.9, 0.99) == 2
    assert images_needed(0.3, 0.51) == 2  # 0.7^2 is 0.49, though not in binary
    assert calibrate([1, 2], 0, 0.3, 0.51).false_reject_bound <= 0.3
    assert images_needed(0.95, 0.95) == 1
    assert images_needed(1e-9) > 2e9


@pytest.mark.parametrize(
    ("n", "wish", "draw", "survival"),
    [
        (60, None, "standard_exponential", lambda t: np.exp(-t)),
        (100, 0.1, "standard_exponential", lambda t: np.exp(-t)),
        (598, 0.005, "random", lambda t: 1 - t),
        (300, 0.05, "standard_normal", lambda t: 0.5 * np.vectorize(math.erfc)(t / math.sqrt(2))),
    ],
)
def test_simulated_coverage(n, wish, draw, survival, rng):
    trials, confidence = 1000, 0.95
    found = [calibrate(getattr(rng, draw)(n), 0, wish, confidence) for _ in range(trials)]
    rates = survival(np.array([c.threshold for c in found]))
    noise = 4 * math.sqrt(confidence * (1 - confidence) / trials)
    assert len({c.false_reject_bound for c in found}) == 1  # it depends on n and the wish alone
    covered = np.mean(rates <= found[0].false_reject_bound)
    assert abs(covered - confidence) <= noise  # the bound is exact, not merely safe
    if wish is not None:
        assert np.mean(rates <= wish) >= confidence - noise


def test_simulated_coverage_holds_for_tied_scores(rng):
    found = [calibrate(rng.integers(0, 20, 100), 0, 0.1) for _ in range(1000)]
    rates = np.array([(19 - c.threshold) / 20 for c in found])
    assert np.mean(rates <= 0.1) >= 0.95 - 4 * math.sqrt(0.95 * 0.05 / 1000)


def test_no_wish_takes_the_largest_score():
    c = calibrate([0.25, 0.5, 0.125], map_floor=0.0625)
    assert c == Calibration(
        threshold=0.5,
        n_good=3,
        max_false_reject=None,
        false_reject_bound=false_reject_bound(3, 0),
        confidence=0.95,
        score_median=0.25,
        score_spread=1.4826 * 0.125,
        map_floor=0.0625,
    )
    assert c.false_reject_bound == pytest.approx(1 - 0.05 ** (1 / 3), rel=1e-12)


def test_one_image():
    c = calibrate([0.3], map_floor=0)
    assert (c.threshold, c.n_good, c.score_median, c.score_spread) == (0.3, 1, 0.3, 0)
    assert c.false_reject_bound == pytest.approx(0.95)
    assert np.nextafter(1, 0) <= false_reject_bound(1, 0, np.nextafter(1, 0)) <= 1
    with pytest.raises(CalibrationError, match="needs at least 598 good images, 1 came; bring more"):
        calibrate([0.3], 0, 0.005)


def test_equal_scores_are_all_good():
    c = calibrate([0.3] * 700, 0, 0.01)
    assert c.threshold == 0.3 and c.score_spread == 0
    assert c.false_reject_bound <= 0.01


def test_ties_do_not_improve_the_bound():
    n = 1000
    distinct = calibrate(np.arange(n), 0, 0.05)
    tied = np.arange(n)
    tied[int(distinct.threshold) :] = distinct.threshold  # nothing is strictly above the threshold now
    again = calibrate(tied, 0, 0.05)
    assert (again.threshold, again.false_reject_bound) == (distinct.threshold, distinct.false_reject_bound)


def test_refusal_is_a_sentence_for_an_engineer():
    with pytest.raises(CalibrationError) as refused:
        calibrate(np.arange(60), 0, 0.005, product="screw")
    assert str(refused.value) == (
        "a false-reject rate of at most 0.5 % at 95 % confidence needs at least 598 good images of 'screw', "
        "60 came; bring more, or ask for at most 4.9 %, which 60 images support"
    )


@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_what_the_refusal_offers_is_accepted(confidence):
    for n in (1, 2, 7, 60, 150, 1000, 9000):
        with pytest.raises(CalibrationError) as refused:
            calibrate(np.arange(n), 0, 1e-5, confidence)
        offer = re.search(r"ask for at most (\S+) %", str(refused.value))
        if offer is None:
            assert false_reject_bound(n, 0, confidence) > 0.99
        else:
            wish = float(offer[1]) / 100
            assert calibrate(np.arange(n), 0, wish, confidence).false_reject_bound <= wish


@pytest.mark.parametrize(
    "scores",
    [
        [],
        [[0.1, 0.2]],
        [0.1, np.nan],
        [np.inf, 0.1],
        [-np.inf],
        0.5,
        None,
        "0.1",
        ["0.1"],
        [True, False],
        [1j],
        [[0.1], [0.2, 0.3]],
        [0.1, None],
        {0.1: 1},
    ],
    ids=str,
)
def test_bad_scores(scores):
    with pytest.raises(InputError, match="scores of 'screw'"):
        calibrate(scores, 0, product="screw")


def test_the_broken_score_is_named():
    with pytest.raises(InputError, match=r"got nan at index 2 \(1 of 4"):
        calibrate([0.1, 0.2, np.nan, 0.3], 0)


@pytest.mark.parametrize("rate", [0, 1, -0.1, 5, np.nan, np.inf, "0.1", True, 1e-320, [0.1]], ids=str)
def test_bad_rates(rate):
    with pytest.raises(InputError, match="max_false_reject"):
        calibrate([0.1] * 100, 0, rate)
    with pytest.raises(InputError, match="max_false_reject"):
        images_needed(rate)
    if rate != 1e-320:
        for call in (lambda: images_needed(0.1, rate), lambda: calibrate([0.1], 0, None, rate)):
            with pytest.raises(InputError, match="confidence"):
                call()


@pytest.mark.parametrize(("n", "m"), [(0, 0), (-1, 0), (5, 5), (5, -1), (5.0, 0), (True, 0), (5, "1")])
def test_bad_counts(n, m):
    with pytest.raises(InputError, match=r"n_good|n_above"):
        false_reject_bound(n, m)


@pytest.mark.parametrize("floor", [np.nan, None, "0"])
def test_bad_map_floor(floor):
    with pytest.raises(InputError, match="map_floor"):
        calibrate([0.1], floor)


def test_float32_scores_keep_the_rule(rng):
    scores = rng.random(500, dtype=np.float32)
    c = calibrate(scores, np.float32(0), 0.02)
    assert type(c.threshold) is float and type(c.map_floor) is float
    above = np.count_nonzero(scores > c.threshold)
    assert binom.cdf(above, 500, 0.02) <= 0.05 < binom.cdf(above + 1, 500, 0.02)
    assert not np.any(scores > calibrate(scores, 0).threshold)


def test_scores_are_not_changed():
    scores = np.array([3.0, 1.0, 2.0])
    calibrate(scores, 0)
    assert scores.tolist() == [3, 1, 2]


def test_hundred_thousand_scores_are_quick(rng):
    scores = rng.random(100_000)
    start = time.perf_counter()
    calibrate(scores, 0, 0.01)
    assert time.perf_counter() - start < 3  # 0.2 s on one core


scores_lists = st.lists(st.floats(-1e30, 1e30) | st.sampled_from([0.0, 0.25, 0.5]), min_size=1, max_size=300)
rates = st.floats(0.01, 0.99)


@settings(max_examples=150, deadline=None)
@given(scores_lists, rates, rates, st.floats(0.01, 0.999))
def test_properties(scores, wish, other_wish, confidence):
    plain = calibrate(scores, 0, None, confidence)
    assert plain.threshold == max(scores)
    found = []
    for rate in sorted((wish, other_wish)):
        try:
            c = calibrate(scores, 0, rate, confidence)
        except CalibrationError:
            assert len(scores) < images_needed(rate, confidence)
            assert plain.false_reject_bound > rate * (1 - 1e-9)
        else:
            found.append(c)
            assert c.threshold in scores and c.threshold <= plain.threshold
            assert 0 <= c.false_reject_bound <= rate
            assert Calibration.from_dict(json.loads(json.dumps(c.to_dict()))) == c
    if len(found) == 2:
        assert found[1].threshold <= found[0].threshold


@given(st.integers(1, 400), st.data())
@settings(max_examples=60, deadline=None)
def test_bound_grows_with_rejects_and_shrinks_with_images(n, data):
    m = data.draw(st.integers(0, n - 1))
    bound = false_reject_bound(n, m)
    assert 0 < bound < 1
    assert false_reject_bound(n + 1, m) <= bound
    assert false_reject_bound(n + 1, m + 1) >= bound


def test_manual_threshold_claims_nothing():
    c = calibrate(np.arange(700), 0.5, 0.01)
    manual = c.with_threshold(np.float32(3))
    assert manual == replace(c, threshold=3.0, false_reject_bound=None, source="manual")
    assert type(manual.threshold) is float
    assert Calibration.from_dict(manual.to_dict()) == manual
    assert manual.with_threshold(4).threshold == 4
    for value in (np.nan, np.inf, None, "3", True):
        with pytest.raises(InputError, match="threshold"):
            c.with_threshold(value)


WRONG_FIELDS = [
    *((name, value) for name in ("threshold", "score_median", "map_floor") for value in (None, "1", math.nan)),
    ("threshold", 10**400),
    ("threshold", True),
    ("threshold", [1]),
    ("n_good", 0),
    ("n_good", 3.0),
    ("n_good", None),
    ("max_false_reject", 0),
    ("max_false_reject", 1.5),
    ("max_false_reject", 1e-4),  # below the bound
    ("false_reject_bound", None),
    ("false_reject_bound", -0.1),
    ("false_reject_bound", 1.1),
    ("confidence", 1),
    ("confidence", None),
    ("score_spread", -1e-9),
    ("score_spread", math.inf),
    ("source", "guessed"),
    ("source", "manual"),  # with a bound
    ("source", "training"),
    ("source", None),
    ("source", []),
    ("surplus", 1),
]


@pytest.mark.parametrize(("name", "value"), WRONG_FIELDS, ids=str)
def test_from_dict_refuses(name, value):
    values = calibrate(np.arange(700), 0.5, 0.01).to_dict()
    with pytest.raises(InputError):
        Calibration.from_dict(values | {name: value})


@pytest.mark.parametrize("values", [None, [], "x", 1, {}, {"threshold": 1}])
def test_from_dict_refuses_other_shapes(values):
    with pytest.raises(InputError, match="expected an object with threshold"):
        Calibration.from_dict(values)
