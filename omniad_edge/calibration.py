"""The threshold of one product from its good images alone, and the false-reject rate it guarantees.

A part is rejected when its score is above the threshold t. Sort the scores of n good images, x_(1) <= ... <=
x_(n), and take t = x_(k) with m = n - k scores above it. If F is the distribution of good scores,
F(x_(k)) ~ Beta(k, n - k + 1), so for the false-reject rate R = 1 - F(x_(k))

    P(R > p) = P(Bin(n, 1 - p) >= k) = P(Bin(n, p) <= m),

whatever F is; where F has steps (ties), R is only smaller. Setting this probability to 1 - confidence gives
the upper bound on R. For m = 0, (1 - p)^n = 1 - confidence.
Source: order-statistic tolerance limits (Wilks 1941), which are the upper limit of Clopper and Pearson 1934.

k must not depend on the scores, so m counts ranks, and a tie never makes the stated bound smaller.
The guarantee is for parts like these images: independent pictures of the line's good parts which the network
was not trained on (it scores its training images lower).
"""

import math
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from reprlib import repr as short

import numpy as np
from numpy.typing import ArrayLike

from .errors import CalibrationError, InputError

SOURCES = ("calibrated", "training", "manual")
MIN_RATE = 1e-9  # below it the number of images is no longer a number anyone can act on
MAX_SCORE = 2 / 3  # three times 1 - cosine, each 2 at most, and the published scale of 1/9
MAD_TO_SIGMA = 1.4826  # of a normal distribution


