"""The TensorRT engine: a plan built on this machine, each profile of it as one CUDA graph. No torch, no Triton."""

import json
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from . import fused
from .bundle import Bundle, quantised_graph
from .cuda_driver import Context, Driver, device_architecture
from .cuda_graph import CudaGraphPlan, release
from .errors import BundleError, EngineError, ExportError, OmniADError
from .export.tensorrt_engine import (
    BATCHES,
    PLUGIN_GRAPH,
    WORKSPACE_BYTES,
    BuiltEngine,
    build_engine,
    check_batches,
    check_precision,
    network_model,
    network_parts,
)
from .image import FrameArray, check_frame
from .kernels.plan import Buffer, Kernel, Plan
from .kernels.schedule import arrange
from .plan_cache import PlanCache, StoredPlan, conditions, digest
from .preprocess import resize
from .progress import say
from .recognition import embedding_channels
from .self_test import read_self_test
from .tensorrt_library import find_plugin, import_tensorrt, load_plugin, new_log


class TensorRtEngine:
    """TensorRT on the GPU, in fp16 with fp32 where the graph says so, and int8 or fp8 where a quantised one does.

    The engine is taken from the cache, else built, which takes minutes and says why, and kept once it has computed
    the bundle's self-test images as the trained network does.

    precision: "fp16", "int8" or "fp8"
    kept: False if it could not be written to the cache; stderr said why
    batches, workspace_bytes: as for `build_engine`; None takes what the kept engine has
    target: where it is built and kept, if not where `Target` says
    Raises EngineError where it cannot be built or loaded, or if the self-test fails.
    """

    backend = "tensorrt"

    def __init__(
        self,
        bundle: Bundle,
        reason: str = "asked for",
        batches: Sequence[int] | None = None,
        workspace_bytes: int | None = None,
        precision: str = "fp16",
        target: "Target | None" = None,
    ) -> None:
        if batches is not None:
            check_batches(batches)
            batches = tuple(sorted(batches))
        self.precision = precision
        self.target = target = target or Target(bundle, precision)
        self_test = read_self_test(bundle, quantised_graph(self.backend, precision))
        self.reason = f"{reason}; {target.graph}"
        self.input_size = bundle.height, bundle.width
        self.channels = embedding_channels(bundle)
        self.embeds = self.channels > 0
        self.front, self.kernels = front_of(bundle, target.arch)
        self.lock, self.graphs = threading.Lock(), {}
        context, owned = Context(target.driver), ExitStack()
        self.finalizer = weakref.finalize(self, release, context, owned)
        built = None
        try:
            with context.entered():
                target.cache.hold(owned)
                try:
                    stored = target.stored(batches, workspace_bytes)
                    plan, self.batches = stored.plan, stored.batches
                except EngineError as exc:
                    say(f"{exc}: building one")
                    workspace_bytes = workspace_bytes or WORKSPACE_BYTES
                    self.batches = batches or BATCHES
                    built = target.build(bundle, self.batches, workspace_bytes)
                    plan = built.plan
                self.load(plan, owned)
            self_test.check(self)
        except BaseException:
            self.finalizer()
            raise
        self.kept = True
        if built is not None:  # only now that it computed what it should
            self.kept = target.keep(built, self.batches, workspace_bytes)
            target.cache.hold(owned)

    @property
    def path(self) -> Path:
        """Where the plan is kept."""
        return self.target.cache.path(".plan")

    def load(self, plan: bytes, owned: ExitStack) -> None:
        trt = self.target.trt
        if self.target.plugin:
            load_plugin(trt, self.target.plugin)
        self.log = new_log(trt)
        # Nothing else holds these, so that they are freed with `owned`, while the CUDA context is current. A list
        # drops its last first, as they need each other.
        self.loaded = [self.log, trt.Runtime(self.log)]
        owned.callback(self.loaded.clear)
        self.loaded.append(self.loaded[-1].deserialize_cuda_engine(plan))
        if self.loaded[-1] is None:
            raise self.log.failure(f"cannot load its engine; delete {self.path}")

    def run(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.run_all(pixels)[:2]

    def run_all(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        return joined([graph.run({"pixels": some}) for graph, some in self.split(pixels)])

    def frame_size(self, frame: FrameArray) -> tuple[int, int]:
        if self.front is not None:
            return self.graph(1).frame_size(frame)
        check_frame(frame)
        return frame.shape[:2]

    def run_frames(
        self, frames: Sequence[FrameArray]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, list[float]]:
        """Resized on the GPU if the bundle has that kernel for it: then a frame may lie there, as for `fused`."""
        if self.front is None:
            pixels, preprocess_ms = self.resized(frames)
            return *self.run_all(pixels), preprocess_ms
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
                plan = io_plan(batch, *self.input_size, self.front, self.channels)
                profile = self.batches.index(batch)
                self.graphs[batch] = TensorRtGraph(self, profile, plan)
            return self.graphs[batch]


class TensorRtGraph(CudaGraphPlan):
    """One profile of an engine in a CUDA graph of its own, with an execution context of its own.

    plan: inputs and outputs, and the front that resizes frames to the input if there are kernels for it
    """

    def __init__(self, engine: TensorRtEngine, profile: int, plan: Plan) -> None:
        self.trt, self.log, self.profile = engine.target.trt, engine.log, profile
        self.held = [*engine.loaded]  # and the execution context, when it is made; see `TensorRtEngine.load`
        self.bound = False
        super().__init__(plan, engine.kernels, {}, pdl=False)

    def prepare(self, owned: ExitStack, kernels: Sequence[Kernel], weights: dict) -> None:
        owned.callback(self.held.clear)  # after the graph, which uses the context's memory
        super().prepare(owned, kernels, weights)

    def launch(self, loaded: Sequence) -> None:
        if not self.bound:
            self.bind()
        if not self.held[-1].execute_async_v3(int(self.stream)):
            raise self.log.failure("cannot run the engine")

    def bind(self) -> None:
        """Makes the context, for this profile's shapes and our buffers for good: a CUDA graph keeps both."""
        # Memory for this profile alone, not for the largest.
        strategy = self.trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        self.held.append(self.held[-1].create_execution_context(strategy))
        if self.held[-1] is None:
            raise self.log.failure("cannot make an execution context")
        if not all(self.settings(self.held[-1])) or self.held[-1].infer_shapes():
            raise self.log.failure(f"does not take inputs and outputs for a batch of {self.plan.batch}")
        self.driver.call("cuStreamSynchronize", self.stream)
        self.bound = True

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

    def __init__(self, bundle: Bundle, precision: str = "fp16") -> None:
        self.trt = import_tensorrt()
        self.arch = device_architecture()
        if self.arch is None:
            raise EngineError(
                "no NVIDIA GPU, driver or cuda-bindings was found: "
                'see "inspect on an NVIDIA GPU" in `omniad doctor`'
            )
        check_precision(precision, self.arch)
        library = find_plugin()
        self.parts = network_parts(bundle, self.arch, library, precision)
        self.plugin = library if PLUGIN_GRAPH in self.parts else None
        why = why_plain(library, self.arch, precision)
        self.graph = "with our plugin" if self.plugin else f"without our plugin: {why}"
        self.driver = Driver()
        digests = [bundle.manifest["parts"][name]["sha256"] for name in self.parts]
        self.cache = PlanCache(
            digest("".join(digests).encode()),
            conditions(self.driver, self.trt.__version__, self.arch, self.plugin),
        )

    def stored(self, batches: Sequence[int] | None, workspace_bytes: int | None) -> StoredPlan:
        """Raises EngineError where there is none, or not with these settings; the message says why."""
        stored = self.cache.read()
        if batches not in (None, stored.batches):
            there, asked = (", ".join(map(str, some)) for some in (stored.batches, batches))
            raise EngineError(f"the engine built here takes {there} images at once, not {asked}")
        if workspace_bytes not in (None, stored.workspace_bytes):
            raise EngineError(f"the engine built here had a workspace of {stored.workspace_bytes} bytes")
        return stored

    def build(self, bundle: Bundle, batches: Sequence[int], workspace_bytes: int) -> BuiltEngine:
        model = network_model(bundle, self.arch, self.parts)
        return build_engine(model, batches, workspace_bytes, self.cache.timings(), plugin=self.plugin)

    def keep(self, built: BuiltEngine, batches: Sequence[int], workspace_bytes: int) -> bool:
        """False where it cannot be written: it runs all the same."""
        try:
            self.cache.keep(built.plan, batches, workspace_bytes)
            self.cache.keep_timings(built.timings)
        except OSError as exc:
            say(f"the engine is not kept and will have to be built again: {exc}; make room in {self.cache.folder}")
            return False
        return True


class ServerTarget(Target):
    """A plan for a server: always built, never put into the cache; `plan` has it once its self-test passed.

    It has one profile, for 1 to `most` images, and no plugin, as the server does not know ours.
    """

    def __init__(self, bundle: Bundle, most: int) -> None:
        super().__init__(bundle)
        self.parts, self.plugin = network_parts(bundle, self.arch, None), None
        self.most, self.plan = most, b""

    def stored(self, batches: Sequence[int] | None, workspace_bytes: int | None) -> StoredPlan:
        raise EngineError("a plan for a server is not kept")

    def build(self, bundle: Bundle, batches: Sequence[int], workspace_bytes: int) -> BuiltEngine:
        model, timings = network_model(bundle, self.arch, self.parts), self.cache.timings()
        return build_engine(model, (1, self.most), workspace_bytes, timings, one_profile=True)

    def keep(self, built: BuiltEngine, batches: Sequence[int], workspace_bytes: int) -> bool:
        self.plan = built.plan
        self.cache.keep_timings(built.timings)
        return True


def build_server_plan(bundle: Bundle, most: int) -> bytes:
    """Takes minutes; with progress on stderr. The self-test's images are computed one by one.

    Raises EngineError, MissingDependencyError or BundleError as TensorRtEngine does.
    """
    target = ServerTarget(bundle, most)
    TensorRtEngine(bundle, "for a server", batches=(1,), target=target)
    return target.plan


def why_plain(library: Path | None, arch: int, precision: str) -> str:
    if precision != "fp16":
        return "it computes in fp16"
    if library is None:
        return "there is no libomniad_plugin.so, or OMNIAD_PLUGIN=none"
    return f"the bundle has no plugin graph with kernels for sm_{arch}"


def check_machine(fp16: bool, precision: str = "fp16") -> None:
    """Raises an error where `omniad-export --engine tensorrt` could not build its engine in the end."""
    if not fp16:
        raise ExportError("--engine: TensorRT computes in fp16 here; export with --fp16 too")
    import_tensorrt()
    arch = device_architecture()
    if arch is None:
        raise EngineError(
            "--engine: an engine is built on the machine that runs it, and here is no NVIDIA GPU; export without "
            "--engine, then run on that machine: omniad build BUNDLE"
        )
    check_precision(precision, arch)


def objection(bundle: Bundle, precision: str = "fp16") -> str:
    """Why `auto` should not take TensorRT here; empty if its engine is there. Never builds one."""
    try:
        target = Target(bundle, precision)
        read_self_test(bundle, quantised_graph("tensorrt", precision))
        target.stored(None, None)
    except OmniADError as exc:
        return str(exc)
    return ""


def front_of(bundle: Bundle, arch: int) -> tuple[Plan | None, list[Kernel]]:
    """The plan whose front resizes frames, and that kernel; None where the bundle has none for this GPU."""
    if fused.objection(bundle, arch):
        return None, []
    try:
        plan = Plan.from_dict(json.loads(bundle.parts[fused.PLAN]))
        return plan, [fused.read_kernels(bundle, arch)[plan.kernel_key(plan.front)]]
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise BundleError(f"fused/* is not as omniad-export writes it: {exc!r}; export again") from exc


def io_plan(batch: int, height: int, width: int, front: Plan | None, channels: int) -> Plan:
    """What goes in and out of the engine, and the front's buffers, without launches.

    channels: of the embedding; 0 without one
    """
    buffers = {
        "pixels": Buffer((batch, height, width, 3), "uint8", "input", 0),
        "anomaly_map": Buffer((batch, height, width), "float32", "output", 0),
        "pred_score": Buffer((batch,), "float32", "output", 0),
    }
    if channels:
        buffers["embedding"] = Buffer((batch, channels), "float32", "output", 0)
    if front is None:
        return arrange(batch, height, width, buffers, ())
    (resizing,) = front.front.calls
    buffers = {name: front.buffers[name] for name in resizing.buffers} | buffers
    return arrange(batch, height, width, buffers, (), front.front)


def joined(outputs: Sequence[dict[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """anomaly_map, pred_score and, if there is one, embedding of all batches."""
    names = ("anomaly_map", "pred_score", "embedding")
    return tuple(
        np.concatenate([made[name] for made in outputs]) if name in outputs[0] else None for name in names
    )
