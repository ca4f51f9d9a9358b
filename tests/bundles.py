"""A bundle's content for tests, and files of it: as they should be, and as a forger would make them."""

import hashlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from omniad_edge.bundle import SCHEMA, Bundle, read_bundle
from omniad_edge.calibration import calibrate
from omniad_edge.errors import BundleError

PARTS = {"weights.onnx": bytes(range(256)) * 3, "graphs/frame.onnx": b"frame", "graphs/batch.onnx": b""}
SCREW, TILE = calibrate(np.arange(700) / 700, 0.01, 0.01), calibrate([0.1, 0.2], 0.01)
SEAL_BYTES = 71


def manifest(**changes) -> dict:
    return {
        "created": "2025-01-31T12:00:00+00:00",
        "versions": {"omniad-edge": "0.1.0", "numpy": "2.0"},
        "model": {"backbone": "resnet18", "depths": [1, 2, 3, 4]},
        "precision": "fp16",
        "input": {
            "height": 256,
            "width": 320,
            "layout": "NHWC",
            "dtype": "uint8",
            "colour": "RGB",
            "resize": "area-halved pillow-bilinear",
        },
        "outputs": ["anomaly_map", "pred_score"],
        "products": {"screw": SCREW.to_dict(), "tile": TILE.to_dict()},
        "recognition": {},
        "parity": {"max_error": 1e-5},
        "trained_on": ["0123456789abcdef"],
        "history": [],
    } | changes


def full(changes: dict | None = None, parts: dict = PARTS) -> dict:
    """A manifest as it stands in the file."""
    listed = {n: {"sha256": hashlib.sha256(d).hexdigest(), "bytes": len(d)} for n, d in parts.items()}
    return manifest(format="omniad-bundle", schema=SCHEMA, parts=listed) | (changes or {})


def seal(data: bytes) -> bytes:
    """`data`, a ZIP with a comment of 71 bytes, with the right digest: what a forger would do."""
    head = data[:-SEAL_BYTES]
    return head + b"sha256:" + hashlib.sha256(head).hexdigest().encode()


def member(name: str, compression: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.compress_type = compression
    return info


def zipped(members: list, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A sealed ZIP of (name or ZipInfo, content) pairs, whatever they are."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members:
            info = name if isinstance(name, zipfile.ZipInfo) else member(name, compression)
            with archive.open(info, "w") as file:  # unlike writestr, this takes an empty name
                file.write(content.encode() if isinstance(content, str) else content)
        archive.comment = bytes(SEAL_BYTES)
    return seal(buffer.getvalue())


def crafted(changes: dict | None = None, parts: dict = PARTS) -> bytes:
    return zipped([("manifest.json", json.dumps(full(changes, parts))), *parts.items()])


def read_bytes(scratch: Path, data: bytes) -> Bundle:
    scratch.write_bytes(data)
    return read_bundle(scratch)


def refused(scratch: Path, data: bytes) -> str:
    with pytest.raises(BundleError) as error:
        read_bytes(scratch, data)
    assert str(error.value).startswith(f"{scratch}: ")
    return str(error.value)
