"""One file `*.omniad` holds all a line needs: the graphs, the weights and each product's threshold.

The file is a ZIP of stored (uncompressed) members in sorted order with a fixed time stamp: `manifest.json`
and the parts it lists with size and SHA-256. The ZIP comment, the last 71 bytes, is `sha256:<64 hex>` of
every byte before it, so a single changed byte is noticed. The digests find damage and mistakes; they are no
signature. A crafted file has right ones, so every claim in it is checked against the file's real size.
"""

import hashlib
import io
import json
import math
import os
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from reprlib import repr as short
from types import MappingProxyType

from .calibration import Calibration
from .errors import BundleError, InputError
from .files import atomic_write
from .recognition import ProductLimit
from .tiles import MAX_INPUT_PX, MAX_SIDE_PX, OVERLAP_PX, Tiling

FORMAT = "omniad-bundle"
SCHEMA = 2  # 2 has "recognition"; who does not know it would let unknown products pass
# UPGRADES[i] turns a manifest of schema i + 1 into one of schema i + 2, so an old file is read step by step.
UPGRADES: tuple[Callable[[dict], dict], ...] = (lambda manifest: manifest | {"schema": 2, "recognition": {}},)

MANIFEST = "manifest.json"
WEIGHTS = "weights.onnx"
SEAL_BYTES = len("sha256:") + 64
END_RECORD = struct.Struct("<4s4H2LH")  # ZIP end of central directory, APPNOTE 4.3.16
MAX_FILE_BYTES = 2**31 - 1  # an ONNX message ends at 2 GiB; also keeps the ZIP free of its 64-bit extension
MAX_MANIFEST_BYTES = 16 * 2**20
MAX_DIRECTORY_BYTES = 2**20
PART_NAME = re.compile(r"(?!\.)[A-Za-z0-9_.-]+(/(?!\.)[A-Za-z0-9_.-]+)*")  # no component starts with a dot
SHA256 = re.compile(r"[0-9a-f]{64}")
IMAGE_DIGEST = re.compile(r"[0-9a-f]{16}")
UTF8_NAME = 0x800  # the only ZIP member flag allowed: no encryption, no sizes behind the data
ZIP_ERRORS = (zipfile.BadZipFile, ValueError, RuntimeError, struct.error, EOFError, OverflowError, IndexError)

KINDS = {
    "created": str,
    "versions": dict,
    "model": dict,
    "precision": str,
    "input": dict,
    "outputs": list,
    "products": dict,
    "recognition": dict,
    "parity": dict,
    "trained_on": list,
    "history": list,
    "parts": dict,
}
JSON_KIND = {str: "a string", dict: "an object", list: "a list"}
FIXED_INPUT = {"layout": "NHWC", "dtype": "uint8", "colour": "RGB", "resize": "area-halved pillow-bilinear"}
# Of a bundle with input.tiles. Another value than above: a version that does not know tiles refuses it.
TILED_RESIZE = "area-halved pillow-bilinear, then cut into tiles"
HISTORY_KEYS = ("time", "action", "product", "old_threshold", "new_threshold")
OUTPUTS = ["anomaly_map", "pred_score"], ["anomaly_map", "pred_score", "embedding"]


