"""One case of the benchmark: a network's file and what runs it.

As a script, what it costs in a process of its own, as JSON:
    python benchmarks/cases.py FILE BACKEND PRECISION THREADS HEIGHT WIDTH
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
from process import memory_mib

from omniad_edge import Detector
from omniad_edge.engine import OnnxRuntimeEngine, OpenVinoEngine, TiledEngine

FRAME_SHAPE = (1080, 1920, 3)

Run = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Case:
    """name: "group/backend-precision"; file: a bundle, a plain export (.onnx) or a checkpoint (.safetensors)."""

    name: str
    file: Path
    backend: str
    precision: str

    @property
    def group(self) -> str:
        return self.name.split("/")[0]

    @property
    def takes_normalised(self) -> bool:
        """Its input is (N, 3, H, W) float32, normalised; else (N, H, W, 3) uint8 RGB."""
        return self.file.suffix == ".onnx"


def open_case(case: Case, threads: int) -> tuple[Run, Detector | None]:
    """What runs the case's network, of a bundle with tiles on one of them; and a bundle's Detector."""
    if case.file.suffix == ".omniad":
        detector = Detector(case.file, case.backend, case.precision, threads)
        engine = detector.engine
        return (engine.engine if isinstance(engine, TiledEngine) else engine).run, detector
    if case.backend == "torch":
        return torch_eager(case.file, threads), None
    model = case.file.read_bytes()
    if case.backend == "onnxruntime":
        return OnnxRuntimeEngine(model, threads).run, None
    return OpenVinoEngine(model, case.precision, threads).run, None


def torch_eager(checkpoint: Path, threads: int) -> Run:
    import torch

    from omniad_edge.weights import load_checkpoint

    torch.set_num_threads(threads)
    return load_checkpoint(checkpoint)[0].predict


def random_pixels(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def footprint(case: Case, threads: int, height: int, width: int) -> dict:
    """Seconds until the first image is done, then resident and peak memory of this process.

    A bundle inspects a 1920x1080 frame on top, so that its memory is that of a line at work.
    """
    shape = (1, 3, height, width) if case.takes_normalised else (1, height, width, 3)
    start = perf_counter()
    run, detector = open_case(case, threads)
    if detector is None:  # a Detector has run once already
        run(np.zeros(shape, np.float32 if case.takes_normalised else np.uint8))
    ready_s = perf_counter() - start
    if detector is not None:
        detector(random_pixels(FRAME_SHAPE))
    return {"ready_s": round(ready_s, 3), **memory_mib()}


if __name__ == "__main__":
    file, backend, precision, *numbers = sys.argv[1:]
    print(json.dumps(footprint(Case("", Path(file), backend, precision), *map(int, numbers))))
