"""The native runtime built with its stand-in for the driver; small bundles for it; what the stand-in recorded."""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from bundles import manifest
from fake_cuda import FakeCuda

from omniad_edge.bundle import Bundle, read_bundle, write_bundle
from omniad_edge.cuda_graph import CudaGraphPlan
from omniad_edge.fused import read_kernels
from omniad_edge.kernels.pack import KERNEL_ROW, RECIPES, pack
from omniad_edge.kernels.plan import Buffer, Call, Kernel, Launch, Plan
from omniad_edge.kernels.resize_tables import MAX_TAPS
from omniad_edge.kernels.schedule import arrange, for_batch
from omniad_edge.onnx_weights import read_weights
from omniad_edge.self_test import SELF_TEST

ROOT = Path(__file__).resolve().parents[1]
CHANNELS = 6  # of the embedding
SIZE = 32  # of the tiny plan's images; the least that a bundle may have
VALGRIND = ("valgrind", "-q", "--error-exitcode=99", "--leak-check=full", "--errors-for-leak-kinds=definite")
FRONT_BUFFERS = ("frame", "geometry", "row_start", "row_weight", "column_start", "column_weight", "pixels")


def tensorrt_headers() -> list[Path]:
    """Folders of NvInferRuntime.h, of one TensorRT or several: the plugin is built with the first."""
    return [Path(folder) for folder in os.environ.get("TENSORRT_INCLUDE_DIR", "").split(os.pathsep) if folder]


def build_native(folder: Path) -> Path:
    """Everything of CMakeLists.txt, in `folder`; skips without its tools."""
    for tool in ("cmake", "g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"the native runtime is built with cmake and g++; {tool} is not on this machine")
    options = ["-DOMNIAD_NATIVE_TESTS=ON", "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS=-O1 -Werror"]
    options += [f"-DTensorRT_INCLUDE_DIR={headers}" for headers in tensorrt_headers()[:1]]
    for command in (["cmake", "-S", ROOT, "-B", folder, *options], ["cmake", "--build", folder, "-j1"]):
        made = subprocess.run(command, capture_output=True, text=True)
        assert made.returncode == 0, made.stdout + made.stderr
    return folder


@dataclass(frozen=True)
class Native:
    """The build in `folder`; files of its runs go to `scratch`."""

    folder: Path
    scratch: Path

    def run(self, *words: object, program: str = "native_program", under: tuple = (), **environment: str):
        """The finished process; the stand-in's folder is where libcuda.so.1 is looked for."""
        variables = {key: value for key, value in os.environ.items() if not key.startswith("OMNIAD_")}
        variables |= {"LD_LIBRARY_PATH": str(self.folder / "stand_in")} | environment
        command = [*under, self.folder / program, *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=120)

    def recorded(self, *words: object, **options) -> tuple[list[str], list[dict]]:
        """The lines printed, and the driver's calls, by a run that must succeed."""
        trace = self.scratch / "trace"
        made = self.run(*words, OMNIAD_TRACE=str(trace), **options)
        assert made.returncode == 0, (made.stdout, made.stderr)
        return made.stdout.splitlines(), [
            json.loads(line + "}") for line in trace.read_text().splitlines() if line
        ]


def weights_file(arrays: dict[str, np.ndarray]) -> bytes:
    """As `export.onnx_graph` writes them, without the onnx package."""

    def varint(value: int) -> bytes:
        return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)

    def field(key: int, content: bytes) -> bytes:
        return varint(key << 3 | 2) + varint(len(content)) + content

    graph = b""
    for name, array in arrays.items():
        shape = b"".join(varint(1 << 3) + varint(size) for size in array.shape)
        kind = varint(2 << 3) + varint({"float32": 1, "float16": 10}[str(array.dtype)])
        graph += field(5, shape + kind + field(8, name.encode()) + field(9, array.tobytes()))
    return field(7, graph)