@dataclass(frozen=True)
class Bundle:
    """A bundle in memory, everything checked. manifest: as in the file; parts: name -> content."""

    manifest: dict
    parts: dict[str, bytes]

    @property
    def height(self) -> int:
        """Input height in pixels."""
        return self.manifest["input"]["height"]

    @property
    def width(self) -> int:
        """Input width in pixels."""
        return self.manifest["input"]["width"]

    @property
    def tiling(self) -> Tiling:
        """How a frame is seen."""
        tiles = self.manifest["input"].get("tiles") or {"rows": self.height, "columns": self.width}
        return Tiling(tiles["rows"], tiles["columns"], self.height, self.width)

    @property
    def precision(self) -> str:
        """Number format of the graphs: "fp32" or "fp16"."""
        return self.manifest["precision"]

    @property
    def products(self) -> dict[str, Calibration]:
        """Product name -> its threshold and calibration."""
        return self.calibrations_of("")

    def calibrations_of(self, graph: str) -> dict[str, Calibration]:
        """As `products`, but for the scores of this graph. 8 bits move them: quantised graphs have their own."""
        entries = self.manifest.get("quantised", {}).get(graph, self.manifest["products"])
        return {name: Calibration.from_dict(entry) for name, entry in entries.items()}

    @property
    def recognition(self) -> dict[str, ProductLimit]:
        """Product name -> how far its images may be from it; empty of a bundle that cannot recognise products."""
        return self.recognition_of("")

    def recognition_of(self, graph: str) -> dict[str, ProductLimit]:
        """As `recognition`, but for the embeddings of this graph. 8 bits move them too; bundles from before they
        were measured have the limits of all others."""
        entries = self.manifest.get("quantised_recognition", {}).get(graph, self.manifest["recognition"])
        return {name: ProductLimit.from_dict(entry) for name, entry in entries.items()}

    def onnx(self, graph: str) -> bytes:
        """The ONNX model of one graph with its weights, ready to be loaded.

        Protobuf messages of the same type, put one behind the other, parse as their merge. The graph
        (a ModelProto without initializers) and the weights (one with nothing else) are therefore stored
        once each, and all graphs share the weights. Raises InputError if there is no such graph.
        """
        name = f"graphs/{graph}.onnx"
        for part in (name, WEIGHTS):
            if part not in self.parts:
                raise InputError(f"this bundle has no part {part!r}; it has: {', '.join(sorted(self.parts))}")
        return self.parts[name] + self.parts[WEIGHTS]


def describe_input(tiling: Tiling) -> dict:
    """The manifest's entry on the network's input, and on how it is made of a frame."""
    entry = {"height": tiling.height, "width": tiling.width, **FIXED_INPUT}
    if tiling.count == 1:
        return entry
    tiles = {"rows": tiling.rows, "columns": tiling.columns, "overlap_px": OVERLAP_PX}
    return entry | {"resize": TILED_RESIZE, "tiles": tiles}


def quantised_graph(backend: str, precision: str) -> str:
    """Name of the graph that an engine computes in int8 or fp8: on a GPU the rest of it is fp16, on a CPU fp32."""
    return "int8_fp16" if (backend, precision) == ("tensorrt", "int8") else precision


def write_bundle(path: str | Path, manifest: dict, parts: dict[str, bytes]) -> None:
    """Write the bundle; `path` holds the old file or the whole new one at any time.

    manifest: created, versions, model, precision, input, outputs, products, recognition, parity, trained_on,
    history, and where there are such graphs quantised: graph -> products with the thresholds for its scores, and
    quantised_recognition: graph -> products with the limits for its embeddings; of a training run also checkpoint,
    the SHA-256 of its file; its format, schema and parts are filled in here.
    parts: name (letters, digits, `_.-/`) -> content.

    The same content gives the same bytes. Raises BundleError if a reader would refuse the result, or if
    it cannot be written.
    """
    try:
        content = _pack(manifest, parts)
        _unpack(content)  # a file that a reader would refuse is not written
        with atomic_write(path) as part:
            part.write_bytes(content)
    except (BundleError, TypeError, ValueError, RecursionError) as exc:
        raise BundleError(f"{path}: not written: {exc}") from exc
    except OSError as exc:
        raise BundleError(f"{path}: not written, an older file there is as it was: {exc}") from exc


def is_bundle(path: Path) -> bool:
    """By its content, whatever it is called; or if it is not there, by its name."""
    try:
        with zipfile.ZipFile(path) as file:
            return MANIFEST in file.namelist()
    except (OSError, zipfile.BadZipFile):
        return path.suffix == ".omniad"


