"""The native runtime against a stand-in for libcuda, beside what the Python executor does with the same bundle."""

import re
import shutil
import subprocess
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from native_parts import (
    CHANNELS,
    FRONT_BUFFERS,
    ROOT,
    SIZE,
    VALGRIND,
    Expected,
    Native,
    arrays,
    fused_parts,
    self_test_part,
    stand_in_kernels,
    tiny_plan,
    weights_file,
    write_tiny,
)

from omniad_edge.cuda_driver import MEANING, STICKY
from omniad_edge.kernels.resize_tables import TABLES, resample_tables
from omniad_edge.onnx_weights import read_weights
from omniad_edge.self_test import MAX_EMBEDDING_ERROR, MAX_MAP_ERROR, MAX_SCORE_ERROR, SELF_TEST

OK, ENGINE, LOST = 0, 3, 6


@pytest.fixture
def native(native_build, tmp_path) -> Native:
    return Native(native_build, tmp_path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.omniad")


@pytest.fixture(scope="session")
def small(small_run, tmp_path_factory) -> Path:
    """The bundle of a whole network, its kernels stand-ins."""
    pytest.importorskip("triton", reason="the network's plan needs Triton: pip install 'omniad-edge[kernels]'")
    from omniad_edge.export import fused_parts as parts_module
    from omniad_edge.export.bundle_export import export_bundle

    path = tmp_path_factory.mktemp("small_native") / "small.omniad"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts_module, "compile_plan", stand_in_kernels)
        export_bundle(small_run.folder, path, True, targets=["sm_87", "sm_90"])
    return path


@pytest.fixture(params=["tiny", "small"])
def bundle(request) -> Path:
    return request.getfixturevalue(request.param)


def names(calls: list[dict]) -> list[str]:
    return [call["call"] for call in calls if call["call"] not in ("dump", "cuDeviceGetAttribute")]


def arena_of(calls: list[dict], expected: Expected) -> int:
    (address,) = (
        c["address"] for c in calls if c["call"] == "cuMemAlloc" and c["bytes"] == expected.plan.arena_bytes
    )
    return address


def pixels_of(expected: Expected, native: Native) -> np.ndarray:
    """Random pixels of a batch, in a file too."""
    plan = expected.plan
    made = np.random.default_rng(1).integers(0, 256, (plan.batch, plan.height, plan.width, 3), np.uint8)
    (native.scratch / "pixels").write_bytes(made.tobytes())
    return made


def outputs_of(expected: Expected, native: Native) -> list[tuple[np.ndarray, np.ndarray]]:
    """(anomaly_map, pred_score, embedding) of each run, from the program's file."""
    plan, made = expected.plan, np.fromfile(native.scratch / "out", np.float32)
    shapes = [plan.buffers[name].shape for name in ("anomaly_map", "embedding")]
    shapes.insert(1, (plan.batch,))
    ends = np.cumsum([np.prod(shape) for shape in shapes])
    for run in made.reshape(-1, ends[-1]):
        parts = np.split(run, ends[:-1])
        yield tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))


def given_back(pixels: np.ndarray, expected: Expected) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the stand-in's kernels make of pixels: the first of them, as maps, peaks and embeddings."""
    flat, plan = np.float32(pixels.reshape(-1)), expected.plan
    anomaly_map, peaks, embedding = (
        np.resize(flat, plan.buffers[name].shape) for name in ("anomaly_map", "peaks", "embedding")
    )
    return anomaly_map, peaks.max(1), embedding


# Beside the Python executor


@pytest.mark.parametrize("batch, arch", [(1, 90), (3, 90), (1, 87)])
def test_the_driver_is_called_as_by_the_python_executor(native, bundle, batch, arch):
    if arch == 87 and bundle.name == "tiny.omniad":
        pytest.skip("it has kernels for sm_90 alone")
    expected = Expected.of(bundle, batch, arch)
    pixels = pixels_of(expected, native)
    words = ("run", bundle, batch, native.scratch / "pixels", native.scratch / "out")
    printed, calls = native.recorded(*words, OMNIAD_ARCH=str(arch))
    assert printed == ["0 "] * 3
    expected.graph.run({"pixels": pixels})
    python = [name for name in expected.cuda.names() if name not in ("cuDeviceGetAttribute", "cuEventCreate")]
    ours = [name for name in names(calls) if name != "cuEventCreate"]
    start, end = python.index("cuModuleLoadData"), len(python)
    at = ours.index("cuModuleLoadData")
    assert ours[at : at + end - start] == python[start:]
    check_launches(calls, expected, arch)
    made, *none = outputs_of(expected, native)
    assert not none
    for given, wanted in zip(made, given_back(pixels, expected), strict=True):
        assert (given == wanted).all()


