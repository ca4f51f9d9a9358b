"""The TensorRT plugin, driven as a builder and a runtime drive it, against a stand-in for libcuda.

Needs TensorRT's headers, of any version from 10.3 on: TENSORRT_INCLUDE_DIR=/path/to/include. Of several, joined by
colons, the plugin is built with the first and driven with each. TensorRT's libraries and a GPU are not needed.
"""

import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from native_parts import ROOT, VALGRIND, Native, fused_parts, stand_in_kernels, tensorrt_headers
from test_native_runtime import names

from omniad_edge.kernels.fold import named_arrays
from omniad_edge.kernels.pack import pack
from omniad_edge.kernels.plan import Buffer, Call, Launch, Plan
from omniad_edge.kernels.schedule import arrange, for_batch

HALF, FLOAT = 1, 0  # numbers of TensorRT's DataType
CHAR, INT8 = 6, 3  # of its PluginFieldType


def small_plan() -> Plan:
    """Launches of one call and two, buffers left out, scratch that shares memory; as no network has it."""
    buffers = {
        "pixels": Buffer((1, 6, 8), "float16", "input", 0),
        "w16": Buffer((8, 8), "float16", "weight", 0, ("same", "w")),
        "anomaly_map": Buffer((1, 24, 4), "float32", "output", 0),
        "w32": Buffer((8,), "float32", "weight", 0, ("same", "b")),
        "peaks": Buffer((1, 6), "float32", "output", 0),
    }
    for index, size in enumerate((1000, 5000, 300, 5000, 10)):
        buffers[f"t{index}"] = Buffer((1, size), "float32" if index % 2 else "float16", "scratch", 0)
    launches = (
        Launch((Call("a.take", ("pixels", "t0", None, "w16"), (3, 1e-05, True), 16, 2),)),
        Launch((Call("a.b", ("t0", "t1"), (), 3), Call("a.c", (None, "t0", "t2", "w32"), (-2.5,), 4, 8))),
        Launch((Call("a.b", ("t1", "t3"), (), 5), Call("a.b", ("t2", "t4"), (), 6))),
        Launch((Call("a.give", ("t3", "t4", "anomaly_map", "peaks"), (), 2),)),
    )
    return arrange(1, 2, 3, buffers, launches)


@cache
def network():
    """A small one with all that the decoder of the published one has, and trained-looking weights."""
    pytest.importorskip("triton", reason="a network's plan needs Triton: pip install 'omniad-edge[kernels]'")
    from golden import golden_model
    from omniad_edge.kernels.fold import fold

    return fold(golden_model(backbone="resnet18", depths=(1, 1, 1, 1), height=64, width=96))


@cache
def network_plan(part: str, dtype: str) -> Plan:
    """Of the network's layers: "block", the first Omni-block, or "decoder", with each student map as an output."""
    given = network()
    from omniad_edge.kernels.network_plan import Map, Recorder, decoder, omni_block

    recorder = Recorder(given, 1, half=dtype == "float16")
    height, width, channels = given.height // 32, given.width // 32, len(given.stages[0][0].out_bias)
    x = Map(recorder.scratch(height * width, channels, kind="input", name="x"), height, width, channels)
    block = part == "block"
    for y in [omni_block(recorder, given.stages[0][0], x, given.tokens)] if block else decoder(recorder, given, x):
        recorder.buffers[y.name] = replace(recorder.buffers.pop(y.name), kind="output")
    return recorder.plan(height, width)


def make_plan(kind: str) -> Plan:
    return small_plan() if kind == "small" else network_plan(*kind.split())


KINDS = ["small", "block float16", "decoder float16", "decoder float32"]


