"""The parity gate: an exported engine against the trained network, on real images, before anything is written."""

from dataclasses import asdict, dataclass

import numpy as np

from ..data import load_masks
from ..evaluate import Predictions, calibrate_products
from ..metrics import aupro, auroc
from ..recognition import ProductSpace
from ..self_test import MAX_MAP_ERROR, MAX_SCORE_ERROR

FEWEST_SCORES = 8  # that have a standard deviation worth the name
FEWEST_RANKS = 50  # from here on two neighbours may change places: that costs 12 / (n^3 - n), 1e-4 of 50


@dataclass(frozen=True)
class Limits:
    """How far an engine may be from the trained network.

    map_error:        largest difference of an anomaly map's value
    score_error:      largest difference of a score, in standard deviations of all scores
    verdict_flips:    share of images with another verdict, each side with thresholds from its own scores; not
                      counting scores nearer to the threshold than the score error allowed
    auroc_difference: of the image AUROC, less one pair of a good and a defective image, which may be a near tie
    rank_loss:        1 - Spearman's rank correlation of the scores
    product_error:    largest distance between two embeddings of an image; most good images are up to 1 from their
                      product's mean (`recognition.py`)
    """

    map_error: float
    score_error: float
    verdict_flips: float
    auroc_difference: float
    rank_loss: float
    product_error: float = 0.02


# fp32 and fp16 differ from the trained network by rounding that no verdict may show; bf16 has 8 bits, and is
# only used where it passes. On the demo's network its rank loss is 9e-5, its score error 0.018, its product error
# 0.048. The loss grows with the square of the errors, so 1e-3 lets these be three times as large.
LIMITS = {
    "fp32": Limits(MAX_MAP_ERROR, MAX_SCORE_ERROR, 0.0, 0.001, 1e-4),
    "fp16": Limits(MAX_MAP_ERROR, MAX_SCORE_ERROR, 0.0, 0.001, 1e-4),
    "bf16": Limits(3e-3, 0.10, 0.01, 0.002, 1e-3, 0.15),
}


@dataclass(frozen=True)
class DetectionLimits:
    """How much worse than the trained network an engine may detect, on the product where it loses most.

    auroc_loss: of the image AUROC
    aupro_loss: of the AUPRO
    """

    auroc_loss: float
    aupro_loss: float


# 8 bits move every score and map, and each engine rounds in another place. What counts is what is detected.
DETECTION_LIMITS = {"int8": DetectionLimits(0.005, 0.01), "fp8": DetectionLimits(0.005, 0.01)}


def compare(
    reference: Predictions, engine: Predictions, precision: str, space: ProductSpace | None = None
) -> dict:
    """The gate's report on one engine: measured values, limits, `passed`, and `failures` in words. JSON-safe."""
    quantised = precision in DETECTION_LIMITS
    limits = asdict(DETECTION_LIMITS[precision] if quantised else LIMITS[precision])
    report = {"images": len(reference.pred_scores), "limits": limits, "measured": {}}
    for predictions, whose in ((reference, "trained network's"), (engine, "engine's")):
        if not (np.isfinite(predictions.anomaly_maps).all() and np.isfinite(predictions.pred_scores).all()):
            return report | {"passed": False, "failures": [f"the {whose} anomaly map is not finite"]}
        if predictions.embeddings is not None and not np.isfinite(predictions.embeddings).all():
            return report | {"passed": False, "failures": [f"the {whose} embedding is not finite"]}
    measured = {
        "map_error": float(np.abs(engine.anomaly_maps - reference.anomaly_maps).max()),
        "score_error": score_error(reference, engine),
        "verdict_flips": verdict_flips(reference, engine, limits.get("score_error", 0.0)),
        "auroc_difference": auroc_difference(reference, engine),
        "rank_loss": rank_loss(reference, engine),
        "product_error": product_error(reference, engine, space),
    }
    if quantised:
        measured |= detection_loss(reference, engine)
    failures = [
        f"{name.replace('_', ' ')} is {measured[name]:.2g}, the limit is {limit:.2g}"
        for name, limit in limits.items()
        if measured[name] is not None and not measured[name] <= limit  # nan is beyond every limit
    ]
    if reference.embeddings is not None and engine.embeddings is None:
        failures.append("the engine gives no embedding, the trained network does")
    return report | {"measured": measured, "passed": not failures, "failures": failures}