def check_launches(calls: list[dict], expected: Expected, arch: int) -> None:
    """Eagerly once, then in the capture: the same kernels, grids, blocks, shared memory and parameters."""
    launches = [call for call in calls if call["call"] == "cuLaunchKernelEx"]
    count, arena = len(expected.plan.launches), arena_of(calls, expected)
    python_arena = int(expected.graph.arena)
    assert [launch["capturing"] for launch in launches] == [False] * count + [True] * count
    images, modules = [], []
    for call in calls:
        images += [call["image"]] if call["call"] == "cuModuleLoadData" else []
        modules += [call["module"]] if call["call"] == "cuModuleGetFunction" else []
    code = dict(zip(dict.fromkeys(modules), images, strict=True))
    for index, launch in enumerate(launches):
        wanted = expected.cuda.launches[index % count]
        assert code[launch["function"]] == wanted.code
        for key in ("grid", "block"):
            assert tuple(launch[key]) == getattr(wanted, key)
        assert launch["shared"] == wanted.shared
        assert launch["attributes"] == ([[6, 1]] if arch >= 90 else [])
        moved = [
            v - arena if v >= arena and k == "p" else v
            for v, k in zip(launch["values"], wanted.code["parameters"], strict=True)
        ]
        there = [v - python_arena if v >= python_arena else v for v in wanted.values]
        assert moved == there


@pytest.mark.parametrize("batch", [1, 2])
def test_weights_in_the_arena_are_what_numpy_packs(native, bundle, batch):
    expected = Expected.of(bundle, batch)
    pixels_of(expected, native)
    words = ("run", bundle, batch, native.scratch / "pixels", native.scratch / "out")
    native.recorded(*words, OMNIAD_DUMP=str(native.scratch / "arena"))
    arena = (native.scratch / "arena").read_bytes()
    assert len(arena) == expected.plan.arena_bytes
    for name, value in expected.weights.items():
        offset = expected.plan.buffers[name].offset_bytes
        assert arena[offset : offset + value.nbytes] == value.tobytes(), name


