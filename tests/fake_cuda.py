"""A stand-in for cuda.bindings.driver: the same calls, host memory behind the device pointers, failures on demand.

Streams are as lazy as the real ones may be: what is queued happens when somebody synchronises. "Machine code" is
made by `cubin`; a kernel reads its parameters through kernelParams as the driver does.
"""

import ctypes
import functools
import itertools
import json
import threading
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np

from omniad_edge.cuda_array import DLTensor
from omniad_edge.cuda_driver import MEANING, STICKY
from omniad_edge.kernels.resize_tables import MAX_TAPS, Tables, resize_reference

WITH_VALUE = (
    *("cuCtxGetCurrent", "cuCtxGetDevice", "cuCtxPopCurrent", "cuDeviceGet", "cuDeviceGetAttribute"),
    *("cuDeviceGetName", "cuDeviceGetUuid", "cuDriverGetVersion"),
    *("cuDevicePrimaryCtxRetain", "cuEventCreate", "cuEventElapsedTime", "cuGraphInstantiate", "cuMemAlloc"),
    *("cuMemHostAlloc", "cuModuleGetFunction", "cuModuleLoadData", "cuStreamCreate", "cuStreamEndCapture"),
)


def cubin(parameters: str, action: str, size: Any = 0) -> bytes:
    """parameters: p for a pointer, i for int32; action: "copy" of `size` bytes, first pointer to second; "resize".

    Of "resize", which does what the kernel does with the parameters of the kernel, `size` is height and width.
    """
    return json.dumps({"entry": "step", "parameters": parameters, "action": action, "size": size}).encode()


class Handle:
    def __init__(self, value: int = 0) -> None:
        self.value = int(value)

    def __int__(self) -> int:
        return self.value


