"""The CUDA driver through cuda-bindings: checked calls, a context for any thread."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import numpy as np

from .cuda_array import UNKNOWN_STREAM, DeviceArray
from .errors import EngineError, EngineLostError, MissingDependencyError, OmniADError

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


def wait_for(driver: Driver, array: DeviceArray, stream: Any, event: Any) -> None:
    """Makes the stream wait until the array is written."""
    if array.stream == UNKNOWN_STREAM:
        driver.call("cuCtxSynchronize")
    elif array.stream is not None:
        driver.call("cuEventRecord", event, driver.api.CUstream(array.stream))
        driver.call("cuStreamWaitEvent", stream, event, 0)


def pinned_array(address: Any, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """A view of memory of the driver's on the host, valid until that is freed."""
    memory = (ctypes.c_uint8 * (prod(shape) * np.dtype(dtype).itemsize)).from_address(int(address))
    return np.frombuffer(memory, dtype).reshape(shape)
