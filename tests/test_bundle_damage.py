"""Bundles that are damaged or crafted are refused with words, whatever is wrong with them."""

import errno
import io
import json
import os
import struct
import tracemalloc
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from bundles import (
    PARTS,
    SEAL_BYTES,
    TILE,
    crafted,
    full,
    manifest,
    member,
    read_bytes,
    refused,
    seal,
    zipped,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omniad_edge.bundle import read_bundle, set_thresholds, write_bundle
from omniad_edge.calibration import Calibration
from omniad_edge.errors import BundleError
from omniad_edge.recognition import limit_of


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "line.omniad"
    write_bundle(path, manifest(), PARTS)
    return path


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("crafted") / "crafted.omniad"


def test_one_flipped_byte_anywhere(path, scratch):
    data = path.read_bytes()
    ends = range(len(data) - 300, len(data))  # directory, end record and comment, each byte
    for position in sorted({*range(0, 100), *np.linspace(0, len(data) - 1, 300).astype(int), *ends}):
        for bit in (0x01, 0x20):
            damaged = bytearray(data)
            damaged[position] ^= bit
            refused(scratch, damaged)


def test_truncated_anywhere(path, scratch):
    data = path.read_bytes()
    for length in sorted({*range(1, 120), *range(1, len(data), 37), *range(len(data) - 120, len(data))}):
        refused(scratch, data[:length])
    assert "truncated" in refused(scratch, data[: len(data) // 2])


@pytest.mark.parametrize("extra", [b"\0", b"\n", b"PK\x05\x06" + bytes(18), b"x" * 71, b"y" * 5000])
def test_appended_bytes(path, scratch, extra):
    refused(scratch, path.read_bytes() + extra)
    refused(scratch, seal(path.read_bytes() + extra))
    refused(scratch, path.read_bytes() * 2)


def test_message_says_what_to_do(path, scratch):
    damaged = bytearray(path.read_bytes())
    damaged[500] ^= 1
    assert "does not match its checksum: damaged or altered; copy it again" in refused(scratch, damaged)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"threshold = 0.5\n" * 100, "is not a bundle: it starts with b'thre'"),
        (b"PK\x05\x06" + bytes(18), "is not a bundle"),
        (b"PK", "is not a bundle"),
        (b"PK\x03\x04", "no checksum"),
        (b"PK\x03\x04" + bytes(500), "no checksum"),
        (seal(b"PK\x03\x04" + bytes(71)), "no checksum"),
        (seal(b"PK\x03\x04" + bytes(500)), "directory"),
        (zipped([]), "is not a bundle"),
        (zipped([("a", b"")]), r"no manifest\.json"),
    ],
    ids=str,
)
def test_other_files(scratch, data, reason):
    scratch.write_bytes(data)
    with pytest.raises(BundleError, match=reason):
        read_bundle(scratch)


def test_not_a_file(tmp_path):
    with pytest.raises(BundleError, match=r"none\.omniad: does not exist; expected a bundle made by"):
        read_bundle(tmp_path / "none.omniad")
    with pytest.raises(BundleError, match="is not a file"):
        read_bundle(tmp_path)
    with pytest.raises(BundleError):
        read_bundle(tmp_path / ("n" * 300))
    os.mkfifo(tmp_path / "pipe.omniad")
    with pytest.raises(BundleError, match="is not a file"):
        read_bundle(tmp_path / "pipe.omniad")


