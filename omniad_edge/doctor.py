"""`omniad doctor`: what this machine has, what it lacks for each thing the product can do, and how to get that."""

import ctypes
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from . import fused, native, tensorrt_engine
from .bundle import Bundle, read_bundle
from .cameras.camera_process import CameraProcess, interpreter
from .cuda_driver import Driver
from .detector import Detector
from .download import default_cache_dir
from .engine import objection
from .errors import EngineError, MissingDependencyError, OmniADError
from .jetson import Jetson
from .plan_cache import MOST_BYTES, plan_folder, stored_plans
from .tensorrt_library import PLUGIN_LIBRARY, PLUGIN_VARIABLE, find_plugin

SCHEMA = 1  # of the JSON
CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimddp", "bf16")
LEAST_CACHE_BYTES = 1 << 30
EXTRAS = (  # what it is for, the packages, the extra that brings them (none: always there)
    ("inspect on a CPU", ("onnxruntime",), ""),
    ("inspect on a CPU, faster", ("openvino",), "openvino"),
    ("inspect with TensorRT", ("tensorrt", "cuda-bindings"), "tensorrt"),
    ("train and export", ("torch", "safetensors", "onnx"), "train"),
    ("export GPU kernels", ("triton",), "kernels"),
    ("MQTT", ("paho-mqtt",), "line"),
    ("metrics and health page", ("prometheus-client",), "line"),
)
CAMERAS = (("GStreamer and CSI cameras", "gstreamer"), ("GigE and USB3 Vision cameras", "aravis"))
BUILD_NATIVE = "sudo apt install g++, then in a clone: pip install --force-reinstall --no-deps ."
# Headers of any TensorRT from 10.3 on will do.
BUILD_PLUGIN = (
    "in a clone, with CUDA's headers in /usr/local/cuda/include or CUDA_INCLUDE_DIR: "
    "git clone --depth 1 https://github.com/NVIDIA/TensorRT build/TensorRT && "
    "TENSORRT_INCLUDE_DIR=build/TensorRT/include pip install --force-reinstall --no-deps ."
)
BUILD_PLUGIN_ON_JETSON = (
    "sudo apt install g++ libnvinfer-headers-dev, then in a clone: "
    "TENSORRT_INCLUDE_DIR=/usr/include/aarch64-linux-gnu pip install --force-reinstall --no-deps ."
)
DRIVER = "sudo ubuntu-drivers install, where there is an NVIDIA GPU; in a container: docker run --gpus all ..."
DRIVER_FOR_JETSON = "sudo apt install nvidia-l4t-cuda; in a container: docker run --runtime nvidia ..."
CUDA_FOR = {"6": "cuda-bindings~=12.9", "7": "cuda-bindings>=13,<14"}  # by JetPack


@dataclass(frozen=True)
class Finding:
    """A line of the report.

    ok:  whether this works here; None for a fact that nothing depends on
    fix: what to do where it does not, mostly a command
    """

    section: str
    name: str
    ok: bool | None
    text: str
    fix: str = ""


