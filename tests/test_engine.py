"""Which engine is chosen and why, that engines agree, and what becomes of their errors."""

import os
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest

from omniad_edge import engine
from omniad_edge.bundle import Bundle, read_bundle
from omniad_edge.engine import OnnxRuntimeEngine, OpenVinoEngine, open_engine
from omniad_edge.errors import EngineError, InputError, MissingDependencyError

HAS_BF16 = "bf16 of this CPU was not found by OpenVINO, or OpenVINO is not installed"


@pytest.fixture(scope="module")
def bundle(small_bundle) -> Bundle:
    return read_bundle(small_bundle)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)


def with_parity(bundle: Bundle, parity: dict) -> Bundle:
    return replace(bundle, manifest=bundle.manifest | {"parity": parity})


def passed(bundle: Bundle, passed: bool = True) -> Bundle:
    return with_parity(
        bundle, {"engines": {"openvino fp32": {"passed": True}, "openvino bf16": {"passed": passed}}}
    )


class Recorder:
    """Stands for an engine's class; keeps what it was made with."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __call__(self, model, *arguments):
        self.arguments, self.reason = arguments, arguments[-1]
        return self


@pytest.fixture
def machine(monkeypatch):
    """Sets up a machine: machine(bf16=..., openvino=...)."""
    monkeypatch.setattr(engine, "OnnxRuntimeEngine", Recorder("onnxruntime"))
    monkeypatch.setattr(engine, "OpenVinoEngine", Recorder("openvino"))

    def set_up(bf16: bool, openvino: bool = True) -> None:
        def cpu_has_bf16() -> bool:
            engine.import_openvino()
            return bf16

        monkeypatch.setattr(engine, "cpu_has_bf16", cpu_has_bf16)
        monkeypatch.setitem(sys.modules, "openvino", object() if openvino else None)

    return set_up


@pytest.mark.parametrize(
    "backend, precision, bf16, gate, expected, reason",
    [
        ("auto", "auto", True, True, "openvino bf16", "OpenVINO in bf16: this CPU has it and the bundle passed"),
        ("auto", "auto", False, True, "openvino fp32", "not bf16, because this CPU does not have bf16"),
        ("auto", "auto", True, False, "openvino fp32", "because the bundle failed the parity gate in bf16"),
        ("auto", "auto", True, None, "onnxruntime", "not OpenVINO, because the bundle was not tested on it"),
        ("auto", "fp32", True, True, "openvino fp32", "OpenVINO in fp32: asked for"),
        ("auto", "bf16", True, True, "openvino bf16", "OpenVINO in bf16"),
        ("onnxruntime", "auto", True, True, "onnxruntime", "ONNX Runtime in fp32: asked for"),
        ("onnxruntime", "fp32", True, True, "onnxruntime", "ONNX Runtime in fp32: asked for"),
        ("openvino", "auto", True, True, "openvino bf16", "OpenVINO in bf16"),
        ("openvino", "auto", False, True, "openvino fp32", "not bf16, because this CPU does not have bf16"),
        ("openvino", "auto", True, False, "openvino fp32", "not bf16, because the bundle failed"),
        ("openvino", "auto", True, None, "openvino fp32", "not bf16, because the bundle was not tested"),
        ("openvino", "fp32", True, True, "openvino fp32", "OpenVINO in fp32: asked for"),
        ("openvino", "bf16", True, True, "openvino bf16", "OpenVINO in bf16"),
    ],
)
def test_choice(bundle, machine, backend, precision, bf16, gate, expected, reason):
    machine(bf16)
    bundle = with_parity(bundle, {}) if gate is None else passed(bundle, gate)
    chosen = open_engine(bundle, backend, precision, threads=2)
    words = chosen.arguments[-1]
    assert reason in words
    if chosen.backend == "openvino":
        assert chosen.arguments == (expected.removeprefix("openvino "), 2, words)
    else:
        assert expected == "onnxruntime" and chosen.arguments == (2, words)


@pytest.mark.parametrize("backend", ["auto", "openvino"])
@pytest.mark.parametrize(
    "bf16, gate, reason", [(False, True, "this CPU does not have bf16"), (True, False, "failed the parity gate")]
)
def test_bf16_is_refused_in_words(bundle, machine, backend, bf16, gate, reason):
    machine(bf16)
    with pytest.raises(EngineError, match=f"precision bf16: .*{reason}"):
        open_engine(passed(bundle, gate), backend, "bf16")


@pytest.mark.parametrize("parity", [{}, {"engines": {}}, {"engines": []}, {"engines": {"openvino bf16": "yes"}}])
def test_bf16_without_a_report_of_the_gate_is_refused(bundle, machine, parity):
    machine(bf16=True)
    with pytest.raises(EngineError, match="was not tested on it in bf16 when it was exported"):
        open_engine(with_parity(bundle, parity), "openvino", "bf16")


def test_only_true_is_passed(bundle, machine):
    machine(bf16=True)
    with pytest.raises(EngineError, match="failed the parity gate"):
        open_engine(passed(bundle, "false"), "openvino", "bf16")


def test_onnxruntime_has_no_bf16(bundle, machine):
    machine(bf16=True)
    with pytest.raises(EngineError, match="for bf16 use backend='openvino'"):
        open_engine(passed(bundle), "onnxruntime", "bf16")


def test_without_openvino(bundle, machine):
    machine(bf16=True, openvino=False)
    chosen = open_engine(passed(bundle))
    assert chosen.backend == "onnxruntime"
    assert 'because OpenVINO is not installed; run: pip install "omniad-edge[openvino]"' in chosen.arguments[-1]
    for asked in ({"backend": "openvino"}, {"precision": "bf16"}, {"backend": "openvino", "precision": "fp32"}):
        with pytest.raises(MissingDependencyError, match=r'pip install "omniad-edge\[openvino\]"'):
            open_engine(passed(bundle), **asked)


def test_openvino_is_not_loaded_where_it_is_not_a_choice(bundle, machine, monkeypatch):
    machine(bf16=True)

    def never():
        raise AssertionError("OpenVINO was imported")

    monkeypatch.setattr(engine, "import_openvino", never)
    assert open_engine(passed(bundle), "onnxruntime").backend == "onnxruntime"


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"backend": "cuda"}, "backend: expected auto, fused, tensorrt, onnxruntime, openvino; got 'cuda'"),
        ({"precision": "int4"}, "precision: expected auto, fp16, fp32, bf16, int8, fp8; got 'int4'"),
        ({"threads": 0}, "threads: expected a whole number from 1 on, or None; got 0"),
        ({"threads": "2"}, "got '2'"),
        ({"threads": True}, "got True"),
    ],
)
def test_unknown_names_and_numbers(bundle, wrong, message):
    with pytest.raises(InputError, match=message):
        open_engine(bundle, **wrong)


# ---- the real engines


def test_both_engines_agree_to_rounding(bundle, pixels):
    pytest.importorskip("openvino")
    ours, theirs = (open_engine(bundle, b, "fp32", threads=2) for b in ("onnxruntime", "openvino"))
    assert (ours.backend, ours.precision) == ("onnxruntime", "fp32")
    assert (theirs.backend, theirs.precision) == ("openvino", "fp32")
    (map1, score1), (map2, score2) = ours.run(pixels), theirs.run(pixels)
    for anomaly_map, score in ((map1, score1), (map2, score2)):
        assert anomaly_map.dtype == score.dtype == np.float32
        assert anomaly_map.shape == (3, 64, 64) and score.shape == (3,)
        assert (score == anomaly_map.max((1, 2))).all()
    # A cosine's error is a few roundings of 1, whatever is left of 1 - cosine; there are three of them.
    assert np.abs(map1 - map2).max() <= 3 * 4 * np.finfo(np.float32).eps


def test_bf16_computes_in_bf16(bundle, pixels):
    pytest.importorskip("openvino")
    if not engine.cpu_has_bf16():
        pytest.skip(HAS_BF16)
    half = open_engine(passed(bundle), "openvino", "auto", threads=2)
    assert (half.backend, half.precision) == ("openvino", "bf16")
    maps, scores = half.run(pixels)
    assert maps.dtype == scores.dtype == np.float32 and (scores == maps.max((1, 2))).all()
    error = np.abs(maps - open_engine(bundle, "onnxruntime").run(pixels)[0]).max()
    assert 1e-5 < error < 0.02, error  # bf16 rounds to 2^-9; in fp32 the error would be 1e-7


def test_bf16_needs_a_cpu_that_has_it(bundle, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setattr(engine, "cpu_has_bf16", lambda: False)
    with pytest.raises(EngineError, match="this CPU does not have it; use precision='fp32'"):
        OpenVinoEngine(bundle.onnx("cpu"), "bf16")


@pytest.fixture(params=["onnxruntime", "openvino"])
def backend(request) -> str:
    pytest.importorskip(request.param)
    return request.param


def test_an_earlier_result_is_not_overwritten_by_the_next(bundle, pixels, backend):
    opened = open_engine(bundle, backend, "fp32", threads=2)
    first, score = opened.run(pixels[:1])
    kept = first.copy(), score.copy()
    opened.run(pixels[1:2])
    assert (first == kept[0]).all() and (score == kept[1]).all()


def test_a_map_does_not_depend_on_the_images_beside_it(bundle, pixels, backend):
    """A threshold is a good image's score of a batch; alone on the line it must not be above it."""
    opened = open_engine(bundle, backend, "fp32", threads=2)
    together = opened.run_all(np.concatenate([pixels] * 3))
    for index, image in enumerate(pixels):
        for whole, alone in zip(together, opened.run_all(image[None]), strict=True):
            assert (whole[index] == alone[0]).all()


