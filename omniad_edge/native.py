"""The native runtime, libomniad_runtime.so: a bundle's kernels on an NVIDIA GPU, run from C++ without the GIL.

Structures and functions here are those of kernels/native/omniad.h.
"""

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from time import perf_counter

import numpy as np

from .cuda_array import NOT_WAITING, UNKNOWN_STREAM, DeviceArray
from .errors import BundleError, EngineError, EngineLostError, InputError
from .image import FrameArray, readable_frame

LIBRARY = Path(__file__).with_name("libomniad_runtime.so")
ABI = 3  # of the omniad.h that this module follows
CALLERS_DEVICE = -1
HOST, GPU, GPU_AFTER_STREAM, GPU_AFTER_ALL = range(4)
ERRORS = {1: InputError, 2: BundleError, 6: EngineLostError}  # of a status; any other is an EngineError
POINTER, INT = ctypes.c_void_p, ctypes.c_int
FUNCTIONS = {
    "omniad_get_architecture": (INT, POINTER),
    "omniad_open_parts": (POINTER, INT, INT, POINTER, INT, POINTER),
    "omniad_close": (POINTER,),
    "omniad_get_info": (POINTER, POINTER),
    "omniad_run": (POINTER, INT, POINTER, POINTER, POINTER, POINTER),
    "omniad_run_frames": (POINTER, POINTER, INT, POINTER, POINTER, POINTER, POINTER),
}


class Part(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("content", ctypes.c_char_p), ("bytes", ctypes.c_size_t))


class Info(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("device", "height", "width", "peaks", "embedding")),
        *((name, ctypes.c_size_t) for name in ("pixels_bytes", "anomaly_map_bytes", "peaks_bytes")),
        ("stream", POINTER),
    )


class Frame(ctypes.Structure):
    _fields_ = (
        ("bgr", POINTER),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "row_bytes")),
        ("place", INT),
        ("stream", POINTER),
    )