def arrays(half: bool = True) -> dict[str, np.ndarray]:
    """One for every recipe's sources, with what is hard to round: subnormal, huge, -0 and halfway numbers."""
    rng = np.random.default_rng(0)
    shapes = {
        "a": (6, 5, 3, 3),
        "first": (4, 3, 7, 7),
        "mean": (3,),
        "depth": (6, 1, 5, 5),
        "m1": (3, 8),
        "m2": (5, 8),
    }
    shapes |= {"b1": (9,), "b2": (9,), "constant": (2, 7, 4), "project": (8, 8), "bias": (8,), "mix": (8, 8)}
    made = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    steps = np.arange(1, 70, dtype=np.float64) * 2.0**-25
    hard = np.concatenate((steps, [65504, 65519.99, 65520, 1e9, -0.0, 2049, 2051, 1 + 2.0**-11, 1 + 3 * 2.0**-11]))
    made["hard"] = np.concatenate(
        (hard, -hard, rng.normal(size=500) * 10.0 ** rng.integers(-9, 5, 500)), dtype=np.float32
    )
    halves = ("a", "m2", "b2", "constant", "mix") if half else ()
    return {name: value.astype(np.float16) if name in halves else value for name, value in made.items()}


RECIPES_OF_ALL = (
    ("same", "hard"),
    ("same", "a"),
    ("convolution", "a"),
    ("first_convolution", "first"),
    ("pixel_mean", "mean"),
    ("depthwise", "depth"),
    ("stack", "m1", "m2"),
    ("added", "b1", "b2"),
    ("added", "b1"),
    ("token_bias", "constant", "project", "bias"),
    ("token_bias", "constant", "project", ""),
    ("token_bias", "constant", "project", "bias", "mix"),
    ("half_bias", "bias"),
)


def tiny_plan() -> Plan:
    """Every recipe in fp16 and fp32, launches of one call and two, scratch that shares memory."""
    given, buffers = arrays(), {}
    for recipe, *sources in RECIPES_OF_ALL:
        value = RECIPES[recipe](*(given[source] if source else None for source in sources))
        for dtype in ("float16", "float32"):
            name = f"{recipe}({', '.join(sources)}) {dtype}"
            buffers[name] = Buffer(np.shape(value), dtype, "weight", 0, (recipe, *sources))
    assert buffers["first_convolution(first) float16"].shape == (7 * KERNEL_ROW, 4)
    weights = tuple(buffers)
    for index, size in enumerate((1000, 5000, 300, 5000, 10)):
        buffers[f"t{index}"] = Buffer((1, size), "float16", "scratch", 0)
    buffers["pixels"] = Buffer((1, SIZE, SIZE, 3), "uint8", "input", 0)
    buffers["embedding"] = Buffer((1, CHANNELS), "float32", "output", 0)
    buffers["anomaly_map"] = Buffer((1, SIZE, SIZE), "float32", "output", 0)
    buffers["peaks"] = Buffer((1, 4), "float32", "output", 0)
    buffers["frame"] = Buffer((0, 0, 3), "uint8", "frame", 0)
    buffers["geometry"] = Buffer((4,), "int32", "table", 0)
    for side in ("row", "column"):
        buffers[f"{side}_start"] = Buffer((SIZE,), "int32", "table", 0)
        buffers[f"{side}_weight"] = Buffer((SIZE, MAX_TAPS), "float32", "table", 0)
    launches = (
        Launch((Call("a.take", ("pixels", "t0", None, *weights[:3]), (3, 1e-05, True), 16, 2),)),
        Launch((Call("a.b", ("t0", "t1"), (), 3), Call("a.c", (None, "t0", "t2", *weights[3:]), (-2.5,), 4, 8))),
        Launch((Call("a.b", ("t1", "t3"), (), 5), Call("a.b", ("t2", "t4"), (), 6))),
        Launch((Call("a.give", ("t3", "t4", "embedding", "anomaly_map", "peaks"), (), 2),)),
    )
    front = Launch((Call("resize.resize", FRONT_BUFFERS, (SIZE, SIZE, MAX_TAPS, 16, 16, 64), 4),))
    return arrange(1, SIZE, SIZE, buffers, launches, front)


def stand_in_kernels(plan: Plan, arch: int) -> Iterator[tuple[str, Kernel]]:
    """`compile_plan` with "machine code" for both stand-ins of the driver; pixels that come in go out as map."""
    done = set()
    for launch in plan.all_launches:
        key = plan.kernel_key(launch)
        if key not in done:
            done.add(key)
            calls = [[name for name in call.buffers if name is not None] for call in launch.calls]
            code = {"entry": "step", "action": "none", "parameters": "i".join("p" * len(c) for c in calls) + "pp"}
            code |= {"native": ";".join(work(plan, launch)), "arch": arch}
            code |= {"key": key} if len(done) % 3 else {}  # some are of the same code
            shared = 60 * 1024 if len(done) % 2 else 1024
            yield key, Kernel("step", json.dumps(code).encode() + b"\0", shared, launch.num_warps)