@dataclass(frozen=True)
class Node:
    """What an ONNX node of a plan has, as files for the harness."""

    folder: Path
    plan: Plan
    arch: int

    @classmethod
    def write(
        cls, folder: Path, plan: Plan, arch: int = 90, images: int = 1, kernels=None, **changes: bytes | None
    ) -> "Node":
        """kernels: by key, instead of stand-ins. changes: files with other content, or left out."""
        node = cls(folder, plan, arch)
        parts = fused_parts(plan, b"", arch, kernels)
        index = json.loads(parts[f"fused/sm_{arch}.json"])["kernels"]
        files = {"plan.char": parts["fused/plan.json"], "arch.char": f"sm_{arch}".encode()}
        files |= {"kernel_index.char": json.dumps(index).encode(), "kernels.int8": parts[f"fused/sm_{arch}.bin"]}
        files["tensors"] = "".join(
            f"{way} {plan.buffers[name].dtype} {' '.join(map(str, plan.buffers[name].shape))}\n"
            for way, group in (("in", node.inputs), ("out", node.outputs))
            for name in group
        ).encode()
        rng = np.random.default_rng(0)
        for place, name in enumerate(node.inputs):
            files[f"input{place}"] = rng.bytes(plan.buffers[name].size_bytes * (1 if place else images))
        folder.mkdir()
        for name, content in (files | {key.replace("__", "."): value for key, value in changes.items()}).items():
            if content is not None:
                (folder / name).write_bytes(content)
        return node

    def of_kind(self, *kinds: str) -> list[str]:
        return [name for name, buffer in self.plan.buffers.items() if buffer.kind in kinds]

    @property
    def inputs(self) -> list[str]:
        return self.of_kind("input") + self.of_kind("weight")

    @property
    def outputs(self) -> list[str]:
        return self.of_kind("output")


def scratch_bytes(plan: Plan, images: int) -> int:
    arranged = for_batch(plan, images)
    scratch = [buffer for buffer in arranged.buffers.values() if buffer.kind == "scratch"]
    return arranged.arena_bytes - min(buffer.offset_bytes for buffer in scratch)


@pytest.fixture
def plugin(request, tmp_path) -> "Plugin":
    if not tensorrt_headers():
        pytest.skip("TensorRT's headers are needed: TENSORRT_INCLUDE_DIR=/path/to/include")
    return Plugin(Native(request.getfixturevalue("native_build"), tmp_path))


@dataclass(frozen=True)
class Plugin:
    native: Native

    @property
    def library(self) -> Path:
        return self.native.folder / "libomniad_plugin.so"

    def node(self, plan: Plan, name: str = "node", **options) -> Node:
        return Node.write(self.native.scratch / name, plan, **options)

    def ask(self, *words: object, **options):
        return self.native.run(self.library, *words, program="plugin_harness", **options)

    def recorded(self, *words: object, **options) -> tuple[list[str], list[dict]]:
        return self.native.recorded(self.library, *words, program="plugin_harness", **options)


# The library


def test_it_exports_what_tensorrt_looks_for_and_needs_neither_tensorrt_nor_cuda(plugin):
    def shown(*command: str) -> str:
        return subprocess.run([*command, plugin.library], capture_output=True, text=True, check=True).stdout

    exported = [line.split()[1:] for line in shown("nm", "-D", "--defined-only").splitlines()]
    assert sorted(exported) == [["T", "getCreators"], ["T", "setLoggerFinder"]]
    needed = re.findall(r"NEEDED.*\[(.*)\]", shown("readelf", "-d"))
    assert needed and all(
        re.match(r"(libstdc\+\+|libgcc_s|libc|libm|libdl|ld-linux.*)\.so", name) for name in needed
    )
    undefined = [line.split()[-1].split("@")[0] for line in shown("nm", "-D", "--undefined-only").splitlines()]
    assert undefined and not [name for name in undefined if re.match("cu[A-Z]|cuda|nv", name) or "nvinfer" in name]


def test_without_headers_it_is_not_built_and_that_is_said(tmp_path):
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not on this machine")
    made = subprocess.run(["cmake", "-S", ROOT, "-B", tmp_path], capture_output=True, text=True)
    assert "The TensorRT plugin is not built: -DTensorRT_INCLUDE_DIR=... is not given" in made.stdout
    made = subprocess.run(
        ["cmake", "-S", ROOT, "-B", tmp_path, f"-DTensorRT_INCLUDE_DIR={tmp_path}"], capture_output=True, text=True
    )
    assert made.returncode != 0 and "needs NvInferRuntime.h" in made.stderr


def test_creators_and_their_fields(plugin):
    fields = f"plan:{CHAR} arch:{CHAR} kernel_index:{CHAR} kernels:{INT8}"
    assert plugin.ask("creators").stdout.splitlines() == [
        f"omniad OmniBlock 1 1.0 {fields}",
        f"omniad OmniDecoder 1 1.0 {fields}",
    ]


