"""A plan's compiled kernels on an NVIDIA GPU: one arena, one CUDA graph. No torch, no Triton."""

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import Any

import numpy as np

from .cuda_array import NOT_WAITING, DeviceArray, device_array
from .cuda_driver import Context, Driver, device_architecture, pinned_array, wait_for
from .cuda_kernel import LoadedKernel, load_kernels, parameters
from .cuda_resize import CudaResize
from .errors import EngineError, InputError
from .image import readable_frame
from .kernels.plan import Buffer, Kernel, Plan, aligned

__all__ = ["CudaGraphPlan", "Kernel", "device_architecture"]


class CudaGraphPlan:
    """Runs a plan; every launch is in one CUDA graph. Safe to call from several threads: they take turns.

    kernels: one per launch of `plan.all_launches`; the same one may repeat
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
        if len(kernels) != len(plan.all_launches):
            raise InputError(
                f"kernels: expected {len(plan.all_launches)}, one for each launch; got {len(kernels)}"
            )
        self.plan, self.pdl = plan, pdl
        self.arena_bytes = plan.arena_bytes  # memory taken on the GPU, besides the kernels' code
        self.inputs, self.outputs, self.tables, expected = (
            {name: buffer for name, buffer in plan.buffers.items() if buffer.kind == kind}
            for kind in ("input", "output", "table", "weight")
        )
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
        loaded = load_kernels(self.driver, self.context, kernels, owned)
        self.arena = call("cuMemAlloc", self.arena_bytes)
        owned.callback(free, "cuMemFree", self.arena)
        self.stream = call("cuStreamCreate", api.CUstream_flags.CU_STREAM_NON_BLOCKING)
        owned.callback(free, "cuStreamDestroy", self.stream)
        self.events = []
        for _ in range(2):
            self.events.append(call("cuEventCreate", api.CUevent_flags.CU_EVENT_DEFAULT))
            owned.callback(free, "cuEventDestroy", self.events[-1])
        self.staging = self.pin(owned)
        self.mapped = self.used_in_place()
        self.resize = None
        if self.plan.front is not None:
            addresses = {name: int(self.address(name)) for name in self.plan.buffers}
            tables = {name: self.staging[name] for name in self.tables}
            first, *loaded = loaded
            self.resize = CudaResize(self.plan, first, addresses, tables, self.driver, self.stream, owned)
        owned.callback(free, "cuStreamSynchronize", self.stream)  # nothing is freed while it is being used
        call("cuMemsetD8Async", self.arena, 0, self.arena_bytes, self.stream)
        for name, value in weights.items():
            call("cuMemcpyHtoDAsync", self.address(name), value.ctypes.data, value.nbytes, self.stream)
        self.launch(loaded)  # loads what the driver loads late, which it may not do in a capture
        call("cuStreamSynchronize", self.stream)
        self.graph = self.capture(loaded)
        owned.callback(free, "cuGraphExecDestroy", self.graph)
        call("cuGraphUpload", self.graph, self.stream)
        call("cuStreamSynchronize", self.stream)

    def pin(self, owned: ExitStack) -> dict[str, np.ndarray]:
        """An array in pinned host memory for each input, output and table: copies to and from it do not block."""
        buffers = self.inputs | self.outputs | self.tables
        address = self.driver.call("cuMemHostAlloc", sum(aligned(b.size_bytes) for b in buffers.values()), 0)
        owned.callback(self.driver.free, "cuMemFreeHost", address)
        staging = {}
        for name, buffer in buffers.items():
            staging[name] = pinned_array(address, buffer.shape, buffer.dtype)
            address = int(address) + aligned(buffer.size_bytes)
        return staging

    def used_in_place(self) -> set[str]:
        """Names of what needs no copy, as a GPU without memory of its own (Jetson) uses the host's where it lies.

        Not pixels that a resized frame is written to: only the GPU uses those.
        """
        shared = all(
            self.driver.attribute(self.context.device, name) for name in ("INTEGRATED", "UNIFIED_ADDRESSING")
        )
        return set() if not shared else {*self.outputs, *(self.inputs if self.plan.front is None else ())}

    def launch(self, loaded: Sequence[LoadedKernel]) -> None:
        for launch, kernel in zip(self.plan.launches, loaded, strict=True):
            values = parameters(launch, lambda name: int(self.address(name)))
            kernel.launch(self.stream, launch.programs, values, self.pdl)

    def capture(self, loaded: Sequence[LoadedKernel]) -> Any:
        """All launches as one executable graph."""
        call, api = self.driver.call, self.driver.api
        call("cuStreamBeginCapture", self.stream, api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        try:
            self.launch(loaded)
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
        """Of a buffer, for the GPU."""
        if name in self.mapped:  # with unified addressing the host's address is the GPU's too
            return self.driver.api.CUdeviceptr(self.staging[name].ctypes.data)
        return self.driver.api.CUdeviceptr(int(self.arena) + self.plan.buffers[name].offset_bytes)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Every input of the plan -> every output, in arrays of their own.

        inputs: in the exact shape and dtype, a NumPy array, or a contiguous array on this plan's GPU that has
            DLPack or __cuda_array_interface__ (it is copied there, and is free again after the call)
        Raises InputError if an input is not that, EngineError if the GPU fails.
        """
        with self.turn():
            check_names("inputs", inputs, self.inputs)
            sources = {name: self.source(name, value) for name, value in inputs.items()}
            for name, source in sources.items():
                self.put(name, source)
            outputs = self.replay()
            del sources  # of the GPU's arrays, only now is everything read
        return outputs

    def run_frames(self, frames: Sequence[Any]) -> tuple[dict[str, np.ndarray], list[float]]:
        """As many frames as the batch has images -> every output; milliseconds until each frame was on its way.

        frames: uint8 BGR (rows, columns, 3) of any size: a NumPy array, or a contiguous array on this plan's GPU,
            which is read where it lies and is free again after the call
        Raises InputError if a frame is not that, EngineError if the GPU fails.
        """
        if self.resize is None or len(frames) != self.plan.batch:
            expected = "none, the plan has no front" if self.resize is None else self.plan.batch
            raise InputError(f"frames: expected {expected}; got {len(frames)}")
        with self.turn():
            reader = int(self.context.device), int(self.stream)
            sources, prepare_ms = [readable_frame(frame, *reader) for frame in frames], []
            try:
                for index, source in enumerate(sources):
                    start = perf_counter()
                    if isinstance(source, DeviceArray):
                        wait_for(self.driver, source, self.stream, self.events[0])
                    self.resize.put(index, source)
                    prepare_ms.append(1e3 * (perf_counter() - start))
            except BaseException:
                self.driver.free("cuStreamSynchronize", self.stream)  # frames before this one are being read
                raise
            outputs = self.replay()
            del sources
        return outputs, prepare_ms

    def frame_size(self, frame: Any) -> tuple[int, int]:
        """Rows and columns of what `run_frames` takes. Raises InputError for anything else."""
        with self.turn():
            return readable_frame(frame, int(self.context.device), NOT_WAITING).shape[:2]

    def replay(self) -> dict[str, np.ndarray]:
        """The graph on the inputs that are on the GPU or on their way."""
        call = self.driver.call
        call("cuGraphLaunch", self.graph, self.stream)
        for name, buffer in self.outputs.items():
            if name in self.mapped:
                continue
            host = self.staging[name].ctypes.data
            call("cuMemcpyDtoHAsync", host, self.address(name), buffer.size_bytes, self.stream)
        call("cuStreamSynchronize", self.stream)
        return {name: self.staging[name].copy() for name in self.outputs}

    def source(self, name: str, value: Any) -> np.ndarray | DeviceArray:
        """The array to copy from, checked."""
        if isinstance(value, np.ndarray):
            check(name, value.dtype, value.shape, True, self.inputs[name])
            return value
        array = device_array(value, name, int(self.context.device), int(self.stream))
        if array is None:
            raise InputError(f"{name}: expected a NumPy array or an array on the GPU, got {type(value).__name__}")
        check(name, array.dtype, array.shape, array.contiguous, self.inputs[name])
        return array

    def put(self, name: str, source: np.ndarray | DeviceArray) -> None:
        """Starts the copy into an input buffer."""
        call, api, size = self.driver.call, self.driver.api, self.inputs[name].size_bytes
        if isinstance(source, np.ndarray):
            np.copyto(self.staging[name], source)
            if name not in self.mapped:
                call("cuMemcpyHtoDAsync", self.address(name), self.staging[name].ctypes.data, size, self.stream)
            return
        wait_for(self.driver, source, self.stream, self.events[0])
        call("cuMemcpyDtoDAsync", self.address(name), api.CUdeviceptr(source.address), size, self.stream)

    def time_ms(self, repeats: int) -> float:
        """Milliseconds of one graph launch on the GPU, mean of `repeats` in a row, on the last run's inputs.

        A single one includes the time until the driver has handed it to the GPU; many hide that.
        """
        if type(repeats) is not int or repeats < 1:
            raise InputError(f"repeats: expected a whole number from 1 on, got {repeats!r}")
        with self.turn():
            call, (start, end) = self.driver.call, self.events
            call("cuEventRecord", start, self.stream)
            for _ in range(repeats):
                call("cuGraphLaunch", self.graph, self.stream)
            call("cuEventRecord", end, self.stream)
            call("cuEventSynchronize", end)
            return call("cuEventElapsedTime", start, end) / repeats

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One thread at a time, with the context current. Raises EngineError if this was closed."""
        with self.lock:
            if not self.finalizer.alive:
                raise EngineError("this CudaGraphPlan was closed; make a new one")
            with self.context.entered():
                yield

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
