"""The seven metrics of the field: AUROC, AP and F1-max of images and of pixels, and AUPRO.

All values are fractions 0..1, higher is better. A metric that needs both classes is nan where only one
is there (no defective image, a product without masks), never an error and never a made-up number.
A score is anomalous above a threshold, so equal scores are always on the same side of it.

Two forms exist of pixel F1-max and AUPRO. The exact one takes every score as a threshold. The published
evaluator (ADer, used by the Omni-AD paper) takes 21 and 100 thresholds between the lowest and the highest
score; its values depend on that one highest pixel and are for comparison with printed tables only.

Sources: AUPRO is "per-region overlap" of Bergmann et al., The MVTec Anomaly Detection Dataset, IJCV 2021,
section 5.2; AP is the step-wise sum of precision x recall gained, without interpolation.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import cv2
import numpy as np

from .errors import InputError

METRICS = ("image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro")
FPR_LIMIT = 0.3
ROC_POINTS = 500


@dataclass(frozen=True)
class ProductMetrics:
    """The seven metrics of one product, as fractions 0..1 or nan, and how many images they rest on."""

    product: str
    n_good: int
    n_defective: int
    image_auroc: float
    image_ap: float
    image_f1_max: float
    pixel_auroc: float
    pixel_ap: float
    pixel_f1_max: float
    aupro: float

    @property
    def mad(self) -> float:
        """Mean of the seven metrics ("mAD" of the paper); nan if one of them is nan."""
        return float(np.mean([getattr(self, name) for name in METRICS]))

    def to_dict(self) -> dict[str, str | int | float]:
        """All fields by name, and `mad`."""
        return {**asdict(self), "mad": self.mad}


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve; equal scores of both classes count half.

    scores: any shape, finite numbers. labels: same shape, bool, True is defective. nan if one class only.
    """
    return _auroc(_rank(scores, labels))


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Average precision: precision at every distinct score, weighted with the recall gained there.

    scores: any shape, finite numbers. labels: same shape, bool, True is defective. nan if one class only.
    """
    return _average_precision(_rank(scores, labels))


def f1_max(scores: np.ndarray, labels: np.ndarray) -> float:
    """The largest F1 that any threshold gives.

    scores: any shape, finite numbers. labels: same shape, bool, True is defective. nan if one class only.
    """
    return _f1_max(_rank(scores, labels))


def f1_max_grid(scores: np.ndarray, labels: np.ndarray) -> float:
    """F1-max of the published evaluator: scores min-max scaled to 0..1, thresholds 0, 0.05, ... 1.

    Arguments as `f1_max`. nan if one class only or all scores are equal (the evaluator divides by zero).
    """
    return _f1_max_grid(_rank(scores, labels))


def aupro(maps: np.ndarray, masks: np.ndarray, fpr_limit: float = FPR_LIMIT) -> float:
    """Exact area under the per-region-overlap curve up to a false-positive rate, divided by that rate.

    maps: (N, H, W) finite numbers. masks: (N, H, W) bool, True is defect; its 8-connected parts are the
    regions, all weighted alike. fpr_limit: in (0, 1]; the curve is cut there by linear interpolation.
    The false-positive rate is over all defect-free pixels. nan if there is no region or no defect-free pixel.
    """
    _check_limit(fpr_limit)
    return _aupro(_rank_pixels(*_checked_maps(maps, masks)), fpr_limit)


def aupro_grid(
    maps: np.ndarray, masks: np.ndarray, n_thresholds: int = 100, fpr_limit: float = FPR_LIMIT
) -> float:
    """AUPRO of the published evaluator: a threshold grid, rates below the limit stretched to 0..1.

    Arguments as `aupro`; the thresholds are min, min + d, ... below max with d = (max - min) / n_thresholds.
    nan where the evaluator divides by zero: equal maps, or fewer than two rates below the limit.
    """
    _check_limit(fpr_limit)
    if n_thresholds < 2:
        raise InputError(f"n_thresholds: expected 2 or more, got {n_thresholds}; the published value is 100")
    return _aupro_grid(_rank_pixels(*_checked_maps(maps, masks)), n_thresholds, fpr_limit)


def roc_curve(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False-positive rate and true-positive rate from (0, 0) to (1, 1), for plotting.

    At most 500 points each, of equal number; above that the points nearest to equal steps along the curve.
    Two empty arrays if one class only.
    """
    ranking = _rank(scores, labels)
    if ranking.one_class:
        return np.empty(0), np.empty(0)
    fpr, tpr = _steps(ranking, ranking.tp / ranking.n_positive)
    if len(fpr) > ROC_POINTS:
        along = fpr + tpr
        nearest = np.searchsorted(along, np.linspace(0.0, along[-1], ROC_POINTS))
        keep = np.unique(np.minimum(nearest, len(along) - 1))
        fpr, tpr = fpr[keep], tpr[keep]
    return fpr, tpr


