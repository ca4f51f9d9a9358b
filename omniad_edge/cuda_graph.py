"""A plan's compiled kernels on an NVIDIA GPU: one arena, one CUDA graph. No torch, no Triton."""

import ctypes
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from .cuda_driver import Context, DeviceArray, Driver, device_architecture, device_array
from .errors import EngineError, InputError
from .kernels.plan import Buffer, Kernel, Launch, Plan, aligned

__all__ = ["CudaGraphPlan", "Kernel", "device_architecture"]

SHARED_BYTES_UNASKED = 48 * 1024  # a kernel gets more only if it asks
WARP = 32


class CudaGraphPlan:
    """Runs a plan; every launch is in one CUDA graph. Safe to call from several threads: they take turns.

    kernels: one per launch of the plan; the same one may repeat
    weights: all "weight" buffers of the plan
    pdl:     programmatic dependent launch, from sm_90 on; the kernels must be compiled for it
    driver:  stands in for cuda.bindings.driver
    Raises InputError if kernels or weights are not the plan's, EngineError where the GPU cannot run them,
    MissingDependencyError without cuda-bindings.
    """

    def __init__(
        self,
        plan: Plan,
        kernels: Sequence[Kernel],
        weights: Mapping[str, np.ndarray],
        pdl: bool,
        driver: Any = None,
    ) -> None:
        if len(kernels) != len(plan.launches):
            raise InputError(f"kernels: expected {len(plan.launches)}, one for each launch; got {len(kernels)}")
        self.plan, self.pdl = plan, pdl
        self.arena_bytes = plan.arena_bytes  # memory taken on the GPU, besides the kernels' code
        self.inputs, self.outputs = (
            {name: buffer for name, buffer in plan.buffers.items() if buffer.kind == kind}
            for kind in ("input", "output")
        )
        expected = {name: buffer for name, buffer in plan.buffers.items() if buffer.kind == "weight"}
        check_names("weights", weights, expected)
        for name, value in weights.items():
            check(f"weight {name}", value.dtype, value.shape, value.flags.c_contiguous, expected[name])
        self.lock = threading.Lock()
        self.driver = Driver(driver)
        self.context = Context(self.driver)
        owned = ExitStack()  # what to free, in reverse
        self.finalizer = weakref.finalize(self, release, self.context, owned)
        try:
            with self.context.entered():
                self.prepare(owned, kernels, weights)
        except BaseException:
            self.close()
            raise

    def prepare(self, owned: ExitStack, kernels: Sequence[Kernel], weights: Mapping[str, np.ndarray]) -> None:
        call, free, api = self.driver.call, self.driver.free, self.driver.api
        functions = self.load(owned, kernels)
        self.arena = call("cuMemAlloc", self.arena_bytes)
        owned.callback(free, "cuMemFree", self.arena)
        self.stream = call("cuStreamCreate", api.CUstream_flags.CU_STREAM_NON_BLOCKING)
        owned.callback(free, "cuStreamDestroy", self.stream)
        self.events = []
        for _ in range(2):
            self.events.append(call("cuEventCreate", api.CUevent_flags.CU_EVENT_DEFAULT))
            owned.callback(free, "cuEventDestroy", self.events[-1])
        self.staging = self.pin(owned)
        owned.callback(free, "cuStreamSynchronize", self.stream)  # nothing is freed while it is being used
        call("cuMemsetD8Async", self.arena, 0, self.arena_bytes, self.stream)
        for name, value in weights.items():
            call("cuMemcpyHtoDAsync", self.address(name), value.ctypes.data, value.nbytes, self.stream)
        self.launch(functions)  # loads what the driver loads late, which it may not do in a capture
        call("cuStreamSynchronize", self.stream)
        self.graph = self.capture(functions)
        owned.callback(free, "cuGraphExecDestroy", self.graph)
        call("cuGraphUpload", self.graph, self.stream)
        call("cuStreamSynchronize", self.stream)

    def load(self, owned: ExitStack, kernels: Sequence[Kernel]) -> list[tuple[Kernel, Any]]:
        """Each kernel with its function in the driver; equal machine code is loaded once."""
        call, api = self.driver.call, self.driver.api
        most = self.driver.attribute(self.context.device, "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
        modules, functions = {}, {}
        for kernel in dict.fromkeys(kernels):
            if kernel.shared_bytes > most:
                raise EngineError(
                    f"kernel {kernel.name}: needs {kernel.shared_bytes} bytes of shared memory, this GPU has "
                    f"{most}; export the bundle with this GPU's architecture in --targets"
                )
            if kernel.cubin not in modules:
                modules[kernel.cubin] = call("cuModuleLoadData", kernel.cubin)
                owned.callback(self.driver.free, "cuModuleUnload", modules[kernel.cubin])
            function = call("cuModuleGetFunction", modules[kernel.cubin], kernel.name.encode())
            if kernel.shared_bytes > SHARED_BYTES_UNASKED:
                key = api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                call("cuFuncSetAttribute", function, key, kernel.shared_bytes)
            functions[kernel] = function
        return [(kernel, functions[kernel]) for kernel in kernels]

    def pin(self, owned: ExitStack) -> dict[str, np.ndarray]:
        """An array in pinned host memory for each input and output: copies to and from it do not block."""
        buffers = self.inputs | self.outputs
        address = self.driver.call("cuMemHostAlloc", sum(aligned(b.size_bytes) for b in buffers.values()), 0)
        owned.callback(self.driver.free, "cuMemFreeHost", address)
        staging = {}
        for name, buffer in buffers.items():
            memory = (ctypes.c_uint8 * buffer.size_bytes).from_address(int(address))
            staging[name] = np.frombuffer(memory, buffer.dtype).reshape(buffer.shape)
            address = int(address) + aligned(buffer.size_bytes)
        return staging

    def launch(self, functions: Sequence[tuple[Kernel, Any]]) -> None:
        api = self.driver.api
        for launch, (kernel, function) in zip(self.plan.launches, functions, strict=True):
            config = api.CUlaunchConfig()
            config.gridDimX, config.gridDimY, config.gridDimZ = launch.programs, 1, 1
            config.blockDimX, config.blockDimY, config.blockDimZ = WARP * kernel.num_warps, 1, 1
            config.sharedMemBytes, config.hStream = kernel.shared_bytes, self.stream
            if self.pdl:
                early = api.CUlaunchAttribute()
                early.id = api.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
                value = api.CUlaunchAttributeValue()
                value.programmaticStreamSerializationAllowed = 1
                early.value = value
                config.attrs, config.numAttrs = [early], 1
            values = self.parameters(launch)
            start = ctypes.addressof(values)
            places = (ctypes.c_void_p * len(values))(*(start + 8 * index for index in range(len(values))))
            self.driver.call("cuLaunchKernelEx", config, function, ctypes.addressof(places), 0)

    def parameters(self, launch: Launch) -> ctypes.Array:
        """The values that `kernels.jit.step` is compiled to take, 8 bytes each; of a number the first 4 count.

        Of one call its buffers; of two, those of the first, how many programs it has, those of the second. Behind
        them Triton appends two pointers to scratch memory, which these kernels do not have.
        """
        values = []
        for index, call in enumerate(launch.calls):
            values += [launch.calls[0].programs] if index else []
            values += [int(self.address(name)) for name in call.buffers if name is not None]
        values += [0, 0]
        return (ctypes.c_uint64 * len(values))(*values)

    def capture(self, functions: Sequence[tuple[Kernel, Any]]) -> Any:
        """All launches as one executable graph."""
        call, api = self.driver.call, self.driver.api
        call("cuStreamBeginCapture", self.stream, api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        try:
            self.launch(functions)
        except BaseException:
            _, graph = api.cuStreamEndCapture(self.stream)
            if graph is not None and int(graph):
                self.driver.free("cuGraphDestroy", graph)
            raise
        graph = call("cuStreamEndCapture", self.stream)
        try:
            return call("cuGraphInstantiate", graph, 0)
        finally:
            self.driver.free("cuGraphDestroy", graph)

    def address(self, name: str) -> Any:
        """Of a buffer, on the GPU."""
        return self.driver.api.CUdeviceptr(int(self.arena) + self.plan.buffers[name].offset_bytes)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Every input of the plan -> every output, in arrays of their own.

        inputs: in the exact shape and dtype, a NumPy array, or a contiguous array on this plan's GPU that has
            DLPack or __cuda_array_interface__ (it is copied there, and is free again after the call)
        Raises InputError if an input is not that, EngineError if the GPU fails.
        """
        with self.lock:
            self.check_open()
            check_names("inputs", inputs, self.inputs)
            with self.context.entered():
                call = self.driver.call
                sources = {name: self.source(name, value) for name, value in inputs.items()}
                for name, source in sources.items():
                    self.put(name, source)
                call("cuGraphLaunch", self.graph, self.stream)
                for name, buffer in self.outputs.items():
                    host = self.staging[name].ctypes.data
                    call("cuMemcpyDtoHAsync", host, self.address(name), buffer.size_bytes, self.stream)
                call("cuStreamSynchronize", self.stream)
                del sources  # of the GPU's arrays, only now is everything read
            return {name: self.staging[name].copy() for name in self.outputs}

    def source(self, name: str, value: Any) -> np.ndarray | DeviceArray:
        """The array to copy from, checked."""
        if isinstance(value, np.ndarray):
            check(name, value.dtype, value.shape, True, self.inputs[name])
            return value
        array = device_array(self.driver, value, name, self.context, int(self.stream))
        if array is None:
            raise InputError(f"{name}: expected a NumPy array or an array on the GPU, got {type(value).__name__}")
        check(name, array.dtype, array.shape, array.contiguous, self.inputs[name])
        return array

    def put(self, name: str, source: np.ndarray | DeviceArray) -> None:
        """Starts the copy into an input buffer."""
        call, api, size = self.driver.call, self.driver.api, self.inputs[name].size_bytes
        if isinstance(source, np.ndarray):
            np.copyto(self.staging[name], source)
            call("cuMemcpyHtoDAsync", self.address(name), self.staging[name].ctypes.data, size, self.stream)
            return
        if source.stream is not None:
            call("cuEventRecord", self.events[0], api.CUstream(source.stream))
            call("cuStreamWaitEvent", self.stream, self.events[0], 0)
        call("cuMemcpyDtoDAsync", self.address(name), api.CUdeviceptr(source.address), size, self.stream)

    def time_ms(self, repeats: int) -> float:
        """Milliseconds of one graph launch on the GPU, mean of `repeats` in a row, on the last run's inputs.

        A single one includes the time until the driver has handed it to the GPU; many hide that.
        """
        if type(repeats) is not int or repeats < 1:
            raise InputError(f"repeats: expected a whole number from 1 on, got {repeats!r}")
        with self.lock:
            self.check_open()
            with self.context.entered():
                call, (start, end) = self.driver.call, self.events
                call("cuEventRecord", start, self.stream)
                for _ in range(repeats):
                    call("cuGraphLaunch", self.graph, self.stream)
                call("cuEventRecord", end, self.stream)
                call("cuEventSynchronize", end)
                return call("cuEventElapsedTime", start, end) / repeats

    def check_open(self) -> None:
        if not self.finalizer.alive:
            raise EngineError("this CudaGraphPlan was closed; make a new one")

    def close(self) -> None:
        """Frees all memory and handles; also done when the object is dropped. May be called twice."""
        with self.lock:
            self.finalizer()

    def __enter__(self) -> "CudaGraphPlan":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def release(context: Context, owned: ExitStack) -> None:
    """Not a method: a finalizer must not hold the object itself."""
    api = context.driver.api
    (status,) = api.cuCtxPushCurrent(context.handle)  # unchecked, as all that frees: it must not raise
    owned.close()
    if status == api.CUresult.CUDA_SUCCESS:
        api.cuCtxPopCurrent()
    context.release()


def check_names(what: str, given: Mapping[str, Any], expected: Mapping[str, Buffer]) -> None:
    if set(given) != set(expected):
        raise InputError(f"{what}: expected {', '.join(sorted(expected))}; got {', '.join(sorted(given))}")


def check(name: str, dtype: Any, shape: tuple[int, ...], contiguous: bool, buffer: Buffer) -> None:
    """Raises InputError if an array is not exactly what the buffer holds."""
    if str(dtype) != buffer.dtype or tuple(shape) != buffer.shape or not contiguous:
        came = f"{dtype} {tuple(shape)}" + ("" if contiguous else ", not C-contiguous")
        raise InputError(f"{name}: expected {buffer.dtype} {buffer.shape}, contiguous; got {came}")