# The builder's questions


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "no kernels"])
def test_what_a_builder_asks(plugin, kind, kernels):
    plan = make_plan(kind)
    without = {} if kernels else {"arch__char": None, "kernel_index__char": b"", "kernels__int8": b""}
    node = plugin.node(plan, **without)
    batches = (1, 2, 7, 64)
    made = plugin.ask("build", "OmniDecoder", node.folder, *batches, LD_LIBRARY_PATH="")  # no driver
    assert made.returncode == 0, made.stderr
    lines = made.stdout.splitlines()
    outputs = [plan.buffers[name] for name in node.outputs]
    types = " ".join(str(HALF if buffer.dtype == "float16" else FLOAT) for buffer in outputs)
    assert lines[:2] == [f"outputs {len(outputs)}", f"types 0 {types}"]
    for line, images in zip(lines[2:4], (5, -1), strict=True):
        shapes = " ".join(str((images, *buffer.shape[1:])) for buffer in outputs)
        assert line == f"shapes 0 {shapes}"
    assert lines[4] == "formats " + "100 " * (len(node.inputs) + len(outputs))
    for line, images in zip(lines[5:9], batches, strict=True):
        most = max(scratch_bytes(plan, fewer) for fewer in range(1, images + 1))
        assert line == f"workspace 0 {most}"
    assert lines[9] == "wrong counts -1" and re.match("tactics 0, timing cache [0-9a-f]{64}$", lines[10])
    assert lines[11:] == ["round trip equal", "not attached -1"]
    assert re.search("expected .* inputs .x, then each weight of the plan", made.stderr)
    assert "attached to an execution context" in made.stderr


def test_batches_and_shapes_that_the_plan_cannot_have_are_refused(plugin):
    node = plugin.node(small_plan())
    made = plugin.ask("build", "OmniBlock", node.folder, 0, 65)
    assert re.findall(r"workspace (-?\d+) (\d+)", made.stdout) == [("-1", str(2**50))] * 2
    assert "batch: expected 1 to 64, got 65" in made.stderr
    tensors = (node.folder / "tensors").read_text()
    (node.folder / "tensors").write_text(tensors.replace("1 6 8", "1 -1 8", 1))  # known at run time only
    assert plugin.ask("build", "OmniBlock", node.folder).stdout.count("shapes 0 (") == 2
    for wrong, words in (
        (tensors.replace("1 6 8", "1 7 8", 1), "input 'pixels': expected 6 along axis 1, got 7"),
        (tensors.replace("1 6 8", "1 6 8 1", 1), "input 'pixels': expected 3 axes, got 4"),
        (tensors.replace("32 8\n", "32 9\n", 1), "input 'w32': expected 8 along axis 0, got 9"),
    ):
        (node.folder / "tensors").write_text(wrong)
        made = plugin.ask("build", "OmniBlock", node.folder)
        assert "shapes -1" in made.stdout and words in made.stderr
        made = plugin.ask("run", "OmniBlock", node.folder, 1)
        assert made.stdout.startswith("run -1 -1 ") and words in made.stderr


def test_a_smaller_batch_may_need_the_larger_workspace(plugin):
    """Rounded up, its buffers may be packed worse; an engine runs it in the workspace of its largest batch."""
    buffers = {f"t{i}": Buffer((1, size), "float16", "scratch", 0) for i, size in enumerate((80, 32, 120, 40))}
    buffers |= {"x": Buffer((1, 1, 4), "float16", "input", 0), "y": Buffer((1, 4), "float16", "output", 0)}
    used = (("t3",), ("t2",), ("t0", "t1", "t3"), ("t1", "x", "y"))
    launches = tuple(Launch((Call("a.b", names, (), 1),)) for names in used)
    plan = arrange(1, 1, 1, buffers, launches)
    assert scratch_bytes(plan, 5) > scratch_bytes(plan, 6)
    made = plugin.ask("build", "OmniBlock", plugin.node(plan).folder, 6)
    assert f"workspace 0 {scratch_bytes(plan, 5)}\n" in made.stdout


