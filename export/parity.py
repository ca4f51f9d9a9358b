"""The parity gate: an exported engine against the trained network, on real images, before anything is written."""

from dataclasses import asdict, dataclass

import numpy as np

from ..evaluate import Predictions, calibrate_products
from ..metrics import auroc


@dataclass(frozen=True)
class Limits:
    """How far an engine may be from the trained network.

    map_error:        largest difference of an anomaly map's value
    score_error:      largest difference of a score, in standard deviations of all scores, where they differ
    verdict_flips:    share of images with another verdict, each side with thresholds from its own scores
    auroc_difference: of the image AUROC, where there are good and defective images
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
        "verdict_flips": float(np.mean(verdicts(engine) != verdicts(reference))),
        "auroc_difference": auroc_difference(reference, engine),
    }
    failures = [
        f"{name.replace('_', ' ')} is {value:.2g}, the limit is {limits[name]:.2g}"
        for name, value in measured.items()
        if value is not None and value > limits[name]
    ]
    return report | {"measured": measured, "passed": not failures, "failures": failures}


def score_error(reference: Predictions, engine: Predictions) -> float | None:
    """None where all scores are equal, as those of a single image: they have no deviation to measure by."""
    deviation = float(reference.pred_scores.std(dtype=np.float64))
    if deviation == 0:
        return None
    return float(np.abs(engine.pred_scores - reference.pred_scores).max() / deviation)


def verdicts(predictions: Predictions) -> np.ndarray:
    """(N,) bool, with each product's threshold at its highest good score of these predictions."""
    defective = np.zeros(len(predictions.pred_scores), bool)
    thresholds = calibrate_products(good_only(predictions))
    for product, calibration in thresholds.items():
        of = predictions.of(product)
        defective[of] = predictions.pred_scores[of].astype(np.float64) > calibration.threshold
    return defective


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
            differences.append(abs(values[0] - values[1]))
    return max(differences, default=None)