def read_bundle(path: str | Path) -> Bundle:
    """Read and check a bundle: the whole file's digest, the ZIP, the manifest, each part's digest.

    Raises BundleError with the file and the reason if it is missing, damaged, altered, crafted, no bundle
    or written by a newer version. Takes memory for twice the file.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"bundle: expected the path of a file such as line3.omniad; got {path!r}")
    try:
        data = _read_file(Path(path))
        _check_seal(data)
        return _unpack(data)
    except BundleError as exc:
        raise BundleError(f"{path}: {exc}") from exc
    except OSError as exc:
        raise BundleError(f"{path}: could not be read: {exc}") from exc


def set_thresholds(
    path: str | Path,
    calibrations: dict[str, Calibration],
    action: str,
    limits: Mapping[str, ProductLimit] = MappingProxyType({}),
    graph: str = "",
) -> None:
    """Replace the calibrations of these products in the bundle file, and record it in its history.

    limits: of recognition, of some of the same products
    graph:  calibrations and limits are for what this quantised graph gives; else for what all others do

    action: a few words for the history, such as "calibrate". Other products stay as they are. The file is
    replaced as a whole; on any error it is the old one. Raises InputError for a product which the bundle
    does not have, BundleError as `read_bundle` and `write_bundle` do.
    """
    bundle = read_bundle(path)
    quantised, products = bundle.manifest.get("quantised", {}), bundle.calibrations_of(graph)
    unknown = sorted(set(calibrations) - set(products))
    if unknown:
        raise InputError(f"{path} has no product {', '.join(map(repr, unknown))}; it has: {', '.join(products)}")
    history = [
        {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "action": action,
            "product": name,
            "old_threshold": products[name].threshold,
            "new_threshold": calibration.threshold,
        }
        for name, calibration in calibrations.items()
    ]
    products |= calibrations
    entries = {name: calibration.to_dict() for name, calibration in products.items()}
    changes = {"quantised": quantised | {graph: entries}} if graph in quantised else {"products": entries}
    changes["history"] = bundle.manifest["history"] + history
    if limits:
        entries = {name: asdict(limit) for name, limit in (bundle.recognition_of(graph) | limits).items()}
        of_graphs = bundle.manifest.get("quantised_recognition", {}) | {graph: entries}
        changes |= {"quantised_recognition": of_graphs} if graph in quantised else {"recognition": entries}
    write_bundle(path, bundle.manifest | changes, bundle.parts)


def _pack(manifest: dict, parts: dict[str, bytes]) -> bytes:
    """The bytes of the file: a ZIP and, as its comment, the digest of all before the comment."""
    listed = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in parts.items()
    }
    manifest = manifest | {"format": FORMAT, "schema": SCHEMA, "parts": listed}
    text = json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False).encode()
    _check_manifest(_load_json(text))  # as a reader will see it; zipfile needs the part names to be sane
    members = parts | {MANIFEST: text}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system = 3  # the same bytes on every system
            info.external_attr = 0o644 << 16
            archive.writestr(info, members[name])
        archive.comment = bytes(SEAL_BYTES)
    content = buffer.getbuffer()[:-SEAL_BYTES]
    if len(content) + SEAL_BYTES > MAX_FILE_BYTES:
        raise BundleError(f"it would have more than {MAX_FILE_BYTES} bytes")
    return b"".join((content, _digest(content)))


def _digest(content: bytes | memoryview) -> bytes:
    return b"sha256:" + hashlib.sha256(content).hexdigest().encode()


def _read_file(path: Path) -> bytes:
    if not path.is_file():  # before opening: a named pipe would block
        reason = "is not a file" if path.exists() else "does not exist"
        raise BundleError(f"{reason}; expected a bundle made by `omniad-export`")
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        if size > MAX_FILE_BYTES:
            raise BundleError(f"is not a bundle: {size} bytes, a bundle has at most {MAX_FILE_BYTES}")
        file.seek(0)
        return file.read(size)


def _check_seal(data: bytes) -> None:
    if not data:
        raise BundleError("is empty (0 bytes); copy it again")
    if not data.startswith(b"PK\x03\x04"):
        raise BundleError(f"is not a bundle: it starts with {data[:4]!r}; expected a file of `omniad-export`")
    if len(data) < END_RECORD.size + SEAL_BYTES or not data[-SEAL_BYTES:].startswith(b"sha256:"):
        raise BundleError("has no checksum at its end: truncated, altered or not a bundle; copy it again")
    if data[-SEAL_BYTES:] != _digest(memoryview(data)[:-SEAL_BYTES]):
        raise BundleError("does not match its checksum: damaged or altered; copy it again from its source")


def _unpack(data: bytes) -> Bundle:
    """The bundle in a file whose digest is right. Nothing in it is believed beyond that."""
    _check_end_record(data)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = _list_members(archive, len(data))
            if MANIFEST not in members:
                raise BundleError(f"is not a bundle: it has no {MANIFEST}")
            _check_member(members[MANIFEST])
            if members[MANIFEST].file_size > MAX_MANIFEST_BYTES:
                raise BundleError(f"its manifest is larger than {MAX_MANIFEST_BYTES} bytes")
            # Before anything else is judged: a newer version may store the rest in another way.
            manifest = _upgrade(_load_json(archive.read(members.pop(MANIFEST))))
            _check_manifest(manifest)
            return Bundle(manifest, _read_parts(archive, members, manifest["parts"]))
    except ZIP_ERRORS as exc:
        raise BundleError(f"is not a readable ZIP: {exc}") from exc


def _check_end_record(data: bytes) -> None:
    """Bounds what zipfile will parse: one directory, small, directly before the record, no 64-bit fields."""
    end = len(data) - SEAL_BYTES - END_RECORD.size
    magic, disk, disk0, n_here, n, size, start, comment = END_RECORD.unpack_from(data, end)
    if (magic, disk, disk0, n_here, comment) != (b"PK\x05\x06", 0, 0, n, SEAL_BYTES):
        raise BundleError("is not a bundle: its ZIP directory does not end as ours")
    if start + size != end or size > MAX_DIRECTORY_BYTES:
        raise BundleError(f"is crafted: a ZIP directory of {size} bytes at {start}, expected to end at {end}")
    if data[max(end - 20, 0) : end].startswith(b"PK\x06\x07"):
        raise BundleError("is crafted: a 64-bit ZIP directory in a file below 2 GiB")


def _list_members(archive: zipfile.ZipFile, file_bytes: int) -> dict[str, zipfile.ZipInfo]:
    members = {}
    for info in archive.infolist():
        name = info.orig_filename  # filename is already cut at a NUL
        if name in members:
            raise BundleError(f"is crafted: two members are named {short(name)}")
        members[name] = info
    claimed = sum(info.compress_size for info in members.values())
    if claimed > file_bytes:
        raise BundleError(f"is crafted: its members claim {claimed} bytes, the file has {file_bytes}")
    return members


def _check_member(info: zipfile.ZipInfo) -> None:
    """Refuses a member whose reading could give anything but its `file_size` bytes of this file."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & ~UTF8_NAME:
        raise BundleError(f"is crafted: {short(info.orig_filename)} is compressed or encrypted")
    if info.file_size != info.compress_size:
        raise BundleError(
            f"is crafted: {short(info.orig_filename)} is stored in {info.compress_size} bytes, "
            f"but claims {info.file_size}"
        )