def test_the_timing_cache_knows_other_kernels(plugin):
    nodes = [plugin.node(small_plan(), f"sm_{arch}", arch=arch) for arch in (87, 90)]
    made = [plugin.ask("build", "OmniBlock", node.folder).stdout for node in nodes]
    assert len({re.search("timing cache (.*)", text)[1] for text in made}) == 2


# Runs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", [87, 90])
def test_a_run_is_launches_and_nothing_else(plugin, kind, arch):
    """In order, with grids, shared memory, early starts and addresses; loaded once, before; captured too."""
    plan = make_plan(kind)
    node = plugin.node(plan, arch=arch, images=3)
    printed, calls = plugin.recorded("run", "OmniDecoder", node.folder, 1, 3, "c3", 1, OMNIAD_ARCH=str(arch))
    kernels = dict(stand_in_kernels(plan, arch))
    loading = names(calls)[: names(calls).index("cuStreamCreate")]
    different = len({kernel.cubin for kernel in kernels.values()})
    assert loading.count("cuModuleLoadData") == different == names(calls).count("cuModuleUnload")
    assert loading.count("cuModuleGetFunction") == len(set(kernels.values()))
    runs = runs_of(calls)
    for line, launches, images in zip(printed, runs, (1, 3, 3, 1), strict=True):
        check_launches(node, for_batch(plan, images), line, launches, calls)
    assert [run[0]["capturing"] for run in runs] == [False, False, True, False]


def runs_of(calls: list[dict]) -> list[list[dict]]:
    """The launches of each run: between them are copies and allocations, in them is nothing else."""
    runs, before = [], ""
    for call in calls:
        if call["call"] == "cuLaunchKernelEx":
            runs += [[]] if before != call["call"] else []
            runs[-1].append(call)
        before = call["call"]
    return runs


def check_launches(node: Node, plan: Plan, line: str, launches: list[dict], calls: list[dict]) -> None:
    word, shaped, queued, scratch, workspace, *addresses = line.split()
    assert (word, shaped, queued) == ("run", "0", "0")
    assert int(scratch) == max(scratch_bytes(node.plan, images) for images in range(1, plan.batch + 1))
    where = dict(zip(node.inputs + node.outputs, map(int, addresses), strict=True))
    inside = {name: buffer for name, buffer in plan.buffers.items() if buffer.kind == "scratch"}
    start = min(buffer.offset_bytes for buffer in inside.values())
    where |= {name: int(workspace) + buffer.offset_bytes - start for name, buffer in inside.items()}
    kernels = dict(stand_in_kernels(node.plan, node.arch))
    modules = [call["module"] for call in calls if call["call"] == "cuModuleGetFunction"]
    images = [call["image"] for call in calls if call["call"] == "cuModuleLoadData"]
    code = dict(zip(dict.fromkeys(modules), images, strict=True))
    for launch, made in zip(plan.launches, launches, strict=True):
        kernel = kernels[node.plan.kernel_key(launch)]
        assert code[made["function"]] == json.loads(kernel.cubin[:-1])
        assert (made["grid"], made["block"]) == ([launch.programs, 1, 1], [32 * kernel.num_warps, 1, 1])
        assert made["shared"] == kernel.shared_bytes and made["attributes"] == (
            [[6, 1]] if node.arch >= 90 else []
        )
        values = []
        for index, call in enumerate(launch.calls):
            values += [launch.calls[0].programs] if index else []
            values += [where[name] for name in call.buffers if name is not None]
        assert made["values"] == [*values, 0, 0]


def test_each_image_of_a_batch_goes_through(plugin):
    """The stand-in's kernels give back as numbers the bytes they were given."""
    node = plugin.node(small_plan(), images=3)
    made = plugin.ask("run", "OmniBlock", node.folder, 3)
    assert made.returncode == 0, made.stderr
    given = np.fromfile(node.folder / "input0", np.uint8)[: 3 * 48]
    for place, name in enumerate(node.outputs):
        shape = node.plan.buffers[name].shape
        wanted = np.resize(np.float32(given), (3, *shape[1:]))
        assert (np.fromfile(node.folder / f"output{place}", np.float32) == wanted.reshape(-1)).all()


