"""The CUDA driver through cuda-bindings: checked calls, a context for any thread, arrays that lie on the GPU."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from .errors import EngineError, EngineLostError, InputError, MissingDependencyError, OmniADError

# After these nothing in the CUDA context works any more.
STICKY = (
    "CUDA_ERROR_ASSERT",
    "CUDA_ERROR_CONTAINED",
    "CUDA_ERROR_CONTEXT_IS_DESTROYED",
    "CUDA_ERROR_DEINITIALIZED",
    "CUDA_ERROR_ECC_UNCORRECTABLE",
    "CUDA_ERROR_EXTERNAL_DEVICE",
    "CUDA_ERROR_HARDWARE_STACK_ERROR",
    "CUDA_ERROR_ILLEGAL_ADDRESS",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION",
    "CUDA_ERROR_INVALID_ADDRESS_SPACE",
    "CUDA_ERROR_INVALID_PC",
    "CUDA_ERROR_LAUNCH_FAILED",
    "CUDA_ERROR_LAUNCH_TIMEOUT",
    "CUDA_ERROR_MISALIGNED_ADDRESS",
    "CUDA_ERROR_MPS_CLIENT_TERMINATED",
    "CUDA_ERROR_NVLINK_UNCORRECTABLE",
    "CUDA_ERROR_TENSOR_MEMORY_LEAK",
    "CUDA_ERROR_UNKNOWN",
)
OTHER_GPU = "the kernels are not for this GPU or are damaged; export the bundle again with its --targets"
NO_GPU = "no usable GPU; look at nvidia-smi, CUDA_VISIBLE_DEVICES and the container's GPU access"
OLD_DRIVER = "the NVIDIA driver and cuda-bindings do not fit; update the driver, or install cuda-bindings 12.9"
MEANING = {
    "CUDA_ERROR_CALL_REQUIRES_NEWER_DRIVER": OLD_DRIVER,
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": OLD_DRIVER,
    "CUDA_ERROR_DEVICE_UNAVAILABLE": "another process has the GPU for itself (exclusive mode); end that process",
    "CUDA_ERROR_INVALID_DEVICE": NO_GPU,
    "CUDA_ERROR_INVALID_IMAGE": OTHER_GPU,
    "CUDA_ERROR_NOT_FOUND": OTHER_GPU,
    "CUDA_ERROR_NO_BINARY_FOR_GPU": OTHER_GPU,
    "CUDA_ERROR_NO_DEVICE": NO_GPU,
    "CUDA_ERROR_OUT_OF_MEMORY": "the GPU or the host has too little free memory; end what else uses it",
    "CUDA_ERROR_STUB_LIBRARY": "libcuda is the toolkit's stub; install the NVIDIA driver",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "the driver was updated while loaded; restart the machine",
}
# Of DLPack (dlpack.h): kinds of device that GPU copies may read, and NumPy's letters of its type codes.
DLPACK_CUDA = (2, 13)  # memory of the device, managed memory
DLPACK_KIND = {0: "i", 1: "u", 2: "f", 6: "b"}
NOT_WAITING = -1  # as the stream in DLPack: only to look at the array, not at what is in it


class Driver:
    """Every call of the driver goes through here, and every error of it ends here, as an EngineError.

    api: cuda.bindings.driver, or what stands in for it
    """

    def __init__(self, api: Any = None) -> None:
        if api is None:
            try:
                from cuda.bindings import driver as api
            except ImportError as exc:
                raise MissingDependencyError("cuda-bindings", "cuda") from exc
        self.api = api
        self.lost = ""  # after a sticky error, what happened

    def call(self, function: str, *arguments: Any) -> Any:
        """What the function returns behind its status. Raises EngineError, at once if the GPU was lost before."""
        if self.lost:
            raise EngineLostError(self.lost)
        try:
            status, *values = getattr(self.api, function)(*arguments)
        except (RuntimeError, AttributeError) as exc:  # no libcuda, or one without this function
            raise EngineError(
                f"{function}: {exc}; the NVIDIA driver (libcuda) is missing or too old: install or update it"
            ) from exc
        if status != self.api.CUresult.CUDA_SUCCESS:
            name = getattr(status, "name", str(status))
            if name in STICKY:
                self.lost = (
                    f"{function}: {name}: the GPU failed or a kernel went wrong, and the engine cannot go on; "
                    "start the process anew, and if it happens again look for Xid in the kernel log (dmesg)"
                )
                raise EngineLostError(self.lost)
            meaning = MEANING.get(name, "the driver refused the call; update the driver, or report this error")
            raise EngineError(f"{function}: {name}: {meaning}")
        return values[0] if values else None

    def free(self, function: str, handle: Any) -> None:
        """A call that gives something back: tried in a lost context too, where it may fail."""
        getattr(self.api, function)(handle)

    def device(self) -> Any:
        """The device of this thread's context; of a thread without one, the first."""
        self.call("cuInit", 0)
        if int(self.call("cuCtxGetCurrent")):
            return self.call("cuCtxGetDevice")
        return self.call("cuDeviceGet", 0)

    def attribute(self, device: Any, name: str) -> int:
        key = getattr(self.api.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return self.call("cuDeviceGetAttribute", key, device)


class Context:
    """This thread's context if it has one, else the primary context of the first device, as other libraries use.

    device: its device
    """

    def __init__(self, driver: Driver) -> None:
        self.driver, self.device = driver, driver.device()
        self.handle = driver.call("cuCtxGetCurrent")
        self.retained = not int(self.handle)
        if self.retained:
            self.handle = driver.call("cuDevicePrimaryCtxRetain", self.device)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """It is current inside; afterwards the thread has again what it had before."""
        self.driver.call("cuCtxPushCurrent", self.handle)
        try:
            yield
        finally:
            self.driver.api.cuCtxPopCurrent()  # not checked: after a lost device it is due as well

    def release(self) -> None:
        if self.retained:
            self.retained = False
            self.driver.free("cuDevicePrimaryCtxRelease", self.device)


def device_architecture(api: Any = None) -> int | None:
    """Like 90 for sm_90, of the device that a CudaGraphPlan uses; None without GPU, driver or cuda-bindings."""
    try:
        driver = Driver(api)
        device = driver.device()
        major, minor = (driver.attribute(device, f"COMPUTE_CAPABILITY_{part}") for part in ("MAJOR", "MINOR"))
    except OmniADError:
        return None
    return major * 10 + minor


@dataclass(frozen=True)
class DeviceArray:
    """An array of someone else that lies on the GPU, valid as long as `owner` is kept.

    dtype:  of NumPy, or words for what NumPy does not have
    stream: whose work writes it: a handle of the driver; None if there is nothing to wait for
    """

    address: int
    shape: tuple[int, ...]
    dtype: str
    contiguous: bool
    owner: Any
    stream: int | None = None


def is_on_gpu(value: Any) -> bool:
    """Whether `device_array` gives an array for it."""
    if hasattr(value, "__dlpack__") and value.__dlpack_device__()[0] in DLPACK_CUDA:
        return True
    return getattr(value, "__cuda_array_interface__", None) is not None


def device_array(driver: Driver, value: Any, name: str, context: Context, stream: int) -> DeviceArray | None:
    """A value with DLPack on a CUDA device or with __cuda_array_interface__; None if it is neither.

    stream: that will read it, or NOT_WAITING
    Raises InputError, with the argument's `name`, if the array lies on another device.
    """
    # DLPack first: its producer makes our stream wait. PyTorch's __cuda_array_interface__ names no stream.
    if hasattr(value, "__dlpack__") and value.__dlpack_device__()[0] in DLPACK_CUDA:
        ours, place = int(context.device), int(value.__dlpack_device__()[1])
        if place != ours:
            raise InputError(f"{name}: expected an array on GPU {ours}, got one on GPU {place}")
        try:
            return from_dlpack(value.__dlpack__(stream=stream))
        except BufferError as exc:  # the producer cannot lend it, for example a tensor with a gradient
            raise InputError(f"{name}: expected an array that can be lent over DLPack: {exc}") from exc
    interface = getattr(value, "__cuda_array_interface__", None)
    if interface is None:
        return None
    dtype, shape = np.dtype(interface["typestr"]), tuple(interface["shape"])
    strides = interface.get("strides")
    elements = strides and [stride / dtype.itemsize for stride in strides]
    if interface.get("version", 0) < 3:  # says nothing about streams
        driver.call("cuCtxSynchronize")
    pointer = interface["data"][0]
    return DeviceArray(pointer, shape, str(dtype), dense(shape, elements), value, interface.get("stream"))


def wait_for(driver: Driver, array: DeviceArray, stream: Any, event: Any) -> None:
    """Makes the stream wait until the array is written."""
    if array.stream is not None:
        driver.call("cuEventRecord", event, driver.api.CUstream(array.stream))
        driver.call("cuStreamWaitEvent", stream, event, 0)


def pinned_array(address: Any, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """A view of memory of the driver's on the host, valid until that is freed."""
    memory = (ctypes.c_uint8 * (prod(shape) * np.dtype(dtype).itemsize)).from_address(int(address))
    return np.frombuffer(memory, dtype).reshape(shape)


class DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),  # in elements; null if contiguous
        ("byte_offset", ctypes.c_uint64),
    )


def from_dlpack(capsule: Any) -> DeviceArray:
    """Reads the capsule without taking the tensor over: it is given back when the capsule is dropped."""
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    tensor = DLTensor.from_address(get_pointer(capsule, b"dltensor"))
    kind = DLPACK_KIND.get(tensor.code)
    if kind and tensor.lanes == 1 and tensor.bits % 8 == 0:
        dtype = str(np.dtype(f"{kind}{tensor.bits // 8}"))
    else:
        dtype = f"DLPack type {tensor.code} of {tensor.bits} bits x {tensor.lanes}"
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tensor.strides[: tensor.ndim] if tensor.strides else None
    address = (tensor.data or 0) + tensor.byte_offset
    return DeviceArray(address, shape, dtype, dense(shape, strides), capsule)


def dense(shape: tuple[int, ...], strides: Any) -> bool:
    """Whether strides, in elements (None: contiguous), are those of a C-contiguous array."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides or ()), strict=False):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
