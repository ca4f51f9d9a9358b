"""`omniad doctor` as a user runs it, and on machines that are not at hand, from stand-ins."""

import json
from enum import IntEnum
from pathlib import Path

import pytest
from fake_cuda import FakeCuda
from jetson_tree import ORIN_NANO, write_tree

from omniad_edge import doctor, fused, native
from omniad_edge.bundle import read_bundle
from omniad_edge.cli import main
from omniad_edge.cuda_driver import Driver
from omniad_edge.engine import BACKENDS
from omniad_edge.errors import MissingDependencyError
from omniad_edge.jetson import Jetson

NO_JETSON = Jetson("/nonexistent")


class NamedCuda(FakeCuda):
    """The stand-in for the driver, with what a GPU says of itself."""

    CUdevice_attribute = IntEnum(
        "CUdevice_attribute",
        [*FakeCuda.CUdevice_attribute.__members__, "CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT"],
    )

    def cuDeviceGetName(self, length, device):
        return self.CUresult.CUDA_SUCCESS, b"Orin".ljust(length, b"\0")

    def cuDriverGetVersion(self):
        return self.CUresult.CUDA_SUCCESS, 12060

    def cuDeviceTotalMem(self, device):
        return self.CUresult.CUDA_SUCCESS, 7990 << 20


@pytest.fixture
def gpu(monkeypatch) -> NamedCuda:
    cuda = NamedCuda(87)
    cuda.attributes += (8,)
    monkeypatch.setattr(doctor, "driver_library", lambda: True)
    monkeypatch.setattr(doctor, "Driver", lambda _: Driver(cuda))
    return cuda


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(doctor, "driver_library", lambda: False)
    monkeypatch.setattr(fused, "device_architecture", lambda: None)


def by_name(findings) -> dict:
    return {finding.name: finding for finding in findings}


def report(capsys, *arguments: object) -> tuple[int, dict]:
    code = main(["doctor", "--json", *map(str, arguments)])
    return code, json.loads(capsys.readouterr().out)