def driver_call(context: bool = True, capturable: bool = False):
    """Records the call, fails if it shall, and asks for a current context as the real driver does."""

    def wrap(function):
        @functools.wraps(function)
        def call(self, *arguments):
            name = function.__name__
            if self.missing_library:
                raise RuntimeError("Failed to dlopen libcuda.so.1")
            with self.lock:
                self.calls.append((name, arguments))
                if self.hook:
                    self.hook(name)
                failure = self.dead or self.failures.get(name)
                if failure in STICKY:
                    self.dead = failure
                if failure and name == "cuStreamEndCapture":
                    self.capturing.clear()
                if failure and name not in ("cuCtxPopCurrent", "cuDevicePrimaryCtxRelease"):
                    return self.refuse(name, failure)
                if context and not self.stack():
                    return self.refuse(name, "CUDA_ERROR_INVALID_CONTEXT")
                if self.capturing.get(threading.get_ident()) and not capturable:
                    return self.refuse(name, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
                value = function(self, *arguments)
                assert (value is not None) == (name in WITH_VALUE)
                return (self.CUresult.CUDA_SUCCESS, value) if name in WITH_VALUE else (self.CUresult.CUDA_SUCCESS,)

        return call

    return wrap


class FakeCuda:
    """calls: (name, arguments) in order; failures: function -> name of the error; alive: handle -> what it is."""

    CUcontext = CUdevice = CUstream = CUdeviceptr = Handle
    CUresult = IntEnum(
        "CUresult",
        [
            "CUDA_SUCCESS",
            "CUDA_ERROR_INVALID_CONTEXT",
            "CUDA_ERROR_INVALID_VALUE",
            "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
            *STICKY,
            *MEANING,
        ],
        start=0,
    )
    CUdevice_attribute = IntEnum(
        "CUdevice_attribute",
        [
            "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR",
            "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR",
            "CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN",
            "CU_DEVICE_ATTRIBUTE_INTEGRATED",
            "CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING",
        ],
    )
    CUfunction_attribute = IntEnum("CUfunction_attribute", ["CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"])
    CUstream_flags = IntEnum("CUstream_flags", ["CU_STREAM_NON_BLOCKING"])
    CUevent_flags = IntEnum("CUevent_flags", ["CU_EVENT_DEFAULT"], start=0)
    CUstreamCaptureMode = IntEnum("CUstreamCaptureMode", ["CU_STREAM_CAPTURE_MODE_THREAD_LOCAL"])
    CUlaunchAttributeID = IntEnum("CUlaunchAttributeID", ["CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION"])

    CUlaunchAttribute = CUlaunchAttributeValue = SimpleNamespace

    @staticmethod
    def CUlaunchConfig():
        return SimpleNamespace(attrs=[], numAttrs=0)

    def __init__(self, arch: int = 90, shared_bytes: int = 227 * 1024, integrated: bool = False) -> None:
        self.attributes = (None, arch // 10, arch % 10, shared_bytes, int(integrated), 1)
        self.calls, self.failures, self.alive = [], {}, {}
        self.missing_library, self.dead, self.hook = False, "", None
        self.memory, self.queues, self.events = {}, {}, {}
        self.capturing, self.local = {}, threading.local()
        self.modules, self.functions, self.graphs = {}, {}, {}
        self.launches, self.replays = [], 0  # every launch done, eager or of a graph
        self.primary_references, self.numbers, self.lock = 0, itertools.count(0x1000), threading.RLock()

    def refuse(self, name: str, error: str) -> tuple:
        """The real ones return as many values as when all is well."""
        return (self.CUresult[error], None) if name in WITH_VALUE else (self.CUresult[error],)

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def stack(self) -> list[int]:
        """This thread's contexts."""
        if not hasattr(self.local, "stack"):
            self.local.stack = []
        return self.local.stack

    def make(self, kind: str) -> Handle:
        handle = Handle(next(self.numbers))
        self.alive[int(handle)] = kind
        return handle

    def drop(self, handle, kind: str) -> None:
        assert self.alive.pop(int(handle)) == kind  # KeyError: freed twice

    # Device and context

    @driver_call(context=False)
    def cuInit(self, flags):
        assert flags == 0

    @driver_call(context=False)
    def cuDeviceGet(self, ordinal):
        return Handle(ordinal)

    @driver_call(context=False)
    def cuDeviceGetAttribute(self, attribute, device):
        return self.attributes[attribute]

    @driver_call(context=False)
    def cuCtxGetCurrent(self):
        return Handle(self.stack()[-1] if self.stack() else 0)

    @driver_call(context=False)
    def cuDeviceGetName(self, size, device):
        return b"NVIDIA Stand-in".ljust(size, b"\0")

    @driver_call(context=False)
    def cuDeviceGetUuid(self, device):
        return SimpleNamespace(bytes=bytes(range(16)))

    @driver_call(context=False)
    def cuDriverGetVersion(self):
        return 12060

    @driver_call()
    def cuCtxGetDevice(self):
        return Handle(0)

    @driver_call(context=False)
    def cuDevicePrimaryCtxRetain(self, device):
        self.primary_references += 1
        return Handle(77)

    @driver_call(context=False)
    def cuDevicePrimaryCtxRelease(self, device):
        self.primary_references -= 1

    @driver_call(context=False)
    def cuCtxPushCurrent(self, context):
        self.stack().append(int(context))

    @driver_call(context=False)
    def cuCtxPopCurrent(self):
        return Handle(self.stack().pop())

    @driver_call()
    def cuCtxSynchronize(self):
        for stream in self.queues:
            self.drain(stream)

    # Memory

    def allocate(self, size: int, kind: str) -> Handle:
        memory = (ctypes.c_uint8 * (size + 256))()
        ctypes.memset(memory, 0xFF, len(memory))  # NaN: nobody may count on zeros
        address = -(-ctypes.addressof(memory) // 256) * 256
        self.memory[address] = (size, memory)
        self.alive[address] = kind
        return address

    @driver_call()
    def cuMemAlloc(self, size):
        return Handle(self.allocate(size, "device memory"))

    @driver_call()
    def cuMemFree(self, pointer):
        self.drop(pointer, "device memory")
        del self.memory[int(pointer)]

    @driver_call()
    def cuMemHostAlloc(self, size, flags):
        return self.allocate(size, "pinned memory")

    @driver_call()
    def cuMemFreeHost(self, address):
        self.drop(address, "pinned memory")
        self.memory[address] = (0, self.memory[address][1])  # NumPy views of it may live on

    def inside(self, address: int, size: int) -> bool:
        return any(start <= address and address + size <= start + n for start, (n, _) in self.memory.items())

    def copy(self, target: int, source: int, size: int, stream, *on_device: int) -> None:
        def work():
            assert all(self.inside(int(address), size) for address in on_device)
            ctypes.memmove(int(target), int(source), size)

        self.queues[int(stream)].append(work)

    @driver_call()
    def cuMemsetD8Async(self, pointer, value, size, stream):
        assert self.inside(int(pointer), size)
        self.queues[int(stream)].append(lambda: ctypes.memset(int(pointer), value, size))

    @driver_call()
    def cuMemcpyHtoDAsync(self, target, source, size, stream):
        self.copy(target, source, size, stream, target)

    @driver_call()
    def cuMemcpyDtoHAsync(self, target, source, size, stream):
        self.copy(target, source, size, stream, source)

    @driver_call()
    def cuMemcpyDtoDAsync(self, target, source, size, stream):
        self.copy(target, source, size, stream, target, source)

    # Streams and events

    def drain(self, stream: int, until: SimpleNamespace | None = None) -> None:
        """Does what is queued, up to the recorded event `until`."""
        queue = self.queues[stream]
        while queue and not (until and until.done):
            queue.pop(0)()

    @driver_call()
    def cuStreamCreate(self, flags):
        assert flags == self.CUstream_flags.CU_STREAM_NON_BLOCKING
        stream = self.make("stream")
        self.queues[int(stream)] = []
        return stream

    @driver_call()
    def cuStreamDestroy(self, stream):
        self.drop(stream, "stream")

    @driver_call()
    def cuStreamSynchronize(self, stream):
        self.drain(int(stream))

    @driver_call()
    def cuEventCreate(self, flags):
        return self.make("event")

    @driver_call()
    def cuEventDestroy(self, event):
        self.drop(event, "event")

    @driver_call()
    def cuEventRecord(self, event, stream):
        recorded = self.events[int(event)] = SimpleNamespace(stream=int(stream), done=False)
        self.queues[int(stream)].append(lambda: vars(recorded).update(done=True))

    @driver_call()
    def cuStreamWaitEvent(self, stream, event, flags):
        recorded = self.events[int(event)]
        self.queues[int(stream)].append(lambda: self.drain(recorded.stream, recorded))

    @driver_call()
    def cuEventSynchronize(self, event):
        if recorded := self.events.get(int(event)):  # else there is nothing to wait for
            self.drain(recorded.stream, recorded)

    @driver_call()
    def cuEventElapsedTime(self, start, end):
        assert self.events[int(start)].done and self.events[int(end)].done
        return 12.0

    # Kernels and graphs

    @driver_call()
    def cuModuleLoadData(self, image):
        module = self.make("module")
        self.modules[int(module)] = json.loads(image)
        return module

    @driver_call()
    def cuModuleUnload(self, module):
        self.drop(module, "module")

    @driver_call()
    def cuModuleGetFunction(self, module, name):
        code = self.modules[int(module)]
        assert code["entry"].encode() == name
        function = Handle(next(self.numbers))
        self.functions[int(function)] = SimpleNamespace(code=code, shared=48 * 1024)
        return function

    @driver_call()
    def cuFuncSetAttribute(self, function, attribute, value):
        self.functions[int(function)].shared = value

    @driver_call(capturable=True)
    def cuLaunchKernelEx(self, config, function, parameters, extra):
        code, values = self.functions[int(function)], []
        assert config.sharedMemBytes <= code.shared and not extra
        places = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))
        for index, kind in enumerate(code.code["parameters"]):
            read = {"p": ctypes.c_uint64, "i": ctypes.c_int32}[kind]
            values.append(read.from_address(places[index]).value)
        launch = SimpleNamespace(
            grid=(config.gridDimX, config.gridDimY, config.gridDimZ),
            block=(config.blockDimX, config.blockDimY, config.blockDimZ),
            shared=config.sharedMemBytes,
            attributes=[(a.id.name, vars(a.value)) for a in config.attrs[: config.numAttrs]],
            values=values,
            code=code.code,
        )
        recorded = self.capturing.get(threading.get_ident())
        queue = recorded[1] if recorded else self.queues[int(config.hStream)]
        queue.append(functools.partial(self.execute, launch))

    def execute(self, launch) -> None:
        self.launches.append(launch)
        if launch.code["action"] == "copy":
            source, target = launch.values[:2]
            assert self.inside(source, launch.code["size"]) and self.inside(target, launch.code["size"])
            ctypes.memmove(target, source, launch.code["size"])
        if launch.code["action"] == "resize":
            self.resize(*launch.code["size"], *launch.values[:7])

    def array(self, address: int, dtype: type, *shape: int) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        assert self.inside(address, size)
        return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype).reshape(shape)

    def resize(self, height, width, frame, geometry, row_start, row_weight, column_start, column_weight, pixels):
        tables = Tables(
            self.array(geometry, np.int32, 4),
            self.array(row_start, np.int32, height),
            self.array(row_weight, np.float32, height, MAX_TAPS),
            self.array(column_start, np.int32, width),
            self.array(column_weight, np.float32, width, MAX_TAPS),
        )
        made = resize_reference(self.array(frame, np.uint8, *tables.geometry[:2], 3), tables)
        self.array(pixels, np.uint8, height, width, 3)[:] = np.floor(made + 0.5)

    @driver_call()
    def cuStreamBeginCapture(self, stream, mode):
        assert mode == self.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self.capturing[threading.get_ident()] = (int(stream), [])

    @driver_call(capturable=True)
    def cuStreamEndCapture(self, stream):
        begun, nodes = self.capturing.pop(threading.get_ident())
        assert begun == int(stream)
        graph = self.make("graph")
        self.graphs[int(graph)] = nodes
        return graph

    @driver_call()
    def cuGraphInstantiate(self, graph, flags):
        executable = self.make("executable graph")
        self.graphs[int(executable)] = self.graphs[int(graph)]
        return executable

    @driver_call()
    def cuGraphDestroy(self, graph):
        self.drop(graph, "graph")

    @driver_call()
    def cuGraphExecDestroy(self, graph):
        self.drop(graph, "executable graph")

    @driver_call()
    def cuGraphUpload(self, graph, stream):
        assert self.alive[int(graph)] == "executable graph"

    @driver_call()
    def cuGraphLaunch(self, graph, stream):
        self.replays += 1
        self.queues[int(stream)].extend(self.graphs[int(graph)])


