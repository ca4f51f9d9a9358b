"""A stand-in for TensorRT's module, to be put into sys.modules: builds and runs models with ONNX Runtime.

Every public name, parameter and return type here is one of the real bindings (tests/test_tensorrt_api.py), so what
code calls on it is there in them too. It computes on memory and streams of a FakeCuda, `_state.cuda`, and insists
on what TensorRT insists on. `_state.faults` holds names of calls that shall fail.
"""

import json
import threading
import weakref
from enum import IntEnum
from functools import cache
from types import SimpleNamespace

import numpy as np

__version__ = "10.3.0"

_MAGIC = b"stand-in plan "
Dims = tuple  # the real ones take tuples too
_state = SimpleNamespace()


def _reset(cuda) -> None:
    global __version__
    __version__ = "10.3.0"
    vars(_state).update(
        cuda=cuda, faults=set(), builders=[], loaded_plans=[], libraries=[], in_library=[], steps=(4, 2), error=0.0
    )


@cache
def _session(model: bytes):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if b"QuantizeLinear" in model:  # see OnnxRuntimeEngine's `as_written`
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _fails(call: str, log: "ILogger", words: str = "the stand-in was told to") -> bool:
    if call in _state.faults:
        log.log(ILogger.ERROR, f"{call}: {words}")
    return call in _state.faults


# Numbers unlike the real ones, which moved between versions: nobody may know them.
class NetworkDefinitionCreationFlag(IntEnum):
    STRONGLY_TYPED = 5


class BuilderFlag(IntEnum):
    TF32 = 31


class MemoryPoolType(IntEnum):
    WORKSPACE = 32


class ExecutionContextAllocationStrategy(IntEnum):
    STATIC = 33
    ON_PROFILE_CHANGE = 34


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING = range(3)

    def __init__(self) -> None: ...

    def log(self, severity: int, msg: str) -> None: ...


class IProgressMonitor:
    def __init__(self) -> None: ...

    def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None: ...

    def step_complete(self, phase_name: str, step: int) -> bool: ...

    def phase_finish(self, phase_name: str) -> None: ...


class IHostMemory(bytearray):
    """The real one has the buffer protocol too."""


# Plugins


class IPluginRegistry:
    def get_creator(self, type: str, version: str, plugin_namespace: str = "") -> object:
        found = (type, version, plugin_namespace) in _state.libraries
        return object() if found else None

    def load_library(self, plugin_path: str) -> object:
        """Of a library that is in use already nothing is given, as the real one does."""
        new = [name for name in _state.in_library if name not in _state.libraries]
        _state.libraries += new
        return object() if new else None


def get_plugin_registry() -> object:
    return IPluginRegistry()


# Building


class ITensor:
    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self._name, self._shape = name, shape

    @property
    def name(self) -> str:
        return self._name

    @property
    def shape(self) -> "Dims":
        return self._shape


class INetworkDefinition:
    def get_input(self, index: int) -> "ITensor":
        pixels = self._model.graph.input[index]
        return ITensor(pixels.name, tuple(d.dim_value or -1 for d in pixels.type.tensor_type.shape.dim))


class ParserError:
    def __init__(self, words: str) -> None:
        self._words = words

    def desc(self) -> str:
        return self._words


class OnnxParser:
    def __init__(self, network: "INetworkDefinition", logger: "ILogger") -> None:
        self._network, self._errors = network, []

    def parse(self, model: bytes, path: str | None = None) -> bool:
        import onnx

        try:
            parsed = onnx.load_model_from_string(model)
        except Exception as exc:
            self._errors.append(f"not a model: {exc}")
            return False
        readers = {node.op_type for node in parsed.graph.node if "pixels" in node.input}
        if readers != {"Cast"}:
            self._errors.append(f"uint8 inputs are taken by a Cast alone, not by {readers}")
        self._network._model, self._network._bytes = parsed, model
        return not self._errors

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> object:
        return ParserError(self._errors[index])


class IOptimizationProfile:
    def set_shape(self, input: str, min: "Dims", opt: "Dims", max: "Dims") -> None:
        self._shapes = (input, tuple(min), tuple(opt), tuple(max))


class ITimingCache:
    def __init__(self, content: bytes) -> None:
        self._content = content

    def serialize(self) -> "IHostMemory":
        return IHostMemory(self._content)


class IBuilderConfig:
    max_aux_streams = None
    progress_monitor = None

    def __init__(self, log: "ILogger") -> None:
        self._log, self._flags, self._profiles, self._limits, self._cache = log, {BuilderFlag.TF32}, [], {}, None

    def set_memory_pool_limit(self, pool: "MemoryPoolType", pool_size: int) -> None:
        self._limits[pool] = pool_size

    def clear_flag(self, flag: "BuilderFlag") -> None:
        self._flags.discard(flag)

    def add_optimization_profile(self, profile: "IOptimizationProfile") -> int:
        if _fails("add_optimization_profile", self._log):
            return -1
        self._profiles.append(profile._shapes)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> "ITimingCache":
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: "ITimingCache", ignore_mismatch: bool) -> bool:
        if cache._content.startswith(b"of another"):
            return False
        self._cache = cache
        return True