def _read_parts(
    archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], listed: dict[str, dict]
) -> dict[str, bytes]:
    """The parts' content; members: the ZIP's without the manifest, listed: the manifest's parts."""
    for name in sorted(members.keys() ^ listed.keys()):
        where = "the file but not in its manifest" if name in members else "its manifest but not in the file"
        raise BundleError(f"part {short(name)} is in {where}")
    parts = {}
    for name, info in members.items():
        _check_member(info)
        if info.file_size != listed[name]["bytes"]:
            raise BundleError(
                f"part {name} has {info.file_size} bytes, its manifest says {short(listed[name]['bytes'])}"
            )
        parts[name] = archive.read(info)
        if hashlib.sha256(parts[name]).hexdigest() != listed[name]["sha256"]:
            raise BundleError(f"part {name} does not match its digest in the manifest: damaged or altered")
    return parts


def _upgrade(manifest: object) -> dict:
    """A manifest of any schema up to ours -> one of ours."""
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BundleError(f'is not a bundle: its manifest does not say "format": "{FORMAT}"')
    schema = manifest.get("schema")
    _expect(type(schema) is int and schema >= 1, "schema must be a whole number from 1", schema)
    if schema > SCHEMA:
        raise BundleError(
            f"was written by a newer version (schema {short(schema)}, this one reads up to {SCHEMA}): "
            "upgrade omniad-edge"
        )
    for step in UPGRADES[schema - 1 :]:
        manifest = step(manifest)
    return manifest