def test_without_the_gpu_it_was_built_for_nothing_is_attached(plugin):
    node = plugin.node(small_plan())
    made = plugin.ask("run", "OmniBlock", node.folder, 1, OMNIAD_ARCH="87")
    assert (made.returncode, made.stdout) == (1, "not attached\n")
    assert "arch: the engine was built for 'sm_90', this GPU is sm_87; build it on this GPU" in made.stderr
    made = plugin.ask("attach", "OmniBlock", node.folder)
    assert made.stdout == "attached\n"  # to the first GPU's primary context


def test_without_a_driver_nothing_is_attached(plugin):
    node = plugin.node(small_plan())
    made = plugin.ask("attach", "OmniBlock", node.folder, LD_LIBRARY_PATH="")
    words = (
        "no usable GPU|has no CUDA context" if driver_is_here() else "the NVIDIA driver was not found.*install it"
    )
    assert made.stdout == "not attached\n" and re.search(words, made.stderr)


def driver_is_here() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def test_without_kernels_nothing_is_attached(plugin):
    node = plugin.node(small_plan(), arch__char=None, kernel_index__char=None, kernels__int8=None)
    made = plugin.ask("run", "OmniBlock", node.folder, 1)
    assert (made.returncode, made.stdout) == (1, "not attached\n")
    assert "the node has none; build the engine from a bundle exported with --targets" in made.stderr


def test_runs_that_were_not_announced_or_have_wrong_addresses_are_refused(plugin):
    made = plugin.ask("misuse", "OmniBlock", plugin.node(small_plan()).folder)
    assert made.stdout.splitlines() == ["-1"] * 5 + ["0"]
    for line, words in zip(
        made.stderr.splitlines(),
        [
            "enqueue: expected batch 0 as onShapeChange said, got 1",
            "enqueue: expected batch 1 as onShapeChange said, got 2",
            "workspace: expected memory, got none",
            "buffer 'anomaly_map': expected memory aligned to 16 bytes, got address",
            "buffer 'pixels': expected memory aligned to 16 bytes, got address 0",
        ],
        strict=True,
    ):
        assert line.startswith(f"omniad: OmniBlock: {words}")


# Failures of the driver


@pytest.mark.parametrize(
    "status, words",
    [(2, "CUDA_ERROR_OUT_OF_MEMORY"), (700, "CUDA_ERROR_ILLEGAL_ADDRESS: .*start the process anew")],
)
def test_every_failure_of_the_driver_has_a_status_and_words_and_leaks_nothing(plugin, status, words):
    node = plugin.node(small_plan())
    made = plugin.ask("faults", "OmniBlock", node.folder, status)
    assert made.returncode == 0, made.stderr
    gives_back = {"cuCtxPushCurrent", "cuModuleUnload", "cuCtxPopCurrent"}  # may fail unseen when all is done
    seen, said = set(), iter(made.stderr.splitlines())
    for line in made.stdout.splitlines():
        alive, name, end = line.split()
        seen.add(name)
        if end == "end":
            assert name in gives_back and (alive == "0" or name == "cuCtxPushCurrent"), line
        else:
            assert (alive, end) == ("0", "enqueue" if name == "cuLaunchKernelEx" else "attach"), line
            assert re.search(f"omniad: OmniBlock: {name}: {words}", next(said))
    assert not [*said] and seen == gives_back | {
        *("cuInit", "cuCtxGetCurrent", "cuCtxGetDevice", "cuDeviceGetAttribute", "cuModuleLoadData"),
        *("cuModuleGetFunction", "cuFuncSetAttribute", "cuLaunchKernelEx"),
    }


# Fields that are missing, of a wrong type, damaged or crafted


def crafted(change) -> bytes:
    """The small plan's file after a change to it."""
    plan = small_plan().to_dict()
    change(plan)
    return json.dumps(plan).encode()


def in_buffer(name: str, **changes) -> bytes:
    return crafted(lambda plan: plan["buffers"][name].update(changes))


def in_kernel(**changes) -> bytes:
    index = json.loads(fused_parts(small_plan(), b"", 90)["fused/sm_90.json"])["kernels"]
    next(iter(index.values())).update(changes)
    return json.dumps(index).encode()


