"""The native runtime cross-compiled for Jetson: what it asks of the system, what it computes, and its wheel."""

import base64
import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from native_parts import ROOT, Expected, Native, tensorrt_headers, write_tiny

EMULATOR = ("qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu")
WHEEL_SCRIPT = ROOT / "kernels/native/platform_wheel.py"
JETPACK_6 = {"GLIBC": (2, 35), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13)}  # of Ubuntu 22.04
LIBRARIES = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6"}


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Path:
    """Everything of CMakeLists.txt for aarch64."""
    for tool, package in (("cmake", "cmake"), ("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu")):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not on this machine; run: sudo apt install {package}")
    folder = tmp_path_factory.mktemp("aarch64")
    toolchain = f"-DCMAKE_TOOLCHAIN_FILE={ROOT}/kernels/native/aarch64.cmake"
    options = [toolchain, "-DOMNIAD_NATIVE_TESTS=ON", "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS=-O0 -Werror"]
    options += [f"-DTensorRT_INCLUDE_DIR={headers}" for headers in tensorrt_headers()[:1]]
    targets = ["omniad_runtime", "native_program", "recording_cuda"]
    targets += ["omniad_plugin"] if tensorrt_headers() else []
    build = ["cmake", "--build", folder, "-j2", "--target", *targets]
    for command in (["cmake", "-S", ROOT, "-B", folder, *options], build):
        made = subprocess.run(command, capture_output=True, text=True)
        assert made.returncode == 0, made.stdout + made.stderr
    return folder


@pytest.fixture(scope="module")
def library(build) -> Path:
    return build / "libomniad_runtime.so"


@pytest.fixture(scope="module")
def plugin(build) -> Path:
    if not tensorrt_headers():
        pytest.skip("TensorRT's headers are needed: TENSORRT_INCLUDE_DIR=/path/to/include")
    return build / "libomniad_plugin.so"


def readelf(library: Path, *options: str) -> str:
    command = ["aarch64-linux-gnu-readelf", "--wide", *options, library]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_it_asks_for_nothing_that_jetpack_6_lacks(library):
    assert re.search(r"Machine:\s+AArch64", readelf(library, "--file-header"))
    needed = set(re.findall(r"NEEDED.*\[(.*)]", readelf(library, "--dynamic")))
    assert {"libc.so.6", "libstdc++.so.6"} <= needed <= LIBRARIES  # no libcuda: that is opened when it is used
    versions = re.findall(r"Name: ([A-Z]+)_([\d.]+)", readelf(library, "--version-info"))
    numbers = {(name, tuple(map(int, number.split(".")))) for name, number in versions if name in JETPACK_6}
    assert {name for name, _ in numbers} == set(JETPACK_6)
    assert not [(name, number) for name, number in numbers if number > JETPACK_6[name]]
    sys.path.insert(0, str(WHEEL_SCRIPT.parent))
    try:
        from platform_wheel import needed_versions
    finally:
        sys.path.remove(str(WHEEL_SCRIPT.parent))
    assert needed_versions(library.read_bytes()) == numbers  # as the script for wheels reads them


def test_the_plugin_asks_for_nothing_that_jetpack_6_lacks(plugin, library, any_wheel):
    needed = set(re.findall(r"NEEDED.*\[(.*)]", readelf(plugin, "--dynamic")))
    assert {"libc.so.6", "libstdc++.so.6"} <= needed <= LIBRARIES  # no TensorRT: it brings itself along
    made = make_wheel(any_wheel, library, plugin)
    assert made.returncode == 0, made.stderr
    with zipfile.ZipFile(made.stdout.strip()) as wheel:
        assert wheel.read("omniad_edge/libomniad_plugin.so") == plugin.read_bytes()


