"""Run with the installed wheel alone (no torch): a verdict from a bundle. Not a pytest file; see the Makefile."""

import importlib.util
import shutil
import sys

import numpy as np

import omniad_edge
from omniad_edge import native

assert importlib.util.find_spec("torch") is None, "this check is about an installation without torch"
assert "site-packages" in omniad_edge.__file__, omniad_edge.__file__
if shutil.which("g++"):
    assert not native.why_absent(), native.why_absent()
detector = omniad_edge.Detector(sys.argv[1])
frame = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
result = detector(frame, product=detector.products[0])
assert result.pred_label == "unknown product", result  # noise is none of the bundle's
print(f"{detector}: {result}; native runtime: {native.why_absent() or 'there'}")