@pytest.mark.parametrize("padding", [0, 7])
def test_frames_of_any_size_go_through_the_front(native, bundle, padding):
    """Tables and frame as the kernel reads them, to the last bit; the second frame of a size writes no tables."""
    expected = Expected.of(bundle, 2)
    sizes = [(31, 40), (31, 40), (700, 333), (9, 2000), (64, 64), (32, 32)]
    rng = np.random.default_rng(2)
    frames = [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    rows = [np.pad(frame.reshape(len(frame), -1), ((0, 0), (0, padding))) for frame in frames]
    (native.scratch / "frames").write_bytes(b"".join(row.tobytes() for row in rows))
    words = ("frames", bundle, 2, native.scratch / "out", native.scratch / "frames", padding)
    printed, calls = native.recorded(*words, *(side for size in sizes for side in size))
    assert printed == ["0 "] * 5
    shown = [bytes.fromhex(call["hex"]) for call in calls if call["call"] == "dump"]
    for index, frame in enumerate(frames):
        tables = resample_tables(*sizes[index], expected.plan.height, expected.plan.width)
        wanted = [frame.tobytes(), *(getattr(tables, name).tobytes() for name in TABLES)]
        assert shown[6 * index : 6 * index + 6] == wanted
    for index in range(0, 6, 2):
        expected.graph.run_frames(frames[index : index + 2])
    python = [name for name in expected.cuda.names() if name not in ("cuDeviceGetAttribute", "cuEventCreate")]
    ours = [name for name in names(calls) if name != "cuEventCreate"]
    start, at = python.index("cuModuleLoadData"), ours.index("cuModuleLoadData")
    assert ours[at : at + len(python) - start] == python[start:]
    check_front(calls, expected)
    for index, (anomaly_map, *_) in enumerate(outputs_of(expected, native)):
        image = expected.plan.height * expected.plan.width * 3
        resized = np.concatenate([np.resize(frame, image) for frame in frames[2 * index : 2 * index + 2]])
        assert (anomaly_map == given_back(resized, expected)[0]).all()


def check_front(calls: list[dict], expected: Expected) -> None:
    arena, plan = arena_of(calls, expected), expected.plan
    fronts = [c for c in calls if c["call"] == "cuLaunchKernelEx"][2 * len(plan.launches) :]
    staging = [c["address"] for c in calls if c["call"] == "cuMemAlloc"][1:]
    assert len(fronts) == 6 and len(staging) == 2  # 31 x 40, and 700 x 333 in its place
    for index, front in enumerate(fronts):
        assert front["grid"] == [plan.front.programs, 1, 1] and front["attributes"] == []
        assert front["values"][0] == staging[index >= 2]
        offsets = [plan.buffers[name].offset_bytes for name in FRONT_BUFFERS[1:]]
        offsets[-1] += index % 2 * plan.height * plan.width * 3
        assert front["values"][1:] == [arena + offset for offset in offsets] + [0, 0]


def test_tables_are_numpys_for_many_sizes(native, tiny):
    """Sizes around halvings and rounding; 4K and a line scan camera's."""
    sizes = [
        (1, 1),
        (127, 128),
        (128, 128),
        (129, 257),
        (256, 300),
        (511, 513),
        (1023, 1080),
        (16, 8000),
        (2160, 3840),
    ]
    frames = b"".join(bytes(3 * rows * columns) for rows, columns in sizes)
    (native.scratch / "frames").write_bytes(frames)
    words = ("frames", tiny, 1, native.scratch / "out", native.scratch / "frames", 0)
    _, calls = native.recorded(*words, *(side for size in sizes for side in size))
    shown = [bytes.fromhex(call["hex"]) for call in calls if call["call"] == "dump"]
    for index, size in enumerate(sizes):
        tables = resample_tables(*size, SIZE, SIZE)
        assert shown[6 * index + 1 : 6 * index + 6] == [getattr(tables, name).tobytes() for name in TABLES], size


def test_enqueue_copies_and_launches_and_nothing_else(native, bundle):
    expected = Expected.of(bundle, 2)
    pixels = pixels_of(expected, native)
    words = ("enqueue", bundle, 2, native.scratch / "pixels", native.scratch / "out")
    printed, calls = native.recorded(*words)
    assert printed == ["0 "] * 6
    pushed = [i for i, c in enumerate(calls) if c["call"] == "cuCtxPushCurrent"]
    runs = [names(calls[start : start + 200]) for start in pushed[2:]]  # the first are to open, and the caller's
    copies = "cuMemcpyDtoDAsync"
    queued = [copies, "cuGraphLaunch", copies, copies, "cuEventRecord", "cuCtxPopCurrent"]
    assert runs[0][:8] == ["cuCtxPushCurrent", "cuStreamIsCapturing", *queued]
    assert runs[1][:9] == ["cuCtxPushCurrent", "cuStreamIsCapturing", "cuStreamWaitEvent", *queued]
    launches = ["cuLaunchKernelEx"] * len(expected.plan.launches)
    captured = ["cuCtxPushCurrent", "cuStreamIsCapturing", copies, *launches, copies, copies, "cuCtxPopCurrent"]
    assert runs[2][: len(captured)] == captured
    assert runs[3][:3] == ["cuCtxPushCurrent", "cuStreamWaitEvent", "cuMemcpyHtoDAsync"]
    anomaly_map, *_ = next(iter(outputs_of(expected, native)))
    assert (anomaly_map == given_back(pixels, expected)[0]).all()


def test_everything_is_freed_in_reverse(native, tiny):
    pixels_of(Expected.of(tiny, 1), native)
    _, calls = native.recorded("run", tiny, 1, native.scratch / "pixels", native.scratch / "out")
    modules = [c["module"] for c in calls if c["call"] == "cuModuleGetFunction"]
    unloaded = [c["handle"] for c in calls if c["call"] == "cuModuleUnload"]
    assert unloaded == list(dict.fromkeys(reversed(modules))) and len(unloaded) > 2
    freeing = names(calls)[-names(calls)[::-1].index("cuCtxPushCurrent") :]
    assert freeing == [
        *("cuGraphExecDestroy", "cuStreamSynchronize", "cuEventDestroy", "cuEventDestroy", "cuMemFreeHost"),
        *(
            "cuEventDestroy",
            "cuStreamDestroy",
            "cuMemFree",
            *["cuModuleUnload"] * len(unloaded),
            "cuCtxPopCurrent",
        ),
        "cuDevicePrimaryCtxRelease",
    ]


# The self-test


def test_the_self_test_passes_in_every_batch(native, tiny):
    printed, calls = native.recorded("selftest", tiny, 1, 3, 8)
    assert printed == ["0 "] * 3
    assert names(calls).count("cuGraphLaunch") == 3 + 1 + 1


GREY = np.full((3, SIZE, SIZE), 7, np.float32)
LAST = np.zeros_like(GREY)
LAST[-1, -1, -1] = 1
EMBEDDING = np.full((3, CHANNELS), 7, np.float32)
FIRST_CHANNEL, LAST_CHANNEL = np.zeros_like(EMBEDDING), np.zeros_like(EMBEDDING)
FIRST_CHANNEL[0, 0] = LAST_CHANNEL[-1, -1] = 1


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"anomaly_map": GREY + np.float32(4e-4) * LAST}, "3 its anomaly map of .* is 0.0004.* off, 0.0003 is"),
        ({"anomaly_map": GREY + np.nan * LAST}, "3 its anomaly map of a self-test image is -?nan off"),
        (
            {"anomaly_map": GREY + np.float32(2e-4) * LAST, "deviation": 5e-3},
            r"3 its score in standard deviations of a self-test image is 0.0[34]\d* off, 0.02 is allowed",
        ),
        ({"anomaly_map": GREY + np.float32(2e-4) * LAST, "deviation": 0.1}, "0 $"),
        ({"pixels": np.full((3, SIZE, SIZE, 3), 8, np.uint8), "anomaly_map": GREY}, "3 its anomaly map .* 1 off"),
        (
            {"embedding": EMBEDDING + np.float32(0.08) * LAST_CHANNEL},
            "3 its embedding of .* is 0.011.* off, 0.01 is",
        ),
        ({"embedding": EMBEDDING + np.float32(0.06) * LAST_CHANNEL}, "0 $"),
        ({"embedding": EMBEDDING + np.nan * FIRST_CHANNEL}, "3 its embedding of a self-test image is -?nan off"),
        ({"embedding": EMBEDDING[:, :-1]}, "2 .*expected an array embedding of 2 axes"),
        ({"anomaly_map": GREY[:2]}, "2 .*expected an array anomaly_map of 3 axes"),
        ({"score_deviation": np.zeros(2, np.float32)}, "2 .*expected an array score_deviation of 0 axes"),
        (
            {"pixels": np.zeros((0, SIZE, SIZE, 3), np.uint8), "anomaly_map": GREY[:0]},
            "2 .*expected an array pixels",
        ),
    ],
)
def test_a_self_test_that_fails_says_why(native, changes, words):
    parts = fused_parts(tiny_plan(), weights_file(arrays())) | {SELF_TEST: self_test_part(**changes)}
    made = native.run("selftest", write_tiny(native.scratch / "other.omniad", parts=parts), 1)
    opened, tested, closed = made.stdout.splitlines()
    assert re.match(words, tested) and (opened, closed) == ("0 ", "0 ")