def test_unreadable_file(path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(BundleError, match=r"could not be read: .*Permission denied"):
        read_bundle(path)


def test_too_large_a_file_is_not_read(tmp_path):
    path = tmp_path / "sparse.omniad"
    with path.open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(5 * 2**30)
    tracemalloc.start()
    with pytest.raises(BundleError, match="5368709120 bytes, a bundle has at most"):
        read_bundle(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6


def test_flipped_bytes_under_a_right_digest(scratch):
    """Whatever the ZIP's fields say: a BundleError, or the very same bundle (a time stamp, say)."""
    data = crafted()
    bundle = read_bytes(scratch, data)
    refusals = 0
    positions = [*range(0, 60), *range(60, len(data) - 450, 41), *range(len(data) - 450, len(data) - 71)]
    for position in positions:
        for bits in (0x01, 0x80):
            forged = bytearray(data)
            forged[position] ^= bits
            try:
                assert read_bytes(scratch, seal(forged)).parts == bundle.parts
            except BundleError:
                refusals += 1
    assert refusals > 0.7 * len(positions)


def test_part_that_does_not_match_its_digest(scratch):
    members = [("manifest.json", json.dumps(full())), *(PARTS | {"graphs/frame.onnx": b"fRame"}).items()]
    assert "part graphs/frame.onnx does not match its digest" in refused(scratch, zipped(members))


def test_part_of_another_size(scratch):
    members = [("manifest.json", json.dumps(full())), *(PARTS | {"graphs/frame.onnx": b"frames"}).items()]
    assert "part graphs/frame.onnx has 6 bytes, its manifest says 5" in refused(scratch, zipped(members))


def test_part_missing_and_part_too_many(scratch):
    text = json.dumps(full())
    some = dict(list(PARTS.items())[:-1])
    assert "in its manifest but not in the file" in refused(
        scratch, zipped([("manifest.json", text), *some.items()])
    )
    more = PARTS | {"notes.txt": b"hello"}
    assert "in the file but not in its manifest" in refused(
        scratch, zipped([("manifest.json", text), *more.items()])
    )


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["manifest.json", "weights.onnx"])
def test_duplicate_names(scratch, name):
    members = [("manifest.json", json.dumps(full())), *PARTS.items()]
    assert "two members are named" in refused(scratch, zipped([*members, (name, dict(members)[name])]))


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/x",
        "a/../x",
        "a/./x",
        "..",
        ".x",
        "a\\x",
        "C:x",
        "C:\\x",
        "a//x",
        "a/",
        "",
        "ü",
        "a b",
        "a\nb",
    ],
)
def test_names_that_lead_elsewhere(scratch, tmp_path, name):
    parts = PARTS | {name: b"x"}
    assert "name must be relative and plain" in refused(scratch, crafted(parts=parts))
    with pytest.raises(BundleError, match="name must be relative and plain"):
        write_bundle(tmp_path / "a.omniad", manifest(), parts)
    assert list(tmp_path.iterdir()) == []


def test_name_cut_at_a_nul(scratch):
    """The ZIP says evil.onnx NUL x, which zipfile shows as evil.onnx; the manifest lists evil.onnx."""
    listed = full(parts=PARTS | {"evil.onnx": b"x"})
    members = [("manifest.json", json.dumps(listed)), *PARTS.items(), ("evil.onnx_x", b"x")]
    data = zipped(members).replace(b"evil.onnx_x", b"evil.onnx\0x")
    assert "'evil.onnx' is in its manifest but not in the file" in refused(scratch, seal(data))


def test_compressed_members(scratch):
    members = [("manifest.json", json.dumps(full())), *PARTS.items()]
    assert "compressed or encrypted" in refused(scratch, zipped(members, zipfile.ZIP_DEFLATED))
    weights = (member("weights.onnx", zipfile.ZIP_DEFLATED), PARTS["weights.onnx"])
    others = [m for m in members if m[0] != "weights.onnx"]
    assert "'weights.onnx' is compressed" in refused(scratch, zipped([*others, weights]))


@pytest.mark.parametrize("name", ["manifest.json", "weights.onnx"])
def test_a_bomb_is_not_unpacked(scratch, name):
    bomb = member(name, zipfile.ZIP_DEFLATED)
    content = bytes(200_000_000)
    listed = full()["parts"] | {"weights.onnx": {"sha256": "0" * 64, "bytes": len(content)}}
    members = {"manifest.json": json.dumps(full({"parts": listed})), **PARTS}
    del members[name]
    data = zipped([*members.items(), (bomb, content)])
    assert len(data) < 300_000
    message, peak = refusal_and_peak(scratch, data)
    assert "is compressed or encrypted" in message
    assert peak < 2e6


def refusal_and_peak(scratch: Path, data: bytes) -> tuple[str, int]:
    """The reason, and the bytes allocated while the file is refused."""
    tracemalloc.start()
    message = refused(scratch, data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return message, peak


@pytest.mark.parametrize("name", ["manifest.json", "weights.onnx"])
@pytest.mark.parametrize("size", [10**4, 2**24, 2**31 - 1, 2**32 - 1])
@pytest.mark.parametrize("fields", [("compressed", "plain"), ("plain",), ("compressed",)], ids=str)
def test_sizes_that_the_file_does_not_have(scratch, name, size, fields):
    sizes = {"weights.onnx": {"sha256": "0" * 64, "bytes": size}}
    data = bytearray(crafted({"parts": full()["parts"] | sizes}))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        local = archive.getinfo(name).header_offset
    directory = data.rindex(name.encode()) - 46
    for compressed, plain in ((local + 18, local + 22), (directory + 20, directory + 24)):
        if "compressed" in fields:
            struct.pack_into("<L", data, compressed, size)
        if "plain" in fields:
            struct.pack_into("<L", data, plain, size)
    message, peak = refusal_and_peak(scratch, seal(data))
    assert "claim" in message
    assert peak < 1e6


def test_members_inside_one_another(scratch):
    """Each part is the local header of the next and all that follows: 30 times the file's size in parts."""
    local, central = "<4s5H3L2H", "<4s6H3L5H2L"
    body, parts, entries = bytes(100_000), {}, []
    for name in [f"p{i:02}" for i in range(30)]:
        parts[name] = body
        fields = (20, 0, 0, 0, 0, zlib.crc32(body), len(body), len(body), len(name), 0)
        body = struct.pack(local, b"PK\x03\x04", *fields) + name.encode() + body
        entries.append((name, fields, len(body)))
    text = json.dumps(full(parts=parts)).encode()
    fields = (20, 0, 0, 0, 0, zlib.crc32(text), len(text), len(text), 13, 0)
    data = struct.pack(local, b"PK\x03\x04", *fields) + b"manifest.json" + text + body
    directory = b""
    entries.append(("manifest.json", fields, len(data)))
    for name, fields, from_end in entries:
        start = len(data) - from_end
        directory += struct.pack(central, b"PK\x01\x02", 20, *fields, 0, 0, 0, 0, start) + name.encode()
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 31, 31, len(directory), len(data), SEAL_BYTES)
    assert "members claim 3" in refused(scratch, seal(data + directory + end + bytes(SEAL_BYTES)))