def evaluate_maps(
    product: str,
    maps: np.ndarray,
    masks: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    published: bool = False,
) -> ProductMetrics:
    """The seven metrics of one product's test images.

    maps: (N, H, W) float32 anomaly maps. masks: (N, H, W) bool, True is defect. scores: (N,) pred_score.
    labels: (N,) bool, True is defective. Pixel F1-max and AUPRO are exact; `published=True` takes both in
    the grid form of the published evaluator, for comparison with printed tables (its scores are the maxima
    of the maps).
    Raises InputError on shapes or dtypes that differ, on NaN or inf, and if an image labelled good has
    defect pixels. A defective image with an empty mask is accepted: small defects vanish on resizing.
    """
    maps, masks = _checked_maps(maps, masks)
    scores, labels = checked_scores(scores, labels)
    if labels.shape != maps.shape[:1]:
        raise InputError(f"scores: expected one for each of the {len(maps)} maps, got shape {scores.shape}")
    marked = masks.any(axis=(1, 2)) & ~labels
    if marked.any():
        raise InputError(f"{product}: image {int(marked.argmax())} is labelled good but its mask has defects")
    images, pixels = _rank(scores, labels), _rank_pixels(maps, masks)
    return ProductMetrics(
        product=product,
        n_good=int((~labels).sum()),
        n_defective=int(labels.sum()),
        image_auroc=_auroc(images),
        image_ap=_average_precision(images),
        image_f1_max=_f1_max(images),
        pixel_auroc=_auroc(pixels),
        pixel_ap=_average_precision(pixels),
        pixel_f1_max=_f1_max_grid(pixels) if published else _f1_max(pixels),
        aupro=_aupro_grid(pixels, 100, FPR_LIMIT) if published else _aupro(pixels, FPR_LIMIT),
    )


def mean_metrics(metrics: Sequence[ProductMetrics]) -> ProductMetrics:
    """Every metric's mean over the products, named "mean"; image counts are summed.

    A product without a value (nan) is left out of that metric's mean; nan if no product has one.
    Raises InputError if there is no product.
    """
    if not metrics:
        raise InputError("metrics: expected at least one product, got none; evaluate a product first")
    means = {}
    for name in METRICS:
        values = [value for value in (getattr(one, name) for one in metrics) if not np.isnan(value)]
        means[name] = float(np.mean(values)) if values else float("nan")
    counts = {name: sum(getattr(one, name) for one in metrics) for name in ("n_good", "n_defective")}
    return ProductMetrics(product="mean", **counts, **means)