@dataclass(frozen=True)
class Calibration:
    """Threshold of one product and what is known about it. Scores are raw anomaly scores, unbounded.

    Every field is checked and numbers become plain int and float; InputError names the field that is wrong.
    """

    threshold: float  # defective iff score > threshold
    n_good: int  # good images it was calibrated on
    max_false_reject: float | None  # the wish, a fraction; None: no wish, the largest good score was taken
    false_reject_bound: float | None  # the guarantee, a fraction; None unless calibrated
    confidence: float  # of the guarantee, a fraction
    score_median: float  # of the good images' scores
    score_spread: float  # 1.4826 x median absolute deviation of those scores; 0 if more than half are equal
    map_floor: float  # anomaly-map value drawn as colour 0
    # or "training": from images that were trained on, which score too low; or "manual": set by hand. Of neither is
    # anything known about its false-reject rate
    source: str = "calibrated"

    def __post_init__(self) -> None:
        for name in ("threshold", "confidence", "score_median", "score_spread", "map_floor"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        for name in ("max_false_reject", "false_reject_bound"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _number(name, getattr(self, name)))
        object.__setattr__(self, "n_good", _count("n_good", self.n_good))
        _check_confidence(self.confidence)
        if self.score_spread < 0:
            raise InputError(f"score_spread: expected 0 or more, got {self.score_spread}")
        if self.source not in SOURCES:
            raise InputError(f"source: expected one of {SOURCES}, got {short(self.source)}")
        self._check_guarantee()

    def _check_guarantee(self) -> None:
        wish, bound = self.max_false_reject, self.false_reject_bound
        if wish is not None:
            _check_rate(wish)
        if (bound is None) == (self.source == "calibrated"):
            raise InputError(
                f"false_reject_bound: expected a number if calibrated, else None; got {bound}, {self.source}"
            )
        if bound is not None and not 0 <= bound <= (1 if wish is None else wish):
            raise InputError(
                f"false_reject_bound: expected 0 to {1 if wish is None else f'the wish {wish}'}, got {bound}"
            )

    def with_threshold(self, value: float) -> "Calibration":
        """The same product with a threshold set by hand: source "manual" and no false-reject bound.

        The other fields, the wish included, stay as the record of the last calibration.
        """
        return replace(self, threshold=value, false_reject_bound=None, source="manual")

    def to_dict(self) -> dict:
        """Field names to JSON values; `from_dict` gives the equal Calibration back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Calibration":
        """Inverse of `to_dict`. Raises InputError for missing, unknown or wrong fields."""
        names = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or set(values) != set(names):
            raise InputError(f"calibration: expected an object with {', '.join(names)}, got {short(values)}")
        return cls(**values)


def images_needed(max_false_reject: float, confidence: float = 0.95) -> int:
    """Smallest n of good images that can support the wish: (1 - max_false_reject)^n <= 1 - confidence.

    Both are fractions; images_needed(0.005) is 598. Raises InputError outside 1e-9..1 (rate), 0..1.
    """
    _check_rate(max_false_reject)
    _check_confidence(confidence)
    n = math.log(1 - confidence) / math.log1p(-max_false_reject)
    return max(1, math.ceil(n - 1e-9))  # the rounding of 1 - confidence must not cost an image


def false_reject_bound(n_good: int, n_above: int, confidence: float = 0.95) -> float:
    """Upper bound, at this confidence, on the false-reject rate of a threshold taken from n_good scores.

    n_above: how many of the sorted scores lie behind the one taken as threshold, 0..n_good - 1, chosen
    before looking at the scores. Returns a fraction 0..1, the p with P(Bin(n_good, p) <= n_above) equal to
    1 - confidence. Raises InputError.
    """
    n_good, n_above = _count("n_good", n_good), _count("n_above", n_above, low=0)
    _check_confidence(confidence)
    if n_above >= n_good:
        raise InputError(f"n_above: expected less than n_good = {n_good}, got {n_above}")
    log_choose = _log_choose(n_good, n_above)
    low, high = 0.0, 1.0
    for _ in range(64):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if _binomial_cdf(log_choose, n_good, middle)[-1] > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def calibrate(
    scores: ArrayLike,
    map_floor: float,
    max_false_reject: float | None = None,
    confidence: float = 0.95,
    product: str | None = None,
) -> Calibration:
    """Threshold from the scores of one product's good images; defective iff score > threshold.

    scores: (N,) real, finite, raw. map_floor: anomaly-map value drawn as colour 0, typically the median
    pixel of the good maps. product: its name, for the error messages.
    Without a wish the threshold is the largest score, with the bound that N images support. With
    max_false_reject (a fraction) it is the smallest score that keeps the false-reject rate at or below the
    wish at this confidence.
    Raises CalibrationError if N images cannot support the wish, saying how many could; InputError for
    scores that are empty, not one-dimensional, not numbers or not finite, and for rates outside 0..1.
    """
    scores = np.sort(_check_scores(scores, product))
    n = scores.size
    n_above = 0
    if max_false_reject is not None:
        n_above = _scores_above(n, max_false_reject, confidence, product)
    bound = false_reject_bound(n, n_above, confidence)
    if max_false_reject is not None:
        bound = min(bound, max_false_reject)  # already shown for this n_above; the bisection ends an ulp above
    median = np.median(scores)
    return Calibration(
        threshold=scores[n - n_above - 1],
        n_good=n,
        max_false_reject=max_false_reject,
        false_reject_bound=bound,
        confidence=confidence,
        score_median=median,
        score_spread=MAD_TO_SIGMA * np.median(np.abs(scores - median)),
        map_floor=map_floor,
    )


def _scores_above(n: int, wish: float, confidence: float, product: str | None) -> int:
    """The largest m with P(Bin(n, wish) <= m) <= 1 - confidence; CalibrationError if there is none."""
    needed = images_needed(wish, confidence)
    if n < needed:
        of_product = f" of {product!r}" if product else ""
        message = (
            f"a false-reject rate of at most {_percent(wish)} at {_percent(confidence)} confidence needs "
            f"at least {needed} good images{of_product}, {n} came; bring more"
        )
        supported = _round_up(false_reject_bound(n, 0, confidence))
        if supported < 1:
            message += f", or ask for at most {_percent(supported)}, which {n} images support"
        raise CalibrationError(message)
    cdf = _binomial_cdf(_log_choose(n, n - 1), n, wish)
    return max(0, int(np.searchsorted(cdf, 1 - confidence, side="right")) - 1)


def _log_choose(n: int, m: int) -> np.ndarray:
    """(m + 1,) float64: log of the binomial coefficients (n over 0..m); absolute error < 1e-8 at n = 1e5."""
    whole = math.lgamma(n + 1)
    return np.array([whole - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(m + 1)])


def _binomial_cdf(log_choose: np.ndarray, n: int, p: float) -> np.ndarray:
    """(m + 1,) float64: P(Bin(n, p) <= 0..m), 0 < p < 1. In logs, because p^i alone underflows."""
    i = np.arange(log_choose.size)
    return np.cumsum(np.exp(log_choose + i * math.log(p) + (n - i) * math.log1p(-p)))


def _check_scores(scores: ArrayLike, product: str | None) -> np.ndarray:
    """(N,) float64, N >= 1, finite; else InputError."""
    name = f"scores of {product!r}" if product else "scores"
    try:
        array = np.asarray(scores)
    except ValueError as exc:
        raise InputError(f"{name}: expected a flat list of numbers, got {short(scores)}") from exc
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "fiu":
        raise InputError(
            f"{name}: expected real numbers of shape (N,) with N >= 1, got {array.dtype} {array.shape}"
        )
    finite = np.isfinite(array)
    if not finite.all():
        index = int(np.argmin(finite))
        raise InputError(
            f"{name}: expected finite numbers, got {array[index]} at index {index} "
            f"({np.count_nonzero(~finite)} of {array.size} are not finite); look at that image and the model"
        )
    return array.astype(np.float64)


def _check_rate(rate: float) -> None:
    if not MIN_RATE <= _number("max_false_reject", rate) < 1:
        raise InputError(
            f"max_false_reject: expected a fraction from {MIN_RATE} to below 1 (0.005 is 0.5 %), got {rate}"
        )


def _check_confidence(confidence: float) -> None:
    if not 0 < _number("confidence", confidence) < 1:
        raise InputError(f"confidence: expected a fraction between 0 and 1 (0.95 is 95 %), got {confidence}")


def _number(name: str, value: object) -> float:
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # an int beyond the largest float
            number = math.inf
        if math.isfinite(number):
            return number
    raise InputError(f"{name}: expected a finite number, got {short(value)}")


def _count(name: str, value: object, low: int = 1) -> int:
    if isinstance(value, Integral) and not isinstance(value, bool) and value >= low:
        return int(value)
    raise InputError(f"{name}: expected a whole number of at least {low}, got {short(value)}")


def _round_up(rate: float) -> float:
    """To two significant digits, never down: what is offered to the reader must be supported."""
    step = 10.0 ** (math.floor(math.log10(rate)) - 1)
    return math.ceil(rate / step - 1e-9) * step


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.6g} %"
