"""A network ready to be measured on a GPU, and the ways to compute it: ours, torch's, ONNX Runtime's."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from networks import export_plain, normalised

from omniad_edge.anomaly_map import resample_matrix
from omniad_edge.bundle import WEIGHTS
from omniad_edge.cuda_graph import CudaGraphPlan
from omniad_edge.errors import OmniADError
from omniad_edge.export.cubins import compile_plan
from omniad_edge.export.fused_parts import kernel_parts
from omniad_edge.export.onnx_graph import weights_message
from omniad_edge.fused import BATCHES, PLAN, with_score
from omniad_edge.kernels.fold import fold, named_arrays
from omniad_edge.kernels.jit import JitPlan
from omniad_edge.kernels.network_plan import build_plan
from omniad_edge.kernels.pack import pack
from omniad_edge.kernels.schedule import for_batch
from omniad_edge.model import OmniAD, normalise
from omniad_edge.native import NativeExecutor
from omniad_edge.progress import say


class Bench:
    """A network, folded, as a plan, compiled for this GPU."""

    def __init__(self, arch: int, model: OmniAD) -> None:
        self.arch, self.model = arch, model
        self.network = fold(self.model)
        self.plan = build_plan(self.network, batch=1)
        self.weights = pack(self.plan, named_arrays(self.network))
        start = perf_counter()
        self.kernels = dict(compile_plan(self.plan, arch))
        self.compile_s = round(perf_counter() - start, 1)
        say(f"{len(self.kernels)} kernels compiled for sm_{arch} in {self.compile_s} s")

    def graph(self, batch: int, pdl: bool, weights: dict[str, np.ndarray] | None = None) -> CudaGraphPlan:
        """weights: other ones than the network's."""
        plan = for_batch(self.plan, batch)
        kernels = [self.kernels[plan.kernel_key(launch)] for launch in plan.all_launches]
        return CudaGraphPlan(plan, kernels, weights or self.weights, pdl)

    def native(self) -> NativeExecutor:
        """The same kernels and weights in the native runtime, for the fused engine's batch sizes."""
        weights = weights_message(named_arrays(self.network))
        parts = {PLAN: json.dumps(self.plan.to_dict()).encode(), WEIGHTS: weights}
        return NativeExecutor(parts | kernel_parts(self.kernels, self.arch), BATCHES)

    def pixels(self, batch: int) -> np.ndarray:
        shape = (batch, self.plan.height, self.plan.width, 3)
        return np.random.default_rng(batch).integers(0, 256, shape, dtype=np.uint8)


@dataclass(frozen=True)
class Case:
    """One way to compute a batch.

    launch: starts one pass on device memory; None for a graph of ours, which times itself
    run:    pixels (N, H, W, 3) uint8 -> map, score and what else it gives on the host
    """

    name: str
    batch: int
    launch: Callable[[], object] | None
    run: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    graph: CudaGraphPlan | None = None


def make_cases(bench: Bench, batch: int, skip_compile: bool, left_out: list[str]) -> list[Case]:
    """Ours, then torch's, then ONNX Runtime's, as far as they can be had; why not goes to left_out."""
    cases = []
    for name, make in (
        ("ours graph pdl", lambda: ours(bench, batch, pdl=True)),
        ("ours graph", lambda: ours(bench, batch, pdl=False)),
        ("ours jit", lambda: ours_jit(bench, batch)),
        ("torch eager fp16", lambda: torch_case(bench, batch, "eager")),
        ("torch eager fp16 graph", lambda: torch_case(bench, batch, "graph")),
        ("torch.compile fp16 max-autotune", lambda: torch_case(bench, batch, "compile")),
        ("onnxruntime cuda fp32, plain export", lambda: onnxruntime_case(bench, batch, "CUDA")),
        ("onnxruntime tensorrt fp16, plain export", lambda: onnxruntime_case(bench, batch, "Tensorrt")),
    ):
        if "torch.compile" in name and skip_compile:
            continue
        say(f"batch {batch}: {name}")
        try:
            launch, run, graph = make()
        except Exception as exc:  # a competitor that does not run here must not end the measurement
            if name.startswith("ours"):
                raise
            left_out.append(f"{name}, batch {batch}: {type(exc).__name__}: {str(exc)[:300]}")
            continue
        cases.append(Case(name, batch, launch, run, graph))
    return cases


def ours(bench: Bench, batch: int, pdl: bool):
    graph = bench.graph(batch, pdl)
    return None, lambda pixels: with_score(graph.run({"pixels": pixels})), graph


def ours_jit(bench: Bench, batch: int):
    jit = JitPlan(for_batch(bench.plan, batch), bench.weights, "cuda")
    return jit.launch, jit.run, None


def torch_case(bench: Bench, batch: int, mode: str):
    model = HalfPrecision(bench.model).cuda()
    pixels = torch.from_numpy(bench.pixels(batch)).cuda()
    call = torch.compile(model, mode="max-autotune", dynamic=False) if mode == "compile" else model

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            return call(pixels)

    side = torch.cuda.Stream()  # a capture needs warm-up on a stream of its own
    with torch.cuda.stream(side):
        for _ in range(3):
            made = step()
    torch.cuda.synchronize()
    launch = step
    if mode == "graph":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = step()
        launch = graph.replay

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pixels.copy_(torch.from_numpy(images))
        given = launch() or made
        return given[0].cpu().numpy(), given[1].cpu().numpy()

    return launch, run, None


class HalfPrecision(torch.nn.Module):
    """The network as torch runs it in fp16, channels last; the map in fp32."""

    def __init__(self, model: OmniAD) -> None:
        super().__init__()
        self.model = OmniAD(model.config).eval()
        self.model.load_state_dict(model.state_dict())
        self.model.half().to(memory_format=torch.channels_last)
        config = model.config
        for scale, stride in enumerate((4, 8, 16)):
            for axis, size in (("rows", config.height), ("columns", config.width)):
                matrix = torch.tensor(resample_matrix(size // stride, size), dtype=torch.float32)
                self.register_buffer(f"{axis}{scale}", matrix)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        image = normalise(pixels, self.model.neck.fuse.conv.weight).contiguous(memory_format=torch.channels_last)
        total = 0
        for scale, (t, s) in enumerate(zip(*self.model(image), strict=True)):
            distance = 1 - torch.nn.functional.cosine_similarity(t.float(), s.float(), dim=1)
            total = total + getattr(self, f"rows{scale}") @ distance @ getattr(self, f"columns{scale}").T
        return total / 9, total.amax((1, 2)) / 9


def onnxruntime_case(bench: Bench, batch: int, vendor: str):
    import onnxruntime

    provider, options = f"{vendor}ExecutionProvider", {"trt_fp16_enable": True} if vendor == "Tensorrt" else {}
    if provider not in onnxruntime.get_available_providers():
        raise OmniADError(f"this onnxruntime has no {provider}")
    model = export_plain(bench.model, "paper")
    session = onnxruntime.InferenceSession(model, providers=[(provider, options), "CPUExecutionProvider"])
    if session.get_providers()[0] != provider:  # ONNX Runtime goes on without it and only logs why
        raise OmniADError(f"{provider} does not start on this machine")
    given = normalised(bench.pixels(batch))
    return (
        lambda: session.run(None, {"pixels": given}),
        lambda pixels: session.run(None, {"pixels": normalised(pixels)}),
        None,
    )