FRONT = {"calls": [{"op": "a.b", "buffers": [], "constants": [], "programs": 1, "num_warps": 4}]}
HOSTILE = [
    ({"plan__char": None}, "plan: not valid JSON"),
    ({"plan__char": None, "plan__int8": b"{}"}, "plan: expected it once, as text, got type 3 of length 2"),
    ({"plan__char": None, "plan__int32": bytes(8)}, "plan: expected it once, as text, got type 5 of length 2"),
    ({"plan__char": None, "plan__null": b""}, "plan: expected it once, as text, got type 6 of length 2"),
    ({"plan__char": None, "plan__negative": b""}, "plan: expected it once, as text, got type 6 of length -1"),
    ({"plan__int8": b"{}"}, "plan: expected it once, as text, got type"),
    ({"kernels__int8": None, "kernels__char": b"x"}, "kernels: expected it once, as int8, got type 6"),
    ({"plan__char": b"\0\0"}, "plan: not valid JSON"),
    ({"plan__char": b"[" * 10**6}, "plan: .*nested too deeply"),
    (
        {"plan__char": crafted(lambda plan: plan.update(batch=2))},
        "plan: .*expected batch 1, one input.*got batch 2",
    ),
    (
        {"plan__char": crafted(lambda plan: plan.update(height=3))},
        r"expected \(1, 3 \* 3, channels\), got \(1, 6, 8\)",
    ),
    ({"plan__char": crafted(lambda plan: plan.update(front=FRONT))}, "plan: front: expected null"),
    ({"plan__char": crafted(lambda plan: plan.update(launches=[]))}, "plan: .*0 launches"),
    (
        {"plan__char": crafted(lambda plan: plan["buffers"].update(t9=plan["buffers"]["t0"]))},
        "plan: buffer 't9': expected a launch that uses it",
    ),
    ({"plan__char": in_buffer("t0", kind="input")}, "plan: buffer 't0': expected .1, 2 . 3, channels"),
    ({"plan__char": in_buffer("pixels", kind="scratch")}, "plan: .*one input.*got batch 1, 0 inputs, 2 outputs"),
    ({"plan__char": in_buffer("t0", kind="table")}, "plan: buffer 't0': expected no tables and frames"),
    ({"plan__char": in_buffer("t0", dtype="int32")}, "plan: buffer 't0': expected float16 or float32, got int32"),
    ({"plan__char": in_buffer("t0", shape=[3, 5])}, "plan: buffer 't0': expected one image, got 3"),
    ({"plan__char": in_buffer("w32", shape=[2**31 - 1] * 3)}, "plan: .*at most 68719476736 elements"),
    ({"arch__char": b""}, "arch: expected like sm_87, got ''"),
    ({"kernels__int8": None}, "kernels: the node has none"),
    ({"kernel_index__char": None}, "kernel_index: not valid JSON"),
    ({"kernel_index__char": b"{}"}, "kernel_index: expected an object with '[0-9a-f]{16}'"),
    ({"kernel_index__char": in_kernel(offset=10**6)}, "kernel_index: expected a whole number from 0 to"),
    ({"kernel_index__char": in_kernel(offset=-1)}, "kernel_index: expected a whole number from 0 to"),
    ({"kernel_index__char": in_kernel(bytes=10**6)}, "kernel_index: expected a whole number from 1 to"),
    ({"kernel_index__char": in_kernel(num_warps=64)}, "kernel_index: expected a whole number from 1 to 32"),
    ({"kernel_index__char": in_kernel(shared_bytes="1")}, "kernel_index: expected a whole number from 0 to"),
]


def check_hostile(plugin, **options) -> None:
    nodes = [plugin.node(small_plan(), f"hostile{i}", **changes) for i, (changes, _) in enumerate(HOSTILE)]
    made = plugin.ask("create", "OmniBlock", *(node.folder for node in nodes), **options)
    assert made.returncode == 0, made.stderr[-3000:]
    assert made.stdout.splitlines() == ["null"] * len(HOSTILE)
    for line, (_, words) in zip(made.stderr.splitlines(), HOSTILE, strict=True):
        assert re.match(f"omniad: node: .*({words})", line), (line, words)


def test_hostile_fields_are_refused_with_words(plugin):
    check_hostile(plugin)


def test_no_byte_is_read_that_is_not_there(plugin):
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is not on this machine")
    check_hostile(plugin, under=VALGRIND)
    node = plugin.node(small_plan(), images=2)
    made = plugin.ask("run", "OmniBlock", node.folder, 2, "c1", under=VALGRIND)
    assert made.returncode == 0, made.stderr[-3000:]