def work(plan: Plan, launch: Launch) -> Iterator[str]:
    """What the stand-in in recording_cuda.h does for a launch."""
    names = []
    for index, call in enumerate(launch.calls):
        names += [""] if index else []  # the number of programs of the first
        names += [name for name in call.buffers if name is not None]
    if launch is plan.front:
        for place, name in enumerate(names[:-1]):
            yield f"dump:{place}:{plan.buffers[name].size_bytes or 'frame'}"
        yield from ("take:0:frame", f"give:6:{plan.height * plan.width * 3}")
        return
    for place, name in enumerate(names):
        if name in ("pixels", "anomaly_map", "peaks", "embedding"):
            verb = "take" if name == "pixels" else "floats"
            yield f"{verb}:{place}:{np.prod(plan.buffers[name].shape)}/{launch.programs}"


def fused_parts(
    plan: Plan, weights: bytes, arch: int = 90, kernels: dict[str, Kernel] | None = None
) -> dict[str, bytes]:
    """kernels: by key, instead of stand-ins."""
    code, index = bytearray(), {}
    for key, kernel in (kernels or dict(stand_in_kernels(plan, arch))).items():
        index[key] = {"name": kernel.name, "offset": len(code), "bytes": len(kernel.cubin)}
        index[key] |= {"shared_bytes": kernel.shared_bytes, "num_warps": kernel.num_warps}
        code += kernel.cubin
    return {
        "fused/plan.json": json.dumps(plan.to_dict()).encode(),
        f"fused/sm_{arch}.bin": bytes(code),
        f"fused/sm_{arch}.json": json.dumps({"arch": f"sm_{arch}", "kernels": index}).encode(),
        "weights.onnx": weights,
    }


def write_tiny(path: Path, plan: Plan | None = None, parts: dict[str, bytes] | None = None) -> Path:
    """A bundle of the tiny plan; parts: instead of its own."""
    given = parts or fused_parts(plan or tiny_plan(), weights_file(arrays())) | {SELF_TEST: self_test_part()}
    size = {"height": SIZE, "width": SIZE}
    write_bundle(path, manifest(input=manifest()["input"] | size), given)
    return path


def self_test_part(pixels: np.ndarray | None = None, deviation: float = 0.0, **changes: np.ndarray) -> bytes:
    """Images (N, SIZE, SIZE, 3) uint8 RGB, and what the stand-in's kernels give for each alone.

    Without pixels: three of one grey, which come out of a batch as they do alone. changes: arrays by name
    """
    if pixels is None:
        pixels = np.full((3, SIZE, SIZE, 3), 7, np.uint8)
    flat = np.float32(pixels[..., ::-1].reshape(len(pixels), 3 * SIZE * SIZE))
    test = {"pixels": np.float16(pixels), "anomaly_map": flat[:, : SIZE * SIZE].reshape(-1, SIZE, SIZE)}
    test["embedding"] = flat[:, :CHANNELS]
    return weights_file(test | {"score_deviation": np.array(deviation, np.float32)} | changes)


@dataclass(frozen=True)
class Expected:
    """What the Python executor makes of a bundle for one batch size, and has its stand-in of the driver record."""

    plan: Plan
    weights: dict[str, np.ndarray]
    kernels: list[Kernel]
    cuda: FakeCuda
    graph: CudaGraphPlan

    @classmethod
    def of(cls, path: Path, batch: int, arch: int = 90) -> "Expected":
        bundle: Bundle = read_bundle(path)
        written = Plan.from_dict(json.loads(bundle.parts["fused/plan.json"]))
        plan = for_batch(written, batch)
        stored = read_kernels(bundle, arch)
        kernels = [stored[written.kernel_key(launch)] for launch in written.all_launches]
        with np.errstate(over="ignore"):  # the tiny plan's arrays have numbers beyond fp16
            weights = pack(plan, read_weights(bundle.parts["weights.onnx"]))
        cuda = FakeCuda(arch)
        # FakeCuda's json does not take the zero that ends the code for the other stand-in.
        graph = CudaGraphPlan(plan, [replace(k, cubin=k.cubin[:-1]) for k in kernels], weights, arch >= 90, cuda)
        return cls(plan, weights, kernels, cuda, graph)


def seal(content: bytes) -> bytes:
    """A changed file with the right digest at its end, as a forger would write it."""
    return content[:-64] + hashlib.sha256(content[:-71]).hexdigest().encode()
