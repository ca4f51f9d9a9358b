"""What `pip install .` builds of the native libraries, and what a source distribution has to have for that."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from native_parts import ROOT, tensorrt_headers

from omniad_edge import tensorrt_library

pytest.importorskip("setuptools", minversion="70.1", reason="setup.py needs it: pip install 'setuptools>=70.1'")


def setup(*words: object, **environment: str) -> subprocess.CompletedProcess:
    variables = {name: value for name, value in os.environ.items() if not name.endswith("_INCLUDE_DIR")}
    command = [sys.executable, "setup.py", "--quiet", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=variables | environment, capture_output=True, text=True)


@pytest.fixture
def headers() -> dict[str, str]:
    folders = tensorrt_headers()
    if not folders:
        pytest.skip("TensorRT's headers are needed: TENSORRT_INCLUDE_DIR=/path/to/include")
    cuda = os.environ.get("CUDA_INCLUDE_DIR", "/usr/local/cuda/include")
    return {"TENSORRT_INCLUDE_DIR": str(folders[0]), "CUDA_INCLUDE_DIR": cuda}


def test_the_plugin_is_built_beside_the_runtime_where_headers_are_named(headers, tmp_path, monkeypatch):
    folders = "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp"
    made = setup("build_ext", *folders, **headers, CFLAGS="-O0")
    assert made.returncode == 0, made.stderr
    assert {path.name for path in (tmp_path / "lib/omniad_edge").iterdir()} == {
        "libomniad_runtime.so",
        "libomniad_plugin.so",
    }
    monkeypatch.delenv("OMNIAD_PLUGIN", raising=False)
    monkeypatch.setattr(tensorrt_library, "__file__", str(tmp_path / "lib/omniad_edge/tensorrt_library.py"))
    library = tensorrt_library.find_plugin()
    exported = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True).stdout
    assert {line.split()[-1] for line in exported.splitlines()} == {"getCreators", "setLoggerFinder"}


def test_folders_without_the_headers_are_refused(tmp_path):
    made = setup("--version", TENSORRT_INCLUDE_DIR=str(tmp_path))
    assert made.returncode == 1
    assert made.stderr.strip() == f"TENSORRT_INCLUDE_DIR: expected the folder of NvInferRuntime.h; got {tmp_path}"
    (tmp_path / "NvInferRuntime.h").touch()
    made = setup("--version", TENSORRT_INCLUDE_DIR=str(tmp_path), CUDA_INCLUDE_DIR="/nowhere")
    assert "CUDA_INCLUDE_DIR: expected the folder of cuda_runtime_api.h; got /nowhere" in made.stderr


def test_a_source_distribution_has_the_sources_of_both(tmp_path):
    made = setup("egg_info", "--egg-base", tmp_path)
    assert made.returncode == 0, made.stderr
    (listed,) = tmp_path.glob("*/SOURCES.txt")
    native = {str(path.relative_to(ROOT)) for path in Path(ROOT, "kernels/native").iterdir() if path.suffix}
    assert {*native, "CMakeLists.txt"} <= {*listed.read_text().splitlines()}