def test_fields_as_the_onnx_parser_gives_them(plugin):
    """With the zero that ends a text, and with fields of others, which are let pass."""
    plain = plugin.node(small_plan(), "plain")
    texts = {
        f"{name}__char": (plain.folder / f"{name}.char").read_bytes() + b"\0"
        for name in ("plan", "arch", "kernel_index")
    }
    node = plugin.node(small_plan(), "parsed", other__int32=bytes(4), **texts)
    made = [plugin.ask("build", "OmniBlock", one.folder, 1).stdout for one in (plain, node)]
    assert made[0] == made[1] and "round trip equal" in made[0]


# TensorRT's own registry and other headers


def test_a_harness_of_other_headers_drives_it_too(plugin):
    """The parts of TensorRT that the plugin uses lie in memory alike in all versions from 10.3 on."""
    if len(tensorrt_headers()) < 2:
        pytest.skip("TENSORRT_INCLUDE_DIR names one folder; of several, joined by colons, each drives the plugin")
    node = plugin.node(small_plan(), images=2)
    questions = [("creators",), ("build", "OmniBlock", node.folder, 1, 3), ("create", "OmniBlock", node.folder)]
    for place, headers in enumerate(tensorrt_headers()[1:]):
        harness = plugin.native.scratch / f"harness{place}"
        build_harness(harness, headers)
        for words in questions:
            mine, other = plugin.ask(*words), plugin.native.run(plugin.library, *words, program=harness)
            assert (mine.returncode, other.returncode) == (0, 0) and mine.stdout == other.stdout
        made = plugin.native.run(plugin.library, "run", "OmniBlock", node.folder, 1, "c2", program=harness)
        assert made.returncode == 0 and re.findall("run 0 0", made.stdout) == ["run 0 0"] * 2


def build_harness(target: Path, headers: Path) -> None:
    native = ROOT / "kernels" / "native"
    sources = [ROOT / "tests" / "plugin_harness.cpp", native / "cuda_driver.cpp"]
    folders = [f"-I{native}", "-isystem", headers, "-isystem", "/usr/local/cuda/include"]
    command = ["g++", "-std=c++17", "-O0", *folders, *sources, "-o", target, "-ldl"]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


ASK = """
import json, sys
from pathlib import Path
import numpy as np
try:
    import tensorrt as trt
except ImportError:
    import tensorrt_bindings as trt

library, node = sys.argv[1], Path(sys.argv[2])
registry = trt.get_plugin_registry()
assert registry.load_library(library) is not None
creator = registry.get_creator("OmniDecoder", "1", "omniad")
assert [field.name for field in creator.field_names] == ["plan", "arch", "kernel_index", "kernels"]
types = {name: getattr(trt.PluginFieldType, kind) for name, kind in
         (("plan", "CHAR"), ("arch", "CHAR"), ("kernel_index", "CHAR"), ("kernels", "INT8"))}
fields = [trt.PluginField(name, np.fromfile(next(node.glob(name + ".*")), np.int8), kind)
          for name, kind in types.items()]
for phase in (trt.TensorRTPhase.BUILD, trt.TensorRTPhase.RUNTIME):
    assert creator.create_plugin("node", trt.PluginFieldCollection(fields[1:]), phase) is None
    plugin = creator.create_plugin("node", trt.PluginFieldCollection(fields), phase)
    assert isinstance(plugin, trt.IPluginV3)
core = plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
if core is not None:  # the bindings of 10.3 give none of a C++ plugin
    assert (core.plugin_name, core.plugin_namespace, core.plugin_version) == ("OmniDecoder", "omniad", "1")
    build = plugin.get_capability_interface(trt.PluginCapabilityType.BUILD)
    assert build.num_outputs == int(sys.argv[3]) and len(build.timing_cache_id) == 64
print("TensorRT", trt.__version__)
"""