def test_it_packs_the_weights_that_numpy_packs(build, tmp_path):
    """On an emulated ARM core: the stand-in for the driver runs there too."""
    if shutil.which(EMULATOR[0]) is None:
        pytest.skip(f"{EMULATOR[0]} is not on this machine; run: sudo apt install qemu-user-static")
    bundle, native = write_tiny(tmp_path / "tiny.omniad"), Native(build, tmp_path)
    expected = Expected.of(bundle, 1)
    (tmp_path / "pixels").write_bytes(np.arange(expected.plan.height * expected.plan.width * 3).astype(np.uint8))
    words = ("run", bundle, 1, tmp_path / "pixels", tmp_path / "out")
    printed, calls = native.recorded(*words, under=EMULATOR, OMNIAD_DUMP=str(tmp_path / "arena"))
    assert printed == ["0 "] * 3
    assert "cuGraphLaunch" in {call["call"] for call in calls}
    arena = (tmp_path / "arena").read_bytes()
    for name, value in expected.weights.items():
        offset = expected.plan.buffers[name].offset_bytes
        assert arena[offset : offset + value.nbytes] == value.tobytes(), name


# The wheel


@pytest.fixture
def any_wheel(tmp_path) -> Path:
    """As `python -m build --wheel` makes it, of two of the files."""
    name = f"omniad_edge-{version('omniad-edge')}"
    path = tmp_path / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file in ("omniad_edge/__init__.py", "omniad_edge/jetson.py"):
            wheel.write(ROOT / file, file)
        metadata = f"Metadata-Version: 2.1\nName: omniad-edge\nVersion: {version('omniad-edge')}\n"
        wheel.writestr(f"{name}.dist-info/METADATA", metadata)
        tag = "Wheel-Version: 1.0\nGenerator: setuptools\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{name}.dist-info/WHEEL", tag)
        wheel.writestr(f"{name}.dist-info/RECORD", "")
    return path


def make_wheel(*arguments: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, WHEEL_SCRIPT, *arguments], capture_output=True, text=True)


def elf(path: Path, machine: int, *strings: bytes) -> Path:
    """As much of a library as the script looks at."""
    path.write_bytes(
        b"\x7fELF".ljust(18, b"\2") + machine.to_bytes(2, "little") + b"\0".join((b"", *strings, b""))
    )
    return path


def test_the_wheel_has_the_library_and_its_tag(library, any_wheel, tmp_path):
    made = make_wheel(any_wheel, library)
    assert made.returncode == 0, made.stderr
    path = Path(made.stdout.strip())
    assert path.name == any_wheel.name.replace("-any.whl", "-manylinux_2_35_aarch64.whl")
    with zipfile.ZipFile(path) as wheel:
        assert wheel.read("omniad_edge/libomniad_runtime.so") == library.read_bytes()
        described = next(wheel.read(name).decode() for name in wheel.namelist() if name.endswith("/WHEEL"))
    assert "\nRoot-Is-Purelib: false\nTag: py3-none-manylinux_2_35_aarch64\n" in described
    for python in ("3.10", "3.12"):
        assert pip_installs(path, tmp_path / python, python, "manylinux_2_35_aarch64")
        assert (tmp_path / python / "omniad_edge" / "libomniad_runtime.so").read_bytes() == library.read_bytes()
    assert not pip_installs(path, tmp_path / "no", "3.10", "manylinux_2_35_x86_64")


def test_a_wheel_with_this_machines_library_gets_the_others(any_wheel, tmp_path):
    given = any_wheel.rename(any_wheel.with_name(any_wheel.name.replace("-any", "-linux_x86_64")))
    with zipfile.ZipFile(given, "a") as wheel:
        wheel.writestr("omniad_edge/libomniad_runtime.so", b"of this machine")
    other = elf(tmp_path / "libomniad_runtime.so", 183)
    path = Path(make_wheel(given, other).stdout.strip())
    assert path.name.endswith("-py3-none-manylinux_2_35_aarch64.whl")
    with zipfile.ZipFile(path) as wheel:
        assert wheel.read("omniad_edge/libomniad_runtime.so") == other.read_bytes()


