"""The fused engine: a bundle's own kernels on an NVIDIA GPU, as one CUDA graph. No torch, no Triton."""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import numpy as np

from . import cuda_graph, native
from .bundle import WEIGHTS, Bundle
from .cuda_graph import CudaGraphPlan
from .errors import BundleError, EngineError
from .image import FrameArray
from .kernels.pack import pack
from .kernels.plan import PDL_FROM, Kernel, Plan
from .kernels.schedule import for_batch
from .onnx_weights import read_weights
from .self_test import read_self_test

PLAN = "fused/plan.json"
BATCHES = (8, 1)  # a graph for each; other numbers of images are made of these


class FusedEngine:
    """Kernels of this network on the GPU, in fp16 with fp32 statistics and sums.

    Launched by the native runtime, which does not hold the GIL, or from Python where that was not built; `reason`
    says which. Before the first frame it computes the bundle's self-test images and compares with the trained
    network's maps and scores.
    Raises EngineError where there is no GPU that the bundle has kernels for, or if the self-test fails.
    """

    backend = "fused"
    precision = "fp16"
    embeds = True
    batches = BATCHES

    def __init__(self, bundle: Bundle, reason: str = "asked for") -> None:
        arch = device_architecture()
        if against := objection(bundle, arch):
            raise EngineError(f"backend fused: {against}")
        self_test = read_self_test(bundle)
        if absent := native.why_absent():
            self.executor = PythonExecutor(bundle, arch)
            self.reason = f"{reason}; launched from Python: {absent}"
        else:
            self.executor = native.NativeExecutor(bundle.parts, BATCHES)
            self.reason = f"{reason}; launched from C++"
        self_test.check(self)

    def run(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.run_all(pixels)[:2]

    def run_all(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        outputs = [self.executor.run(images) for images in in_batches(pixels)]
        return tuple(map(np.concatenate, zip(*outputs, strict=True)))

    def frame_size(self, frame: FrameArray) -> tuple[int, int]:
        return self.executor.frame_size(frame)

    def run_frames(self, frames: Sequence[FrameArray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[float]]:
        """Resized on the GPU. A frame may lie there: with DLPack or __cuda_array_interface__, C-contiguous."""
        *outputs, preprocess_ms = zip(*map(self.executor.run_frames, in_batches(frames)), strict=True)
        return *map(np.concatenate, outputs), list(chain(*preprocess_ms))


class PythonExecutor:
    """What `native.NativeExecutor` does, from Python: a CudaGraphPlan for each of BATCHES, made when first needed.

    Raises BundleError for parts that are not as omniad-export writes them, EngineError where the GPU cannot run
    them, MissingDependencyError without cuda-bindings.
    """

    def __init__(self, bundle: Bundle, arch: int) -> None:
        try:
            self.plan = Plan.from_dict(json.loads(bundle.parts[PLAN]))
            self.weights = pack(self.plan, read_weights(bundle.parts[WEIGHTS]))
            kernels = read_kernels(bundle, arch)
            self.kernels = [kernels[self.plan.kernel_key(launch)] for launch in self.plan.all_launches]
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise BundleError(f"fused/* is not as omniad-export writes it: {exc!r}; export again") from exc
        self.pdl = arch >= PDL_FROM
        self.lock = threading.Lock()
        self.graphs: dict[int, CudaGraphPlan] = {}

    def run(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return with_score(self.graph(len(pixels)).run({"pixels": pixels}))

    def frame_size(self, frame: FrameArray) -> tuple[int, int]:
        return self.graph(1).frame_size(frame)

    def run_frames(self, frames: Sequence[FrameArray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[float]]:
        outputs, preprocess_ms = self.graph(len(frames)).run_frames(frames)
        return *with_score(outputs), preprocess_ms

    def graph(self, batch: int) -> CudaGraphPlan:
        with self.lock:
            if batch not in self.graphs:
                self.graphs[batch] = CudaGraphPlan(
                    for_batch(self.plan, batch), self.kernels, self.weights, self.pdl
                )
            return self.graphs[batch]


def device_architecture() -> int | None:
    """Like 90 for sm_90, of the GPU that a FusedEngine takes; None if there is none."""
    return cuda_graph.device_architecture() if native.why_absent() else native.device_architecture()


def in_batches(images: Sequence) -> Iterator[Sequence]:
    """As few as can be of the sizes that there are."""
    start = 0
    while start < len(images):
        batch = next(size for size in BATCHES if size <= len(images) - start)
        yield images[start : start + batch]
        start += batch


def with_score(outputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A plan's outputs -> anomaly_map (N, H, W), pred_score (N,), embedding (N, D)."""
    return outputs["anomaly_map"], outputs["peaks"].max(1), outputs["embedding"]


def objection(bundle: Bundle, arch: int | None) -> str:
    """Why this bundle cannot run on a GPU of this architecture (None: there is none); empty if it can."""
    if arch is None:
        what = "GPU, driver or cuda-bindings" if native.why_absent() else "GPU or driver"
        return f'no NVIDIA {what} was found: see "inspect on an NVIDIA GPU" in `omniad doctor`'
    if PLAN not in bundle.parts:
        return f"the bundle has no GPU kernels; export it with --targets sm_{arch}"
    if f"fused/sm_{arch}.bin" not in bundle.parts:
        has = sorted(name[6:-4] for name in bundle.parts if name.endswith(".bin"))
        return f"the bundle has kernels for {', '.join(has)}; export it with --targets sm_{arch} too"
    return ""


def read_kernels(bundle: Bundle, arch: int) -> dict[str, Kernel]:
    code = bundle.parts[f"fused/sm_{arch}.bin"]
    index = json.loads(bundle.parts[f"fused/sm_{arch}.json"])
    return {
        key: Kernel(
            entry["name"],
            code[entry["offset"] : entry["offset"] + entry["bytes"]],
            entry["shared_bytes"],
            entry["num_warps"],
        )
        for key, entry in index["kernels"].items()
    }
