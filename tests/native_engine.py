"""What tests/test_native_engine.py runs, in a process that finds the stand-in for the driver as libcuda.so.1.

native_engine.py LIBRARY VERB BUNDLE [FILE]: the verbs are the functions below.
"""

import ctypes
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep

import numpy as np
from fake_cuda import OnGpu, OverDlpack

from omniad_edge import Detector, native
from omniad_edge.bundle import read_bundle
from omniad_edge.engine import open_engine
from omniad_edge.errors import OmniADError
from omniad_edge.native import NativeExecutor

CUDA = ctypes.CDLL("libcuda.so.1")
OUT_OF_MEMORY, ILLEGAL_ADDRESS = 2, 700


class LentMemory:
    """Gives FakeCuda's arrays memory that counts as the stand-in's GPU."""

    def __init__(self) -> None:
        self.alive, self.memory = {}, []

    def allocate(self, size: int, kind: str) -> int:
        self.memory.append(ctypes.create_string_buffer(size))
        address = ctypes.addressof(self.memory[-1])
        CUDA.stand_in_lend(ctypes.c_void_p(address), ctypes.c_size_t(size))
        self.alive[address] = kind
        return address


def executor(bundle: str, *batches: int) -> NativeExecutor:
    return NativeExecutor(read_bundle(bundle).parts, batches)


def engine(bundle: str, file: str) -> None:
    """The inputs in `file` through the engine that is chosen; its outputs back into it."""
    chosen = open_engine(read_bundle(bundle))
    print(chosen.backend, chosen.reason)
    with np.load(file) as given:
        pixels, frames = given["pixels"], [given[f"frame{index}"] for index in range(11)]
    padded = np.pad(frames[1], ((0, 0), (2, 3), (0, 0)))
    frames[1] = padded[:, 2:-3]
    frames[2] = np.ascontiguousarray(frames[2][..., ::-1])[..., ::-1]
    frames[3].flags.writeable = pixels.flags.writeable = False
    assert [chosen.frame_size(frame) for frame in frames] == [frame.shape[:2] for frame in frames]
    anomaly_map, pred_score, embedding = chosen.run_all(pixels)
    frame_map, frame_score, frame_embedding, preprocess_ms = chosen.run_frames(frames)
    assert len(preprocess_ms) == len(frames) and min(preprocess_ms) > 0
    outputs = {"maps": anomaly_map, "scores": pred_score, "embeddings": embedding}
    of_frames = {"frame_maps": frame_map, "frame_scores": frame_score, "frame_embeddings": frame_embedding}
    np.savez(file, **outputs, **of_frames)


def detector(bundle: str) -> None:
    result = Detector(bundle)(np.full((40, 50, 3), 7, np.uint8))
    print(json.dumps([result.backend, result.precision, float(result.pred_score)]))


def batches(bundle: str) -> None:
    both = executor(bundle, 8, 1)
    for count in (8, 1):
        both.run(np.zeros((count, both.height, both.width, 3), np.uint8))


def on_gpu(bundle: str) -> None:
    """A frame on the GPU in each way that there is, one run each; then what is not taken."""
    native_one, memory = executor(bundle, 1), LentMemory()
    frame = np.random.default_rng(3).integers(0, 256, (40, 50, 3), np.uint8)
    (wanted,), *_ = native_one.run_frames([frame])
    for make in (OnGpu, OverDlpack):
        array = make(memory, frame)
        assert native_one.frame_size(array) == (40, 50)
        assert (native_one.run_frames([array])[0] == wanted).all()
    assert array.stream == native_one.stream and array.dropped
    for changes in ({"stream": None}, {"version": 2}):
        producer, array = ctypes.c_void_p(), OnGpu(memory, np.zeros_like(frame), **changes)
        CUDA.cuCtxPushCurrent_v2(ctypes.c_void_p(77))
        CUDA.cuStreamCreate(ctypes.byref(producer), 1)
        if "stream" in changes:
            array.__cuda_array_interface__["stream"] = producer.value
        source = ctypes.c_void_p(frame.ctypes.data)
        CUDA.cuMemcpyHtoDAsync_v2(ctypes.c_uint64(array.address), source, ctypes.c_size_t(frame.nbytes), producer)
        CUDA.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        assert (native_one.run_frames([array])[0] == wanted).all()
    for wrong in (
        OnGpu(memory, frame[..., :1]),
        OnGpu(memory, frame, strides=(3, 150, 1)),
        OverDlpack(memory, frame, device=1),
        frame[..., 0],
        "part.png",
    ):
        for use in (native_one.frame_size, lambda value: native_one.run_frames([value])):
            attempt(use, wrong)


def attempt(use, *arguments) -> None:
    """Prints what it raises."""
    try:
        use(*arguments)
        print("nothing")
    except OmniADError as exc:
        print(f"{type(exc).__name__}: {exc}")


def errors(bundle: str) -> None:
    one = executor(bundle, 1)
    pixels = np.zeros((1, one.height, one.width, 3), np.uint8)
    attempt(one.run, pixels[0])
    attempt(one.run, pixels.astype(np.float32))
    attempt(one.run, np.concatenate([pixels] * 2))
    attempt(one.run_frames, [pixels[0]] * 2)
    attempt(one.run_frames, [np.zeros((1, 1 << 21, 3), np.uint8)])
    parts = read_bundle(bundle).parts
    attempt(NativeExecutor, parts | {"fused/plan.json": b"{}"}, [1])
    attempt(NativeExecutor, {}, [1])
    for status in (OUT_OF_MEMORY, ILLEGAL_ADDRESS):
        CUDA.stand_in_fail(2, status)  # the call behind the one that enters the context
        attempt(one.run, pixels)
        CUDA.stand_in_fail(0, 0)
        attempt(one.run, pixels)


def context(bundle: str) -> None:
    """In a thread with a context of its own, and dropped in one without."""
    CUDA.cuCtxPushCurrent_v2(ctypes.c_void_p(99))
    assert native.device_architecture() == 90
    kept = [executor(bundle, 1)]
    CUDA.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
    kept[0].run(np.zeros((1, kept[0].height, kept[0].width, 3), np.uint8))
    kept.clear()
    print(CUDA.stand_in_alive())


def threads(bundle: str) -> None:
    both = executor(bundle, 2, 1)

    def check(index: int) -> bool:
        pixels = np.full((1 + index % 2, both.height, both.width, 3), index, np.uint8)
        anomaly_map, pred_score, _ = both.run(pixels)
        return bool((anomaly_map == index).all() and (pred_score == index).all())

    with ThreadPoolExecutor(8) as pool:
        print(all(pool.map(check, range(100))))


def gil(bundle: str) -> None:
    """How often this thread came to its turn while another was waiting for the GPU."""
    one = executor(bundle, 1)
    pixels = np.zeros((1, one.height, one.width, 3), np.uint8)
    waiting, turns = threading.Thread(target=one.run, args=(pixels,)), 0
    CUDA.stand_in_delay(500)
    waiting.start()
    while waiting.is_alive():
        sleep(0.01)
        turns += 1
    print(turns)


if __name__ == "__main__":
    native.LIBRARY = Path(sys.argv[1])
    assert native.why_absent() == ""
    globals()[sys.argv[2]](*sys.argv[3:])
