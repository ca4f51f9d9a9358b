"""Bundles as they should be: written, read, upgraded, and changed in place."""

import errno
import hashlib
import json
import os
import time
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from bundles import (
    PARTS,
    SCREW,
    TILE,
    crafted,
    full,
    manifest,
    member,
    read_bytes,
    refused,
    zipped,
)

from omniad_edge import bundle as bundle_module
from omniad_edge.bundle import SCHEMA, Bundle, read_bundle, set_thresholds, write_bundle
from omniad_edge.errors import BundleError, InputError
from omniad_edge.recognition import limit_of, read_recogniser


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "line.omniad"
    write_bundle(path, manifest(), PARTS)
    return path


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("crafted") / "crafted.omniad"


def test_round_trip(path):
    bundle = read_bundle(path)
    assert bundle.manifest == full()
    assert bundle.parts == PARTS
    assert (bundle.height, bundle.width, bundle.precision) == (256, 320, "fp16")
    assert bundle.products == {"screw": SCREW, "tile": TILE}
    assert read_bundle(str(path)) == bundle


def test_file_layout(path):
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment == b"sha256:" + hashlib.sha256(data[:-71]).hexdigest().encode()
        assert archive.namelist() == sorted([*PARTS, "manifest.json"])
        assert {i.compress_type for i in archive.infolist()} == {zipfile.ZIP_STORED}
        assert {i.date_time for i in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_same_content_same_bytes(path, tmp_path):
    write_bundle(tmp_path / "b.omniad", manifest(), dict(reversed(PARTS.items())))
    assert (tmp_path / "b.omniad").read_bytes() == path.read_bytes()


def test_write_leaves_its_arguments_alone(tmp_path):
    given_manifest, given_parts = manifest(), dict(PARTS)
    write_bundle(tmp_path / "a.omniad", given_manifest, given_parts)
    assert (given_manifest, given_parts) == (manifest(), PARTS)


def test_our_writer_is_not_needed_to_make_one(scratch):
    assert read_bytes(scratch, crafted()).parts == PARTS


def test_any_printable_product_name(tmp_path):
    names = ["Schraube M4×10", "螺丝", "a/b", "x" * 200]
    write_bundle(tmp_path / "a.omniad", manifest(products=dict.fromkeys(names, TILE.to_dict())), PARTS)
    assert set(read_bundle(tmp_path / "a.omniad").products) == set(names)


def test_onnx_is_graph_and_weights(path):
    bundle = read_bundle(path)
    assert bundle.onnx("frame") == b"frame" + PARTS["weights.onnx"]
    assert bundle.onnx("batch") == PARTS["weights.onnx"]
    with pytest.raises(InputError, match=r"no part 'graphs/tiles.onnx'; it has: graphs/batch.onnx, graphs/fr"):
        bundle.onnx("tiles")
    with pytest.raises(InputError, match=r"no part 'weights.onnx'"):
        Bundle(bundle.manifest, {"graphs/frame.onnx": b""}).onnx("frame")


def test_concatenated_onnx_runs():
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [2]) for n in "xy")
    opset = [onnx.helper.make_opsetid("", 17)]
    weights = onnx.ModelProto()
    weights.graph.initializer.append(onnx.numpy_helper.from_array(np.float32([10, 20]), "w"))
    for op, expected in (("Add", [11, 22]), ("Mul", [10, 40])):
        graph = onnx.helper.make_graph([onnx.helper.make_node(op, ["x", "w"], ["y"])], "g", [x], [y])
        model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
        parts = {"graphs/a.onnx": model.SerializeToString(), "weights.onnx": weights.SerializeToString()}
        session = onnxruntime.InferenceSession(Bundle({}, parts).onnx("a"), providers=["CPUExecutionProvider"])
        assert session.run(None, {"x": np.float32([1, 2])})[0].tolist() == expected


def test_66_mb_are_read_in_half_a_second(tmp_path, rng):
    """In processor time, which other work on the machine does not count into."""
    path = tmp_path / "large.omniad"
    write_bundle(path, manifest(), PARTS | {"weights.onnx": rng.bytes(66_000_000)})
    times = []
    for _ in range(3):
        start = time.process_time()
        read_bundle(path)
        times.append(time.process_time() - start)
    path.unlink()
    assert min(times) < 0.5, times


@pytest.mark.parametrize("schema", [SCHEMA + 1, 7, 10**300])
@pytest.mark.parametrize(
    "members",
    [
        lambda text: [("manifest.json", text), *PARTS.items()],
        lambda text: [("manifest.json", text)],
        lambda text: [("manifest.json", text), ("../new layout\\", b"new")],
        lambda text: [("manifest.json", text), (member("weights.bin", zipfile.ZIP_DEFLATED), bytes(100_000))],
    ],
)
def test_newer_schema_whatever_else_is_new(scratch, schema, members):
    for new in (
        full({"schema": schema}),
        {"format": "omniad-bundle", "schema": schema, "parts": 1, "input": []},
    ):
        message = refused(scratch, zipped(members(json.dumps(new))))
        assert "was written by a newer version (schema " in message
        assert f"this one reads up to {SCHEMA}): upgrade omniad-edge" in message