def run_doctor(path: Path | None = None, as_json: bool = False, root: str | Path = "/") -> int:
    """Print the report. -> 1 if there is a bundle at `path` that cannot run here, else 0."""
    jetson = Jetson(root)
    gpu, on_gpu = look_at_gpu(jetson)
    findings = [*machine(), on_gpu, *packages(jetson), native_runtime(), plugin(jetson), *cameras()]
    findings += on_jetson(jetson) if jetson else ()
    findings += inspect_bundle(path) if path else ()
    ok = all(finding.ok for finding in findings if (finding.section, finding.name) == ("bundle", "auto"))
    if as_json:
        facts = {
            "machine": machine_facts(),
            "gpu": gpu,
            "jetson": jetson.facts() | jetson.state() if jetson else None,
        }
        report = {"schema": SCHEMA, "ok": ok, **facts, "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(report, indent=1))
    else:
        print_findings(findings)
    return 0 if ok else 1


def print_findings(findings: list[Finding]) -> None:
    console = Console(highlight=False)
    table = Table("", "", Column(overflow="fold"), box=box.SIMPLE, show_header=False, pad_edge=False)
    for section in dict.fromkeys(finding.section for finding in findings):
        table.add_row(f"[bold]{section}[/]")
        for finding in findings:
            if finding.section == section:
                mark = {True: "[green]yes[/]", False: "[red]no[/]", None: ""}[finding.ok]
                table.add_row(finding.name, mark, escape(finding.text))
        table.add_section()
    console.print(table)
    fixes: dict[str, list[str]] = {}
    for finding in findings:
        if finding.ok is False and finding.fix:
            fixes.setdefault(finding.fix, []).append(finding.name)
    for fix, names in fixes.items():
        console.print(f"for {', '.join(names)}:\n  {fix}", markup=False, soft_wrap=True)


# The machine


def machine_facts() -> dict:
    """CPU, memory and system, JSON-safe. What cannot be known is "unknown" or None."""
    cpu = read("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.*)$", cpu, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)$", cpu, re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+) kB$", read("/proc/meminfo"), re.MULTILINE)
    return {
        "cpu": (model[1] if model else platform.processor()) or "unknown",
        "cpu_features": [name for name in CPU_FEATURES if flags and name in flags[1].split()],
        "cores": os.cpu_count(),
        "memory_mib": int(memory[1]) // 1024 if memory else None,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def machine() -> Iterator[Finding]:
    facts = machine_facts()
    features = " ".join(facts["cpu_features"]) or "no vector extensions known"
    yield Finding("machine", "omniad-edge", None, installed("omniad-edge") or "not installed, run from its folder")
    yield Finding("machine", "system", None, f"{facts['system']}, Python {facts['python']}")
    yield Finding("machine", "CPU", None, f"{facts['cpu']}, {facts['cores']} cores ({features})")
    if facts["memory_mib"]:
        yield Finding("machine", "memory", None, f"{facts['memory_mib']} MiB")
    yield cache_space(default_cache_dir())
    yield kept_engines(plan_folder())


def cache_space(folder: Path) -> Finding:
    there = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(there).free
    text = f"{folder}, {free / 1e9:.1f} GB free"
    return Finding("machine", "cache", free >= LEAST_CACHE_BYTES, text, "export OMNIAD_CACHE=/folder/with/room")


def kept_engines(folder: Path) -> Finding:
    plans = stored_plans(folder)
    size = sum(plan_bytes for _, plan_bytes, _ in plans)
    text = f"{len(plans)}, {size / 1e6:.0f} MB of {MOST_BYTES / 1e9:g} GB at most, in {folder}"
    return Finding("machine", "TensorRT engines", None, text)


# What it can do


def installed(package: str) -> str | None:
    """Its version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def packages(jetson: Jetson) -> Iterator[Finding]:
    for name, wanted, extra in EXTRAS:
        versions = {package: installed(package) for package in wanted}
        missing = [package for package, number in versions.items() if number is None]
        text = ", ".join(f"{package} {number}" for package, number in versions.items())
        if missing:
            text = f"without {' and '.join(missing)}"
        fixes = [install_command(extra, jetson, package) for package in missing]
        yield Finding("can do", name, not missing, text, "; ".join(dict.fromkeys(fixes)))


def native_runtime() -> Finding:
    absent = native.why_absent()
    return Finding(
        "can do", "launch GPU kernels from C++", not absent, absent or str(native.LIBRARY), BUILD_NATIVE
    )


def plugin(jetson: Jetson) -> Finding:
    section, name = "can do", "inspect with TensorRT and our plugin"
    if os.environ.get(PLUGIN_VARIABLE) == "none":
        return Finding(section, name, None, f"switched off: {PLUGIN_VARIABLE}=none")
    try:
        library = find_plugin()
    except EngineError as exc:
        return Finding(section, name, False, str(exc))
    if library is None:
        text = f"{PLUGIN_LIBRARY} was not built: engines are built from the plain graph"
        return Finding(section, name, False, text, BUILD_PLUGIN_ON_JETSON if jetson else BUILD_PLUGIN)
    if installed("onnx") is None:  # which puts the kernels into the graph
        return Finding(section, name, False, "without onnx", 'pip install "onnx>=1.16"')
    return Finding(section, name, True, str(library))


def install_command(extra: str, jetson: Jetson, package: str) -> str:
    """On a Jetson TensorRT is the system's, and cuda-bindings must fit its CUDA."""
    if jetson and package == "tensorrt":
        return "sudo apt install python3-libnvinfer (an environment sees it with venv --system-site-packages)"
    if jetson and package == "cuda-bindings":
        return f'pip install "{CUDA_FOR.get((jetson.jetpack or "")[:1], "omniad-edge[cuda]")}"'
    return f'pip install "omniad-edge[{extra}]"' if extra else "pip install omniad-edge"


def look_at_gpu(jetson: Jetson) -> tuple[dict | None, Finding]:
    """Its facts, and whether the fused kernels can use it."""
    section, name = "can do", "inspect on an NVIDIA GPU"
    if not driver_library():
        text = "no NVIDIA driver: libcuda.so.1 is not on this machine"
        return None, Finding(section, name, False, text, DRIVER_FOR_JETSON if jetson else DRIVER)
    try:
        gpu = gpu_facts()
    except MissingDependencyError:
        if arch := fused.device_architecture():
            return None, Finding(section, name, True, f"sm_{arch}; more about it needs cuda-bindings")
        return None, Finding(
            section, name, False, "without cuda-bindings", install_command("cuda", jetson, "cuda-bindings")
        )
    except OmniADError as exc:
        return None, Finding(section, name, False, str(exc))
    text = f"{gpu['name']}, {gpu['arch']}, {gpu['multiprocessors']} multiprocessors, {gpu['memory_mib']} MiB"
    driver = " ".join(filter(None, ("driver", gpu["driver"], "for CUDA", gpu["driver_cuda"])))
    text += f", {driver}, cuda-bindings {installed('cuda-bindings')}"
    return gpu, Finding(section, name, True, text)


def driver_library() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def gpu_facts(api: object = None) -> dict:
    """The GPU that the fused engine would use, JSON-safe. Raises EngineError or MissingDependencyError."""
    driver = Driver(api)
    device = driver.device()
    major, minor = (driver.attribute(device, f"COMPUTE_CAPABILITY_{part}") for part in ("MAJOR", "MINOR"))
    cuda = driver.call("cuDriverGetVersion")  # 12060 is 12.6
    return {
        "name": driver.call("cuDeviceGetName", 128, device).split(b"\0")[0].decode(),
        "arch": f"sm_{major}{minor}",
        "multiprocessors": driver.attribute(device, "MULTIPROCESSOR_COUNT"),
        "memory_mib": int(driver.call("cuDeviceTotalMem", device)) >> 20,
        "driver": read("/sys/module/nvidia/version").strip() or None,  # a Jetson's under JetPack 6 has no number
        "driver_cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
    }


def cameras() -> Iterator[Finding]:
    yield Finding("can do", "USB and RTSP cameras, video files", True, "OpenCV")
    for name, backend in CAMERAS:
        python = interpreter(backend)
        try:
            CameraProcess(name, backend, {}).check_installed()
        except MissingDependencyError as exc:
            what, _, command = str(exc).partition("; run: ")
            yield Finding("can do", name, False, f"{what} in {python}", command)
        else:
            yield Finding("can do", name, True, python)


def on_jetson(jetson: Jetson) -> Iterator[Finding]:
    facts, state = jetson.facts(), jetson.state()
    yield Finding("Jetson", "board", None, facts["model"] or "unknown")
    yield Finding("Jetson", "JetPack", None, f"{facts['jetpack'] or 'unknown'}, L4T {facts['l4t'] or 'unknown'}")
    yield Finding("Jetson", "power mode", None, facts["power_mode"] or "unknown: look at sudo nvpmodel -q")
    fixed = {True: "fixed", False: "not fixed (sudo jetson_clocks fixes them)", None: "fixed or not: unknown"}
    clocks = ", ".join(f"{name} {mhz:.0f} MHz" for name, mhz in state["clocks_mhz"].items())
    yield Finding("Jetson", "clocks", None, f"{clocks or 'unknown'}; {fixed[facts['clocks_fixed']]}")
    degrees = ", ".join(f"{zone} {value:.0f} °C" for zone, value in state["temperatures_c"].items())
    yield Finding("Jetson", "temperatures", None, degrees or "unknown")
    rails = ", ".join(f"{rail} {value:.0f} mW" for rail, value in state["rails_mw"].items())
    yield Finding("Jetson", "power", None, rails or "unknown")
    yield csi_camera(jetson)


def csi_camera(jetson: Jetson) -> Finding:
    plugin = jetson.root / "usr/lib/aarch64-linux-gnu/gstreamer-1.0/libgstnvarguscamerasrc.so"
    text = "nvarguscamerasrc" if plugin.is_file() else "GStreamer's nvarguscamerasrc is not there"
    fix = "sudo apt install nvidia-l4t-gstreamer nvidia-l4t-camera"
    return Finding("Jetson", "CSI cameras", plugin.is_file(), text, fix)


# With a bundle


def inspect_bundle(path: Path) -> Iterator[Finding]:
    """Each engine that could run it, and the one that does: opened, and run once."""
    try:
        bundle = read_bundle(path)
        products = ", ".join(bundle.products)
        text = f"{path}: {bundle.tiling}, {bundle.precision}, products {products}"
        yield Finding("bundle", "file", True, text)
        for name, against in engine_objections(bundle).items():
            yield Finding("bundle", name, not against, against or "can run it")
        start = perf_counter()
        detector = Detector(path)
    except OmniADError as exc:
        yield Finding("bundle", "auto", False, str(exc))
        return
    text = f"{detector.reason}; opened and run in {perf_counter() - start:.1f} s"
    yield Finding("bundle", "auto", True, text)


def engine_objections(bundle: Bundle) -> dict[str, str]:
    """Why `auto` would not take an engine for this bundle here; empty where it might."""
    return {
        "fused fp16": fused.objection(bundle, fused.device_architecture()),
        "tensorrt fp16": tensorrt_engine.objection(bundle),
        "openvino bf16": objection(bundle, "bf16"),
        "openvino fp32": objection(bundle, "fp32"),
        "onnxruntime fp32": "",
    }
