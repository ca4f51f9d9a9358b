"""The engine for a bundle on an NVIDIA GPU: our fused kernels or TensorRT, and where both can, the faster one."""

from collections.abc import Mapping
from importlib.util import find_spec
from statistics import median
from time import perf_counter

import numpy as np

from .bundle import Bundle
from .fused import FusedEngine
from .tensorrt_engine import Target, TensorRtEngine

WARM_UP_CALLS, MEASURED_CALLS = 5, 50

GpuEngine = FusedEngine | TensorRtEngine


def open_gpu_engine(bundle: Bundle, not_fused: str, not_tensorrt: str) -> GpuEngine:
    """The one there is no objection to: not_fused, not_tensorrt; of two the faster."""
    if not_tensorrt:
        why = f"; not TensorRT: {not_tensorrt}" if find_spec("tensorrt") else ""
        return FusedEngine(bundle, f"fused kernels in fp16: the bundle has them for this GPU{why}")
    if not_fused:
        return TensorRtEngine(bundle, f"TensorRT in fp16: its engine is there; {not_fused}")
    return open_faster(bundle)


def open_faster(bundle: Bundle) -> GpuEngine:
    """Both are measured once, then the result is kept beside the TensorRT engine's plan."""
    target, engines = Target(bundle), {}
    kernels = bundle.manifest["parts"][f"fused/sm_{target.arch}.bin"]["sha256"]
    median_ms = target.cache.speeds(kernels)
    if median_ms.keys() != {"fused", "tensorrt"}:
        engines = {backend: open_one(bundle, backend) for backend in ("fused", "tensorrt")}
        median_ms = measure(engines, (bundle.height, bundle.width))
        target.cache.keep_speeds(kernels, median_ms)
    faster = min(median_ms, key=median_ms.get)
    engine = engines.get(faster) or open_one(bundle, faster)
    engine.reason += f" ({', '.join(f'{backend} {ms:.2f} ms an image' for backend, ms in median_ms.items())})"
    return engine


def open_one(bundle: Bundle, backend: str) -> GpuEngine:
    if backend == "fused":
        return FusedEngine(bundle, "fused kernels in fp16: faster than TensorRT")
    return TensorRtEngine(bundle, "TensorRT in fp16: faster than the fused kernels")


def measure(engines: Mapping[str, GpuEngine], size: tuple[int, int]) -> dict[str, float]:
    """Median milliseconds of each for a frame of this size; in turns, so that all see the same clocks."""
    frame = np.zeros((*size, 3), np.uint8)
    spent_ms = {backend: [] for backend in engines}
    for _ in range(WARM_UP_CALLS + MEASURED_CALLS):
        for backend, engine in engines.items():
            start = perf_counter()
            engine.run_frames([frame])
            spent_ms[backend].append(1e3 * (perf_counter() - start))
    return {backend: median(values[WARM_UP_CALLS:]) for backend, values in spent_ms.items()}
