"""What the package promises to those who import it."""

import inspect
import json
import subprocess
import sys
import textwrap

import pytest

import omniad_edge
from omniad_edge import errors

TRAINING = ("torch", "safetensors", "onnx", "triton")
OPTIONAL = ("openvino", "paho", "prometheus_client")
DEPENDENCIES = {"numpy", "cv2", "PIL", "onnxruntime", "rich"}
CORE = (
    *("errors", "files", "image", "preprocess", "data", "result", "calibration", "bundle", "engine", "detector"),
    *("credentials", "frame", "verdict", "sizes", "address"),
    *("metrics", "report", "evaluate", "products", "progress", "cli", "tiles"),
)
CORE_PACKAGES = ("cameras", "outputs", "line")  # with every module in them


def in_process(code: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_public_names():
    detection = {"Detector", "Frame", "Region", "Result", "OmniADError", "errors"}
    line = {"Line", "open_source", "MqttTrigger", "Verdict"}
    outputs = {"JsonLines", "Rejects", "Mqtt", "Webhook", "Health", "TerminalView"}
    assert set(omniad_edge.__all__) == detection | line | outputs
    for name in omniad_edge.__all__:
        assert getattr(omniad_edge, name).__doc__


def test_every_error_has_the_one_base():
    raised = {name: c for name, c in vars(errors).items() if inspect.isclass(c)}
    assert sorted(raised) == [
        "BundleError",
        "CalibrationError",
        "CameraError",
        "DataError",
        "DownloadError",
        "EngineError",
        "EngineLostError",
        "ExportError",
        "InputError",
        "MissingDependencyError",
        "OmniADError",
        "OutputError",
        "TrainingError",
    ]
    assert all(issubclass(c, errors.OmniADError) for c in raised.values())
    assert issubclass(errors.InputError, ValueError) and issubclass(errors.MissingDependencyError, ImportError)
    assert all(name in errors.__doc__ for name in raised)


def test_importing_takes_the_core_only():
    """No package beyond the declared dependencies, and the engines only when one is opened."""
    code = """
        import json, sys
        before = set(sys.modules)
        import omniad_edge
        print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
    """
    imported = {n for n in json.loads(in_process(code)) if n not in sys.stdlib_module_names}
    assert imported - {"omniad_edge"} <= DEPENDENCIES, imported
    assert not imported & {"torch", "onnxruntime", "openvino"}


@pytest.mark.parametrize("module", ["omniad_edge.train", "omniad_edge.export.bundle_export"])
def test_what_needs_torch_says_so_by_its_import(module):
    code = f"""
        import sys
        sys.modules["torch"] = None
        try:
            import {module}
        except ImportError as exc:
            print(exc.name)
    """
    assert in_process(code).strip() == "torch"


def test_core_modules_work_without_the_packages_of_training():
    in_process(f"""
        import importlib, pkgutil, sys
        for name in {(*TRAINING, *OPTIONAL)}:
            sys.modules[name] = None
        for name in {(*CORE, *CORE_PACKAGES)}:
            module = importlib.import_module("omniad_edge." + name)
            for part in pkgutil.iter_modules(getattr(module, "__path__", ())):
                importlib.import_module(module.__name__ + "." + part.name)
    """)


def test_importing_is_quick():
    """In processor time, which other work on the machine does not count into."""
    code = """
        import time
        start = time.process_time()
        import omniad_edge
        print(time.process_time() - start)
    """
    seconds = min(float(in_process(code)) for _ in range(3))
    assert seconds < 0.5, seconds