@pytest.mark.parametrize("model", [b"", b"garbage", b"\x08\x08" * 400], ids=["empty", "text", "protobuf"])
def test_a_broken_model_is_an_engine_error(backend, model):
    make = OnnxRuntimeEngine if backend == "onnxruntime" else OpenVinoEngine
    with pytest.raises(EngineError, match=r"(ONNX Runtime|OpenVINO) \S+ cannot load the model"):
        make(model)


def test_a_truncated_model_is_an_engine_error(bundle, backend):
    model = bundle.onnx("cpu")
    make = OnnxRuntimeEngine if backend == "onnxruntime" else OpenVinoEngine
    with pytest.raises(EngineError, match="cannot load the model"):
        make(model[: len(model) // 2])


def test_pixels_that_do_not_fit_are_an_engine_error(bundle, pixels, backend):
    opened = open_engine(bundle, backend, "fp32", threads=2)
    for wrong in (pixels[:, :32], pixels[..., :2]):
        with pytest.raises(EngineError, match=r"failed on pixels \(3, "):
            opened.run(np.ascontiguousarray(wrong))
    assert opened.run(pixels)[1].shape == (3,)  # it goes on after the error


@pytest.mark.parametrize("threads, at_once", [(None, 1), (1, 2)])
def test_calls_that_use_every_core_take_turns(bundle, pixels, threads, at_once):
    opened = open_engine(bundle, "onnxruntime", threads=threads)
    inside, most, both = 0, 0, threading.Event()

    def run(pixels):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        if inside == 2:
            both.set()
        both.wait(0.3)
        inside -= 1
        return pixels[..., 0], pixels[:, 0, 0, 0], None

    opened.run_all = run
    callers = [threading.Thread(target=opened.run_frames, args=([pixels[0]],)) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert most == at_once


def test_openvino_sends_nothing(tmp_path):
    """Its telemetry would write an identifier into the home folder, and a message to Google Analytics."""
    code = "import sys; from omniad_edge.engine import import_openvino; print(import_openvino().__name__)"
    code += "; print(sys.modules['openvino.tools.ovc.telemetry_utils'].tm.__name__)"
    made = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"HOME": str(tmp_path)}, capture_output=True, text=True
    )
    assert made.stdout.split() == ["openvino", "openvino.tools.ovc.telemetry_stub"], made.stderr
    assert not list(tmp_path.iterdir())
