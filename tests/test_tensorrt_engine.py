"""Building, keeping and running TensorRT engines on stand-ins for TensorRT and for the CUDA driver.

The stand-in computes a model with ONNX Runtime, so the engine's self-test is the real one.
"""

import errno
import gc
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import cuda.bindings
import fake_tensorrt as trt
import numpy as np
import onnx
import pytest
from fake_cuda import FakeCuda, OnGpu, check_all_freed, cubin

from omniad_edge import Detector, gpu_choice, native, plan_cache
from omniad_edge.bundle import Bundle, read_bundle, write_bundle
from omniad_edge.cli import main
from omniad_edge.cuda_driver import Driver
from omniad_edge.engine import OnnxRuntimeEngine, open_engine
from omniad_edge.errors import BundleError, EngineError, ExportError, InputError, MissingDependencyError
from omniad_edge.export import bundle_export
from omniad_edge.export.tensorrt_engine import PLUGIN_GRAPH, build_engine, network_model, network_parts
from omniad_edge.jetson import Jetson
from omniad_edge.kernels.fold import fold
from omniad_edge.kernels.plan import Kernel
from omniad_edge.preprocess import resize
from omniad_edge.self_test import SELF_TEST
from omniad_edge.tensorrt_engine import TensorRtEngine, build_server_plan
from omniad_edge.tensorrt_library import PLUGINS
from omniad_edge.weights import load_run

FIRST = "no engine was built of this bundle here yet: building one"


@pytest.fixture(scope="module")
def bundle_file(small_run, tmp_path_factory) -> Path:
    """In fp16, without kernels."""
    path = tmp_path_factory.mktemp("tensorrt") / "line3.omniad"
    bundle_export.export_bundle(small_run.folder, path, fp16=True)
    return path


@pytest.fixture(scope="module")
def bundle(bundle_file) -> Bundle:
    return read_bundle(bundle_file)


@pytest.fixture(scope="module")
def fused_file(small_run, bundle, tmp_path_factory) -> Path:
    """With kernels for sm_90, of which the stand-in for the driver can run the one that resizes frames."""
    pytest.importorskip("triton", reason="the kernels need Triton: pip install 'omniad-edge[kernels]'")
    from omniad_edge.export import fused_parts

    def compile_plan(plan, arch):
        resizing = plan.front and plan.kernel_key(plan.front)
        for key in sorted({plan.kernel_key(launch) for launch in plan.all_launches}):
            code = cubin("p" * 9, "resize", (plan.height, plan.width)) if key == resizing else key.encode()
            yield key, Kernel("step", code, 1024, 4)

    path = tmp_path_factory.mktemp("tensorrt-fused") / "line3.omniad"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_parts, "compile_plan", compile_plan)
        parts = fused_parts.fused_parts(fold(load_run(small_run.folder)[0]), ["sm_90"])
    write_bundle(path, bundle.manifest, bundle.parts | parts)
    return path


@pytest.fixture(scope="module")
def fused_bundle(fused_file) -> Bundle:
    return read_bundle(fused_file)


@pytest.fixture
def machine(monkeypatch, tmp_path) -> Iterator[FakeCuda]:
    """A GPU of sm_90 with TensorRT 10.3, and an empty cache; in the end nothing of the GPU's may be left."""
    driver = FakeCuda()
    monkeypatch.setattr(cuda.bindings, "driver", driver)
    monkeypatch.setattr(native, "why_absent", lambda: "it was not built")  # its driver is another
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setenv("OMNIAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OMNIAD_PLUGIN", raising=False)
    trt._reset(driver)
    yield driver
    if driver.alive:  # a failed engine lives as long as its exception
        gc.collect()
    check_all_freed(driver)


@pytest.fixture
def pixels(bundle, rng) -> np.ndarray:
    return rng.integers(0, 256, (11, bundle.height, bundle.width, 3), np.uint8)


def built() -> int:
    return len(trt._state.builders)


def kept(suffix: str = ".plan") -> Path:
    (path,) = (plan_cache.default_cache_dir() / "tensorrt").glob(f"*-*{suffix}")
    return path


