"""Reads the arrays of our own `weights.onnx` without the onnx package, which the line does not have.

The file is a protobuf message ModelProto with nothing but graph.initializer: tensors with dims, data_type, name
and raw_data (fields 1, 2, 8 and 9 of TensorProto in onnx.proto3), as `export.onnx_graph` writes them.
"""

from collections.abc import Iterator

import numpy as np

from .errors import BundleError

GRAPH, INITIALIZER = 7, 5
DIMS, DATA_TYPE, NAME, RAW_DATA = 1, 2, 8, 9
TYPES = {1: np.dtype(np.float32), 10: np.dtype(np.float16)}
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types


def read_weights(message: bytes) -> dict[str, np.ndarray]:
    """Name -> fp16 or fp32 array, a read-only view of `message`. Raises BundleError if it is not such a file."""
    try:
        arrays = {}
        for field, graph in parts(memoryview(message)):
            for inner, tensor in parts(graph) if field == GRAPH else ():
                if inner == INITIALIZER:
                    name, value = read_tensor(tensor)
                    arrays[name] = value
        return arrays
    except (IndexError, KeyError, TypeError, ValueError) as exc:
        raise BundleError(f"weights.onnx: not a file of weights as omniad-export writes it: {exc!r}") from exc


def read_tensor(message: memoryview) -> tuple[str, np.ndarray]:
    shape, name, dtype, data = [], "", None, b""
    for field, value in parts(message):
        if field == DIMS:  # packed in one field, or one by one
            shape += [value] if isinstance(value, int) else varints(value)
        elif field == DATA_TYPE:
            dtype = TYPES[value]
        elif field == NAME:
            name = bytes(value).decode()
        elif field == RAW_DATA:
            data = value
    return name, np.frombuffer(data, dtype).reshape(shape)


def parts(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a protobuf message; a value is a number or bytes."""
    at = 0
    while at < len(message):
        key, at = varint(message, at)
        wire = key & 7
        if wire == VARINT:
            value, at = varint(message, at)
        else:
            size, at = varint(message, at) if wire == BYTES else ({FIXED64: 8, FIXED32: 4}[wire], at)
            if at + size > len(message):
                raise ValueError(f"a field of {size} bytes, {len(message) - at} are left")
            value, at = message[at : at + size], at + size
        yield key >> 3, value


def varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("a number of more than 64 bits")


def varints(message: memoryview) -> list[int]:
    at, values = 0, []
    while at < len(message):
        value, at = varint(message, at)
        values.append(value)
    return values
