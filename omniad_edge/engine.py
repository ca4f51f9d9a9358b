"""Engines: a bundle's graph in, `run(pixels) -> anomaly_map, pred_score` out. Vendor errors end here."""

import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from time import perf_counter
from typing import Protocol

import numpy as np

from . import fused, tensorrt_engine
from .bundle import Bundle
from .errors import EngineError, InputError, MissingDependencyError
from .gpu_choice import open_gpu_engine
from .image import FrameArray, check_frame
from .preprocess import resize
from .tiles import Tiling

BACKENDS = ("fused", "tensorrt", "onnxruntime", "openvino")
PRECISIONS = ("fp16", "fp32", "bf16", "int8", "fp8")
OUTPUTS = ("anomaly_map", "pred_score", "embedding")  # of the graph; older bundles' have no embedding
DISTANCES = ("distance_0", "distance_1", "distance_2")  # tensors of the graph: 1 - cosine of each scale

Outputs = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # as OUTPUTS
FrameOutputs = tuple[np.ndarray, np.ndarray, np.ndarray | None, list[float]]  # and milliseconds of each frame


class Engine(Protocol):
    """What runs the network. Safe to call from several threads at once.

    backend, precision: what computes, and in which arithmetic
    reason: why this engine was chosen, in words
    embeds: whether `run_all` gives embeddings
    """

    backend: str
    precision: str
    reason: str
    embeds: bool

    def run(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """pixels (N, H, W, 3) uint8 RGB -> anomaly_map (N, H, W) and pred_score (N,), float32."""

    def run_all(self, pixels: np.ndarray) -> Outputs:
        """And the embedding (N, D), float32, that products are recognised by; None where there is none."""

    def frame_size(self, frame: FrameArray) -> tuple[int, int]:
        """Rows and columns of a frame that this engine takes. Raises InputError for anything else."""

    def run_frames(self, frames: Sequence[FrameArray]) -> FrameOutputs:
        """Frames (rows, columns, 3) uint8 BGR, each of any size -> what `run_all` gives of them resized.

        And how many milliseconds the host took to prepare each. Raises InputError as `frame_size` does.
        """


class CpuEngine(ABC):
    """Takes frames of NumPy and resizes them on the CPU.

    threads: of one call. None lets it use every core; then calls take turns, as two at once would both be late.
    """

    embeds = False

    def __init__(self, threads: int | None) -> None:
        self.turn = threading.Lock() if threads is None else nullcontext()

    @property
    @abstractmethod
    def input_size(self) -> tuple[int, int]:
        """Height and width of the network's input."""

    @abstractmethod
    def run(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...

    def run_all(self, pixels: np.ndarray) -> Outputs:
        return *self.run(pixels), None

    def frame_size(self, frame: FrameArray) -> tuple[int, int]:
        check_frame(frame)
        return frame.shape[:2]

    def run_frames(self, frames: Sequence[FrameArray]) -> FrameOutputs:
        pixels, preprocess_ms = np.empty((len(frames), *self.input_size, 3), np.uint8), []
        for index, frame in enumerate(frames):
            start = perf_counter()
            pixels[index] = resize(frame, *self.input_size)
            preprocess_ms.append(1e3 * (perf_counter() - start))
        with self.turn:
            outputs = self.run_all(pixels)
        return *outputs, preprocess_ms


class OnnxRuntimeEngine(CpuEngine):
    """ONNX Runtime on the CPU, in fp32 whatever precision the weights are stored in, or in a model's int8.

    as_written: computes every node by itself, for a model that is to run elsewhere. Where a quantised model has
                scales in fp16, ONNX Runtime 1.32 else rounds biases too, in steps that fp16 cannot hold
    """

    backend = "onnxruntime"

    def __init__(
        self,
        model: bytes,
        threads: int | None = None,
        reason: str = "asked for",
        precision: str = "fp32",
        as_written: bool = False,
    ) -> None:
        import onnxruntime

        super().__init__(threads)
        self.precision, self.reason = precision, reason
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        if as_written:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as exc:  # its exceptions share no base class
            raise EngineError(f"ONNX Runtime {onnxruntime.__version__} cannot load the model: {exc}") from exc
        there = {output.name for output in self.session.get_outputs()}
        self.outputs = [name for name in OUTPUTS if name in there]
        self.embeds = "embedding" in there

    @property
    def input_size(self) -> tuple[int, int]:
        _, height, width, _ = self.session.get_inputs()[0].shape
        return height, width

    def run(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.run_all(pixels)[:2]

    def run_all(self, pixels: np.ndarray) -> Outputs:
        """Image by image, as its sums in a batch differ in the last bit, and a threshold is one image's score."""
        try:
            outputs = [self.session.run(self.outputs, {"pixels": image[None]}) for image in pixels]
        except Exception as exc:
            raise EngineError(f"ONNX Runtime failed on pixels {pixels.shape}: {exc}") from exc
        return with_embedding([np.concatenate(of_all) for of_all in zip(*outputs, strict=True)])


class OpenVinoEngine(CpuEngine):
    """OpenVINO on the CPU. It would compute in bf16 unasked where a CPU has it; here precision is explicit.

    precision: "fp32"; "bf16"; or "int8", of a model that says what to quantise, whose rest is in fp32

    In bf16 the tail from the distance maps on is a model of its own in fp32: in bf16 the scores are off by five
    times as much, and it takes under a hundredth of the time.
    """

    backend = "openvino"

    def __init__(
        self, model: bytes, precision: str = "fp32", threads: int | None = None, reason: str = "asked for"
    ) -> None:
        openvino = import_openvino()
        super().__init__(threads)
        self.precision, self.reason = precision, reason
        if precision == "bf16" and not cpu_has_bf16():
            raise EngineError("precision bf16: this CPU does not have it; use precision='fp32'")
        settings = {"PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            settings |= {"INFERENCE_NUM_THREADS": threads}
        try:
            core = openvino.Core()
            network = core.read_model(model)
            # One image at a time: with a dynamic batch OpenVINO fuses less. Preset base on two AVX-512 cores:
            # 90 ms dynamic, 74 ms static; eight images in a loop take no longer than as a dynamic batch.
            shape = network.inputs[0].partial_shape
            shape[0] = 1
            network.reshape(shape)
            parts = split_at_distances(network) if precision == "bf16" else [network]
            hints = ["bf16", "f32"] if precision == "bf16" else ["f32"]  # a plain export has no second part
            self.compiled = [
                core.compile_model(part, "CPU", settings | {"INFERENCE_PRECISION_HINT": hint})
                for part, hint in zip(parts, hints, strict=False)
            ]
        except Exception as exc:
            raise EngineError(f"OpenVINO {openvino.__version__} cannot load the model: {exc}") from exc
        self.embeds = any("embedding" in output.get_names() for part in self.compiled for output in part.outputs)
        self.requests = threading.local()

    @property
    def input_size(self) -> tuple[int, int]:
        _, height, width, _ = self.compiled[0].inputs[0].shape
        return height, width

    def run(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.run_all(pixels)[:2]

    def run_all(self, pixels: np.ndarray) -> Outputs:
        try:
            # One per thread: a request is not thread-safe, and making one costs more than a small image.
            if not hasattr(self.requests, "own"):
                self.requests.own = [part.create_infer_request() for part in self.compiled]
            outputs = []
            for index in range(len(pixels)):
                first, *tail = self.requests.own
                values = list(first.infer([pixels[index : index + 1]]).values())
                for request in tail:  # takes the distance maps; what is behind them is the embedding
                    values = [*request.infer(values[:3]).values(), *values[3:]]
                outputs.append(values)
        except Exception as exc:
            raise EngineError(f"OpenVINO failed on pixels {pixels.shape}: {exc}") from exc
        return with_embedding([np.concatenate(of_all) for of_all in zip(*outputs, strict=True)])


def with_embedding(outputs: Sequence[np.ndarray]) -> Outputs:
    """outputs: in the order of OUTPUTS, the last one or not."""
    anomaly_map, pred_score, *embedding = outputs
    return anomaly_map, pred_score, embedding[0] if embedding else None


class TiledEngine(CpuEngine):
    """Images in tiles, which another engine computes: one after the other, so N tiles take N times as long as one.

    Frames are resized and cut, and maps merged, on the CPU whatever computes the tiles; so a frame that lies on a
    GPU is refused. Each pass over an image takes its tiles in calls of up to eight.
    """

    def __init__(self, engine: Engine, tiling: Tiling, threads: int | None = None) -> None:
        super().__init__(threads)
        self.engine, self.tiling = engine, tiling
        self.backend, self.precision, self.reason = engine.backend, engine.precision, engine.reason
        self.embeds = engine.embeds

    @property
    def input_size(self) -> tuple[int, int]:
        return self.tiling.size

    def run(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """pixels (N, rows, columns, 3) -> merged anomaly_map (N, rows, columns) and its maxima."""
        return self.run_all(pixels)[:2]

    def run_all(self, pixels: np.ndarray) -> Outputs:
        return with_embedding(self.tiling.predict(self.engine.run_all, pixels))


def split_at_distances(network):
    """An openvino.Model of our graph -> two: pixels to distance maps and embedding, and the maps to the outputs.

    Of a graph that does not name its distance maps (a plain export, as the benchmark compares) -> itself alone.
    """
    import openvino
    from openvino import opset13

    distances = [op.output(0) for op in network.get_ordered_ops() if op.get_friendly_name() in DISTANCES]
    if not distances:
        return [network]
    maps = [opset13.parameter(distance.partial_shape, openvino.Type.f32) for distance in distances]
    for distance, given in zip(distances, maps, strict=True):
        for taker in distance.get_target_inputs():
            taker.replace_source_output(given.output(0))
    embedding = [output for output in network.outputs if "embedding" in output.get_names()]
    rest = [output.node for output in network.outputs if "embedding" not in output.get_names()]
    first = [*distances, *(output.node.input_value(0) for output in embedding)]
    return [openvino.Model(first, network.get_parameters()), openvino.Model(rest, maps)]


def open_engine(
    bundle: Bundle, backend: str = "auto", precision: str = "auto", threads: int | None = None
) -> Engine:
    """The engine for `bundle` on this machine.

    "auto" takes the NVIDIA GPU at hand: the fused kernels if the bundle has them for it, or TensorRT if its engine
    was built already; of both the faster. Else OpenVINO, the faster one on CPUs, where it is installed and the
    bundle passed the parity gate on it: in bf16 if the CPU has it and the bundle passed in it too. Otherwise it
    takes ONNX Runtime in fp32. int8 and fp8 it never takes unasked.
    Raises InputError for an unknown name, MissingDependencyError or EngineError where what was asked for is not
    to be had here; never takes something else instead.
    """
    engine = open_network(bundle, backend, precision, threads)
    return engine if bundle.tiling.count == 1 else TiledEngine(engine, bundle.tiling, threads)


def open_network(bundle: Bundle, backend: str, precision: str, threads: int | None) -> Engine:
    """What computes the bundle's network: a whole frame, or a tile of one."""
    if backend not in ("auto", *BACKENDS):
        raise InputError(f"backend: expected auto, {', '.join(BACKENDS)}; got {backend!r}")
    if precision not in ("auto", *PRECISIONS):
        raise InputError(f"precision: expected auto, {', '.join(PRECISIONS)}; got {precision!r}")
    if threads is not None and (type(threads) is not int or threads < 1):
        raise InputError(f"threads: expected a whole number from 1 on, or None; got {threads!r}")
    if backend == "fused" and precision not in ("auto", "fp16"):
        raise EngineError(f"the fused kernels compute in fp16; for {precision} use another backend")
    if backend == "tensorrt" and precision in ("fp32", "bf16"):
        raise EngineError(f"TensorRT computes in fp16, int8 or fp8; for {precision} use another backend")
    if backend in ("onnxruntime", "openvino") and precision == "fp16":
        raise EngineError("CPUs compute in fp32 or bf16; fp16 is the precision of backend='fused', on a GPU")
    if precision in ("int8", "fp8"):
        return open_quantised_engine(bundle, backend, precision, threads)
    if backend == "fused":
        return fused.FusedEngine(bundle, "fused kernels in fp16: asked for")
    if backend == "tensorrt":
        return tensorrt_engine.TensorRtEngine(bundle, "TensorRT in fp16: asked for")
    no_gpu = ""
    arch = fused.device_architecture() if precision in ("auto", "fp16") and backend == "auto" else None
    if arch is not None or precision == "fp16":
        not_fused, not_tensorrt = fused.objection(bundle, arch), tensorrt_engine.objection(bundle)
        if not (not_fused and not_tensorrt):
            return open_gpu_engine(bundle, not_fused, not_tensorrt)
        if precision == "fp16":
            raise EngineError(f"precision fp16: {not_fused}; nor TensorRT: {not_tensorrt}")
        no_gpu = f"; not the GPU, because {not_fused}; nor TensorRT: {not_tensorrt}"
    elif backend == precision == "auto" and fused.PLAN in bundle.parts:
        no_gpu = f"; not the GPU that the bundle has kernels for: {fused.objection(bundle, None)}"
    engine = open_cpu_engine(bundle, backend, precision, threads)
    engine.reason += no_gpu
    return engine


def open_quantised_engine(bundle: Bundle, backend: str, precision: str, threads: int | None) -> Engine:
    """TensorRT where it is asked for or, in this precision, was built already; else a CPU's engine, in int8."""
    if backend == "tensorrt":
        return tensorrt_engine.TensorRtEngine(bundle, f"TensorRT in {precision}: asked for", precision=precision)
    no_gpu = tensorrt_engine.objection(bundle, precision) if backend == "auto" else "another backend was asked for"
    if not no_gpu:
        reason = f"TensorRT in {precision}: its engine is there"
        return tensorrt_engine.TensorRtEngine(bundle, reason, precision=precision)
    if precision == "fp8":
        raise EngineError(f"precision fp8: it is computed by TensorRT alone, on a GPU; {no_gpu}")
    if "graphs/int8.onnx" not in bundle.parts:
        raise EngineError("precision int8: the bundle has no int8 graph; export it with --int8")
    model = bundle.onnx("int8")
    if backend == "openvino":
        import_openvino()  # what is missing, not an objection
    against = "ONNX Runtime was asked for" if backend == "onnxruntime" else objection(bundle, "int8")
    if not against:
        return OpenVinoEngine(model, "int8", threads, "OpenVINO in int8: asked for, and it passed the parity gate")
    if backend == "openvino":
        raise EngineError(f"precision int8: {against}")
    return OnnxRuntimeEngine(model, threads, f"ONNX Runtime in int8: not OpenVINO, because {against}", "int8")


def open_cpu_engine(bundle: Bundle, backend: str, precision: str, threads: int | None) -> Engine:
    if backend == "onnxruntime" and precision == "bf16":
        raise EngineError("ONNX Runtime computes in fp32 on CPUs; for bf16 use backend='openvino'")
    model = bundle.onnx("cpu")
    if backend == "onnxruntime":
        return OnnxRuntimeEngine(model, threads, "ONNX Runtime in fp32: asked for")
    if backend == "auto" and precision != "bf16" and (against := objection(bundle, "fp32")):
        return OnnxRuntimeEngine(model, threads, f"ONNX Runtime in fp32: not OpenVINO, because {against}")
    import_openvino()  # from here on it is an error if it is missing, not an objection
    if precision == "fp32":
        return OpenVinoEngine(model, "fp32", threads, "OpenVINO in fp32: asked for")
    against = objection(bundle, "bf16")
    if not against:
        reason = "OpenVINO in bf16: this CPU has it and the bundle passed the parity gate in it"
        return OpenVinoEngine(model, "bf16", threads, reason)
    if precision == "bf16":
        raise EngineError(f"precision bf16: {against}")
    return OpenVinoEngine(model, "fp32", threads, f"OpenVINO in fp32: not bf16, because {against}")


def objection(bundle: Bundle, precision: str) -> str:
    """Why this bundle should not run on OpenVINO in this precision on this machine; empty if it may."""
    try:
        if precision == "bf16" and not cpu_has_bf16():
            return "this CPU does not have bf16"
        import_openvino()
    except MissingDependencyError as exc:
        return str(exc)
    try:
        passed = bundle.manifest["parity"]["engines"][f"openvino {precision}"]["passed"]
    except (KeyError, TypeError):  # the parity report's shape is not checked in reading
        return f"the bundle was not tested on it in {precision} when it was exported"
    return "" if passed is True else f"the bundle failed the parity gate in {precision} (see omniad info)"


def cpu_has_bf16() -> bool:
    """Whether OpenVINO computes in bf16 natively on this CPU. Raises MissingDependencyError without OpenVINO."""
    return "BF16" in import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def import_openvino():
    """Without its telemetry, which tells Google Analytics of every import, and forks for it."""
    sys.modules.setdefault("openvino_telemetry", None)  # for OpenVINO as if it was not installed, which it allows
    try:
        import openvino
    except ImportError as exc:
        raise MissingDependencyError("OpenVINO", "openvino") from exc
    return openvino
