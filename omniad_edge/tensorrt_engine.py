"""The TensorRT engine: a plan built on this machine, each profile of it as one CUDA graph. No torch, no Triton."""

import json
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from . import fused
from .bundle import Bundle
from .cuda_driver import Context, Driver
from .cuda_graph import CudaGraphPlan, release
from .errors import BundleError, EngineError, ExportError, OmniADError
from .export.tensorrt_engine import (
    BATCHES,
    PLUGIN_GRAPH,
    WORKSPACE_BYTES,
    BuiltEngine,
    build_engine,
    check_batches,
    network_model,
    network_parts,
)
from .image import FrameArray, check_frame
from .kernels.plan import Buffer, Kernel, Plan
from .kernels.schedule import arrange
from .plan_cache import PlanCache, StoredPlan, conditions, digest
from .preprocess import resize
from .progress import say
from .self_test import read_self_test
from .tensorrt_library import find_plugin, import_tensorrt, load_plugin, new_log

WARM_UP_CALLS, MEASURED_CALLS = 5, 50


class TensorRtEngine:
    """TensorRT on the GPU, in fp16 with fp32 where the graph says so.

    The engine is taken from the cache, else built, which takes minutes and says why, and kept once it has computed
    the bundle's self-test images as the trained network does.

    batches, workspace_bytes: as for `build_engine`; None takes what the kept engine has
    Raises EngineError where it cannot be built or loaded, or if the self-test fails.
    """

    backend = "tensorrt"
    precision = "fp16"

    def __init__(
        self,
        bundle: Bundle,
        reason: str = "asked for",
        batches: Sequence[int] | None = None,
        workspace_bytes: int | None = None,
    ) -> None:
        if batches is not None:
            check_batches(batches)
        self_test = read_self_test(bundle)
        self.target = target = Target(bundle)
        self.reason = f"{reason}; {target.graph}"
        self.input_size = bundle.height, bundle.width
        self.front, self.kernels = front_of(bundle, target.arch)
        self.lock, self.graphs = threading.Lock(), {}
        context, owned = Context(target.driver), ExitStack()
        self.finalizer = weakref.finalize(self, release, context, owned)
        built = None
        try:
            with context.entered():
                try:
                    stored = target.stored(batches, workspace_bytes)
                    plan, self.batches = stored.plan, stored.batches
                except EngineError as exc:
                    say(f"{exc}: building one")
                    workspace_bytes = workspace_bytes or WORKSPACE_BYTES
                    self.batches = tuple(batches or BATCHES)
                    built = target.build(bundle, self.batches, workspace_bytes)
                    plan = built.plan
                self.load(plan, owned)
            self_test.check(self)
        except BaseException:
            self.finalizer()
            raise
        if built is not None:  # kept only now that it computed what it should
            target.keep(built, self.batches, workspace_bytes)

    @property
    def path(self) -> Path:
        """Where the plan is kept."""
        return self.target.cache.path(".plan")

    def load(self, plan: bytes, owned: ExitStack) -> None:
        trt = self.target.trt
        if self.target.plugin:
            load_plugin(trt, self.target.plugin)
        self.log = new_log(trt)
        self.loaded = [
            trt.Runtime(self.log).deserialize_cuda_engine(plan)
        ]  # nothing else holds it: freed with `owned`
        owned.callback(self.loaded.clear)
        if self.loaded[0] is None:
            raise self.log.failure(f"cannot load its engine; delete {self.path}")

    def run(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return joined([graph.run({"pixels": some}) for graph, some in self.split(pixels)])

    def frame_size(self, frame: FrameArray) -> tuple[int, int]:
        if self.front is not None:
            return self.graph(1).frame_size(frame)
        check_frame(frame)
        return frame.shape[:2]

    def run_frames(self, frames: Sequence[FrameArray]) -> tuple[np.ndarray, np.ndarray, list[float]]:
        """Resized on the GPU if the bundle has that kernel for it: then a frame may lie there, as for `fused`."""
        if self.front is None:
            pixels, preprocess_ms = self.resized(frames)
            return *self.run(pixels), preprocess_ms
        made, preprocess_ms = [], []
        for graph, some in self.split(frames):
            outputs, milliseconds = graph.run_frames(some)
            made.append(outputs)
            preprocess_ms += milliseconds
        return *joined(made), preprocess_ms

    def resized(self, frames: Sequence[np.ndarray]) -> tuple[np.ndarray, list[float]]:
        pixels, preprocess_ms = np.empty((len(frames), *self.input_size, 3), np.uint8), []
        for index, frame in enumerate(frames):
            start = perf_counter()
            pixels[index] = resize(frame, *self.input_size)
            preprocess_ms.append(1e3 * (perf_counter() - start))
        return pixels, preprocess_ms

    def split(self, images: Sequence) -> Iterator[tuple["TensorRtGraph", Sequence]]:
        """Each graph to run, with as many of the images as its profile takes."""
        start = 0
        while start < len(images):
            batch = max(size for size in self.batches if size <= len(images) - start)
            yield self.graph(batch), images[start : start + batch]
            start += batch

    def graph(self, batch: int) -> "TensorRtGraph":
        with self.lock:
            if batch not in self.graphs:
                plan = io_plan(batch, *self.input_size, self.front)
                profile = self.batches.index(batch)
                self.graphs[batch] = TensorRtGraph(self, profile, plan)
            return self.graphs[batch]


class TensorRtGraph(CudaGraphPlan):
    """One profile of an engine in a CUDA graph of its own, with an execution context of its own.

    plan: inputs and outputs, and the front that resizes frames to the input if there are kernels for it
    """

    def __init__(self, engine: TensorRtEngine, profile: int, plan: Plan) -> None:
        self.trt, self.loaded, self.log = engine.target.trt, engine.loaded, engine.log
        self.profile = profile
        self.execution: list[Any] = []  # the context; nothing else holds it: freed while CUDA's is current
        super().__init__(plan, engine.kernels, {}, pdl=False)

    def prepare(self, owned: ExitStack, kernels: Sequence[Kernel], weights: dict) -> None:
        owned.callback(self.execution.clear)  # after the graph, which uses its memory
        super().prepare(owned, kernels, weights)

    def launch(self, loaded: Sequence) -> None:
        if not self.execution:
            self.bind()
        if not self.execution[0].execute_async_v3(int(self.stream)):
            raise self.log.failure("cannot run the engine")

    def bind(self) -> None:
        """Makes the context, for this profile's shapes and our buffers for good: a CUDA graph keeps both."""
        # Memory for this profile alone, not for the largest.
        strategy = self.trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        self.execution.append(self.loaded[0].create_execution_context(strategy))
        if self.execution[0] is None:
            raise self.log.failure("cannot make an execution context")
        if not all(self.settings(self.execution[0])) or self.execution[0].infer_shapes():
            raise self.log.failure(f"does not take inputs and outputs for a batch of {self.plan.batch}")
        self.driver.call("cuStreamSynchronize", self.stream)

    def settings(self, context: Any) -> Iterator[bool]:
        """Whether each was taken."""
        yield context.set_optimization_profile_async(self.profile, int(self.stream))
        for name, buffer in self.inputs.items():
            yield context.set_input_shape(name, buffer.shape)
        for name in (*self.inputs, *self.outputs):
            yield context.set_tensor_address(name, int(self.address(name)))


class Target:
    """This machine for a bundle's engine: its GPU, its TensorRT, our plugin, the place in the cache.

    graph: which graph the engine is of, in words
    Raises EngineError, MissingDependencyError or BundleError where there can be no engine.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.trt = import_tensorrt()
        self.arch = fused.device_architecture()
        if self.arch is None:
            raise EngineError("no NVIDIA GPU, driver or cuda-bindings was found (omniad-edge[tensorrt])")
        library = find_plugin()
        self.parts = network_parts(bundle, self.arch, library)
        self.plugin = library if PLUGIN_GRAPH in self.parts else None
        self.graph = "with our plugin" if self.plugin else f"without our plugin: {why_plain(library, self.arch)}"
        self.driver = Driver()
        digests = [bundle.manifest["parts"][name]["sha256"] for name in self.parts]
        self.cache = PlanCache(
            digest("".join(digests).encode()),
            conditions(self.driver, self.trt.__version__, self.arch, self.plugin),
        )

    def stored(self, batches: Sequence[int] | None, workspace_bytes: int | None) -> StoredPlan:
        """Raises EngineError where there is none, or not with these settings; the message says why."""
        stored = self.cache.read()
        if batches is not None and tuple(batches) != stored.batches:
            there, asked = (", ".join(map(str, some)) for some in (stored.batches, batches))
            raise EngineError(f"the engine built here takes {there} images at once, not {asked}")
        if workspace_bytes not in (None, stored.workspace_bytes):
            raise EngineError(f"the engine built here had a workspace of {stored.workspace_bytes} bytes")
        return stored

    def build(self, bundle: Bundle, batches: Sequence[int], workspace_bytes: int) -> BuiltEngine:
        model = network_model(bundle, self.arch, self.parts)
        return build_engine(model, batches, workspace_bytes, self.cache.timings(), plugin=self.plugin)

    def keep(self, built: BuiltEngine, batches: Sequence[int], workspace_bytes: int) -> None:
        self.cache.keep(built.plan, batches, workspace_bytes)
        self.cache.keep_timings(built.timings)


def why_plain(library: Path | None, arch: int) -> str:
    if library is None:
        return "there is no libomniad_plugin.so, or OMNIAD_PLUGIN=none"
    return f"the bundle has no plugin graph with kernels for sm_{arch}"


def check_machine(fp16: bool) -> None:
    """Raises an error where `omniad-export --engine tensorrt` could not build its engine in the end."""
    if not fp16:
        raise ExportError("--engine: TensorRT computes in fp16 here; export with --fp16 too")
    import_tensorrt()
    if fused.device_architecture() is None:
        raise EngineError(
            "--engine: an engine is built on the machine that runs it, and here is no NVIDIA GPU; export without "
            "--engine, then run on that machine: omniad build BUNDLE"
        )


def objection(bundle: Bundle) -> str:
    """Why `auto` should not take TensorRT here; empty if its engine is there. Never builds one."""
    try:
        read_self_test(bundle)
        Target(bundle).stored(None, None)
    except OmniADError as exc:
        return str(exc)
    return ""


def open_faster(bundle: Bundle) -> "fused.FusedEngine | TensorRtEngine":
    """The fused engine or TensorRT's, both of which can run here; measured once, then remembered in the cache."""
    target, engines = Target(bundle), {}
    rivals = f"fused {bundle.manifest['parts'][f'fused/sm_{target.arch}.bin']['sha256']}"
    median_ms = target.cache.speeds(rivals)
    if median_ms.keys() != {"fused", "tensorrt"}:
        engines = {backend: open_one(bundle, backend) for backend in ("fused", "tensorrt")}
        median_ms = measure(engines)
        target.cache.keep_speeds(rivals, median_ms)
    faster = min(median_ms, key=median_ms.get)
    engine = engines.get(faster) or open_one(bundle, faster)
    engine.reason += f" ({', '.join(f'{backend} {ms:.2f} ms an image' for backend, ms in median_ms.items())})"
    return engine


def open_one(bundle: Bundle, backend: str) -> "fused.FusedEngine | TensorRtEngine":
    if backend == "fused":
        return fused.FusedEngine(bundle, "fused kernels in fp16: faster than TensorRT")
    return TensorRtEngine(bundle, "TensorRT in fp16: faster than the fused kernels")


def measure(engines: dict[str, Any]) -> dict[str, float]:
    """Median milliseconds of each, for one frame of the network's size; in turns, so that clocks are the same."""
    frame = np.zeros((*engines["tensorrt"].input_size, 3), np.uint8)
    spent_ms = {backend: [] for backend in engines}
    for _ in range(WARM_UP_CALLS + MEASURED_CALLS):
        for backend, engine in engines.items():
            start = perf_counter()
            engine.run_frames([frame])
            spent_ms[backend].append(1e3 * (perf_counter() - start))
    return {backend: median(values[WARM_UP_CALLS:]) for backend, values in spent_ms.items()}


def front_of(bundle: Bundle, arch: int) -> tuple[Plan | None, list[Kernel]]:
    """The plan whose front resizes frames, and that kernel; None where the bundle has none for this GPU."""
    if fused.objection(bundle, arch):
        return None, []
    try:
        plan = Plan.from_dict(json.loads(bundle.parts[fused.PLAN]))
        return plan, [fused.read_kernels(bundle, arch)[plan.kernel_key(plan.front)]]
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise BundleError(f"fused/* is not as omniad-export writes it: {exc!r}; export again") from exc


def io_plan(batch: int, height: int, width: int, front: Plan | None) -> Plan:
    """What goes in and out of the engine, and the front's buffers, without launches."""
    buffers = {
        "pixels": Buffer((batch, height, width, 3), "uint8", "input", 0),
        "anomaly_map": Buffer((batch, height, width), "float32", "output", 0),
        "pred_score": Buffer((batch,), "float32", "output", 0),
    }
    if front is None:
        return arrange(batch, height, width, buffers, ())
    (resizing,) = front.front.calls
    buffers = {name: front.buffers[name] for name in resizing.buffers} | buffers
    return arrange(batch, height, width, buffers, (), front.front)


def joined(outputs: Sequence[dict[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """anomaly_map and pred_score of all batches."""
    return tuple(np.concatenate([made[name] for made in outputs]) for name in ("anomaly_map", "pred_score"))