def checked_scores(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores as float32 or float64 and labels as bool, both arrays of one shape; InputError if they are not.

    Scores must be finite numbers and labels bool: 0/1 integers and swapped arguments are refused.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if labels.dtype != bool:
        raise InputError(f"labels: expected bool, True is defective, got {labels.dtype}; convert with `> 0`")
    if scores.dtype.kind not in "fiu":
        raise InputError(f"scores: expected numbers, got {scores.dtype}; are scores and labels swapped?")
    if scores.shape != labels.shape:
        raise InputError(f"scores and labels: expected one shape, got {scores.shape} and {labels.shape}")
    if not np.isfinite(scores).all():
        raise InputError("scores: expected finite numbers, got NaN or inf; the network's output is broken")
    if scores.dtype not in (np.float32, np.float64):  # small integers and fp16 would overflow in differences
        scores = scores.astype(np.float64)
    return scores, labels


@dataclass(frozen=True)
class _Ranking:
    """Counts at the K distinct scores of the positives, from the highest score down.

    Between two of them only false positives are added, so no metric here needs any other threshold: sorting
    the many negatives without their order, and looking the few positives up, is all the work there is.
    """

    negatives: np.ndarray  # (n_negative,) scores, ascending
    positives: np.ndarray  # (n_positive,) scores, ascending
    tp: np.ndarray  # (K,) int64, positives at or above the score
    fp: np.ndarray  # (K,) int64, negatives at or above it
    fp_above: np.ndarray  # (K,) int64, negatives strictly above it
    overlap: np.ndarray | None = None  # (n_positive + 1,) region overlap of the i highest positives, 0..1

    @property
    def n_positive(self) -> int:
        return len(self.positives)

    @property
    def n_negative(self) -> int:
        return len(self.negatives)

    @property
    def one_class(self) -> bool:
        return not self.n_positive or not self.n_negative


def _rank(scores: np.ndarray, labels: np.ndarray) -> _Ranking:
    scores, labels = checked_scores(scores, labels)
    return _count(np.sort(scores[~labels]), np.sort(scores[labels]))


def _rank_pixels(maps: np.ndarray, masks: np.ndarray) -> _Ranking:
    positives = maps[masks]
    order = np.argsort(positives)
    shares = _region_shares(masks)[order[::-1]]
    overlap = np.concatenate([[0.0], np.cumsum(shares)])
    return _count(np.sort(maps[~masks]), positives[order], overlap)


def _count(negatives: np.ndarray, positives: np.ndarray, overlap: np.ndarray | None = None) -> _Ranking:
    last = np.ones(len(positives), bool)  # last of equal scores on the way down: where all of them are in
    last[1:] = positives[1:] != positives[:-1]
    first_index = np.flatnonzero(last)[::-1]
    distinct = positives[first_index]
    return _Ranking(
        negatives=negatives,
        positives=positives,
        tp=len(positives) - first_index,
        fp=len(negatives) - np.searchsorted(negatives, distinct, side="left"),
        fp_above=len(negatives) - np.searchsorted(negatives, distinct, side="right"),
        overlap=overlap,
    )


def _region_shares(masks: np.ndarray) -> np.ndarray:
    """What each defect pixel adds to the mean region overlap, (n_positive,), in the order of maps[masks]."""
    shares, n_regions = [np.empty(0)], 0
    for mask in masks[masks.any(axis=(1, 2))]:
        found, regions, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
        shares.append(1.0 / stats[regions[mask], cv2.CC_STAT_AREA])
        n_regions += found - 1  # region 0 is the background
    return np.concatenate(shares) / max(n_regions, 1)


def _auroc(ranking: _Ranking) -> float:
    if ranking.one_class:
        return float("nan")
    # Twice the pairs ordered rightly: integers, exact below 2**62 pairs.
    below = (ranking.n_negative - ranking.fp) + (ranking.n_negative - ranking.fp_above)
    pairs = int(np.sum(np.diff(ranking.tp, prepend=0) * below))
    return pairs / (2 * ranking.n_positive * ranking.n_negative)


def _average_precision(ranking: _Ranking) -> float:
    if ranking.one_class:
        return float("nan")
    precision = ranking.tp / (ranking.tp + ranking.fp)
    return float(np.sum(np.diff(ranking.tp, prepend=0) * precision)) / ranking.n_positive


def _f1_max(ranking: _Ranking) -> float:
    if ranking.one_class:
        return float("nan")
    return float(np.max(2 * ranking.tp / (ranking.tp + ranking.fp + ranking.n_positive)))


def _f1_max_grid(ranking: _Ranking) -> float:
    if ranking.one_class:
        return float("nan")
    low, high = _range(ranking)
    if low == high:
        return float("nan")
    grid = np.arange(0.0, 1.001, 0.05)
    # Scaling keeps the order, so the sorted scores can be scaled in place of the maps.
    tp = ranking.n_positive - np.searchsorted((ranking.positives - low) / (high - low), grid, side="right")
    fp = ranking.n_negative - np.searchsorted((ranking.negatives - low) / (high - low), grid, side="right")
    return float(np.max(2 * tp / (tp + fp + ranking.n_positive)))


def _aupro(ranking: _Ranking, fpr_limit: float) -> float:
    if ranking.one_class:
        return float("nan")
    fpr, pro = _steps(ranking, ranking.overlap[ranking.tp])
    inside = int(np.searchsorted(fpr, fpr_limit, side="right"))
    if inside < len(fpr):
        share = (fpr_limit - fpr[inside - 1]) / (fpr[inside] - fpr[inside - 1])
        at_limit = pro[inside - 1] + share * (pro[inside] - pro[inside - 1])
        fpr, pro = np.append(fpr[:inside], fpr_limit), np.append(pro[:inside], at_limit)
    return min(_area(fpr, pro) / fpr_limit, 1.0)  # a sum of 1/area shares may end a rounding error above 1


def _aupro_grid(ranking: _Ranking, n_thresholds: int, fpr_limit: float) -> float:
    if ranking.one_class:
        return float("nan")
    low, high = _range(ranking)
    if low == high:
        return float("nan")
    grid = np.arange(low, high, (high - low) / n_thresholds)
    fp = ranking.n_negative - np.searchsorted(ranking.negatives, grid, side="right")
    tp = ranking.n_positive - np.searchsorted(ranking.positives, grid, side="right")
    fpr, pro = fp / ranking.n_negative, ranking.overlap[tp]
    fpr, pro = fpr[fpr < fpr_limit][::-1], pro[fpr < fpr_limit][::-1]
    if not len(fpr) or fpr[0] == fpr[-1]:
        return float("nan")
    return min(_area((fpr - fpr[0]) / (fpr[-1] - fpr[0]), pro), 1.0)


def _steps(ranking: _Ranking, rate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The curve of `rate` (K,) over the false-positive rate, as (2 K + 2,) points from (0, 0) to (1, 1).

    Flat from one positive score to just above the next; a straight line where both classes share a score.
    """
    fpr = np.stack([ranking.fp_above, ranking.fp], axis=1).ravel() / ranking.n_negative
    before = np.concatenate([[0.0], rate[:-1]])
    height = np.stack([before, rate], axis=1).ravel()
    return np.concatenate([[0.0], fpr, [1.0]]), np.concatenate([[0.0], height, rate[-1:]])


def _area(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1]))) / 2


def _range(ranking: _Ranking) -> tuple[np.floating, np.floating]:
    negatives, positives = ranking.negatives, ranking.positives
    return min(negatives[0], positives[0]), max(negatives[-1], positives[-1])


def _checked_maps(maps: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    maps, masks = np.asarray(maps), np.asarray(masks)
    if maps.ndim != 3 or maps.shape != masks.shape or 0 in maps.shape:
        raise InputError(f"maps and masks: expected one shape (N, H, W), got {maps.shape} and {masks.shape}")
    return checked_scores(maps, masks)


def _check_limit(fpr_limit: float) -> None:
    if not 0 < fpr_limit <= 1:
        raise InputError(f"fpr_limit: expected above 0 and up to 1, got {fpr_limit}; the usual value is 0.3")
