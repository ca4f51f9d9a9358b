"""The fused engine through the native runtime against the stand-in for libcuda, beside the Python executor."""

import ctypes
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_cuda import OnGpu
from native_parts import (
    ROOT,
    SIZE,
    Expected,
    Native,
    arrays,
    fused_parts,
    self_test_part,
    tiny_plan,
    weights_file,
    write_tiny,
)
from test_native_runtime import check_launches, given_back, names

from omniad_edge import native as native_module
from omniad_edge.errors import EngineError
from omniad_edge.native import NativeExecutor
from omniad_edge.self_test import SELF_TEST

FRAME_SIZES = [
    (31, 40),
    (31, 40),
    (60, 33),
    (9, 200),
    (64, 64),
    (32, 32),
    (1, 1),
    (1, 90),
    (90, 1),
    (33, 7),
    (50, 60),
]


class PythonNative(Native):
    """Runs words of tests/native_engine.py."""

    def run(self, *words: object, **options):
        script = (Path(__file__).with_name("native_engine.py"), self.folder / "libomniad_runtime.so")
        return super().run(*script, *words, program=sys.executable, **options)

    def said(self, *words: object, **options) -> list[str]:
        made = self.run(*words, **options)
        assert made.returncode == 0, (made.stdout, made.stderr)
        return made.stdout.splitlines()