class OnGpu:
    """An array of another library, in device memory of the stand-in, with __cuda_array_interface__."""

    def __init__(self, cuda: FakeCuda, value: np.ndarray, **changes) -> None:
        self.address = cuda.allocate(value.nbytes, "foreign")
        del cuda.alive[self.address]
        ctypes.memmove(self.address, np.ascontiguousarray(value).ctypes.data, value.nbytes)
        self.__cuda_array_interface__ = {
            "shape": value.shape,
            "typestr": value.dtype.str,
            "data": (self.address, False),
            "version": 3,
            "stream": None,
        } | changes


class OverDlpack:
    """The same, with DLPack; `stream` is what the consumer gave, `dropped` whether it gave the tensor back."""

    def __init__(self, cuda: FakeCuda, value: np.ndarray, code: int = 1, device: int = 0, strides=None) -> None:
        self.stream, self.dropped, self.device = None, False, device
        self.memory = OnGpu(cuda, value)
        self.shape = (ctypes.c_int64 * value.ndim)(*value.shape)
        self.strides = strides and (ctypes.c_int64 * value.ndim)(*strides)
        self.tensor = DLTensor(self.memory.address - 4, 2, device, value.ndim, code, 8 * value.itemsize, 1)
        self.tensor.shape, self.tensor.byte_offset = self.shape, 4
        if strides:
            self.tensor.strides = self.strides

        @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        def dropped(_):
            self.dropped = True

        self.destructor = dropped

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device

    def __dlpack__(self, stream):
        self.stream = stream
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(ctypes.addressof(self.tensor), b"dltensor", ctypes.cast(self.destructor, ctypes.c_void_p))


def check_all_freed(cuda: FakeCuda) -> None:
    assert cuda.alive == {}
    assert cuda.primary_references == 0
    assert cuda.stack() == []
