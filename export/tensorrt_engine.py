"""A bundle's network as a TensorRT engine, built on the device that runs it. Needs neither torch nor Triton."""

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle import WEIGHTS, Bundle, quantised_graph
from ..errors import BundleError, EngineError, InputError, MissingDependencyError
from ..progress import PhaseReport, phase_display
from ..tensorrt_library import import_tensorrt, load_plugin, new_log

PLAIN_GRAPH, PLUGIN_GRAPH = "graphs/fp16.onnx", "graphs/plugin.onnx"
BATCHES = (1, 8)
WORKSPACE_BYTES = 1 << 30
MAX_BATCH = 64
FP8_ARCH = 89  # the first with it


@dataclass(frozen=True)
class BuiltEngine:
    """plan: the serialised engine; timings: TensorRT's timing cache, to hand to the next build on this device"""

    plan: bytes
    timings: bytes


def build_engine(
    model: bytes,
    batches: Sequence[int] = BATCHES,
    workspace_bytes: int = WORKSPACE_BYTES,
    timings: bytes = b"",
    plugin: Path | None = None,
    one_profile: bool = False,
) -> BuiltEngine:
    """Build for this thread's GPU, with progress on stderr; takes minutes.

    model:     ONNX whose first input is (N, H, W, 3) and which carries its precision: nothing is computed in less
               than it says, not even fp32 in TF32
    batches:   numbers of images, each with an optimisation profile of its own
    workspace_bytes: memory that a layer may take for itself, at most
    timings:   of an earlier build on this device; layers measured then are not measured again
    plugin:    library to load first, if the model has our plugins' nodes
    one_profile: instead, for any number of images up to the largest of `batches`, and best for that: for a server
               that puts together what waits and knows one profile
    Raises EngineError if TensorRT refuses, InputError for batches it cannot be built for.
    """
    check_batches(batches)
    trt = import_tensorrt()
    log = new_log(trt)
    if plugin:
        load_plugin(trt, plugin)
    builder = trt.Builder(log)
    # Ignored by TensorRT 11, which knows no other mode. Not a number: the flags' numbers are others there.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model):
        log.errors += [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise log.failure("cannot parse the model")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    config.clear_flag(trt.BuilderFlag.TF32)  # on unasked; the score is read off an fp32 product
    config.max_aux_streams = 0  # all in the one stream that is captured as a CUDA graph
    ranges = [(1, max(batches))] if one_profile else [(batch, batch) for batch in batches]
    for profile in profiles(builder, network.get_input(0), ranges):
        if config.add_optimization_profile(profile) < 0:
            raise log.failure("refuses an optimisation profile")
    cache = config.create_timing_cache(timings)
    if not config.set_timing_cache(cache, False):  # of another device or version
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    with phase_display("building the TensorRT engine") as report:
        monitor = new_monitor(trt, report)
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if plan is None:
        raise log.failure("cannot build the engine")
    return BuiltEngine(bytes(plan), bytes(cache.serialize()))


def check_device(device: str) -> None:
    if device != "gpu":
        raise InputError(
            f"device: expected gpu, got {device!r}; a DLA has no instance norm, no attention and no plugins: "
            "nearly every layer would go back to the GPU, each time with a copy"
        )


def check_precision(precision: str, arch: int) -> None:
    if precision == "fp8" and arch < FP8_ARCH:
        raise EngineError(
            f"precision fp8: this GPU is sm_{arch}; fp8 is computed from sm_{FP8_ARCH} on (Ada, Hopper, Thor), "
            "not by Jetson Orin; take int8 or fp16"
        )


def check_batches(batches: Sequence[int]) -> None:
    valid = all(type(batch) is int and 1 <= batch <= MAX_BATCH for batch in batches)
    if not valid or 1 not in batches or len(set(batches)) != len(batches):
        raise InputError(
            f"batches: expected different whole numbers from 1 to {MAX_BATCH}, 1 among them; got {list(batches)}"
        )


def profiles(builder: Any, pixels: Any, ranges: Sequence[tuple[int, int]]) -> list[Any]:
    """One for each range of batches. Where it is one batch alone, TensorRT chooses kernels for that very shape."""
    made = []
    for least, most in ranges:
        smallest, largest = ((batch, *tuple(pixels.shape)[1:]) for batch in (least, most))
        made.append(builder.create_optimization_profile())
        made[-1].set_shape(pixels.name, smallest, largest, largest)
    return made


def new_monitor(trt: Any, report: PhaseReport) -> Any:
    """A trt.IProgressMonitor that hands on to `report`. TensorRT calls it from several threads."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()
            self.lock, self.steps, self.interrupted = threading.Lock(), {}, False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            self.tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """False ends the build."""
            if step + 1 < self.steps.get(phase_name, 0):
                self.tell(phase_name, step + 1)
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            self.tell(phase_name, self.steps.get(phase_name, 0))

        def tell(self, phase: str, done: int) -> None:
            try:
                with self.lock:
                    report(phase, done, self.steps.get(phase, 0))
            except KeyboardInterrupt:  # Ctrl-C arrives here: while TensorRT builds no other Python runs
                self.interrupted = True

    return Monitor()


# What of a bundle an engine is built from


def network_parts(bundle: Bundle, arch: int, plugin: Path | None, precision: str = "fp16") -> tuple[str, ...]:
    """Names of the parts: with the plugin those of its graph and kernels, if the bundle has them for this GPU.

    Raises BundleError if it has no graph in this precision.
    """
    if precision != "fp16":
        graph = f"graphs/{quantised_graph('tensorrt', precision)}.onnx"
        if graph not in bundle.parts:
            raise BundleError(
                f"the bundle has no {precision} graph for TensorRT; export it with --fp16 --{precision}"
            )
        return graph, WEIGHTS
    with_plugin = (PLUGIN_GRAPH, WEIGHTS, f"fused/sm_{arch}.bin", f"fused/sm_{arch}.json")
    if plugin and all(name in bundle.parts for name in with_plugin):
        return with_plugin
    if PLAIN_GRAPH not in bundle.parts:
        raise BundleError("the bundle has no fp16 graph for TensorRT; export it with --fp16")
    return PLAIN_GRAPH, WEIGHTS


def network_model(bundle: Bundle, arch: int, parts: Sequence[str]) -> bytes:
    """The ONNX model of these parts; with the plugin the nodes hold its kernels for this GPU.

    The functions that stand for the nodes elsewhere are left out: up to TensorRT 10.6 they win over a plugin.
    """
    if parts[0] != PLUGIN_GRAPH:
        return bundle.onnx(parts[0].removeprefix("graphs/").removesuffix(".onnx"))
    try:
        import onnx
    except ImportError as exc:
        raise MissingDependencyError("onnx", "tensorrt") from exc
    from .plugin_graph import with_kernels, without_functions

    try:
        index = json.loads(bundle.parts[f"fused/sm_{arch}.json"])["kernels"]
        model = onnx.load_model_from_string(bundle.onnx("plugin"))
        model = with_kernels(model, f"sm_{arch}", index, bundle.parts[f"fused/sm_{arch}.bin"])
        return without_functions(model).SerializeToString()
    except (KeyError, TypeError, ValueError) as exc:
        raise EngineError(f"{PLUGIN_GRAPH} is not as omniad-export writes it: {exc!r}; export again") from exc
