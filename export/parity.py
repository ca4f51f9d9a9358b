"""The parity gate: an exported engine against the trained network, on real images, before anything is written."""

from dataclasses import asdict, dataclass

import numpy as np

from ..evaluate import Predictions, calibrate_products
from ..metrics import auroc

FEWEST_SCORES = 8  # that have a standard deviation worth the name


@dataclass(frozen=True)
class Limits:
    """How far an engine may be from the trained network.

    map_error:        largest difference of an anomaly map's value
    score_error:      largest difference of a score, in standard deviations of all scores
    verdict_flips:    share of images with another verdict, each side with thresholds from its own scores; not
                      counting scores nearer to the threshold than the score error allowed
    auroc_difference: of the image AUROC, less one pair of a good and a defective image, which may be a near tie
    """

    map_error: float
    score_error: float
    verdict_flips: float
    auroc_difference: float


# fp32 and fp16 differ from the trained network by rounding that no verdict may show; bf16 has 8 bits, and is
# only used where it passes.
LIMITS = {
    "fp32": Limits(3e-4, 0.02, 0.0, 0.001),
    "fp16": Limits(3e-4, 0.02, 0.0, 0.001),
    "bf16": Limits(3e-3, 0.10, 0.01, 0.002),
}


def compare(reference: Predictions, engine: Predictions, precision: str) -> dict:
    """The gate's report on one engine: measured values, limits, `passed`, and `failures` in words. JSON-safe."""
    limits = asdict(LIMITS[precision])
    report = {"images": len(reference.pred_scores), "limits": limits, "measured": {}}
    for predictions, whose in ((reference, "trained network's"), (engine, "engine's")):
        if not (np.isfinite(predictions.anomaly_maps).all() and np.isfinite(predictions.pred_scores).all()):
            return report | {"passed": False, "failures": [f"the {whose} anomaly map is not finite"]}
    measured = {
        "map_error": float(np.abs(engine.anomaly_maps - reference.anomaly_maps).max()),
        "score_error": score_error(reference, engine),
        "verdict_flips": verdict_flips(reference, engine, limits["score_error"]),
        "auroc_difference": auroc_difference(reference, engine),
    }
    failures = [
        f"{name.replace('_', ' ')} is {value:.2g}, the limit is {limits[name]:.2g}"
        for name, value in measured.items()
        if value is not None and value > limits[name]
    ]
    return report | {"measured": measured, "passed": not failures, "failures": failures}


def score_error(reference: Predictions, engine: Predictions) -> float | None:
    """None where few or equal scores have no deviation to measure by; the map error limits the score's too."""
    deviation = float(reference.pred_scores.std(dtype=np.float64))
    if deviation == 0 or len(reference.pred_scores) < FEWEST_SCORES:
        return None
    return float(np.abs(engine.pred_scores - reference.pred_scores).max() / deviation)


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
    return Predictions(images, predictions.anomaly_maps[keep], predictions.pred_scores[keep])


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
