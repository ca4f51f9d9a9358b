"""From an anomaly map to a verdict with its evidence."""

from dataclasses import asdict, dataclass, field

import cv2
import numpy as np

from .calibration import Calibration
from .errors import EngineError, InputError
from .frame import Frame
from .image import check_frame

SCHEMA = 2  # of Result.to_dict; since 2 pred_label may say that the frame does not show the product
GOOD, DEFECTIVE = "good", "defective"
UNKNOWN_PRODUCT, WRONG_PRODUCT = "unknown product", "wrong product"
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


@dataclass(frozen=True, eq=False)  # arrays have no one truth value; two results are equal if they are the same
class Result:
    """The verdict on one frame.

    pred_label:   "good" or "defective", by pred_score > threshold, of a frame that shows `product`; else "unknown
                  product" where it shows none of the bundle's, "wrong product" where another than was named
    pred_score:   maximum of the anomaly map; raw, never clamped or rescaled
    threshold:    of `product`, in the same unit
    product:      whose threshold was used; `product_assumed` if the caller did not name it, nor was it recognised
    product_shown: the product that was recognised, "" where none of the bundle's fits; None: not looked at
    product_distance: from `product`, or unless the caller named it from the nearest one; above 1 it does not fit
    anomaly_map:  (H, W) float32, >= 0, of the size that a frame is resized to
    pred_mask:    (H, W) bool, anomaly_map > threshold
    regions:      connected areas of the mask in frame pixels, highest peak first, at most 100
    speed_ms:     milliseconds: preprocess, engine (its share of the batch), postprocess, total; with the fused
                  backend preprocess is to hand the frame to the GPU, where engine includes resizing it
    backend, precision: what computed it
    frame:        the frame, where `Detector.stream` read it; else None
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
    frame: Frame | None = field(default=None, repr=False)
    product_shown: str | None = None
    product_distance: float | None = None

    @property
    def is_defective(self) -> bool:
        return self.pred_label == DEFECTIVE

    @property
    def product_fault(self) -> str:
        """In words, that the frame does not show the product it should; "" if it does or was not looked at."""
        if self.pred_label == WRONG_PRODUCT:
            return f"wrong product: shows {self.product_shown}, expected {self.product}"
        return UNKNOWN_PRODUCT if self.pred_label == UNKNOWN_PRODUCT else ""

    def to_dict(self) -> dict:
        """JSON-safe, without the arrays; `schema` changes when a field changes its meaning or goes."""
        names = ["pred_label", "pred_score", "threshold", "product", "product_assumed"]
        names += ["product_shown", "product_distance"]
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
        scale = max(2 * (self.threshold - low), float(np.finfo(np.float32).smallest_subnormal))
        # In float64, where a value at the threshold gives 0.5 exactly.
        return np.clip((self.anomaly_map.astype(np.float64) - low) / scale, 0, 1).astype(np.float32)

    def draw(self, frame: np.ndarray) -> np.ndarray:
        """frame (H, W, 3) uint8 BGR, the one inspected -> a copy with heatmap, mask outline and verdict."""
        check_frame(frame)
        if frame.shape[:2] != (self.frame_height, self.frame_width):
            raise InputError(
                f"draw: expected the inspected frame, ({self.frame_height}, {self.frame_width}, 3); "
                f"got {frame.shape}"
            )
        size = (self.frame_width, self.frame_height)
        heat = cv2.resize(self.heatmap(), size, interpolation=cv2.INTER_LINEAR)
        colour = cv2.applyColorMap((255 * heat).astype(np.uint8), cv2.COLORMAP_TURBO)
        weight = 0.7 * np.minimum(2 * heat, 1)
        picture = cv2.blendLinear(frame, colour, 1 - weight, weight)
        mask = cv2.resize(self.pred_mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        line_px = max(1, round(min(size) / 200))
        cv2.drawContours(picture, outlines, -1, (255, 255, 255), line_px)
        text = f"{self.pred_label} {self.pred_score:.4f} / {self.threshold:.4f}"
        font, scale = cv2.FONT_HERSHEY_SIMPLEX, 0.6 * min(size) / 400
        (text_width, text_height), below = cv2.getTextSize(text, font, scale, line_px)
        corner = (text_width + 4 * line_px, text_height + below + 4 * line_px)
        cv2.rectangle(picture, (0, 0), corner, (0, 0, 0), cv2.FILLED)
        place = (2 * line_px, text_height + 2 * line_px)
        cv2.putText(picture, text, place, font, scale, (255, 255, 255), line_px, cv2.LINE_AA)
        return picture


def decide(
    anomaly_map: np.ndarray, pred_score: float, calibration: Calibration, frame_height: int, frame_width: int
) -> dict:
    """The fields of a Result that follow from the map: label, score, threshold, mask, regions.

    anomaly_map: (H, W) float32; pred_score: its maximum. Raises EngineError if a value is not finite.
    """
    score, threshold = float(pred_score), calibration.threshold
    # The map too: an engine's maximum may pass over NaN, and such a frame must not come out as good.
    if not (np.isfinite(score) and np.isfinite(anomaly_map).all()):
        raise EngineError(
            f"anomaly map: expected finite values; got {np.count_nonzero(~np.isfinite(anomaly_map))} others and "
            f"a score of {score}; the model or its engine is broken: export again, or try another precision"
        )
    # In float64, as the score: float32 would round the threshold and could call a frame defective without mask.
    # Cast by hand, as NumPy 1 would compare an array with a number in the array's precision.
    pred_mask = anomaly_map.astype(np.float64) > threshold
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
    peaks = np.full(count, -np.inf, np.float32)
    np.maximum.at(peaks, labels[pred_mask], anomaly_map[pred_mask])
    map_height, map_width = pred_mask.shape
    regions = []
    for label in 1 + np.argsort(-peaks[1:], kind="stable")[:MAX_REGIONS]:
        x, y, w, h, area = (int(v) for v in stats[label])
        inside = np.where(labels[y : y + h, x : x + w] == label, anomaly_map[y : y + h, x : x + w], -np.inf)
        row, column = divmod(int(inside.argmax()), w)
        # Whole numbers: x * (frame_width / map_width) may end an ulp beside a whole pixel.
        left, top = x * frame_width // map_width, y * frame_height // map_height
        right, bottom = -(-(x + w) * frame_width // map_width), -(-(y + h) * frame_height // map_height)
        regions.append(
            Region(
                x=left,
                y=top,
                width=right - left,
                height=bottom - top,
                area_px=max(1, round(area * frame_width * frame_height / (map_width * map_height))),
                peak_score=float(inside[row, column]),
                peak_x=(2 * (x + column) + 1) * frame_width // (2 * map_width),
                peak_y=(2 * (y + row) + 1) * frame_height // (2 * map_height),
            )
        )
    return tuple(regions)
