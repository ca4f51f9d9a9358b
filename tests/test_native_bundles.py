"""Bundles for the native runtime that are truncated, altered or crafted are refused with words."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bundles import manifest
from native_parts import SIZE, VALGRIND, Native, arrays, fused_parts, seal, tiny_plan, weights_file, write_tiny

from omniad_edge.bundle import describe_input, write_bundle
from omniad_edge.tiles import Tiling


@pytest.fixture
def native(native_build, tmp_path) -> Native:
    return Native(native_build, tmp_path)


@pytest.fixture
def tiny(tmp_path) -> Path:
    return write_tiny(tmp_path / "tiny.omniad")


TINY_PARTS = fused_parts(tiny_plan(), weights_file(arrays()))


def crafted_parts(changes: dict) -> dict[str, bytes]:
    """The tiny bundle's, changed: by bytes, or in the plan or the index by a function."""
    parts = dict(TINY_PARTS)
    for name, change in changes.items():
        if callable(change):
            entry = json.loads(parts[name])
            change(entry)
            parts[name] = json.dumps(entry).encode()
        else:
            parts[name] = change
    return {name: content for name, content in parts.items() if content is not None}


def in_plan(change) -> dict:
    return {"fused/plan.json": change}


def in_call(**changes) -> dict:
    return in_plan(lambda plan: plan["launches"][0]["calls"][0].update(changes))


def in_buffer(name: str, **changes) -> dict:
    return in_plan(lambda plan: plan["buffers"][name].update(changes))


def in_kernel(**changes) -> dict:
    return {"fused/sm_90.json": lambda index: next(iter(index["kernels"].values())).update(changes)}


SAME = "same(hard) float32"


def of_dtype(dtype: str) -> dict:
    """Everything for a plan with a weight of this dtype, the keys of the kernels too."""
    plan = tiny_plan()
    plan.buffers[SAME] = replace(plan.buffers[SAME], dtype=dtype)
    return fused_parts(plan, TINY_PARTS["weights.onnx"])


CRAFTED = [
    ({"fused/plan.json": None}, "3 .*no GPU kernels; export it with --targets sm_90"),
    ({"fused/sm_90.bin": None}, "3 .*kernels for "),
    ({"weights.onnx": None}, "2 .*no part weights.onnx"),
    ({"fused/plan.json": b""}, "2 .*plan.json: not valid JSON.*export again"),
    ({"fused/plan.json": b"[" * 100000}, "2 .*nested too deeply"),
    ({"fused/plan.json": b"[" + b"0," * 1000001 + b"0]"}, "2 .*too many values"),
    ({"fused/plan.json": b'{"a": 1, "a": 2}'}, "2 .*each key once"),
    ({"fused/plan.json": b'{"a\xff": 1}'}, "2 .*UTF-8"),
    ({"fused/plan.json": b'"\\ud800"'}, "2 .*surrogate"),
    ({"fused/plan.json": b"01"}, "2 .*nothing more at byte 1"),
    ({"fused/plan.json": b"NaN"}, "2 .*a value at byte 0"),
    ({"fused/plan.json": b"{}"}, "2 .*with 'batch'"),
    (in_plan(lambda plan: plan.update(more=1)), "2 .*object of 6 keys, got one of 7"),
    (
        in_plan(lambda plan: plan.update(height=64)),
        r"2 .*buffer pixels: expected uint8 \(1, 64, 32, 3\), got uint8 \(1, 32, 32, 3\)",
    ),
    (in_plan(lambda plan: plan.update(batch=1.0)), "2 .*whole number from 1 to 64, got '1.0'"),
    (in_plan(lambda plan: plan["buffers"].pop("peaks")), "2 .*expected a buffer of the plan, got 'peaks'"),
    (in_plan(lambda plan: plan["launches"][0].update(calls=[])), "2 .*one or two calls, got one of 0"),
    (in_plan(lambda plan: plan["buffers"].update(t9=plan["buffers"]["t0"])), "2 .*'t9'.*a launch that uses it"),
    (in_call(programs=0), "2 .*whole number from 1"),
    (in_call(programs=2**31), "2 .*whole number from 1 to 2147483647, got '2147483648'"),
    (in_call(num_warps=64), "2 .*whole number from 1 to 32"),
    (in_call(op='a"b'), "2 .*an op like 'file.function'"),
    (in_call(constants=["x"]), "2 .*numbers as constants"),
    (in_call(constants=[7]), "2 .*sm_90.json: expected an object with '[0-9a-f]{16}'"),
    (in_call(buffers=["frame"]), "2 .*frames and tables in the front alone"),
    (in_buffer(SAME, dtype="float64"), "2 .*float16, float32, uint8, int32, got 'float64'"),
    (of_dtype("int32"), "2 .*weights of float16 or float32"),
    (in_buffer(SAME, kind="other"), "2 .*known kind"),
    (in_buffer(SAME, shape=[2**31 - 1] * 8), "2 .*at most 68719476736 elements"),
    (in_buffer(SAME, shape=[-1]), "2 .*whole number from 0"),
    (in_buffer(SAME, shape=[]), "2 .*a shape of 1 to 8 axes"),
    (in_buffer(SAME, shape=[5]), r"2 .*same\(hard\).*expected 5 values, got 656"),
    (in_buffer(SAME, recipe=["same", "nothing"]), "2 .*an array 'nothing' in weights.onnx"),
    (in_buffer(SAME, recipe=["same", ""]), "2 .*an array as source 1, got none"),
    (in_buffer(SAME, recipe=["same", "m1", "m2"]), "2 .*expected 1 to 1 arrays, got 2"),
    (in_buffer(SAME, recipe=["stack", "m1", "b1"]), "2 .*matrices of the same input"),
    (in_buffer(SAME, recipe=["convolution", "m1"]), "2 .*4 axes as source 1, got 2"),
    (in_buffer(SAME, recipe=["first_convolution", "a"]), "2 .*a first convolution of 3 channels"),
    (in_buffer(SAME, recipe=["added", "b1", "m1"]), "2 .*biases of the same shape"),
    (in_buffer(SAME, recipe=["token_bias", "constant", "project", "b1"]), "2 .*matrices that take"),
    (in_buffer(SAME, recipe=["other", "m1"]), "2 .*a known recipe, got 'other'"),
    (in_buffer(SAME, recipe=[]), "2 .*a known recipe, got ''"),
    (
        in_buffer("row_weight", shape=[SIZE, 1000]),
        r"2 .*buffer row_weight: expected float32 \(32, 512\), got float32 \(32, 1000\)",
    ),
    (in_buffer("row_start", kind="scratch"), "2 .*resize kernel's tables and no others"),
    (
        in_buffer("t1", shape=[1, 1 << 30, 2]),
        r"1 .*expected fewer than 1, so that .* 2\^31 elements; t1 would have 2147",
    ),
    (in_buffer("peaks", shape=[1, 0]), "2 .*bytes in every buffer but the frame's"),
    (in_kernel(offset=10**6), "2 .*sm_90.json: .*whole number from 0 to"),
    (in_kernel(bytes=10**6), "2 .*sm_90.json: .*whole number from 1 to"),
    (in_kernel(shared_bytes=10**6), "3 kernel 'step': needs 1000000 bytes of shared memory, this GPU has 232448"),
    ({"fused/sm_90.json": b"[]"}, "2 .*sm_90.json: expected an object"),
    ({"weights.onnx": b"\x3a\xff\xff\xff\xff\x0f"}, "2 .*weights.onnx: expected a field of"),
    ({"weights.onnx": b"\x3a" + b"\xff" * 12}, "2 .*weights.onnx: .*does not end"),
    ({"weights.onnx": TINY_PARTS["weights.onnx"][:-1]}, "2 .*weights.onnx: expected a field of"),
    ({"weights.onnx": b""}, "2 .*an array 'hard'"),
]


