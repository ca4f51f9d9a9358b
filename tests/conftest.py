"""Fixtures shared by all tests."""

from pathlib import Path

import numpy as np
import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of float64 reference values of the published network; not part of the repository."""
    return _shared("golden")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real inspection images (screw, magnetic_tile); not part of the repository."""
    return _shared("data")


def _shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"optional test material {folder} is not on this machine")
    return folder