class Builder:
    def __init__(self, logger: "ILogger") -> None:
        self._log = logger
        _state.builders.append(self)

    def create_network(self, flags: int = 0) -> "INetworkDefinition":
        assert flags == 1 << 5
        return INetworkDefinition()

    def create_builder_config(self) -> "IBuilderConfig":
        self._config = IBuilderConfig(self._log)
        return self._config

    def create_optimization_profile(self) -> "IOptimizationProfile":
        return IOptimizationProfile()

    def build_serialized_network(self, network: "INetworkDefinition", config: "IBuilderConfig") -> "IHostMemory":
        assert _state.cuda.stack(), "no CUDA context is current"
        if not _tell(config.progress_monitor) or _fails("build_serialized_network", self._log):
            return None
        config._cache._content += b"timed "
        about = {"version": __version__, "profiles": config._profiles}
        return IHostMemory(_MAGIC + json.dumps(about).encode() + b"\n" + network._bytes)


def _tell(monitor: "IProgressMonitor") -> bool:
    """Phases within each other, the inner one ended early."""
    outer, inner = _state.steps
    monitor.phase_start("Building Engine", None, outer)
    going = True
    for step in range(outer):
        monitor.phase_start("Tactics [all]", "Building Engine", inner)
        going = going and monitor.step_complete("Tactics [all]", 0)
        monitor.phase_finish("Tactics [all]")
        going = going and monitor.step_complete("Building Engine", step)
    monitor.phase_finish("Building Engine")
    return going


# Running


class Runtime:
    def __init__(self, logger: "ILogger") -> None:
        self._log = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> "ICudaEngine":
        assert _state.cuda.stack(), "no CUDA context is current"
        _state.loaded_plans.append(serialized_engine)
        about, _, model = serialized_engine.removeprefix(_MAGIC).partition(b"\n")
        if _fails("deserialize_cuda_engine", self._log):
            return None
        return ICudaEngine(json.loads(about)["profiles"], model, self._log)


class ICudaEngine:
    def __init__(self, profiles: list, model: bytes, log: "ILogger") -> None:
        self._profiles, self._log, self._handle = profiles, log, _state.cuda.make("engine")
        self._session = _session(model)

    def create_execution_context(self, strategy: "ExecutionContextAllocationStrategy" = 33) -> "IExecutionContext":
        assert strategy is ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        return None if _fails("create_execution_context", self._log) else IExecutionContext(self)

    def __del__(self) -> None:
        _free(self._handle, "engine")


class IExecutionContext:
    def __init__(self, engine: "ICudaEngine") -> None:
        self._engine, self._handle = engine, _state.cuda.make("execution context")
        self._profile, self._shape, self._addresses = None, None, {}

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert _state.cuda.alive[stream_handle] == "stream"
        assert not _state.cuda.capturing, "this does not belong into a capture"
        self._profile = self._engine._profiles[profile_index]
        return True

    def set_input_shape(self, name: str, shape: tuple) -> bool:
        _, least, _, most = self._profile
        self._shape = shape
        fits = all(a <= size <= b for a, size, b in zip(least, shape, most, strict=True))
        return name == "pixels" and fits and not _fails("set_input_shape", self._engine._log)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    def infer_shapes(self) -> list[str]:
        return [] if self._shape else ["pixels"]

    def execute_async_v3(self, stream_handle: int) -> bool:
        cuda = _state.cuda
        assert cuda.stack() and cuda.alive[stream_handle] == "stream"
        if _fails("execute_async_v3", self._engine._log):
            return False
        recorded = cuda.capturing.get(threading.get_ident())
        queue = recorded[1] if recorded else cuda.queues[stream_handle]
        compute = weakref.WeakMethod(self._compute)  # a CUDA graph does not keep the context alive
        queue.append(lambda: compute()())
        return True

    def _compute(self) -> None:
        pixels = _state.cuda.array(self._addresses["pixels"], np.uint8, *self._shape)
        names = [output.name for output in self._engine._session.get_outputs()]
        for name, value in zip(names, self._engine._session.run(names, {"pixels": pixels}), strict=True):
            _state.cuda.array(self._addresses[name], np.float32, *value.shape)[:] = value + _state.error

    def __del__(self) -> None:
        _free(self._handle, "execution context")


def _free(handle, kind: str) -> None:
    assert _state.cuda.stack(), "no CUDA context is current"
    _state.cuda.drop(handle, kind)