@pytest.mark.parametrize("pixel", [-1, 256, np.nan])
def test_a_self_test_of_what_are_no_pixels(native, pixel):
    test = weights_file(
        read_weights(self_test_part()) | {"pixels": np.full((3, SIZE, SIZE, 3), pixel, np.float16)}
    )
    parts = fused_parts(tiny_plan(), weights_file(arrays())) | {SELF_TEST: test}
    made = native.run("selftest", write_tiny(native.scratch / "other.omniad", parts=parts), 1)
    assert "2 fused/self_test.onnx: expected pixels from 0 to 255" in made.stdout


def test_a_bundle_without_self_test(native):
    parts = fused_parts(tiny_plan(), weights_file(arrays()))
    made = native.run("selftest", write_tiny(native.scratch / "other.omniad", parts=parts), 1)
    assert "2 the bundle has no fused/self_test.onnx; export it again" in made.stdout


def test_limits_of_the_self_test_are_those_of_python():
    text = (ROOT / "kernels" / "native" / "self_test.cpp").read_text()
    found = re.findall(r"kMAX_(MAP|SCORE|EMBEDDING)_ERROR = ([\d.e-]+)[,;]", text)
    limits = {"MAP": MAX_MAP_ERROR, "SCORE": MAX_SCORE_ERROR, "EMBEDDING": MAX_EMBEDDING_ERROR}
    assert {name: float(value) for name, value in found} == limits


