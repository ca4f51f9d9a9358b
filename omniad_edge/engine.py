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
        # One request per thread: a request is not thread-safe, and making one costs more than a small image.
        if not hasattr(self.requests, "own"):
            self.requests.own = self.compiled.create_infer_request()
        try:
            outputs = self.requests.own.infer({"pixels": pixels})
        except Exception as exc:
            raise EngineError(f"OpenVINO failed on pixels {pixels.shape}: {exc}") from exc
        return outputs["anomaly_map"].copy(), outputs["pred_score"].copy()


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
    if backend == "onnxruntime" and precision == "bf16":
        raise EngineError("ONNX Runtime computes in fp32 on CPUs; for bf16 use backend='openvino'")
    against = objection_to_bf16(bundle)
    if precision == "bf16" and against:
        raise EngineError(f"precision bf16: {against}")
    model = bundle.onnx("cpu")
    bf16 = precision != "fp32" and not against
    if bf16 and backend != "onnxruntime":
        reason = "OpenVINO in bf16: this CPU has it and the bundle passed the parity gate in it"
        return OpenVinoEngine(model, "bf16", threads, reason)
    if backend == "openvino":
        reason = f"OpenVINO in fp32: {'asked for' if precision == 'fp32' else f'not bf16, because {against}'}"
        return OpenVinoEngine(model, "fp32", threads, reason)
    why = "asked for" if backend == "onnxruntime" or precision == "fp32" else f"not OpenVINO, because {against}"
    return OnnxRuntimeEngine(model, threads, f"ONNX Runtime in fp32: {why}")


def objection_to_bf16(bundle: Bundle) -> str:
    """Why this bundle cannot run in bf16 on this machine; empty if it can."""
    try:
        if not cpu_has_bf16():
            return "this CPU does not have bf16"
    except MissingDependencyError as exc:
        return str(exc)
    report = bundle.manifest["parity"].get("engines", {}).get("openvino bf16")
    if report is None:
        return "the bundle was not tested in bf16 when it was exported (OpenVINO or the CPU's bf16 was missing)"
    return "" if report["passed"] else "the bundle failed the parity gate in bf16 (see omniad info)"


def cpu_has_bf16() -> bool:
    """Whether OpenVINO computes in bf16 natively on this CPU. Raises MissingDependencyError without OpenVINO."""
    return "BF16" in import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def import_openvino():
    try:
        import openvino
    except ImportError as exc:
        raise MissingDependencyError("OpenVINO", "openvino") from exc
    return openvino