def score_error(reference: Predictions, engine: Predictions) -> float | None:
    """None where there is no deviation to measure by; the map error limits the score's too."""
    deviation = score_deviation(reference)
    return deviation and float(np.abs(engine.pred_scores - reference.pred_scores).max() / deviation)


def score_deviation(predictions: Predictions) -> float | None:
    """Standard deviation of the scores; None of few or equal ones."""
    deviation = float(predictions.pred_scores.std(dtype=np.float64))
    return deviation if deviation and len(predictions.pred_scores) >= FEWEST_SCORES else None


def rank_loss(reference: Predictions, engine: Predictions) -> float | None:
    """None of few scores, where a near tie would decide, and of equal ones."""
    scores = reference.pred_scores, engine.pred_scores
    if len(scores[0]) < FEWEST_RANKS or any(np.ptp(one) == 0 for one in scores):
        return None
    ours, theirs = ((rank - rank.mean()) / rank.std() for rank in map(ranks, scores))
    return float(np.mean((ours - theirs) ** 2) / 2)


def ranks(scores: np.ndarray) -> np.ndarray:
    """From 1 on; equal scores share the mean of theirs."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def product_error(reference: Predictions, engine: Predictions, space: ProductSpace | None) -> float | None:
    """None where one of both has no embeddings."""
    if space is None or reference.embeddings is None or engine.embeddings is None:
        return None
    difference = space.whitened(engine.embeddings) - space.whitened(reference.embeddings)
    return float(np.linalg.norm(difference, axis=1).max())


def verdict_flips(reference: Predictions, engine: Predictions, allowed_error: float) -> float:
    distance, other = over_threshold(reference), over_threshold(engine)
    clear = np.abs(distance) > allowed_error * reference.pred_scores.std(dtype=np.float64)
    return float(np.mean(((distance > 0) != (other > 0)) & clear))


def over_threshold(predictions: Predictions) -> np.ndarray:
    """(N,) score less threshold, with each product's threshold at its highest good score of these predictions."""
    distance = predictions.pred_scores.astype(np.float64)
    for product, calibration in calibrate_products(good_only(predictions)).items():
        distance[predictions.of(product)] -= calibration.threshold
    return distance


def good_only(predictions: Predictions) -> Predictions:
    keep = np.flatnonzero(~predictions.labels)
    images = predictions.images
    images = type(images)(images.pixels[keep], [images.samples[i] for i in keep], images.broken)
    embeddings = None if predictions.embeddings is None else predictions.embeddings[keep]
    return Predictions(images, predictions.anomaly_maps[keep], predictions.pred_scores[keep], embeddings)


def detection_loss(reference: Predictions, engine: Predictions) -> dict[str, float]:
    """What the engine detects less than the trained network; negative where it detects more.

    Each the largest over the products that have good and defective images, the latter with masks (DataError
    without). A loss by which the defects of no product are measured, all being too small for the input, is 0.
    """
    masks, labels = load_masks(reference.images.samples, *reference.anomaly_maps.shape[1:]), reference.labels
    losses = {"auroc_loss": [], "aupro_loss": []}
    for product in reference.products:
        of = reference.of(product)
        if 0 < labels[of].sum() < len(of):
            before, after = (auroc(p.pred_scores[of], labels[of]) for p in (reference, engine))
            losses["auroc_loss"].append(before - after)
            if masks[of].any():
                before, after = (aupro(p.anomaly_maps[of], masks[of]) for p in (reference, engine))
                losses["aupro_loss"].append(before - after)
    return {name: float(max(values, default=0.0)) for name, values in losses.items()}


def auroc_difference(reference: Predictions, engine: Predictions) -> float | None:
    """The largest over the products; None where no product has both good and defective images."""
    labels, differences = reference.labels, []
    for product in reference.products:
        of = reference.of(product)
        if 0 < labels[of].sum() < len(of):
            values = [auroc(p.pred_scores[of], labels[of]) for p in (reference, engine)]
            pairs = labels[of].sum() * (~labels[of]).sum()
            differences.append(max(0.0, float(abs(values[0] - values[1]) - 1 / pairs)))
    return max(differences, default=None)