def build(bundle: Bundle, driver: FakeCuda, *arguments, **options):
    driver.stack().append(1)
    try:
        return build_engine(bundle.onnx("fp16"), *arguments, **options)
    finally:
        driver.stack().pop()


# Building


def test_what_is_built(bundle, machine, capsys):
    made = build(bundle, machine, (1, 3), 5 << 20, b"known ")
    assert made.timings == b"known timed "
    (builder,) = trt._state.builders
    config = builder._config
    assert config._flags == set() and config.max_aux_streams == 0
    assert config._limits == {trt.MemoryPoolType.WORKSPACE: 5 << 20}
    shapes = [(batch, bundle.height, bundle.width, 3) for batch in (1, 3)]
    assert config._profiles == [("pixels", shape, shape, shape) for shape in shapes]
    err = capsys.readouterr().err
    assert err.startswith("building the TensorRT engine; this takes minutes\n") and "ended after" in err


def test_progress_in_lines(bundle, machine, capsys, monkeypatch):
    monkeypatch.setattr("omniad_edge.progress.LINE_EVERY_S", 0)
    build(bundle, machine)
    lines = [line.split(": ")[1].rsplit(",", 1)[0] for line in capsys.readouterr().err.splitlines()[1:-1]]
    first = ["Tactics [all], 0 of 2", "Tactics [all], 1 of 2", "Tactics [all], 2 of 2"]
    assert lines[:5] == ["Building Engine, 0 of 4", *first, "Building Engine, 1 of 4"]
    assert lines[-1] == "Building Engine, 4 of 4"