# Failures of the driver


def test_a_failure_at_any_call_has_a_code_and_words_and_leaks_nothing(native, tiny):
    made = native.run("faults", tiny, 2)
    assert made.returncode == 0, made.stderr
    seen = check_faults(made.stdout, "CUDA_ERROR_OUT_OF_MEMORY: the GPU or the host has too little free memory")
    assert {
        "cuInit",
        "cuModuleLoadData",
        "cuLaunchKernelEx",
        "cuGraphInstantiate",
        "cuStreamWaitEvent",
    } <= seen.keys()


def test_after_a_sticky_error_everything_is_freed_too(native, tiny):
    made = native.run("faults", tiny, 700, "once")
    assert made.returncode == 0, made.stderr
    check_faults(made.stdout, "CUDA_ERROR_ILLEGAL_ADDRESS: .*start the process anew.*dmesg", LOST)


def check_faults(printed: str, words: str, error: int = ENGINE) -> Counter:
    """How often each function failed. What happens while a runtime is closed may fail unseen, once in a life."""
    seen, unseen = Counter(), Counter()
    for line in printed.splitlines():
        alive, name, status, said = line.split(" ", 3)
        seen[name] += 1
        # Who cannot have the context back to close can free nothing: it is destroyed, and with it all that it had.
        assert alive == "0" or (name, status) == ("cuCtxPushCurrent", "0"), line
        if int(status) == OK:
            unseen[name] += 1
        else:
            assert int(status) == error and re.match(f"{name}(WithFlags)?: {words}", said), line
    assert all(unseen[name] <= 1 for name in ("cuStreamSynchronize", "cuEventSynchronize", "cuCtxPushCurrent"))
    gives_back = (
        "cuStreamSynchronize|cuEventSynchronize|cuCtxPushCurrent|.*(Destroy|Free|Unload|Release|PopCurrent)"
    )
    assert all(re.match(gives_back, name) for name in unseen), unseen
    return seen


def test_nothing_leaks_and_no_byte_is_read_that_is_not_there(native, tiny):
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is not on this machine")
    made = native.run("faults", tiny, 2, "once", under=VALGRIND)
    assert made.returncode == 0, made.stderr[-3000:]
    check_faults(made.stdout, "CUDA_ERROR_OUT_OF_MEMORY")


def test_misuse_is_refused_with_words(native, tiny):
    made = native.run("misuse", tiny)
    assert made.returncode == 0, (made.stdout, made.stderr)
    wanted = [
        *("1 path: expected a pointer", "1 runtime: expected a pointer", "1 batches: expected a pointer"),
        *("1 batches: expected at least one", "1 batches: expected numbers from 1 to 64, got 0", "1 .*, got 65"),
        *["3 cuDeviceGet: CUDA_ERROR_INVALID_DEVICE: no usable GPU"] * 2,
        *("1 content of a part: expected a pointer", "3 the bundle has no GPU kernels; export it with"),
        *("1 architecture: expected a pointer", "0 ", *["1 runtime: expected a pointer"] * 2, "0 "),
        *("1 pixels: expected a pointer", "1 pred_score: expected a pointer", "1 images: expected 1 or 3; got 2"),
        *("1 pixels, anomaly_map, peaks: expected addresses", "1 images: expected 1 or 3; got -1"),
        *("1 frame: .* at no address", "1 frame: .* 0 rows", "1 frame: .* 2 bytes apart"),
        *("1 frame: expected less than 2 GiB", "1 frame: .*512 a side are the limit"),
        *(
            "1 frame: expected BGR rows",
            "1 frame: expected rows that follow each other on the GPU, .* 4 bytes apart",
        ),
        *("1 frame: expected a place of omniad_place, got 4", "1 frames: expected 1 or 3; got 0", "0 ", "0 "),
    ]
    for line, words in zip(made.stdout.splitlines(), wanted, strict=True):
        assert re.match(words, line), (line, words)


