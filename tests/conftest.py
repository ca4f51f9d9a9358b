"""Fixtures shared by all tests."""

import os
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "4000")  # as the command line does, before torch is imported

import numpy as np
import pytest
import torch

# Kernels run on the GPU there is, else in Triton's interpreter, which must be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def draw():
    """draw(*shape, dtype, scale, mean): normally distributed values on the CPU, drawn in float64."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype=torch.float32, scale: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        return (mean + scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    return draw


@pytest.fixture
def opened():
    """opened(address): the source of an address, open; closed in the end."""
    from omniad_edge.cameras.sources import open_source

    sources = []

    def open_one(address):
        sources.append(open_source(address))
        sources[-1].open()
        return sources[-1]

    yield open_one
    for source in sources:
        source.close()


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of float64 reference values of the published network; not part of the repository."""
    return _shared("golden")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real inspection images (screw, magnetic_tile); not part of the repository."""
    return _shared("data")


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """A SmallRun: folder of a run (untrained, 64 x 64) and of its data; do not change it."""
    from small_run import make_run

    return make_run(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def small_bundle(small_run, tmp_path_factory) -> Path:
    """The bundle of `small_run`, in fp32; do not change it."""
    from omniad_edge.export.bundle_export import export_bundle

    path = tmp_path_factory.mktemp("bundle") / "small.omniad"
    export_bundle(small_run.folder, path)
    return path


@pytest.fixture(scope="session")
def native_build(tmp_path_factory) -> Path:
    """Folder with the native runtime, its programs and a stand-in for libcuda.so.1; skips without its tools."""
    from native_parts import build_native

    return build_native(tmp_path_factory.mktemp("native"))


def _shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"optional test material {folder} is not on this machine")
    return folder