def test_bytes_before_the_first_member(scratch):
    assert "directory" in refused(scratch, seal(b"PK\x03\x04 and more" + crafted()))


def test_manifest_of_17_mib(scratch):
    text = json.dumps(full({"parity": {"x": "y" * 17 * 2**20}}))
    assert "manifest is larger than 16777216 bytes" in refused(scratch, zipped([("manifest.json", text)]))
    with pytest.raises(BundleError, match="larger than 16777216"):
        write_bundle(scratch.parent / "m.omniad", manifest(parity={"x": "y" * 17 * 2**20}), PARTS)


def test_directory_that_lies(scratch):
    """The end record's size, start and counts of the directory."""
    end = len(crafted()) - SEAL_BYTES - 22
    for offset, code in ((4, "<H"), (6, "<H"), (8, "<H"), (10, "<H"), (12, "<L"), (16, "<L")):
        for value in (0, 1, 0x7FFF, 0xFFFF, 0xFFFFFFFF):
            data = bytearray(crafted())
            value &= 0xFFFF if code == "<H" else 0xFFFFFFFF
            if struct.unpack_from(code, data, end + offset)[0] == value:
                continue
            struct.pack_into(code, data, end + offset, value)
            refused(scratch, seal(data))


def test_thousands_of_members(scratch):
    data = zipped([("manifest.json", json.dumps(full())), *((f"{i:050}", b"") for i in range(15_000))])
    assert "ZIP directory of" in refused(scratch, data)
    with pytest.raises(BundleError, match="ZIP directory of"):
        write_bundle(scratch.parent / "many.omniad", manifest(), {f"{i:050}": b"" for i in range(15_000)})


def test_64_bit_directory(scratch):
    data = crafted()
    end = len(data) - SEAL_BYTES - 22
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, 0, 1)
    size = struct.unpack_from("<L", data, end + 12)[0]
    record = bytearray(data[end:])
    struct.pack_into("<L", record, 12, size + len(locator))
    assert "64-bit" in refused(scratch, seal(data[:end] + locator + record))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"format": ' + b"9" * 5000 + b"}", "manifest|format"),
        (json.dumps(full({"parity": {"x": float("nan")}})).encode(), "NaN is not a finite number"),
        (json.dumps(full()).replace("1e-05", "1e999").encode(), "1e999 is not a finite number"),
        (b"[]", "format"),
        (b"null", "format"),
        (b"{}", "format"),
        (b'{"format": "zip"}', "format"),
        (b'{"format": "omniad-bundle"}', "schema must be a whole number from 1, got None"),
        (b'{"format": "omniad-bundle", "schema": 2}', "created must be a string"),
    ],
)
def test_manifest_that_is_none(scratch, text, reason):
    scratch.write_bytes(zipped([("manifest.json", text)]))
    with pytest.raises(BundleError, match=reason):
        read_bundle(scratch)


@pytest.mark.parametrize("schema", [0, -1, "1", "2", 1.0, True, None, [1], {}], ids=repr)
def test_schema_that_is_none(scratch, schema):
    assert "schema must be a whole number from 1" in refused(scratch, crafted({"schema": schema}))


def without(values: dict, key: str) -> dict:
    return {k: v for k, v in values.items() if k != key}