def test_a_bundle_that_cuts_tiles_is_refused_in_words(native, tmp_path):
    described = manifest(input=describe_input(Tiling(64, 48, SIZE, SIZE)))
    write_bundle(tmp_path / "tiled.omniad", described, TINY_PARTS)
    (line,) = native.run("open", tmp_path / "tiled.omniad").stdout.splitlines()
    assert re.match("2 .*input tiles: its images are cut into tiles, .* Detector in Python", line), line


def write_crafted(native: Native) -> list[Path]:
    paths = [native.scratch / f"{index}.omniad" for index in range(len(CRAFTED))]
    for path, (changes, _) in zip(paths, CRAFTED, strict=True):
        write_tiny(path, parts=crafted_parts(changes))
    return paths


def test_crafted_parts_are_refused(native):
    made = native.run("open", *write_crafted(native))
    assert made.returncode == 0, made.stderr
    for line, (_, words) in zip(made.stdout.splitlines(), CRAFTED, strict=True):
        assert re.match(words, line), (line, words)


def test_crafted_parts_are_read_within_their_bounds(native):
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is not on this machine")
    made = native.run("open", *write_crafted(native), under=VALGRIND)
    assert made.returncode == 0, made.stderr[-3000:]


def test_truncated_and_altered_files_are_refused(native, tiny):
    content, paths = tiny.read_bytes(), []
    rng = np.random.default_rng(3)
    for index, at in enumerate([*range(0, 80, 9), *rng.integers(80, len(content), 20)]):
        for name, damaged in (("cut", content[:at]), ("flipped", content[:at] + b"~" + content[at + 1 :])):
            if damaged != content:
                paths.append(native.scratch / f"{name}{index}")
                paths[-1].write_bytes(damaged)
    made = native.run("open", *paths)
    assert made.returncode == 0, made.stderr
    lines = made.stdout.splitlines()
    assert len(lines) == len(paths) and all(
        re.match("2 .*(empty|not a bundle|checksum)", line) for line in lines
    ), lines


def test_a_forged_zip_is_refused_or_read_as_it_is(native, tiny):
    """Any byte of the headers, directory and manifest changed, and the digest made right: no crash, no hang."""
    content, paths = tiny.read_bytes(), []
    directory = content.index(b"PK\1\2")
    manifest = content.index(b"manifest.json") - 30
    rng = np.random.default_rng(4)
    places = [*range(30), *range(manifest, manifest + 80), *range(directory, len(content) - 71)]
    for index, at in enumerate(places):
        paths.append(native.scratch / str(index))
        paths[-1].write_bytes(seal(content[:at] + bytes([content[at] ^ rng.integers(1, 256)]) + content[at + 1 :]))
    made = native.run("open", *paths)
    assert made.returncode == 0, made.stderr
    lines = made.stdout.splitlines()
    assert len(lines) == len(paths) and all(line[0] in "02" for line in lines)
    assert sum(line.startswith("2 ") for line in lines) > len(lines) // 2


def test_a_plan_without_a_front_takes_pixels_alone(native):
    plan = replace(tiny_plan(), front=None)
    buffers = {name: b for name, b in plan.buffers.items() if b.kind not in ("table", "frame")}
    path = write_tiny(native.scratch / "bare.omniad", replace(plan, buffers=buffers))
    (native.scratch / "frames").write_bytes(bytes(12))
    words = ("frames", path, 1, native.scratch / "out", native.scratch / "frames", 0, 2, 2)
    printed = native.run(*words).stdout.splitlines()
    assert printed == ["0 ", "1 frames: expected none, the plan has no front; got 1", "0 "]
