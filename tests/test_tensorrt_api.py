"""Our TensorRT code against the real Python bindings of five versions, which come without the libraries.

The bindings are imported over a stand-in for libnvinfer: nothing can be built, but every class and signature is
there. Two things are compared with them: each `trt.name` in our sources, and the stand-in module fake_tensorrt,
on which tests/test_tensorrt_engine.py runs all of our code. A call that it takes is thereby one that they take.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PACKAGES = {
    "10.3.0": "tensorrt-cu12-bindings",  # JetPack 6.2
    "10.13.3.9": "tensorrt-cu13-bindings",  # JetPack 7.1
    "10.16.1.11": "tensorrt-cu13-bindings",  # JetPack 7.2 has 10.16.2
    "11.1.0.106": "tensorrt-cu13-bindings",
    "11.4.0.106": "tensorrt-cu13-bindings",
}
# What the bindings import of the libraries.
SYMBOLS = (
    *("createInferBuilder_INTERNAL", "createInferRuntime_INTERNAL", "createInferRefitter_INTERNAL"),
    *("createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getNvOnnxParserVersion"),
    *("getPluginRegistry", "getBuilderPluginRegistry", "initLibNvInferPlugins"),
)
ROOT = Path(__file__).resolve().parents[1]
CHECK = Path(__file__).with_name("tensorrt_conformance.py")


@pytest.fixture(scope="session")
def libraries(tmp_path_factory) -> Path:
    """Folder with stand-ins for the libraries, whose functions give null."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the stand-in for libnvinfer needs g++")
    folder = tmp_path_factory.mktemp("nvinfer")
    source, library = folder / "stand_in.cpp", folder / "stand_in.so"
    source.write_text("".join(f'extern "C" void *{name}() {{ return nullptr; }}\n' for name in SYMBOLS))
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        for major in (10, 11):
            (folder / f"lib{name}.so.{major}").symlink_to(library)
    return folder


@pytest.fixture(params=PACKAGES)
def bindings(request) -> Path:
    """Folder of one version's bindings, kept in pytest's cache; skips where pip cannot get them."""
    version = request.param
    folder = request.config.cache.mkdir("tensorrt-bindings") / f"{version}-{sys.implementation.cache_tag}"
    if not folder.is_dir():
        wheels = folder.with_suffix(".wheels")
        wanted = f"{PACKAGES[version]}=={version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--retries=0", "--timeout=5", "--disable-pip-version-check", "--dest", wheels, wanted]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            pytest.skip(f"pip cannot get {wanted} for this Python: {done.stderr.strip().splitlines()[-1]}")
        (wheel,) = wheels.glob("*.whl")
        zipfile.ZipFile(wheel).extractall(wheels / "unpacked")
        (wheels / "unpacked").rename(folder)
        shutil.rmtree(wheels)
    return folder


def test_our_code_fits_the_bindings(bindings, libraries):
    environment = os.environ | {"LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": f"{bindings}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, CHECK], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("version") == bindings.name.split("-")[0]
    assert found == {"names": [], "stand_in": [], "derived": []}
