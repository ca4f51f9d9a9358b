"""Engines: a bundle's graph in, `run(pixels) -> anomaly_map, pred_score` out. Vendor errors end here."""

import threading
from typing import Protocol

import numpy as np

from .bundle import Bundle
from .errors import EngineError, InputError, MissingDependencyError

BACKENDS = ("onnxruntime", "openvino")
PRECISIONS = ("fp32", "bf16")


class Engine(Protocol):
    """What runs the network. Safe to call from several threads at once.

    backend, precision: what computes, and in which arithmetic
    reason: why this engine was chosen, in words
    """

    backend: str
    precision: str
    reason: str

    def run(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """pixels (N, H, W, 3) uint8 RGB -> anomaly_map (N, H, W) and pred_score (N,), float32."""


class OnnxRuntimeEngine:
    """ONNX Runtime on the CPU, in fp32 whatever precision the weights are stored in."""

    backend = "onnxruntime"
    precision = "fp32"

    def __init__(self, model: bytes, threads: int | None = None, reason: str = "asked for") -> None:
        import onnxruntime

        self.reason = reason
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as exc:  # its exceptions share no base class
            raise EngineError(f"ONNX Runtime {onnxruntime.__version__} cannot load the model: {exc}") from exc

    def run(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        try:
            return tuple(self.session.run(["anomaly_map", "pred_score"], {"pixels": pixels}))
        except Exception as exc:
            raise EngineError(f"ONNX Runtime failed on pixels {pixels.shape}: {exc}") from exc


class OpenVinoEngine:
    """OpenVINO on the CPU. It would compute in bf16 unasked where a CPU has it; here precision is explicit."""

    backend = "openvino"

    def __init__(
        self, model: bytes, precision: str = "fp32", threads: int | None = None, reason: str = "asked for"
    ) -> None:
        openvino = import_openvino()
        self.precision, self.reason = precision, reason
        if precision == "bf16" and not cpu_has_bf16():
            raise EngineError("precision bf16: this CPU does not have it; use precision='fp32'")
        settings = {"INFERENCE_PRECISION_HINT": {"fp32": "f32"}.get(precision, precision)}
        settings |= {"PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            settings |= {"INFERENCE_NUM_THREADS": threads}
        try:
            core = openvino.Core()
            self.compiled = core.compile_model(core.read_model(model), "CPU", settings)
        except Exception as exc:
            raise EngineError(f"OpenVINO {openvino.__version__} cannot load the model: {exc}") from exc
        self.requests = threading.local()

    def run(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        try:
            # One per thread: a request is not thread-safe, and making one costs more than a small image.
            if not hasattr(self.requests, "own"):
                self.requests.own = self.compiled.create_infer_request()
            outputs = self.requests.own.infer({"pixels": pixels})
            return outputs["anomaly_map"], outputs["pred_score"]  # copies: the request's own are written over
        except Exception as exc:
            raise EngineError(f"OpenVINO failed on pixels {pixels.shape}: {exc}") from exc


def open_engine(
    bundle: Bundle, backend: str = "auto", precision: str = "auto", threads: int | None = None
) -> Engine:
    """The engine for `bundle` on this machine.

    "auto" takes OpenVINO in bf16 where it is installed, the CPU has bf16 and the bundle's parity gate let it
    pass, and ONNX Runtime in fp32 otherwise. Raises InputError for an unknown name, MissingDependencyError or
    EngineError where what was asked for is not to be had here; never takes something else instead.
    """
    if backend not in ("auto", *BACKENDS):
        raise InputError(f"backend: expected auto, {' or '.join(BACKENDS)}; got {backend!r}")
    if precision not in ("auto", *PRECISIONS):
        raise InputError(f"precision: expected auto, {' or '.join(PRECISIONS)}; got {precision!r}")
    if threads is not None and (type(threads) is not int or threads < 1):
        raise InputError(f"threads: expected a whole number from 1 on, or None; got {threads!r}")
    if backend == "onnxruntime" and precision == "bf16":
        raise EngineError("ONNX Runtime computes in fp32 on CPUs; for bf16 use backend='openvino'")
    model = bundle.onnx("cpu")
    if backend == "onnxruntime" or (backend == "auto" and precision == "fp32"):
        return OnnxRuntimeEngine(model, threads, "ONNX Runtime in fp32: asked for")
    if backend == "openvino" or precision == "bf16":
        import_openvino()  # asked for: it is an error if it is missing, not an objection
    if precision == "fp32":
        return OpenVinoEngine(model, "fp32", threads, "OpenVINO in fp32: asked for")
    against = objection_to_bf16(bundle)
    if not against:
        reason = "OpenVINO in bf16: this CPU has it and the bundle passed the parity gate in it"
        return OpenVinoEngine(model, "bf16", threads, reason)
    if precision == "bf16":
        raise EngineError(f"precision bf16: {against}")
    if backend == "openvino":
        return OpenVinoEngine(model, "fp32", threads, f"OpenVINO in fp32: not bf16, because {against}")
    return OnnxRuntimeEngine(model, threads, f"ONNX Runtime in fp32: not OpenVINO, because {against}")


def objection_to_bf16(bundle: Bundle) -> str:
    """Why this bundle cannot run in bf16 on this machine; empty if it can."""
    try:
        if not cpu_has_bf16():
            return "this CPU does not have bf16"
    except MissingDependencyError as exc:
        return str(exc)
    try:
        passed = bundle.manifest["parity"]["engines"]["openvino bf16"]["passed"]
    except (KeyError, TypeError):  # the parity report's shape is not checked in reading
        return "the bundle was not tested in bf16 when it was exported (OpenVINO or the CPU's bf16 was missing)"
    return "" if passed is True else "the bundle failed the parity gate in bf16 (see omniad info)"


def cpu_has_bf16() -> bool:
    """Whether OpenVINO computes in bf16 natively on this CPU. Raises MissingDependencyError without OpenVINO."""
    return "BF16" in import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def import_openvino():
    try:
        import openvino
    except ImportError as exc:
        raise MissingDependencyError("OpenVINO", "openvino") from exc
    return openvino
