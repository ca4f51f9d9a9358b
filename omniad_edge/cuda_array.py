"""Arrays of other libraries that lie on the GPU: DLPack and __cuda_array_interface__."""

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import InputError

# Of DLPack (dlpack.h): kinds of device that GPU copies may read, and NumPy's letters of its type codes.
DLPACK_CUDA = (2, 13)  # memory of the device, managed memory
DLPACK_KIND = {0: "i", 1: "u", 2: "f", 6: "b"}
NOT_WAITING = -1  # as the stream in DLPack: only to look at the array, not at what is in it
UNKNOWN_STREAM = -2  # of an array whose owner does not say what writes it


@dataclass(frozen=True)
class DeviceArray:
    """An array of someone else that lies on the GPU, valid as long as `owner` is kept.

    dtype:  of NumPy, or words for what NumPy does not have
    stream: whose work writes it: a handle of the driver, or UNKNOWN_STREAM; None if there is nothing to wait for
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


def device_array(value: Any, name: str, device: int, stream: int) -> DeviceArray | None:
    """A value with DLPack on a CUDA device or with __cuda_array_interface__; None if it is neither.

    device, stream: that will read it; or NOT_WAITING
    Raises InputError, with the argument's `name`, if the array lies on another device.
    """
    # DLPack first: its producer makes our stream wait. PyTorch's __cuda_array_interface__ names no stream.
    if hasattr(value, "__dlpack__") and value.__dlpack_device__()[0] in DLPACK_CUDA:
        place = int(value.__dlpack_device__()[1])
        if place != device:
            raise InputError(f"{name}: expected an array on GPU {device}, got one on GPU {place}")
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
    written = interface.get("stream") if interface.get("version", 0) >= 3 else UNKNOWN_STREAM
    return DeviceArray(interface["data"][0], shape, str(dtype), dense(shape, elements), value, written)


def check_device_frame(frame: DeviceArray) -> None:
    """Raises InputError unless it is uint8 (rows, columns, 3), C-contiguous and not empty."""
    fits = len(frame.shape) == 3 and frame.shape[2] == 3 and all(frame.shape)
    if frame.dtype != "uint8" or not fits or not frame.contiguous:
        came = f"{frame.dtype} {frame.shape}" + ("" if frame.contiguous else ", not C-contiguous")
        raise InputError(
            f"frame: expected a C-contiguous uint8 BGR array of shape (height, width, 3); got {came}: bring it to "
            "that on the GPU, or pass it as a NumPy array"
        )


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
