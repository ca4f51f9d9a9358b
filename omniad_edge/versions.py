"""Which software made or measured something: for checkpoints, bundles and benchmark results."""

import platform
from importlib.metadata import PackageNotFoundError, version

LIBRARIES = (
    "omniad-edge",
    "torch",
    "onnx",
    "onnxruntime",
    "openvino",
    "triton",
    "cuda-bindings",
    "numpy",
    "opencv-python-headless",
    "pillow",
)


def versions() -> dict[str, str]:
    """Versions of Python and of those LIBRARIES that are installed, by name."""
    known = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            known[library] = version(library)
        except PackageNotFoundError:
            continue
    return known