def test_the_report_in_words_and_as_json(no_gpu, capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "no NVIDIA driver: libcuda.so.1" in printed
    code, made = report(capsys)
    assert (code, made["ok"], made["gpu"]) == (0, True, None)
    assert {finding["section"] for finding in made["findings"]} >= {"machine", "can do"}
    for finding in made["findings"]:
        assert finding["name"] in printed and finding["text"]
        if finding["ok"] is False:
            assert f"  {finding['fix']}\n" in printed  # in one line, to be copied
    assert made["machine"]["cores"] >= 1
    assert all("omniad doctor" not in finding["fix"] for finding in made["findings"])


def test_a_bundle_runs_on_what_auto_takes(small_bundle, no_gpu, capsys):
    code, made = report(capsys, small_bundle)
    assert (code, made["ok"]) == (0, True)
    found = {finding["name"]: finding for finding in made["findings"] if finding["section"] == "bundle"}
    assert "64x64" in found["file"]["text"]
    assert {name.split()[0] for name in found} >= set(BACKENDS)
    assert not found["fused fp16"]["ok"] and "no NVIDIA GPU" in found["fused fp16"]["text"]
    assert 'see "inspect on an NVIDIA GPU"' in found["fused fp16"]["text"]  # which is a line of this report
    assert "inspect on an NVIDIA GPU" in {finding["name"] for finding in made["findings"]}
    assert found["onnxruntime fp32"]["ok"]
    assert found["auto"]["ok"] and "opened and run in" in found["auto"]["text"]


def test_kernels_for_another_gpu_say_so(small_bundle, monkeypatch):
    monkeypatch.setattr(fused, "device_architecture", lambda: 87)
    against = doctor.engine_objections(read_bundle(small_bundle))["fused fp16"]
    assert against == "the bundle has no GPU kernels; export it with --targets sm_87"


@pytest.mark.parametrize("content", [None, b"not a bundle"], ids=["not there", "damaged"])
def test_a_bundle_that_cannot_run_fails(tmp_path, capsys, content):
    path = tmp_path / "line.omniad"
    if content:
        path.write_bytes(content)
    code, made = report(capsys, path)
    assert (code, made["ok"]) == (1, False)
    (auto,) = (finding for finding in made["findings"] if finding["section"] == "bundle")
    assert (auto["name"], auto["ok"]) == ("auto", False) and str(path) in auto["text"]
    assert main(["doctor", str(path)]) == 1
    assert str(path) in capsys.readouterr().out.replace("\n", "").replace(" ", "")


def test_a_gpu_by_the_driver(gpu, monkeypatch):
    monkeypatch.setattr(doctor, "read", {"/sys/module/nvidia/version": "540.4.0\n"}.__getitem__)
    facts, finding = doctor.look_at_gpu(NO_JETSON)
    assert facts == {
        "name": "Orin",
        "arch": "sm_87",
        "multiprocessors": 8,
        "memory_mib": 7990,
        "driver": "540.4.0",
        "driver_cuda": "12.6",
    }
    text = "Orin, sm_87, 8 multiprocessors, 7990 MiB, driver 540.4.0 for CUDA 12.6, cuda-bindings"
    assert finding.ok and finding.text.startswith(text)


def test_a_driver_without_a_gpu(gpu):
    gpu.failures["cuInit"] = "CUDA_ERROR_NO_DEVICE"
    facts, finding = doctor.look_at_gpu(NO_JETSON)
    assert facts is None and not finding.ok and "CUDA_ERROR_NO_DEVICE: no usable GPU" in finding.text


def test_missing_packages_come_with_the_command(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda package: None if package in ("openvino", "onnx") else "1.2")
    found = by_name(doctor.packages(NO_JETSON))
    assert found["inspect on a CPU"].ok and found["inspect on a CPU"].text == "onnxruntime 1.2"
    assert found["inspect on a CPU, faster"].fix == 'pip install "omniad-edge[openvino]"'
    assert (found["train and export"].ok, found["train and export"].text) == (False, "without onnx")


@pytest.mark.parametrize(
    ("release", "command"),
    [
        ("# R36 (release), REVISION: 4.3", 'pip install "cuda-bindings~=12.9"'),
        ("# R39 (release), REVISION: 2.0", 'pip install "cuda-bindings>=13,<14"'),
        ("", 'pip install "omniad-edge[cuda]"'),
    ],
    ids=["JetPack 6", "JetPack 7", "unknown"],
)
def test_on_a_jetson_bindings_fit_its_cuda(tmp_path, monkeypatch, release, command):
    def none(_):
        raise MissingDependencyError("cuda-bindings", "cuda")

    monkeypatch.setattr(doctor, "driver_library", lambda: True)
    monkeypatch.setattr(doctor, "Driver", none)
    monkeypatch.setattr(fused, "device_architecture", lambda: None)
    files = {name: text for name, text in ORIN_NANO.items() if name != "var/lib/dpkg/status"}
    jetson = Jetson(write_tree(tmp_path, files | {"etc/nv_tegra_release": release}))
    assert doctor.look_at_gpu(jetson)[1].fix == command
    monkeypatch.setattr(doctor, "installed", lambda package: None)
    fix = by_name(doctor.packages(jetson))["inspect with TensorRT"].fix
    assert fix.startswith("sudo apt install python3-libnvinfer (an environment") and fix.endswith(f"); {command}")


def test_a_jetson_tells_its_state(tmp_path, no_gpu, capsys):
    write_tree(tmp_path, ORIN_NANO)
    assert doctor.run_doctor(as_json=True, root=tmp_path) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["jetson"]["power_mode"] == "MAXN_SUPER" and made["jetson"]["clocks_mhz"]["gpu"] == 306
    found = {finding["name"]: finding for finding in made["findings"]}
    assert found["clocks"]["text"] == "gpu 306 MHz, cpu 1114 MHz; not fixed (sudo jetson_clocks fixes them)"
    assert not found["CSI cameras"]["ok"]
    plugin = "usr/lib/aarch64-linux-gnu/gstreamer-1.0/libgstnvarguscamerasrc.so"
    write_tree(tmp_path, {plugin: ""})
    assert doctor.csi_camera(Jetson(tmp_path)).ok


def test_what_cameras_need(monkeypatch):
    def check(self):
        if self.backend == "aravis":
            raise MissingDependencyError("Aravis's Python interface", install="sudo apt install it")

    monkeypatch.setattr(doctor.CameraProcess, "check_installed", check)
    found = by_name(doctor.cameras())
    assert found["GStreamer and CSI cameras"].ok
    assert found["GigE and USB3 Vision cameras"].fix == "sudo apt install it"


def test_the_native_library_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libomniad_runtime.so")
    assert not doctor.native_runtime().ok and "is not there" in doctor.native_runtime().text
    monkeypatch.setattr(native, "why_absent", lambda: "")
    assert doctor.native_runtime().ok


def test_the_plugin_and_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setenv("OMNIAD_PLUGIN", "none")
    assert doctor.plugin(NO_JETSON).ok is None
    monkeypatch.setenv("OMNIAD_PLUGIN", str(tmp_path / "libomniad_plugin.so"))
    assert doctor.plugin(NO_JETSON).ok is False and "not a file" in doctor.plugin(NO_JETSON).text
    (tmp_path / "libomniad_plugin.so").touch()
    assert doctor.plugin(NO_JETSON).ok and str(tmp_path) in doctor.plugin(NO_JETSON).text
    monkeypatch.setattr(doctor, "installed", lambda package: None)
    assert doctor.plugin(NO_JETSON).fix == 'pip install "onnx>=1.16"'
    monkeypatch.setattr(doctor, "find_plugin", lambda: None)
    for jetson, folder in ((NO_JETSON, "build/TensorRT/include"), (True, "/usr/include/aarch64-linux-gnu")):
        fix = f"TENSORRT_INCLUDE_DIR={folder} pip install --force-reinstall --no-deps ."
        assert not doctor.plugin(jetson).ok and doctor.plugin(jetson).fix.endswith(fix)


def test_the_engines_that_are_kept(tmp_path):
    assert doctor.kept_engines(tmp_path / "not there").text.startswith("0, 0 MB of 4 GB at most, in ")
    for name, size in (("a.plan", 1_500_000), ("b.plan", 600_000), ("a.json", 5_000_000)):
        (tmp_path / name).write_bytes(bytes(size))
    assert doctor.kept_engines(tmp_path).text == f"2, 2 MB of 4 GB at most, in {tmp_path}"


def test_a_cache_folder_that_is_not_there_yet(tmp_path, monkeypatch):
    finding = doctor.cache_space(tmp_path / "not" / "yet")
    assert finding.ok and str(Path("not", "yet")) in finding.text
    monkeypatch.setattr(doctor, "LEAST_CACHE_BYTES", 1 << 60)
    assert not doctor.cache_space(tmp_path).ok
