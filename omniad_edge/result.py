"""From an anomaly map to a verdict with its evidence."""

from dataclasses import asdict, dataclass, field
from math import ceil, floor

import cv2
import numpy as np

from .calibration import Calibration
from .errors import InputError

SCHEMA = 1  # of Result.to_dict
GOOD, DEFECTIVE = "good", "defective"
MAX_REGIONS = 100


@dataclass(frozen=True)
class Region:
    """One connected area above the threshold, in pixels of the frame.

    x, y, width, height: its box. area_px: its area. peak_score: its highest anomaly-map value, at peak_x, peak_y.
    """

    x: int
    y: int
    width: int
    height: int
    area_px: int
    peak_score: float
    peak_x: int
    peak_y: int


@dataclass(frozen=True)
class Result:
    """The verdict on one frame.

    pred_label:   "good" or "defective"; defective exactly if pred_score > threshold
    pred_score:   maximum of the anomaly map; raw, never clamped or rescaled
    threshold:    of `product`, in the same unit
    product:      whose threshold was used; `product_assumed` if the caller did not name it
    anomaly_map:  (H, W) float32 at the network's input size, >= 0
    pred_mask:    (H, W) bool, anomaly_map > threshold
    regions:      connected areas of the mask in frame pixels, highest peak first, at most 100
    speed_ms:     milliseconds: preprocess, engine (its share of the batch), postprocess, total
    backend, precision: what computed it
    """

    pred_label: str
    pred_score: float
    threshold: float
    product: str
    product_assumed: bool
    anomaly_map: np.ndarray = field(repr=False)
    pred_mask: np.ndarray = field(repr=False)
    regions: tuple[Region, ...]
    frame_height: int
    frame_width: int
    map_floor: float = field(repr=False)
    speed_ms: dict[str, float]
    backend: str
    precision: str

    @property
    def is_defective(self) -> bool:
        return self.pred_label == DEFECTIVE

    def to_dict(self) -> dict:
        """JSON-safe, without the arrays; `schema` changes when a field changes its meaning or goes."""
        names = ["pred_label", "pred_score", "threshold", "product", "product_assumed"]
        names += ["frame_height", "frame_width", "speed_ms", "backend", "precision"]
        return {
            "schema": SCHEMA,
            **{name: getattr(self, name) for name in names},
            "regions": [asdict(region) for region in self.regions],
        }

    def heatmap(self) -> np.ndarray:
        """(H, W) float32, 0 to 1, on a fixed scale: 0 is the map's usual level on good parts, 0.5 the threshold.

        The same value has the same colour in every image of a product, so good parts do not glow.
        """
        low = self.map_floor if self.map_floor < self.threshold else 0.0
        scale = max(2 * (self.threshold - low), np.finfo(np.float32).tiny)
        return np.clip((self.anomaly_map - np.float32(low)) / np.float32(scale), 0, 1)

    def draw(self, frame: np.ndarray) -> np.ndarray:
        """frame (H, W, 3) uint8 BGR, the one inspected -> a copy with heatmap, mask outline and verdict."""
        if getattr(frame, "shape", None) != (self.frame_height, self.frame_width, 3):
            raise InputError(
                f"draw: expected the inspected frame, ({self.frame_height}, {self.frame_width}, 3); "
                f"got {getattr(frame, 'shape', type(frame).__name__)}"
            )
        size = (self.frame_width, self.frame_height)
        heat = cv2.resize(self.heatmap(), size, interpolation=cv2.INTER_LINEAR)
        colour = cv2.applyColorMap((255 * heat).astype(np.uint8), cv2.COLORMAP_TURBO)
        weight = (0.7 * np.minimum(2 * heat, 1))[..., None]
        picture = (frame * (1 - weight) + colour * weight).astype(np.uint8)
        mask = cv2.resize(self.pred_mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        line_px = max(1, round(min(size) / 200))
        cv2.drawContours(picture, outlines, -1, (255, 255, 255), line_px)
        text = f"{self.pred_label} {self.pred_score:.4f} / {self.threshold:.4f}"
        text_scale = min(size) / 400
        place = (4 * line_px, round(18 * text_scale) + 2 * line_px)
        for ink, px in (((0, 0, 0), 4 * line_px), ((255, 255, 255), line_px)):
            cv2.putText(picture, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.6 * text_scale, ink, px, cv2.LINE_AA)
        return picture


def decide(
    anomaly_map: np.ndarray, pred_score: float, calibration: Calibration, frame_height: int, frame_width: int
) -> dict:
    """The fields of a Result that follow from the map: label, score, threshold, mask, regions.

    anomaly_map: (H, W) float32; pred_score: its maximum. Raises InputError if the score is not finite.
    """
    score, threshold = float(pred_score), calibration.threshold
    if not np.isfinite(score):
        raise InputError(f"anomaly map: expected finite values, got a score of {score}")
    # In float64, as the score: float32 would round the threshold and could call a frame defective without mask.
    pred_mask = anomaly_map > np.float64(threshold)
    return {
        "pred_label": DEFECTIVE if score > threshold else GOOD,
        "pred_score": score,
        "threshold": threshold,
        "anomaly_map": anomaly_map,
        "pred_mask": pred_mask,
        "regions": find_regions(anomaly_map, pred_mask, frame_height, frame_width),
        "frame_height": frame_height,
        "frame_width": frame_width,
        "map_floor": calibration.map_floor,
    }


def find_regions(
    anomaly_map: np.ndarray, pred_mask: np.ndarray, frame_height: int, frame_width: int
) -> tuple[Region, ...]:
    """8-connected areas of the mask, scaled to the frame, highest peak first, at most MAX_REGIONS."""
    if not pred_mask.any():
        return ()
    count, labels, stats, _ = cv2.connectedComponentsWithStats(pred_mask.astype(np.uint8), connectivity=8)
    sy, sx = frame_height / pred_mask.shape[0], frame_width / pred_mask.shape[1]
    regions = []
    for label in range(1, count):
        x, y, w, h, area = (int(v) for v in stats[label])
        inside = np.where(labels[y : y + h, x : x + w] == label, anomaly_map[y : y + h, x : x + w], -np.inf)
        row, column = np.unravel_index(inside.argmax(), inside.shape)
        left, top = floor(x * sx), floor(y * sy)
        regions.append(
            Region(
                x=left,
                y=top,
                width=min(ceil((x + w) * sx), frame_width) - left,
                height=min(ceil((y + h) * sy), frame_height) - top,
                area_px=max(1, round(area * sx * sy)),
                peak_score=float(inside[row, column]),
                peak_x=min(int((x + column + 0.5) * sx), frame_width - 1),
                peak_y=min(int((y + row + 0.5) * sy), frame_height - 1),
            )
        )
    return tuple(sorted(regions, key=lambda region: -region.peak_score)[:MAX_REGIONS])