LIMIT = asdict(limit_of(np.ones(20)))
SIZES = [0, -32, 1, 31, 33, 100, 4097, 4128, 10**9, 10**400, 256.0, "256", None, True, [256]]
WRONG = [
    *({"input": manifest()["input"] | {key: size}} for key in ("height", "width") for size in SIZES),
    *(
        {"input": manifest()["input"] | {key: v}}
        for key in ("layout", "dtype", "colour", "resize")
        for v in ("x", None)
    ),
    *({"input": without(manifest()["input"], key)} for key in manifest()["input"]),
    *({"precision": value} for value in ("int8", "FP16", "", 16, None, [])),
    *({"outputs": value} for value in ([], ["pred_score", "anomaly_map"], "anomaly_map", [["anomaly_map"], 1])),
    *({"created": value} for value in ("", 1, None, "\x1b[2J", "x" * 201)),
    *({"versions": value} for value in ({"a": 1}, {"": "1"}, {"a": "\x1b"}, [])),
    *({"model": value} for value in (None, [], "resnet18")),
    *({"parity": value} for value in (None, [], 1e-5)),
    *({"trained_on": value} for value in ([1], ["0123"], ["0123456789ABCDEF"], ["0123456789abcdef\n"], {}, "")),
    *({"checkpoint": value} for value in (None, 1, "0123456789abcdef", "A" * 64)),
    *({"products": value} for value in ({}, [], {"": TILE.to_dict()}, {"a\x1b[31m": TILE.to_dict()}, {"a": None})),
    *({"products": {"a": TILE.to_dict() | {"threshold": v}}} for v in (None, "0.5", True, [], 10**400)),
    *({"products": {"a": without(TILE.to_dict(), key)}} for key in TILE.to_dict()),
    *({"recognition": value} for value in (None, [], {"screw": LIMIT}, {"other": LIMIT, "tile": LIMIT})),
    *(
        {"recognition": {"screw": LIMIT, "tile": LIMIT | changes}}
        for changes in (
            *({"limit": value} for value in (0, -1.0, "1", None, True, 10**400)),
            *({"n_good": value} for value in (0, 1.5, None)),
            *({"false_unknown_bound": value} for value in (-0.1, 1.1, "0")),
            {"confidence": 1.0},
            {"more": 1},
        )
    ),
    *({"history": value} for value in ({}, [1], [{}], [[]])),
    *({"parts": value} for value in ([], {"weights.onnx": 1}, {"weights.onnx": {}}, {"manifest.json": {}})),
    *(
        {"parts": full()["parts"] | {"weights.onnx": full()["parts"]["weights.onnx"] | change}}
        for change in (
            {"bytes": "768"},
            {"bytes": 768.0},
            {"bytes": -1},
            {"bytes": 10**400},
            {"sha256": "0"},
            {"sha256": 0},
        )
    ),
]


@pytest.mark.parametrize("changes", WRONG, ids=lambda c: f"{c!r:.60}")
def test_wrong_shapes(scratch, changes):
    refused(scratch, crafted(changes))


@pytest.mark.parametrize("key", full())
def test_missing_keys(scratch, key):
    data = zipped([("manifest.json", json.dumps(without(full(), key))), *PARTS.items()])
    assert key in refused(scratch, data)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_threshold_that_is_not_finite(scratch, number):
    text = json.dumps(full({"products": {"a": TILE.to_dict() | {"threshold": 0.1875}}}))
    data = zipped([("manifest.json", text.replace("0.1875", number)), *PARTS.items()])
    assert "not a finite number" in refused(scratch, data)


def places(node: object, at: tuple = ()) -> list[tuple]:
    """Every key and index in a JSON value."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [at, *(p for key, child in items for p in places(child, (*at, key)))]


def planted(node: object, at: tuple, value: object) -> object:
    if not at:
        return value
    copy = node.copy()
    copy[at[0]] = planted(node[at[0]], at[1:], value)
    return copy


ENTRY = {"time": "t", "action": "a", "product": "screw", "old_threshold": 1, "new_threshold": 0.5}
FUZZED = full({"history": [ENTRY]})
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([0, 1, 32, 64, 0.5, "fp32", "0123456789abcdef", 10**400, -1, "\ud800", "manual"]),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(places(FUZZED)), json_values), min_size=1, max_size=2))
def test_any_value_anywhere(scratch, plants):
    forged = FUZZED
    for at, value in plants:
        if at in places(forged):
            forged = planted(forged, at, value)
    try:
        bundle = read_bytes(scratch, zipped([("manifest.json", json.dumps(forged)), *PARTS.items()]))
    except BundleError:
        return
    assert 32 <= bundle.height <= 4096 and bundle.width % 32 == 0
    assert bundle.precision in ("fp32", "fp16")
    assert all(isinstance(c, Calibration) and np.isfinite(c.threshold) for c in bundle.products.values())
    name = next(iter(bundle.products))
    set_thresholds(scratch, {name: TILE}, "calibrate")
    assert read_bundle(scratch).products == bundle.products | {name: TILE}


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=400))
def test_garbage_with_a_right_end(scratch, garbage):
    for data in (b"PK\x03\x04" + garbage, garbage):
        end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, len(garbage), 4, SEAL_BYTES)
        refused(scratch, seal(data + end + bytes(SEAL_BYTES)))