def test_progress_in_a_terminal(bundle, machine, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    build(bundle, machine)
    assert "building the TensorRT engine" in capsys.readouterr().err


def test_ctrl_c_ends_a_build(bundle, machine, monkeypatch):
    def interrupted(text: str) -> None:
        if "1 of 4" in text:
            raise KeyboardInterrupt

    monkeypatch.setattr("omniad_edge.progress.LINE_EVERY_S", 0)
    monkeypatch.setattr("omniad_edge.progress.say", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(bundle, machine)


def test_timings_of_another_device_are_left_out(bundle, machine):
    assert build(bundle, machine, timings=b"of another").timings == b"timed "


@pytest.mark.parametrize(
    "fault, words",
    [
        (
            "build_serialized_network",
            "cannot build the engine: build_serialized_network: the stand-in was told to",
        ),
        ("add_optimization_profile", "refuses an optimisation profile"),
    ],
)
def test_errors_say_what_tensorrt_said(bundle, machine, fault, words):
    trt._state.faults.add(fault)
    with pytest.raises(EngineError, match=f"TensorRT 10.3.0 {words}"):
        build(bundle, machine)


def test_a_model_that_cannot_be_parsed(machine):
    with pytest.raises(EngineError, match="cannot parse the model: not a model"):
        build_engine(b"no model")


@pytest.mark.parametrize("batches", [(8,), (1, 1), (0, 1), (1, 65), (1, 2.5), ()])
def test_batches_that_cannot_be(machine, batches):
    with pytest.raises(InputError, match="batches: expected different whole numbers from 1 to 64, 1 among them"):
        build_engine(b"", batches)


# Running


def test_it_computes_the_fp16_graph(bundle, machine, pixels):
    engine = open_engine(bundle, "tensorrt")
    assert (engine.backend, engine.precision) == ("tensorrt", "fp16")
    assert engine.reason.startswith("TensorRT in fp16: asked for; without our plugin: there is no libomniad")
    anomaly_map, pred_score = engine.run(pixels)
    truth = OnnxRuntimeEngine(bundle.onnx("fp16"))
    for index, image in enumerate(pixels):
        expected_map, expected_score = truth.run(image[None])
        assert np.abs(anomaly_map[index] - expected_map[0]).max() < 1e-5
        assert abs(pred_score[index] - expected_score[0]) < 1e-5
    assert sorted(engine.graphs) == [1, 8]
    assert anomaly_map.dtype == pred_score.dtype == np.float32


def test_every_image_is_a_replay_of_its_batchs_graph(bundle, machine, pixels):
    engine = open_engine(bundle, "tensorrt")
    engine.run(pixels)
    machine.calls.clear()
    engine.run(pixels)
    names = machine.names()
    assert names.count("cuGraphLaunch") == 4  # 8 + 1 + 1 + 1
    assert {name for name in names if name.startswith("cuGraph")} == {"cuGraphLaunch"}
    assert names.count("cuMemcpyHtoDAsync") == 4 and names.count("cuMemcpyDtoHAsync") == 12


def test_frames_are_resized_on_the_cpu_without_a_kernel_for_it(bundle, machine, rng):
    frames = [rng.integers(0, 256, (50, 70 + width, 3), np.uint8) for width in range(3)]
    engine = open_engine(bundle, "tensorrt")
    anomaly_map, _, embedding, preprocess_ms = engine.run_frames(frames)
    resized = np.stack([resize(frame, bundle.height, bundle.width) for frame in frames])
    assert (anomaly_map == engine.run(resized)[0]).all()
    assert (embedding == OnnxRuntimeEngine(bundle.onnx("fp16")).run_all(resized)[2]).all()
    assert len(preprocess_ms) == 3 and min(preprocess_ms) > 0
    assert engine.frame_size(frames[0]) == (50, 70)
    with pytest.raises(InputError):
        engine.frame_size(OnGpu(machine, frames[0]))


@pytest.mark.parametrize("integrated", [False, True])
def test_frames_are_resized_on_the_gpu_with_one(fused_bundle, machine, rng, integrated):
    machine.attributes = FakeCuda(integrated=integrated).attributes
    engine = open_engine(fused_bundle, "tensorrt")
    frame = rng.integers(0, 256, (50, 70, 3), np.uint8)
    from_host = engine.run_frames([frame])
    from_gpu = engine.run_frames([OnGpu(machine, frame)])
    assert (from_host[0] == from_gpu[0]).all() and (from_host[1] == from_gpu[1]).all()
    assert engine.frame_size(OnGpu(machine, frame)) == (50, 70)
    same_size = rng.integers(0, 256, (*engine.input_size, 3), np.uint8)
    made, straight = engine.run_frames([same_size[..., ::-1]]), engine.run(same_size[None])
    assert (made[0] == straight[0]).all()


def test_an_integrated_gpu_works_on_the_hosts_memory(bundle, machine, pixels):
    on_a_card = open_engine(bundle, "tensorrt").run(pixels)
    machine.attributes = FakeCuda(integrated=True).attributes
    engine = open_engine(bundle, "tensorrt")
    engine.run(pixels)
    machine.calls.clear()
    in_place = engine.run(pixels)
    assert not [name for name in machine.names() if name.startswith("cuMemcpy")]
    assert all((a == b).all() for a, b in zip(on_a_card, in_place, strict=True))


def test_a_detector_says_what_it_runs_on(bundle_file, machine, rng):
    detector = Detector(bundle_file, "tensorrt")
    results = detector([rng.integers(0, 256, (40, 50, 3), np.uint8)] * 2, product="gear")
    assert [(r.backend, r.precision) for r in results] == [("tensorrt", "fp16")] * 2


@pytest.mark.parametrize(
    "fault, words",
    [
        ("deserialize_cuda_engine", r"cannot load its engine; delete .*\.plan: deserialize"),
        ("create_execution_context", "cannot make an execution context"),
        ("set_input_shape", "does not take inputs and outputs for a batch of 1"),
        ("execute_async_v3", "cannot run the engine"),
    ],
)
def test_what_fails_is_an_engine_error(bundle, machine, fault, words):
    open_engine(bundle, "tensorrt")
    trt._state.faults.add(fault)
    with pytest.raises(EngineError, match=f"TensorRT 10.3.0 {words}"):
        open_engine(bundle, "tensorrt")


def test_an_engine_that_computes_something_else_is_not_kept(bundle, machine):
    trt._state.error = 1e-3
    with pytest.raises(EngineError, match=r"its anomaly map of a self-test image is 0\.001 off"):
        open_engine(bundle, "tensorrt")
    assert not (plan_cache.default_cache_dir() / "tensorrt").exists()


# What is kept


def test_an_engine_is_built_once(bundle, machine, pixels, capsys):
    first = open_engine(bundle, "tensorrt").run(pixels)
    assert FIRST in capsys.readouterr().err
    again = open_engine(bundle, "tensorrt").run(pixels)
    assert built() == 1 and capsys.readouterr().err == ""
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert kept().stat().st_mode & 0o077 == 0 or kept().parent.stat().st_mode & 0o077 == 0


def test_another_machine_builds_again_and_says_why(bundle, machine, capsys, monkeypatch):
    open_engine(bundle, "tensorrt")
    capsys.readouterr()
    trt.__version__ = "10.13.3"
    monkeypatch.setattr(Jetson, "power_mode", "15W")
    open_engine(bundle, "tensorrt")
    assert capsys.readouterr().err.startswith(
        "the engine built here before does not fit any more: TensorRT was 10.3.0, is 10.13.3, power mode was "
        "none, is 15W: building one"
    )
    assert built() == 2
    open_engine(bundle, "tensorrt")
    trt.__version__ = "10.3.0"
    monkeypatch.setattr(Jetson, "power_mode", None)
    open_engine(bundle, "tensorrt")  # the first one is there still
    assert built() == 2


def test_timings_are_used_again(bundle, machine, tmp_path):
    open_engine(bundle, "tensorrt")
    TensorRtEngine(bundle, batches=(1, 2))
    assert trt._state.builders[1]._config._cache._content == b"timed timed "


def test_batches_asked_for(bundle, machine, pixels, capsys):
    open_engine(bundle, "tensorrt")
    engine = TensorRtEngine(bundle, batches=(1, 2, 4))
    assert "the engine built here takes 1, 8 images at once, not 1, 2, 4: building one" in capsys.readouterr().err
    engine.run(pixels)
    assert sorted(engine.graphs) == [1, 2, 4]
    assert open_engine(bundle, "tensorrt").batches == (1, 2, 4) and built() == 2
    TensorRtEngine(bundle, workspace_bytes=1 << 20)
    assert f"had a workspace of {1 << 30} bytes: building one" in capsys.readouterr().err


# For a server


def test_a_plan_for_a_server_has_one_profile_and_a_place_in_its_repository(bundle_file, machine, tmp_path, capsys):
    assert main(["triton-repository", str(bundle_file), "--tensorrt", "--out", str(tmp_path / "models")]) == 0
    folder = tmp_path / "models/omniad_line3_network"
    plan = (folder / "1/model.plan").read_bytes()
    assert trt._state.loaded_plans == [plan]  # for the self-test
    ((name, least, best, most),) = trt._state.builders[0]._config._profiles
    assert (name, least[0], best[0], most[0]) == ("pixels", 1, 8, 8) and least[1:] == most[1:] == (64, 64, 3)
    config = (folder / "config.pbtxt").read_text()
    assert 'platform: "tensorrt_plan"\nmax_batch_size: 8\ndynamic_batching { }\n' in config
    assert "building one" in capsys.readouterr().err
    cache = plan_cache.plan_folder()
    assert [path.suffix for path in cache.iterdir()] == [
        ".cache"
    ]  # for the next build; the plan is not ours to run


def test_a_plan_for_a_server_has_no_plugin(plugin_bundle, plugin, machine):
    assert build_server_plan(plugin_bundle, 4)
    assert trt._state.libraries == []


def test_a_plan_for_a_server_that_computes_something_else_is_not_written(bundle_file, machine, tmp_path, capsys):
    trt._state.error = 1e-3
    arguments = ["triton-repository", str(bundle_file), "--tensorrt", "--out", str(tmp_path / "models")]
    assert main(arguments) == 1 and "a self-test image is 0.001 off" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()
    (tmp_path / "models").mkdir()
    (tmp_path / "models/something").touch()
    assert main(arguments) == 1 and built() == 1  # refused before the minutes that a build takes


# How much is kept


@pytest.fixture
def small_cache(bundle, machine, monkeypatch) -> Path:
    """The cache's folder, with an engine of this bundle in it and room for a second, but not for a third."""
    open_engine(bundle, "tensorrt")
    monkeypatch.setattr(plan_cache, "MOST_BYTES", int(2.5 * kept().stat().st_size))
    gc.collect()
    return kept().parent


def open_of_version(bundle: Bundle, version: str):
    trt.__version__ = version
    return open_engine(bundle, "tensorrt")


def files(folder: Path) -> Counter:
    return Counter(path.suffix for path in folder.iterdir())


def used_at(path: Path, time_s: float) -> None:
    os.utime(path.with_suffix(".used"), (time_s, time_s))


def test_the_engine_used_longest_ago_makes_room(bundle, small_cache, capsys):
    first = kept()
    used_at(first, 1000)
    open_of_version(bundle, "10.4")
    (second,) = set(small_cache.glob("*.plan")) - {first}
    assert "removed" not in capsys.readouterr().err
    used_at(second, 2000)
    open_of_version(bundle, "10.3.0")  # which makes it the one used last
    assert first.with_suffix(".used").stat().st_mtime > 2000
    second.with_suffix(".speeds").write_text("{}")
    gc.collect()
    open_of_version(bundle, "10.5")
    err = capsys.readouterr().err
    assert re.search(rf"removed TensorRT engines .*: 1, \d+ MB; {small_cache} keeps .* GB at most", err)
    assert files(small_cache) == {".plan": 2, ".json": 2, ".used": 2, ".cache": 3}
    assert first.exists() and not second.exists()


def test_an_engine_in_use_is_not_removed(bundle, small_cache, capsys):
    in_use = [open_of_version(bundle, version) for version in ("10.3.0", "10.4", "10.5")]
    assert files(small_cache)[".plan"] == 3 and "removed" not in capsys.readouterr().err
    del in_use[0]
    gc.collect()
    open_of_version(bundle, "10.6")
    assert files(small_cache)[".plan"] == 3 and "removed TensorRT engines" in capsys.readouterr().err


def test_an_engine_in_use_in_another_process_is_not_removed(small_cache):
    program = (
        "import fcntl, sys; file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_SH); print(flush=True); input()"
    )
    command = [sys.executable, "-c", program, kept(".used")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert not plan_cache.remove(kept()) and files(small_cache)[".plan"] == 1
        other.communicate(b"\n")
    assert plan_cache.remove(kept()) and files(small_cache) == {".cache": 1}


def test_two_may_make_room_at_once(small_cache, monkeypatch):
    monkeypatch.setattr(plan_cache, "MOST_BYTES", 0)
    with monkeypatch.context() as patch:
        found = plan_cache.stored_plans(small_cache)
        patch.setattr(plan_cache, "stored_plans", lambda folder: found)
        for _ in range(2):
            plan_cache.make_room(small_cache, 0, small_cache / "new.plan")
    assert plan_cache.stored_plans(small_cache) == [] and files(small_cache)[".plan"] == 0


def test_what_a_power_cut_left_is_removed_a_day_later(small_cache):
    old, new = small_cache / ".a.plan.x.part", small_cache / ".b.plan.y.part"
    old.write_bytes(b"half"), new.write_bytes(b"half")
    os.utime(old, (1000, 1000))
    plan_cache.make_room(small_cache, 0, kept())
    assert new.exists() and not old.exists()


def test_an_engine_that_cannot_be_kept_runs(bundle, bundle_file, machine, pixels, capsys, monkeypatch):
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(plan_cache, "write", full)
    plan_cache.PlanCache("network", {}).keep_speeds("rival", {"fused": 1.0})  # a measurement may be lost
    engine = open_engine(bundle, "tensorrt")
    assert len(engine.run(pixels)[0]) == len(pixels)
    assert "is not kept and will have to be built again: [Errno 28] No space left" in capsys.readouterr().err
    assert main(["build", str(bundle_file)]) == 1
    assert "could not be kept" in capsys.readouterr().err and not engine.path.exists()


def tamper_plan(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"!")


def tamper_record(path: Path) -> None:
    path.with_suffix(".json").write_text("{}")


@pytest.mark.parametrize(
    "tamper, words",
    [
        (tamper_plan, "is not the engine that was built here, its SHA-256 is another: not loaded: building one"),
        (tamper_record, "is damaged; delete it to have the engine built again: building one"),
        (Path.unlink, "cannot be read: "),
        (lambda path: path.with_suffix(".json").unlink(), FIRST),
    ],
)
def test_only_what_was_built_here_is_loaded(bundle, machine, capsys, tamper, words):
    open_engine(bundle, "tensorrt")
    plan = kept().read_bytes()
    tamper(kept())
    trt._state.loaded_plans.clear()
    open_engine(bundle, "tensorrt")
    assert words in capsys.readouterr().err
    assert built() == 2 and trt._state.loaded_plans == [plan]  # the new one, equal to the first; nothing else


def test_a_plan_of_another_user_is_not_loaded(bundle, machine, capsys, monkeypatch):
    open_engine(bundle, "tensorrt")
    capsys.readouterr()
    owner = kept().stat().st_uid
    if owner == 0:
        monkeypatch.setattr(plan_cache, "TRUSTED_OWNERS", ())
    monkeypatch.setattr(plan_cache.os, "getuid", lambda: owner + 1)
    open_engine(bundle, "tensorrt")
    assert "belongs to another user: not loaded; set OMNIAD_CACHE" in capsys.readouterr().err


def test_a_jetsons_release_and_power_mode_count(machine, monkeypatch, tmp_path):
    files = {
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic",
        "var/lib/nvpmodel/status": "pmode:0002",
        "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(plan_cache, "Jetson", lambda: Jetson(tmp_path))
    needs = plan_cache.conditions(Driver(), "10.3.0", 87, None)
    assert needs["driver"].endswith("L4T 36.4.3, CUDA 12.6") and needs["power mode"] == "MAXN_SUPER"
    assert needs["GPU"] == "NVIDIA Stand-in" and needs["GPU id"] == bytes(range(16)).hex()


# With the plugin


@pytest.fixture
def plugin(machine, monkeypatch, tmp_path) -> Path:
    library = tmp_path / "libomniad_plugin.so"
    library.write_bytes(b"a library")
    monkeypatch.setenv("OMNIAD_PLUGIN", str(library))
    trt._state.in_library = [(name, "1", "omniad") for name in ("OmniBlock", "OmniDecoder")]
    return library


@pytest.fixture(scope="module")
def bundle_with_plugin_graph(fused_bundle, tmp_path_factory) -> Bundle:
    """Its plugin graph is the plain one."""
    path = tmp_path_factory.mktemp("tensorrt-plugin") / "line3.omniad"
    parts = {PLUGIN_GRAPH: fused_bundle.parts["graphs/fp16.onnx"]}
    write_bundle(path, fused_bundle.manifest, fused_bundle.parts | parts)
    return read_bundle(path)


@pytest.fixture
def plugin_bundle(bundle_with_plugin_graph, monkeypatch) -> Bundle:
    """What fills kernels into its plugin graph leaves marks there."""
    stand_in = ModuleType("omniad_edge.export.plugin_graph")

    def with_kernels(model, arch, kernel_index, kernels):
        model.doc_string = f"{arch}, {len(kernel_index)} kernels, {len(kernels)} bytes"
        return model

    def without_functions(model):
        model.doc_string += ", no functions"
        return model

    stand_in.with_kernels, stand_in.without_functions = with_kernels, without_functions
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    return bundle_with_plugin_graph


def test_with_the_plugin(plugin_bundle, plugin, machine, pixels):
    engine = open_engine(plugin_bundle, "tensorrt")
    assert engine.reason.endswith("; with our plugin")
    assert len(trt._state.libraries) == 2
    index = json.loads(plugin_bundle.parts["fused/sm_90.json"])["kernels"]
    size = len(plugin_bundle.parts["fused/sm_90.bin"])
    marks = f"sm_90, {len(index)} kernels, {size} bytes, no functions"
    assert marks.encode() in kept().read_bytes()
    trt._state.libraries.clear()
    open_engine(plugin_bundle, "tensorrt")  # in a process of its own the library is loaded before the plan
    assert len(trt._state.libraries) == 2 and built() == 1


def test_the_exported_plugin_graph_gets_this_gpus_kernels(fused_bundle):
    parts = network_parts(fused_bundle, 90, Path("libomniad_plugin.so"))
    assert parts[0] == PLUGIN_GRAPH
    model = onnx.load_model_from_string(network_model(fused_bundle, 90, parts))
    (node,) = (node for node in model.graph.node if node.domain == "omniad")
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert node.op_type in PLUGINS and not model.functions
    assert (attributes["plugin_namespace"], attributes["plugin_version"]) == (b"omniad", b"1")
    assert attributes["arch"] == b"sm_90" and json.loads(attributes["kernel_index"])


def test_another_plugin_needs_another_engine(plugin_bundle, plugin, machine, capsys):
    open_engine(plugin_bundle, "tensorrt")
    plugin.write_bytes(b"another library")
    open_engine(plugin_bundle, "tensorrt")
    assert "does not fit any more: plugin was" in capsys.readouterr().err and built() == 2


def test_without_the_plugin_in_words(bundle, plugin_bundle, plugin, machine, monkeypatch):
    assert "without our plugin: the bundle has no plugin graph" in open_engine(bundle, "tensorrt").reason
    monkeypatch.setenv("OMNIAD_PLUGIN", "none")
    assert "without our plugin: there is no libomniad_plugin.so" in open_engine(plugin_bundle, "tensorrt").reason
    assert trt._state.libraries == []
    monkeypatch.setenv("OMNIAD_PLUGIN", "/there/is/none.so")
    with pytest.raises(EngineError, match=r"OMNIAD_PLUGIN is '/there/is/none.so', not a file"):
        open_engine(plugin_bundle, "tensorrt")


def test_a_library_without_our_plugins(plugin_bundle, plugin, machine):
    trt._state.in_library.pop()
    with pytest.raises(EngineError, match=r"does not find OmniDecoder in .*OMNIAD_PLUGIN=none"):
        open_engine(plugin_bundle, "tensorrt")


def test_a_crafted_plugin_graph(plugin_bundle, plugin, machine, monkeypatch):
    parts = plugin_bundle.parts | {"fused/sm_90.json": b"[]"}
    with pytest.raises(EngineError, match="not as omniad-export writes it"):
        network_model(Bundle(plugin_bundle.manifest, parts), 90, (PLUGIN_GRAPH,))


# Which engine


def test_auto_does_not_build(bundle, machine):
    engine = open_engine(bundle)
    assert engine.backend != "tensorrt" and built() == 0
    assert "nor TensorRT: no engine was built of this bundle here yet" in engine.reason


def test_auto_takes_what_was_built(bundle, machine):
    open_engine(bundle, "tensorrt")
    engine = open_engine(bundle)
    assert engine.backend == "tensorrt"
    assert "TensorRT in fp16: its engine is there; the bundle has no GPU kernels" in engine.reason
    assert open_engine(bundle, precision="fp16").backend == "tensorrt"


class Fused:
    """Stands for the fused engine, which the stand-ins cannot run."""

    backend = "fused"

    def __init__(self, bundle: Bundle, reason: str) -> None:
        self.reason = reason

    def run_frames(self, frames: list) -> None:
        pass


@pytest.mark.parametrize("faster, slower", [("fused", "tensorrt"), ("tensorrt", "fused")])
def test_of_two_the_faster_one_is_taken(fused_bundle, machine, monkeypatch, faster, slower):
    measured = []
    monkeypatch.setattr(gpu_choice, "FusedEngine", Fused)
    engine = open_engine(fused_bundle)
    assert engine.backend == "fused" and "not TensorRT: no engine was built" in engine.reason

    def measure(engines, size):
        measured.append(sorted(engines))
        return {faster: 1.5, slower: 2.0}

    monkeypatch.setattr(gpu_choice, "measure", measure)
    open_engine(fused_bundle, "tensorrt")
    for _ in range(2):
        engine = open_engine(fused_bundle)
        assert engine.backend == faster
        assert f"({faster} 1.50 ms an image, {slower} 2.00 ms an image)" in engine.reason
    assert measured == [["fused", "tensorrt"]]
    kept(".speeds").write_text("[]")
    open_engine(fused_bundle)
    assert len(measured) == 2


def test_the_measurement(fused_bundle, machine, monkeypatch):
    monkeypatch.setattr(gpu_choice, "MEASURED_CALLS", 3)
    engine = open_engine(fused_bundle, "tensorrt")
    median_ms = gpu_choice.measure({"fused": Fused(None, ""), "tensorrt": engine}, engine.input_size)
    assert 0 < median_ms["fused"] < median_ms["tensorrt"]


# What is missing


def test_without_tensorrt(bundle, machine, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "omniad-edge\[tensorrt\]"; on a Jetson'):
        open_engine(bundle, "tensorrt")
    assert "nor TensorRT: TensorRT is not installed" in open_engine(bundle).reason


def test_without_a_gpu(bundle, machine, bundle_file, capsys):
    machine.missing_library = True
    with pytest.raises(EngineError, match="no NVIDIA GPU"):
        open_engine(bundle, "tensorrt")
    with pytest.raises(EngineError, match="precision fp16: no NVIDIA GPU"):
        open_engine(bundle, precision="fp16")
    assert "TensorRT" not in open_engine(bundle).reason


def test_bundles_that_have_not_what_it_takes(bundle, machine):
    for missing, words in (
        (SELF_TEST, "no self-test images for a GPU; export it again with --fp16"),
        ("graphs/fp16.onnx", "no fp16 graph for TensorRT; export it with --fp16"),
    ):
        parts = {name: part for name, part in bundle.parts.items() if name != missing}
        with pytest.raises(BundleError, match=words):
            open_engine(Bundle(bundle.manifest, parts), "tensorrt")
    with pytest.raises(BundleError, match=r"self_test\.onnx is not as omniad-export writes it"):
        open_engine(Bundle(bundle.manifest, bundle.parts | {SELF_TEST: b"PK"}), "tensorrt")
    with pytest.raises(EngineError, match="TensorRT computes in fp16, int8 or fp8; for fp32"):
        open_engine(bundle, "tensorrt", "fp32")


# The command line


def test_build(bundle_file, machine, capsys):
    assert main(["build", str(bundle_file), "--batches", "1,2", "--workspace", "64MB"]) == 0
    out, err = capsys.readouterr()
    assert (
        "engine      TensorRT in fp16; without our plugin" in out
        and "1, 2 images at once; self-test passed" in out
    )
    assert f"kept        {kept()}" in out and "auto        TensorRT in fp16: its engine is there" in out
    assert FIRST in err
    assert main(["build", str(bundle_file), "--batches", "1,2", "--workspace", "64MB"]) == 0
    assert built() == 1


def test_build_for_a_dla(bundle_file, machine, capsys):
    assert main(["build", str(bundle_file), "--device", "dla"]) == 1
    assert "a DLA has no instance norm" in "".join(capsys.readouterr().err.split("\n"))


def test_export_with_engine(bundle_file, machine, monkeypatch, capsys):
    exported = bundle_export.ExportReport(bundle_file, bundle_file.stat().st_size, {}, {}, {})
    monkeypatch.setattr(bundle_export, "export_bundle", lambda *_: exported)
    assert main(["export", "--fp16", "--engine", "tensorrt", "run", "--out", str(bundle_file)]) == 0
    assert "self-test passed" in capsys.readouterr().out and built() == 1


@pytest.mark.parametrize("fp16, error", [(True, EngineError), (False, ExportError)])
def test_export_with_engine_is_refused_before_it_begins(machine, tmp_path, capsys, fp16, error):
    machine.missing_library = True
    options = ["--fp16"] if fp16 else []
    command = ["export", *options, "--engine", "tensorrt", "run", "--out", str(tmp_path / "b")]
    assert main(command) == 1
    err = capsys.readouterr().err
    assert error.__name__ in err and "--engine" in err and not (tmp_path / "b").exists()