@pytest.fixture
def native(native_build, tmp_path) -> PythonNative:
    return PythonNative(native_build, tmp_path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny_engine") / "tiny.omniad")


# What it computes


def test_any_images_and_frames_through_the_engine_that_is_chosen(native, tiny):
    rng, file = np.random.default_rng(7), native.scratch / "file.npz"
    pixels = rng.integers(0, 256, (11, SIZE, SIZE, 3), np.uint8)
    frames = [rng.integers(0, 256, (*size, 3), np.uint8) for size in FRAME_SIZES]
    np.savez(file, pixels=pixels, **{f"frame{index}": frame for index, frame in enumerate(frames)})
    (said,) = native.said("engine", tiny, file)
    assert said == "fused fused kernels in fp16: the bundle has them for this GPU; launched from C++"
    resized = np.stack([np.resize(frame, (SIZE, SIZE, 3)) for frame in frames])  # as the stand-in does
    with np.load(file) as made:
        for images, kind in ((pixels, ""), (resized, "frame_")):
            wanted = [given_back(some, Expected.of(tiny, len(some))) for some in np.split(images, (8, 9, 10))]
            for name, parts in zip(("maps", "scores", "embeddings"), zip(*wanted, strict=True), strict=True):
                assert (made[f"{kind}{name}"] == np.concatenate(parts)).all()


def test_a_detector(native, tiny):
    (said,) = native.said("detector", tiny)
    assert json.loads(said) == ["fused", "fp16", 7.0]


def test_a_self_test_that_fails_is_refused(native, tmp_path):
    test = self_test_part(anomaly_map=np.full((3, SIZE, SIZE), 7.01, np.float32))
    parts = fused_parts(tiny_plan(), weights_file(arrays())) | {SELF_TEST: test}
    made = native.run("detector", write_tiny(tmp_path / "other.omniad", parts=parts))
    assert re.search(r"EngineError: backend fused: its anomaly map of a self-test image is 0\.01 off", made.stderr)


# What it calls


def test_batch_sizes_share_weights_and_memory(native, tiny):
    """One arena, each kernel and weight once; a graph for each, which differ in their grids alone."""
    eight, one = Expected.of(tiny, 8), Expected.of(tiny, 1)
    _, calls = native.recorded("batches", tiny)
    called, count = names(calls), len(eight.plan.launches)
    opening = called[: called.index("cuGraphLaunch")]
    assert opening.count("cuMemAlloc") == 1 and opening.count("cuGraphInstantiate") == 2
    assert opening.count("cuMemcpyHtoDAsync") == len(eight.weights) + 1  # and the first run's pixels
    python = [name for name in eight.cuda.names() if name not in ("cuDeviceGetAttribute", "cuEventCreate")]
    ours = [name for name in opening if name != "cuEventCreate"]
    start, end = python.index("cuModuleLoadData"), python.index("cuGraphUpload") + 1
    at = ours.index("cuModuleLoadData")
    assert ours[at : at + end - start] == python[start:end]
    places = [place for place, call in enumerate(calls) if call["call"] == "cuLaunchKernelEx"]
    check_launches(calls[: places[2 * count]], eight, 90)
    smaller = [calls[place] for place in places[2 * count :]]
    assert len(smaller) == count
    for launch, same, alone in zip(smaller, places[count:], one.cuda.launches, strict=False):
        assert tuple(launch["grid"]) == alone.grid and launch["capturing"]
        assert launch["function"] == calls[same]["function"]
        # The number of a first call's programs is the one parameter that is not an address.
        kinds = alone.code["parameters"]
        for kind, value, larger, wanted in zip(
            kinds, launch["values"], calls[same]["values"], alone.values, strict=True
        ):
            assert value == (wanted if kind == "i" else larger)
    copied = [call["bytes"] for call in calls if call["call"] == "cuMemcpyDtoHAsync"]
    assert copied == [size * eight.plan.batch for size in copied[3:]] + copied[3:]


def test_frames_on_the_gpu_are_read_where_they_lie_once_they_are_written(native, tiny):
    said, calls = native.recorded("on_gpu", tiny)
    expected = Expected.of(tiny, 1)
    runs = [list(run) for run in split_at(names(calls), "cuCtxPushCurrent")]
    host, interface, dlpack = [run for run in runs if "cuGraphLaunch" in run][:3]
    after_stream, after_all = [run for run in runs if {"cuStreamWaitEvent", "cuCtxSynchronize"} & set(run)]
    cuda, frame = expected.cuda, np.zeros((40, 50, 3), np.uint8)
    expected.graph.run_frames([frame])
    for ours, changes in (
        (interface, {}),
        (dlpack, {}),
        (after_stream, {"stream": 1}),
        (after_all, {"version": 2}),
    ):
        cuda.queues[1] = []
        cuda.calls.clear()
        expected.graph.run_frames([OnGpu(cuda, frame, **changes)])
        assert ours == cuda.names()
    assert "cuMemcpyHtoDAsync" in host and "cuMemcpyHtoDAsync" not in interface + dlpack + after_stream + after_all
    wanted = [
        r"InputError: frame: expected a C-contiguous uint8 BGR array .*got uint8 \(40, 50, 1\)",
        r"InputError: frame: expected a C-contiguous .*got uint8 \(40, 50, 3\), not C-contiguous",
        "InputError: frame: expected an array on GPU 0, got one on GPU 1",
        "InputError: frame: expected a uint8 BGR array .*COLOR_GRAY2BGR",
        "InputError: frame: expected a uint8 BGR array .*read_image",
    ]
    for line, words in zip(said, np.repeat(wanted, 2), strict=True):
        assert re.match(words, line), (line, words)


def split_at(called: list[str], name: str):
    """The calls from each of `name` on, up to the next."""
    places = [place for place, other in enumerate(called) if other == name]
    for start, end in zip(places, [*places[1:], len(called)], strict=True):
        yield called[start:end]


def test_a_threads_own_context_is_used(native, tiny):
    (alive,), calls = native.recorded("context", tiny)
    assert alive == "0" and not {"cuDevicePrimaryCtxRetain", "cuDeviceGet"} & set(names(calls))


# Threads


def test_threads_take_turns(native, tiny):
    assert native.said("threads", tiny) == ["True"]


def test_other_threads_run_while_one_waits_for_the_gpu(native, tiny):
    (turns,) = native.said("gil", tiny)
    assert int(turns) >= 5


# What goes wrong


def test_errors_are_of_our_tree_with_the_words_of_the_library(native, tiny):
    lost = "EngineLostError: cuMemcpyHtoDAsync: CUDA_ERROR_ILLEGAL_ADDRESS: the GPU failed.*start the process anew"
    wanted = [
        r"InputError: pixels: expected uint8 \(32, 32, 32, 3\); got uint8 \(32, 32, 3\)",
        r"InputError: pixels: expected uint8 \(1, 32, 32, 3\); got float32",
        "InputError: images: expected 1; got 2",
        "InputError: frames: expected 1; got 2",
        "InputError: frame: .*512 a side are the limit",
        "BundleError: bundle: fused/plan.json: .*export again",
        "EngineError: the bundle has no GPU kernels; export it with --targets sm_90",
        "EngineError: cuMemcpyHtoDAsync: CUDA_ERROR_OUT_OF_MEMORY: the GPU or the host has too little",
        "nothing",
        *(lost, lost),
    ]
    for line, words in zip(native.said("errors", tiny), wanted, strict=True):
        assert re.match(words, line), (line, words)


def test_why_it_is_absent(native, monkeypatch, tmp_path):
    (tmp_path / "text.so").write_text("no library")
    stand_in = native.folder / "stand_in" / "libcuda.so.1"  # a library, but not this one
    for path, words in (
        (tmp_path / "none.so", "none.so is not there; pip builds it where it finds a C.. compiler"),
        (tmp_path / "text.so", "text.so cannot be loaded: .*install omniad-edge again"),
        (stand_in, "cannot be loaded: .*omniad_abi"),
    ):
        monkeypatch.setattr(native_module, "LIBRARY", path)
        assert re.search(words, native_module.why_absent())
        with pytest.raises(EngineError, match=words):
            NativeExecutor({}, [1])


def test_a_library_of_another_abi_is_not_used(native, monkeypatch):
    path = native.folder / "libomniad_runtime.so"
    monkeypatch.setattr(native_module, "LIBRARY", path)
    assert native_module.why_absent() == ""
    native_module.load.cache_clear()
    monkeypatch.setattr(native_module, "ABI", 1)
    assert re.search(r"another version \(ABI 3, expected 1\)", native_module.why_absent())
    native_module.load.cache_clear()


def test_the_module_follows_the_header(native):
    header = (ROOT / "kernels" / "native" / "omniad.h").read_text()
    assert re.search(r"#define OMNIAD_ABI (\d+)", header)[1] == str(native_module.ABI)
    assert re.search(r"OMNIAD_CALLERS_DEVICE \((-?\d+)\)", header)[1] == str(native_module.CALLERS_DEVICE)
    for name, types in native_module.FUNCTIONS.items():
        (parameters,) = re.findall(rf"\b{name}\((.*?)\);", header, re.DOTALL)
        kinds = [ctypes.c_void_p if "*" in given else ctypes.c_int for given in parameters.split(",")]
        assert list(types) == kinds, name
    structures = native_module.Part, native_module.Info, native_module.Frame
    for made, tag in zip(structures, ("part", "info", "frame"), strict=True):
        body = re.search(rf"struct omniad_{tag} \{{(.*?)\}}", header, re.DOTALL)[1]
        fields = re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL).split(";")
        declared = [re.sub(r".*[ *]", "", name) for field in fields for name in field.strip().split(",") if name]
        assert [name for name, _ in made._fields_] == declared
    layout = Native(native.folder, native.scratch).run("layout").stdout.split()
    assert layout == [str(ctypes.sizeof(made)) for made in structures]