def _load_json(text: bytes) -> object:
    """JSON with finite numbers only; else BundleError."""
    try:
        return json.loads(text.decode("utf-8"), parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as exc:
        raise BundleError(f"manifest: not valid JSON: {exc}") from exc


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def _check_manifest(manifest: dict) -> None:
    """Refuses a manifest that is not of schema SCHEMA's shape (BundleError)."""
    for key, kind in KINDS.items():
        _expect(isinstance(manifest.get(key), kind), f"{key} must be {JSON_KIND[kind]}", manifest.get(key))
    _expect(_is_text(manifest["created"]), "created must be a time", manifest["created"])
    precision = manifest["precision"]
    _expect(precision in ("fp32", "fp16"), "precision must be fp32 or fp16", precision)
    _expect(manifest["outputs"] in OUTPUTS, f"outputs must be {OUTPUTS[0]} or {OUTPUTS[1]}", manifest["outputs"])
    for name, version in manifest["versions"].items():
        _expect(_is_text(name) and _is_text(version), "versions must be text", {name: version})
    _check_input(manifest["input"])
    _expect(len(manifest["products"]) > 0, "products must name at least one product", manifest["products"])
    _check_products(manifest["products"], Calibration.from_dict)
    _check_products(manifest["recognition"], ProductLimit.from_dict)
    same = not manifest["recognition"] or manifest["recognition"].keys() == manifest["products"].keys()
    _expect(same, "recognition must have no product or all", sorted(manifest["recognition"]))
    _check_graphs(manifest, "quantised", "products", Calibration.from_dict)
    _check_graphs(manifest, "quantised_recognition", "recognition", ProductLimit.from_dict)
    for digest in manifest["trained_on"]:
        _expect(_matches(IMAGE_DIGEST, digest), "trained_on must be digests of 16 hex digits", digest)
    if "checkpoint" in manifest:
        described = _matches(SHA256, manifest["checkpoint"])
        _expect(described, "checkpoint must be 64 hex digits", manifest["checkpoint"])
    for entry in manifest["history"]:
        _check_history(entry)
    for name, entry in manifest["parts"].items():
        plain = _matches(PART_NAME, name) and name != MANIFEST
        _expect(plain, "a part's name must be relative and plain", name)
        described = isinstance(entry, dict) and _matches(SHA256, entry.get("sha256"))
        described = described and type(entry.get("bytes")) is int
        _expect(described, f"part {short(name)} must have a sha256 and its size in bytes", entry)


def _check_input(entry: dict) -> None:
    for key in ("height", "width"):
        size = entry.get(key)
        valid = type(size) is int and 32 <= size <= MAX_INPUT_PX and size % 32 == 0
        _expect(valid, f"input {key} must be a multiple of 32 from 32 to {MAX_INPUT_PX}", size)
    tiled = {"resize": TILED_RESIZE} if "tiles" in entry else {}
    for key, value in (FIXED_INPUT | tiled).items():
        _expect(entry.get(key) == value, f"input {key} must be {value}", entry.get(key))

    if tiled:
        _check_tiles(entry["tiles"], entry)


def _check_tiles(tiles: object, entry: dict) -> None:
    _expect(isinstance(tiles, dict), "input tiles must be an object", tiles)
    for key, least in (("rows", entry["height"]), ("columns", entry["width"])):
        valid = type(tiles.get(key)) is int and least <= tiles[key] <= MAX_SIDE_PX
        _expect(valid, f"input tiles {key} must be a whole number from {least} to {MAX_SIDE_PX}", tiles.get(key))
    shared = tiles.get("overlap_px")
    _expect(shared == OVERLAP_PX, f"input tiles overlap_px must be {OVERLAP_PX}", shared)


def _check_graphs(manifest: dict, key: str, like: str, read: Callable[[dict], object]) -> None:
    """What single graphs have under `key` is of the same products as what all others share under `like`."""
    graphs = manifest.get(key, {})
    _expect(isinstance(graphs, dict), f"{key} must be an object", graphs)
    for graph, entries in graphs.items():
        _expect(isinstance(entries, dict), f"{key} {short(graph)} must be an object", entries)
        _expect(entries.keys() == manifest[like].keys(), f"{key} must have the same products", entries)
        _check_products(entries, read)


def _check_products(entries: dict, read: Callable[[dict], object]) -> None:
    for name, entry in entries.items():
        _expect(_is_text(name), "a product's name must be printable text", name)
        try:
            read(entry)
        except InputError as exc:
            raise BundleError(f"manifest: product {name!r}: {exc}") from exc


def _check_history(entry: object) -> None:
    valid = (
        isinstance(entry, dict)
        and all(_is_text(entry.get(key)) for key in HISTORY_KEYS[:3])
        and all(type(entry.get(key)) in (int, float) for key in HISTORY_KEYS[3:])
    )
    _expect(valid, "a history entry must have " + ", ".join(HISTORY_KEYS), entry)


def _expect(valid: bool, what: str, value: object) -> None:
    if not valid:
        raise BundleError(f"manifest: {what}, got {short(value)}")


def _is_text(value: object) -> bool:
    """Printable, so that showing it on a terminal is harmless."""
    return isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable()


def _matches(pattern: re.Pattern, value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None