def test_without_a_driver_or_kernels_it_says_what_to_do(native, tiny):
    if (
        shutil.which("ldconfig")
        and "libcuda.so.1" in subprocess.run(["ldconfig", "-p"], capture_output=True, text=True).stdout
    ):
        pytest.skip("this machine has an NVIDIA driver")
    made = native.run("open", tiny, tiny, LD_LIBRARY_PATH="")
    for line in made.stdout.splitlines():
        assert re.match(r"3 the NVIDIA driver was not found: .*libcuda.so.1.*; install it", line)
    made = native.run("open", tiny, OMNIAD_ARCH="87")
    assert made.stdout == "3 the bundle has kernels for sm_90; export it with --targets sm_87 too\n"


# The declarations, the library and the example


def test_declarations_are_those_of_cuda_h():
    header = next(filter(Path.is_file, map(Path, ("/usr/local/cuda/include/cuda.h", "/usr/include/cuda.h"))), None)
    if header is None or shutil.which("g++") is None:
        pytest.skip("no CUDA toolkit, or no g++, on this machine")
    command = ["g++", "-std=c++17", "-fsyntax-only", f"-I{header.parent}", f"-I{ROOT / 'kernels' / 'native'}"]
    made = subprocess.run([*command, ROOT / "tests" / "cuda_header_check.cpp"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


def test_errors_with_a_meaning_are_those_of_the_python_driver():
    text = (ROOT / "kernels" / "native" / "cuda_api.h").read_text()
    known = dict(re.findall(r"X\((CUDA_ERROR_\w+), \d+, (\w+)\)", text))
    assert {name for name, meaning in known.items() if meaning == "kSTICKY"} == set(STICKY)
    assert known.keys() - set(STICKY) == MEANING.keys()


def test_the_library_exports_the_c_interface_and_needs_nothing_of_cuda(native):
    library = native.folder / "libomniad_runtime.so"
    header = (ROOT / "kernels" / "native" / "omniad.h").read_text()
    declared = set(re.findall(r"OMNIAD_API [\w *]+?\b(omniad_\w+)\(", header))
    exported = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True).stdout
    assert {line.split()[-1] for line in exported.splitlines() if " T " in line} == declared
    needed = subprocess.run(["ldd", library], capture_output=True, text=True).stdout
    assert not re.search("cuda|nvinfer|torch", needed)
    assert native.run("version").stdout.strip() == version("omniad-edge")
    c = ["gcc", "-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", "-x", "c"]
    made = subprocess.run([*c, ROOT / "kernels" / "native" / "omniad.h"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


def test_the_example_prints_a_score_for_each_frame(native, tiny):
    frames = np.random.default_rng(5).integers(0, 256, (3, 20, 30, 3), np.uint8)
    raw = native.scratch / "frames.bgr"
    raw.write_bytes(frames.tobytes())
    made = native.run(tiny, raw, 20, 30, program="omniad_example")
    wanted = [np.resize(np.resize(frame, SIZE * SIZE * 3), 4).max() for frame in frames]
    assert made.returncode == 0 and [float(line) for line in made.stdout.splitlines()] == wanted
    raw.write_bytes(frames.tobytes()[:-1])
    made = native.run(tiny, raw, 20, 30, program="omniad_example")
    assert made.returncode == 1 and "the last frame has 1799 bytes, expected 1800" in made.stderr
    for words, code in (((tiny, raw, 20, "x"), 2), ((raw, raw, 20, 30), 1), ((tiny, raw / "no", 20, 30), 1)):
        made = native.run(*words, program="omniad_example")
        assert made.returncode == code and made.stderr