def test_older_schema_is_upgraded_step_by_step(path, monkeypatch):
    old = read_bundle(path)
    monkeypatch.setattr(bundle_module, "SCHEMA", 4)
    steps = (
        *bundle_module.UPGRADES,
        lambda m: m | {"model": m["model"] | {"a": 1}},
        lambda m: m | {"model": m["model"] | {"b": m["model"]["a"] + 1}},
    )
    monkeypatch.setattr(bundle_module, "UPGRADES", steps)
    assert read_bundle(path).manifest["model"] == old.manifest["model"] | {"a": 1, "b": 2}
    set_thresholds(path, {"screw": TILE}, "calibrate")
    new = read_bundle(path).manifest
    assert new["schema"] == 4 and new["model"]["b"] == 2
    monkeypatch.undo()
    with pytest.raises(BundleError, match=r"newer version \(schema 4, this one reads up to 2\)"):
        read_bundle(path)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"parity": {"x": float("nan")}}, PARTS),
        ({"parity": {"x": np.float32(1)}}, PARTS),
        ({"model": {"depths"}}, PARTS),
        ({"input": {}}, PARTS),
        ({"products": {}}, PARTS),
        ({}, {"manifest.json": b"{}"}),
        ({}, {"a": "text"}),
        ({}, {1: b""}),
        ({}, {"\ud800": b""}),
    ],
)
def test_what_a_reader_would_refuse_is_not_written(path, changes, parts):
    before = path.read_bytes()
    with pytest.raises(BundleError, match=r"line\.omniad: not written: "):
        write_bundle(path, manifest(**changes), parts)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_too_large_is_not_written(path, monkeypatch):
    monkeypatch.setattr(bundle_module, "MAX_FILE_BYTES", 3000)
    with pytest.raises(BundleError, match="more than 3000 bytes"):
        write_bundle(path, manifest(), {"weights.onnx": bytes(3000)})


def test_set_thresholds(path):
    old = read_bundle(path)
    manual = SCREW.with_threshold(0.75)
    set_thresholds(path, {"screw": manual}, "threshold by hand")
    set_thresholds(path, {"screw": SCREW, "tile": SCREW}, "calibrate")
    new = read_bundle(path)
    assert new.products == {"screw": SCREW, "tile": SCREW}
    assert new.parts == old.parts
    changed = ("products", "history")
    assert {k: v for k, v in new.manifest.items() if k not in changed} == {
        k: v for k, v in old.manifest.items() if k not in changed
    }
    assert all(entry.pop("time").endswith("+00:00") for entry in new.manifest["history"])
    assert new.manifest["history"] == [
        {"action": a, "product": p, "old_threshold": o, "new_threshold": n}
        for a, p, o, n in (
            ("threshold by hand", "screw", SCREW.threshold, 0.75),
            ("calibrate", "screw", 0.75, SCREW.threshold),
            ("calibrate", "tile", TILE.threshold, SCREW.threshold),
        )
    ]


def test_manual_threshold_keeps_the_rest(path):
    set_thresholds(path, {"screw": SCREW.with_threshold(2)}, "by hand")
    products = read_bundle(path).products
    assert products == {
        "screw": replace(SCREW, threshold=2.0, false_reject_bound=None, source="manual"),
        "tile": TILE,
    }


def test_unknown_keys_survive_a_new_threshold(scratch):
    scratch.write_bytes(crafted({"note": {"line": 4}}))
    set_thresholds(scratch, {"tile": SCREW}, "calibrate")
    assert read_bundle(scratch).manifest["note"] == {"line": 4}


def test_unknown_product(path):
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"no product 'nut'; it has: screw, tile"):
        set_thresholds(path, {"screw": TILE, "nut": TILE}, "calibrate")
    assert path.read_bytes() == before


def test_action_that_is_no_text(path):
    before = path.read_bytes()
    for action in ("", "\x1b[2J", "x" * 201, 3):
        with pytest.raises(BundleError, match="history entry"):
            set_thresholds(path, {"screw": TILE}, action)
    assert path.read_bytes() == before


def test_set_thresholds_follows_a_link(path):
    link = path.with_name("current.omniad")
    link.symlink_to(path.name)
    set_thresholds(link, {"screw": TILE}, "calibrate")
    assert link.is_symlink() and read_bundle(path).products["screw"] == TILE


@pytest.mark.parametrize("target", [(Path, "replace"), (Path, "write_bytes"), (os, "fsync")], ids=repr)
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_interrupted_write_leaves_the_old_bundle(path, monkeypatch, target, failure):
    before = path.read_bytes()

    def fail(*args, **kwargs):
        if target[1] == "write_bytes":
            with args[0].open("wb") as file:  # half of it is on the disk
                file.write(args[1][:1000])
        raise failure

    monkeypatch.setattr(*target, fail)
    expected = BundleError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as error:
        set_thresholds(path, {"screw": TILE}, "calibrate")
    monkeypatch.undo()
    assert isinstance(failure, KeyboardInterrupt) or "No space left on device" in str(error.value)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    assert read_bundle(path).products["screw"] == SCREW


def test_a_bundle_from_before_recognition_recognises_nothing(scratch):
    before = {key: value for key, value in full({"schema": 1}).items() if key != "recognition"}
    read = read_bytes(scratch, zipped([("manifest.json", json.dumps(before)), *PARTS.items()]))
    assert read.recognition == {} and read.manifest == full() and read_recogniser(read) is None


def test_limits_of_recognition_are_replaced_with_the_thresholds(scratch):
    limits = {"screw": limit_of(np.ones(20)), "tile": limit_of(np.ones(3), used_for_fit=True)}
    write_bundle(scratch, manifest(recognition={name: asdict(limit) for name, limit in limits.items()}), PARTS)
    assert read_bundle(scratch).recognition == limits
    new = {"screw": limit_of(np.full(400, 2.0))}
    set_thresholds(scratch, {"screw": TILE}, "calibrate", new)
    assert read_bundle(scratch).recognition == limits | new


def test_what_is_no_path_is_refused():
    with pytest.raises(InputError, match=r"bundle: expected the path of a file .*; got None"):
        read_bundle(None)
