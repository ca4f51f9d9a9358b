"""Scores of many images: for evaluation, for calibration and for the export's parity gate."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .calibration import Calibration, calibrate
from .data import Images, load_masks
from .errors import CalibrationError
from .metrics import ProductMetrics, evaluate_maps

# pixels (N, H, W, 3) uint8 RGB -> anomaly_map (N, H, W) and pred_score (N,), float32
Predict = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Predictions:
    """anomaly_maps (N, H, W) and pred_scores (N,), float32, of `images`."""

    images: Images
    anomaly_maps: np.ndarray
    pred_scores: np.ndarray

    def of(self, product: str) -> np.ndarray:
        """Indices of a product's images."""
        return np.flatnonzero([sample.product == product for sample in self.images.samples])

    @property
    def products(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(sample.product for sample in self.images.samples))

    @property
    def labels(self) -> np.ndarray:
        """(N,) bool, True for defective."""
        return np.array([not sample.is_good for sample in self.images.samples], dtype=bool)


def predict_images(
    predict: Predict, images: Images, batch: int = 8, progress: Callable[[int], None] | None = None
) -> Predictions:
    """Run `predict` over all images; progress is called with the number done."""
    count, height, width, _ = images.pixels.shape
    anomaly_maps, pred_scores = np.empty((count, height, width), np.float32), np.empty(count, np.float32)
    for start in range(0, count, batch):
        part = slice(start, start + batch)
        anomaly_maps[part], pred_scores[part] = predict(images.pixels[part])
        if progress:
            progress(min(start + batch, count))
    return Predictions(images, anomaly_maps, pred_scores)


def evaluate(predictions: Predictions) -> list[ProductMetrics]:
    """The seven metrics per product. Raises DataError if a defective image has no mask."""
    masks = load_masks(predictions.images.samples, *predictions.images.pixels.shape[1:3])
    metrics = []
    for product in predictions.products:
        of = predictions.of(product)
        metrics.append(
            evaluate_maps(
                product,
                predictions.anomaly_maps[of],
                masks[of],
                predictions.pred_scores[of],
                predictions.labels[of],
            )
        )
    return metrics


def calibrate_products(
    predictions: Predictions, max_false_reject: float | None = None, confidence: float = 0.95
) -> dict[str, Calibration]:
    """A calibration per product from predictions of good images.

    The map's floor is the median pixel of the product's good maps. Raises CalibrationError naming every
    product whose images cannot support the wish.
    """
    calibrations, refused = {}, []
    for product in predictions.products:
        of = predictions.of(product)
        floor = float(np.median(predictions.anomaly_maps[of]))
        try:
            calibrations[product] = calibrate(
                predictions.pred_scores[of], floor, max_false_reject, confidence, product
            )
        except CalibrationError as exc:
            refused.append(str(exc))
    if refused:
        raise CalibrationError("\n".join(refused))
    return calibrations
