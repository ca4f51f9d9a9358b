"""A few images in a bundle with the trained network's maps, to compare a GPU's with before its first frame."""

from dataclasses import dataclass, replace

import numpy as np

from .bundle import Bundle
from .errors import BundleError, EngineError
from .onnx_weights import read_weights

SELF_TEST = "fused/self_test.onnx"  # tensors alone, as in weights.onnx, whose readers in Python and C++ take it
# fp16 rounding of the whole network; further away something is wrong with this GPU, its driver or the kernels.
MAX_MAP_ERROR = 3e-4
MAX_SCORE_ERROR = 0.02  # in standard deviations of the scores that the parity gate saw
MAX_EMBEDDING_ERROR = 0.01  # of the embedding's largest value


@dataclass(frozen=True)
class SelfTest:
    """pixels: (n, H, W, 3) uint8 RGB; anomaly_maps, embeddings: (n, H, W), (n, D) float32, the trained network's.

    score_deviation: standard deviation of all scores that the parity gate saw; 0 where it saw too few to have one
    max_map_error, max_score_error, max_embedding_error: how far an engine may be off; the score in standard
        deviations, the embedding as a part of its largest value
    """

    pixels: np.ndarray
    anomaly_maps: np.ndarray
    embeddings: np.ndarray
    score_deviation: float
    max_map_error: float = MAX_MAP_ERROR
    max_score_error: float = MAX_SCORE_ERROR
    max_embedding_error: float = MAX_EMBEDDING_ERROR

    def check(self, engine) -> None:
        """In each of the engine's batch sizes, each of which has kernels or tactics of its own.

        Raises EngineError if what it gives of these images is not the trained network's.
        """
        count = len(self.pixels)
        for batch in engine.batches:
            for first in range(0, count, batch):
                rows = np.arange(first, first + batch) % count
                outputs = engine.run_frames(list(self.pixels[rows][..., ::-1]))[:3]  # the same size: a copy
                for index, row in enumerate(rows):
                    self.compare(engine, row, *(None if made is None else made[index] for made in outputs))

    def compare(
        self, engine, row: int, anomaly_map: np.ndarray, pred_score: np.ndarray, embedding: np.ndarray | None
    ) -> None:
        truth = self.anomaly_maps[row]
        check_error(engine, "anomaly map", float(np.abs(anomaly_map - truth).max()), self.max_map_error)
        if self.score_deviation:
            error = abs(float(pred_score) - float(truth.max())) / self.score_deviation
            check_error(engine, "score in standard deviations", error, self.max_score_error)
        if embedding is not None:
            truth = self.embeddings[row]
            error = float(np.abs(embedding - truth).max() / np.abs(truth).max())
            check_error(engine, "embedding", error, self.max_embedding_error)


def read_self_test(bundle: Bundle, graph: str = "fp16") -> SelfTest:
    """For an engine that computes this graph. A quantised one may be off twice as far as the gate found the graph
    to be: another engine adds in another order, and a value between two steps may then fall to either. For its
    embedding there is no such measure.

    Raises BundleError where the bundle has none, or not as omniad-export writes it.
    """
    if SELF_TEST not in bundle.parts:
        raise BundleError("the bundle has no self-test images for a GPU; export it again with --fp16")
    try:
        test = read_weights(bundle.parts[SELF_TEST])
        pixels = test["pixels"].astype(np.uint8)
        made = SelfTest(pixels, test["anomaly_map"], test["embedding"], float(test["score_deviation"]))
        if graph == "fp16":
            return made
        measured = bundle.manifest["parity"]["engines"][f"onnxruntime {graph}"]["measured"]
        limits = 2 * float(measured["map_error"]), 2 * float(measured["score_error"] or 0)
        return replace(made, max_map_error=limits[0], max_score_error=limits[1], max_embedding_error=np.inf)
    except (BundleError, KeyError, TypeError, ValueError) as exc:
        raise BundleError(f"{SELF_TEST} is not as omniad-export writes it: {exc!r}; export again") from exc


def check_error(engine, what: str, error: float, limit: float) -> None:
    if not error <= limit:
        raise EngineError(
            f"backend {engine.backend}: its {what} of a self-test image is {error:.2g} off, {limit:.2g} is "
            "allowed; update the driver, export again, or use backend='onnxruntime'"
        )