def test_a_wheel_with_the_plugin(any_wheel, tmp_path):
    """That of this machine, which may be in the given wheel, is left out where there is none for the other."""
    given = any_wheel.rename(any_wheel.with_name(any_wheel.name.replace("-any", "-linux_x86_64")))
    with zipfile.ZipFile(given, "a") as wheel:
        wheel.writestr("omniad_edge/libomniad_plugin.so", b"of this machine")
    runtime, plugin = (elf(tmp_path / f"libomniad_{name}.so", 183) for name in ("runtime", "plugin"))
    for libraries in ((runtime, plugin), (runtime,), (plugin,)):
        with zipfile.ZipFile(make_wheel(given, *libraries).stdout.strip()) as wheel:
            there = {name: wheel.read(name) for name in wheel.namelist() if name.endswith(".so")}
        assert there == {f"omniad_edge/{library.name}": library.read_bytes() for library in libraries}


def test_the_record_lists_every_file_with_its_digest(any_wheel, tmp_path):
    path = Path(make_wheel(any_wheel, elf(tmp_path / "libomniad_runtime.so", 183)).stdout.strip())
    with zipfile.ZipFile(path) as wheel:
        (record,) = (name for name in wheel.namelist() if name.endswith("/RECORD"))
        rows = [line.split(",") for line in wheel.read(record).decode().splitlines()]
        assert {name for name, *_ in rows} == set(wheel.namelist())
        for name, digest, size in rows:
            if name != record:
                content = wheel.read(name)
                wanted = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
                assert (digest, size) == (f"sha256={wanted}", str(len(content)))


def pip_installs(wheel: Path, target: Path, python: str, platform: str) -> bool:
    """On a machine of that kind; JetPack 6 has Python 3.10, JetPack 7 has 3.12."""
    where = ["--target", target, "--python-version", python, "--platform", platform, "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", *where, wheel]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("machine", "version", "words"),
    [
        (183, b"GLIBC_2.38", "asks for GLIBC_2.38, Ubuntu 22.04 (JetPack 6) has 2.35"),
        (183, b"GLIBCXX_3.4.32", "asks for GLIBCXX_3.4.32, Ubuntu 22.04 (JetPack 6) has 3.4.30"),
        (40, b"GLIBC_2.4", "expected a library for x86_64 or aarch64"),
    ],
    ids=["glibc", "libstdc++", "32 bit"],
)
def test_a_library_for_newer_systems_is_refused(any_wheel, tmp_path, machine, version, words):
    made = make_wheel(any_wheel, elf(tmp_path / "libomniad_runtime.so", machine, b"GLIBC_2.17", version))
    assert made.returncode == 1 and words in made.stderr
    assert [path.name for path in tmp_path.glob("*.whl")] == [any_wheel.name]


def test_versions_are_compared_as_numbers(any_wheel, tmp_path):
    made = make_wheel(
        any_wheel, elf(tmp_path / "libomniad_runtime.so", 62, b"GLIBC_2.4", b"GLIBCXX_3.4.9", b"CXXABI_1.3.9")
    )
    assert made.stdout.strip().endswith("-py3-none-manylinux_2_35_x86_64.whl")


def test_wrong_files_are_errors_in_words(any_wheel, tmp_path):
    text = tmp_path / "text" / "libomniad_plugin.so"
    text.parent.mkdir()
    text.write_text("text")
    arm, intel = elf(tmp_path / "libomniad_runtime.so", 183), elf(tmp_path / "libomniad_plugin.so", 62)
    other = elf(tmp_path / "other.so", 183)
    for arguments, words in (
        ((any_wheel, text), "expected a library"),
        ((text, arm), "expected a wheel for any Python"),
        ((tmp_path / "none-py3-none-any.whl", arm), "No such file"),
        ((any_wheel, other), "expected a library named libomniad_runtime.so or libomniad_plugin.so"),
        ((any_wheel, arm, intel), "for one machine; got manylinux_2_35_aarch64 and manylinux_2_35_x86_64"),
    ):
        made = make_wheel(*arguments)
        assert made.returncode == 1 and words in made.stderr and "Traceback" not in made.stderr
    assert make_wheel(any_wheel).returncode == 2