def test_tensorrts_python_bindings_load_it(plugin):
    """With TensorRT itself where it is installed, else its bindings alone and a stand-in for its libraries."""
    node, where = plugin.node(small_plan()), ""
    if importlib.util.find_spec("tensorrt") is None:
        bindings = importlib.util.find_spec("tensorrt_bindings")
        if bindings is None:
            pytest.skip("neither tensorrt nor its bindings are here: pip install --no-deps tensorrt-cu13-bindings")
        where = build_stand_in(plugin.native.scratch, Path(bindings.origin))
    command = [sys.executable, "-c", ASK, plugin.library, node.folder, str(len(node.outputs))]
    variables = os.environ | {"LD_LIBRARY_PATH": f"{where}:{os.environ.get('LD_LIBRARY_PATH', '')}"}
    made = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert made.returncode == 0 and made.stdout.startswith("TensorRT "), made.stderr
    assert made.stderr.count("omniad: node: plan: not valid JSON") == 2


def build_stand_in(folder: Path, bindings: Path) -> Path:
    """What the bindings link, with headers of their major version; skips without such."""
    major = re.search(r"__version__ = \"(\d+)", bindings.read_text())[1]
    for headers in tensorrt_headers():
        found = re.findall(r"define \w+_MAJOR\w* (\d+)", (headers / "NvInferVersion.h").read_text())
        if major in found:
            break
    else:
        pytest.skip(f"the bindings are of TensorRT {major}, TENSORRT_INCLUDE_DIR has no headers of that version")
    made = [folder / f"lib{name}.so.{major}" for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser")]
    folders = ["-isystem", headers, "-isystem", "/usr/local/cuda/include"]
    command = ["g++", "-std=c++17", "-O0", "-w", "-shared", "-fPIC", "-fvisibility=hidden", *folders]
    command += [f"-Wl,-soname,{made[0].name}", "-o", made[0], ROOT / "tests" / "stand_in_nvinfer.cpp"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for link in made[1:]:
        link.symlink_to(made[0])
    return folder


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS[1:])
def test_outputs_on_a_gpu(plugin, kind):
    """The kernels themselves, compiled for this GPU."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    from omniad_edge.export.cubins import compile_plan

    major, minor = torch.cuda.get_device_capability()
    arch, plan = 10 * major + minor, make_plan(kind)
    node = plugin.node(plan, arch=arch, images=3, kernels=dict(compile_plan(plan, arch)), **inputs_of(plan, 3))
    made = plugin.ask("run", "OmniDecoder", node.folder, 3, LD_LIBRARY_PATH=os.environ.get("LD_LIBRARY_PATH", ""))
    assert made.returncode == 0, made.stderr
    check_outputs(node, 3)


def inputs_of(plan: Plan, images: int) -> dict[str, bytes]:
    """Normally distributed maps and the network's weights, packed."""
    x = np.random.default_rng(0).standard_normal((images, *plan.buffers["x"].shape[1:]))
    packed = pack(plan, named_arrays(network()))
    arrays = [x.astype(plan.buffers["x"].dtype), *(packed[name] for name in plan.buffers if name in packed)]
    return {f"input{place}": array.tobytes() for place, array in enumerate(arrays)}


def check_outputs(node: Node, images: int) -> None:
    """Against float64, allowed twice the error of plain torch in the same dtype."""
    import torch

    from omniad_edge.kernels.network import TorchOps, decoder, omni_block

    given, plan = network(), node.plan
    x = np.fromfile(node.folder / "input0", plan.buffers["x"].dtype).reshape(images, *plan.buffers["x"].shape[1:])
    image = torch.from_numpy(x).transpose(1, 2).unflatten(2, (plan.height, plan.width))

    @torch.inference_mode()
    def maps(dtype: torch.dtype) -> list[torch.Tensor]:
        ops = TorchOps(dtype)
        block = len(node.outputs) == 1
        made = (
            [omni_block(ops, given.stages[0][0], image.to(dtype))]
            if block
            else decoder(ops, given, image.to(dtype))
        )
        return [y.double().flatten(2).transpose(1, 2) for y in made]

    dtype = getattr(torch, plan.buffers["x"].dtype)
    for place, (truth, plain) in enumerate(zip(maps(torch.float64), maps(dtype), strict=True)):
        name = node.outputs[place]
        got = np.fromfile(node.folder / f"output{place}", plan.buffers[name].dtype).reshape(truth.shape)
        allowed = 2 * (plain - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
        assert np.abs(got - truth.numpy()).max() <= allowed, name
