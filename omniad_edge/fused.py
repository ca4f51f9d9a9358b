"""The fused engine: a bundle's own kernels on an NVIDIA GPU, as one CUDA graph. No torch, no Triton."""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import numpy as np

from .bundle import WEIGHTS, Bundle
from .cuda_graph import CudaGraphPlan, device_architecture
from .errors import BundleError, EngineError
from .image import FrameArray
from .kernels.pack import pack
from .kernels.plan import Kernel, Plan
from .kernels.schedule import for_batch
from .onnx_weights import read_weights
from .self_test import read_self_test

PLAN = "fused/plan.json"
PDL_FROM = 90  # the first architecture with programmatic dependent launch
BATCHES = (8, 1)  # a graph for each; other numbers of images are made of these


class FusedEngine:
    """Kernels of this network on the GPU, in fp16 with fp32 statistics and sums.

    Before the first frame it computes the bundle's self-test images and compares with the trained network's maps
    and scores.
    Raises EngineError where there is no GPU that the bundle has kernels for, or if the self-test fails.
    """

    backend = "fused"
    precision = "fp16"

    def __init__(self, bundle: Bundle, reason: str = "asked for") -> None:
        self.reason = reason
        arch = device_architecture()
        if against := objection(bundle, arch):
            raise EngineError(f"backend fused: {against}")
        try:
            self.plan = Plan.from_dict(json.loads(bundle.parts[PLAN]))
            self.weights = pack(self.plan, read_weights(bundle.parts[WEIGHTS]))
            kernels = read_kernels(bundle, arch)
            self.kernels = [kernels[self.plan.kernel_key(launch)] for launch in self.plan.all_launches]
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise BundleError(f"fused/* is not as omniad-export writes it: {exc!r}; export again") from exc
        self_test = read_self_test(bundle)
        self.pdl = arch >= PDL_FROM
        self.lock = threading.Lock()
        self.graphs: dict[int, CudaGraphPlan] = {}
        self_test.check(self)

    def run(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return joined([graph.run({"pixels": images}) for graph, images in self.batches(pixels)])

    def frame_size(self, frame: FrameArray) -> tuple[int, int]:
        return self.graph(1).frame_size(frame)

    def run_frames(self, frames: Sequence[FrameArray]) -> tuple[np.ndarray, np.ndarray, list[float]]:
        """Resized on the GPU. A frame may lie there: with DLPack or __cuda_array_interface__, C-contiguous."""
        made = [graph.run_frames(some) for graph, some in self.batches(frames)]
        outputs, preprocess_ms = zip(*made, strict=True)
        return *joined(outputs), list(chain(*preprocess_ms))

    def batches(self, images: Sequence) -> Iterator[tuple[CudaGraphPlan, Sequence]]:
        """Each graph to run, with as many of the images as it takes."""
        start = 0
        while start < len(images):
            batch = next(size for size in BATCHES if size <= len(images) - start)
            yield self.graph(batch), images[start : start + batch]
            start += batch

    def graph(self, batch: int) -> CudaGraphPlan:
        with self.lock:
            if batch not in self.graphs:
                self.graphs[batch] = CudaGraphPlan(
                    for_batch(self.plan, batch), self.kernels, self.weights, self.pdl
                )
            return self.graphs[batch]


def objection(bundle: Bundle, arch: int | None) -> str:
    """Why this bundle cannot run on a GPU of this architecture (None: there is none); empty if it can."""
    if arch is None:
        return "no NVIDIA GPU, driver or cuda-bindings was found (omniad-edge[cuda])"
    if PLAN not in bundle.parts:
        return f"the bundle has no GPU kernels; export it with --targets sm_{arch}"
    if f"fused/sm_{arch}.bin" not in bundle.parts:
        has = sorted(name[6:-4] for name in bundle.parts if name.endswith(".bin"))
        return f"the bundle has kernels for {', '.join(has)}; export it with --targets sm_{arch} too"
    return ""


def joined(outputs: Sequence[Mapping[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """anomaly_map and pred_score of all batches."""
    anomaly_map = np.concatenate([made["anomaly_map"] for made in outputs])
    return anomaly_map, np.concatenate([made["peaks"].max(1) for made in outputs])


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