class NativeExecutor:
    """The fused engine's launches, from C++. Safe to call from several threads: they take turns.

    parts:   of a bundle that was read and checked
    batches: how many images a run may have; all of them share one set of weights on the GPU
    It uses this thread's CUDA context, or in a thread without one the primary context of the first device.
    Raises BundleError for parts that are not as omniad-export writes them, EngineError where the GPU cannot run
    them, or where the library is not there: see `why_absent`.
    """

    def __init__(self, parts: Mapping[str, bytes], batches: Sequence[int]) -> None:
        if absent := why_absent():
            raise EngineError(absent)
        self.library = load(LIBRARY)
        given = (Part * len(parts))()
        for part, (name, content) in zip(given, parts.items(), strict=True):
            part.name, part.content, part.bytes = name.encode(), content, len(content)
        sizes, self.handle = (INT * len(batches))(*batches), POINTER()
        where = CALLERS_DEVICE, sizes, len(sizes), ctypes.byref(self.handle)
        check(self.library, self.library.omniad_open_parts(given, len(given), *where))
        self.close = weakref.finalize(self, self.library.omniad_close, self.handle)
        info = Info()
        check(self.library, self.library.omniad_get_info(self.handle, ctypes.byref(info)))
        self.device, self.height, self.width, self.stream = info.device, info.height, info.width, info.stream
        self.channels = info.embedding

    def run(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """pixels (N, H, W, 3) uint8 RGB, N a batch size -> anomaly_map (N, H, W), pred_score (N,) and embedding
        (N, D), float32."""
        expected = len(pixels), self.height, self.width, 3
        if pixels.dtype != np.uint8 or pixels.shape != expected:
            raise InputError(f"pixels: expected uint8 {expected}; got {pixels.dtype} {pixels.shape}")
        pixels = np.ascontiguousarray(pixels)
        outputs = self.outputs(len(pixels))
        given = len(pixels), address(pixels), *map(address, outputs)
        check(self.library, self.library.omniad_run(self.handle, *given))
        return outputs

    def frame_size(self, frame: FrameArray) -> tuple[int, int]:
        """Rows and columns of what `run_frames` takes. Raises InputError for anything else."""
        return readable_frame(frame, self.device, NOT_WAITING).shape[:2]

    def run_frames(self, frames: Sequence[FrameArray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[float]]:
        """As many frames as a batch size -> what `run` gives of them, milliseconds until each was on its way.

        frames: uint8 BGR (rows, columns, 3) of any size: a NumPy array, or a contiguous array on this GPU, which
            is read where it lies and is free again after the call
        Raises InputError if a frame is not that, EngineError if the GPU fails.
        """
        sources, given, ours_ms = [], [], []
        for frame in frames:
            start = perf_counter()
            source = readable_frame(frame, self.device, self.stream)
            sources.append(source if isinstance(source, DeviceArray) else with_dense_rows(source))
            given.append(described(sources[-1]))
            ours_ms.append(1e3 * (perf_counter() - start))
        outputs, native_ms = self.outputs(len(frames)), np.empty(len(frames))
        results = map(address, (*outputs, native_ms))
        given = (Frame * len(given))(*given)
        check(self.library, self.library.omniad_run_frames(self.handle, given, len(given), *results))
        del sources  # only now is everything read
        return *outputs, (native_ms + ours_ms).tolist()

    def outputs(self, images: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        shapes = (images, self.height, self.width), (images,), (images, self.channels)
        return tuple(np.empty(shape, np.float32) for shape in shapes)


@cache
def load(path: Path) -> ctypes.CDLL | str:
    """The library, or words for why it is not there."""
    if not path.is_file():
        return f"{path.name} is not there; pip builds it where it finds a C++ compiler (g++)"
    try:
        library = ctypes.CDLL(str(path))
        abi = library.omniad_abi()
    except (OSError, AttributeError) as exc:
        return f"{path.name} cannot be loaded: {exc}; install omniad-edge again"
    if abi != ABI:
        return f"{path.name} is of another version (ABI {abi}, expected {ABI}); install omniad-edge again"
    library.omniad_last_error.restype = ctypes.c_char_p
    for name, types in FUNCTIONS.items():
        getattr(library, name).argtypes = types
    return library


def why_absent() -> str:
    """Why the native runtime is not used here; empty if it is."""
    library = load(LIBRARY)
    return library if isinstance(library, str) else ""


def device_architecture() -> int | None:
    """Like 90 for sm_90, of the device that a NativeExecutor uses; None without a GPU or its driver."""
    architecture = INT()
    failed = load(LIBRARY).omniad_get_architecture(CALLERS_DEVICE, ctypes.byref(architecture))
    return None if failed else architecture.value


def check(library: ctypes.CDLL, status: int) -> None:
    """Raises the error of the status, with the words of the library."""
    if status:
        raise ERRORS.get(status, EngineError)(library.omniad_last_error().decode(errors="replace"))


def address(array: np.ndarray) -> int:
    """Of its first byte. The short way takes 0.4 us, which `array.ctypes` takes 3 us for."""
    if array.flags.c_contiguous and array.flags.writeable:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))
    return array.ctypes.data


def with_dense_rows(frame: np.ndarray) -> np.ndarray:
    """The frame, copied if its pixels do not follow each other in a row."""
    dense = frame.strides[1:] == (3, 1) and frame.strides[0] >= 3 * frame.shape[1]
    return frame if dense else np.ascontiguousarray(frame)


def described(source: np.ndarray | DeviceArray) -> tuple:
    """The fields of a Frame."""
    rows, columns = source.shape[:2]
    if isinstance(source, DeviceArray):
        place = {None: GPU, UNKNOWN_STREAM: GPU_AFTER_ALL}.get(source.stream, GPU_AFTER_STREAM)
        return (
            source.address,
            rows,
            columns,
            3 * columns,
            place,
            source.stream if place == GPU_AFTER_STREAM else None,
        )
    # Strides of a contiguous array need not mean anything where there is only one row.
    row_bytes = 3 * columns if source.flags.c_contiguous else source.strides[0]
    return address(source), rows, columns, row_bytes, HOST, None
