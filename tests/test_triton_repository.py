"""A bundle as a model repository of Triton: what is in it, and that its verdicts are the Detector's."""

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError

import cv2
import numpy as np
import pytest

from omniad_edge import Detector, Result
from omniad_edge.bundle import read_bundle, set_thresholds, write_bundle
from omniad_edge.cli import main
from omniad_edge.errors import BundleError, ExportError, InputError
from omniad_edge.export.onnx_graph import build_graph, weights_message
from omniad_edge.export.triton_repository import write_triton_repository
from omniad_edge.files import atomic_folder
from omniad_edge.kernels.fold import fold
from omniad_edge.recognition import RECOGNITION
from omniad_edge.self_test import MAX_MAP_ERROR
from omniad_edge.weights import load_checkpoint

pytest.importorskip("tritonclient", reason="the server's schema comes with it: pip install 'tritonclient[grpc]'")
from triton_stand_in import Refused, TritonStandIn, read_config


@pytest.fixture(scope="module")
def bundle(small_run, small_bundle, tmp_path_factory) -> Path:
    """In fp16; of its three products board has a threshold that every part is above."""
    path = tmp_path_factory.mktemp("serving") / "line 3.omniad"
    small = read_bundle(small_bundle)
    wide = {name: limit | {"limit": 1e6} for name, limit in small.manifest["recognition"].items()}
    manifest = small.manifest | {"precision": "fp16", "recognition": wide}  # every frame shows what is named
    network = fold(load_checkpoint(small_run.folder / "model.safetensors")[0])
    cpu, weights = build_graph(network, half=False, half_weights=True)
    fp16, _ = build_graph(network, half=True, half_weights=True)
    parts = {"graphs/cpu.onnx": cpu, "graphs/fp16.onnx": fp16, "weights.onnx": weights_message(weights)}
    parts[RECOGNITION] = small.parts[RECOGNITION]
    write_bundle(path, manifest, parts)
    products = read_bundle(path).products
    limits = {"board": 0.01, "cap": 0.9, "gear": 0.8}
    set_thresholds(path, {name: products[name].with_threshold(t) for name, t in limits.items()}, "for this test")
    return path


@pytest.fixture(scope="module")
def models(bundle, tmp_path_factory) -> Path:
    """A repository for CPUs; do not change it."""
    folder = tmp_path_factory.mktemp("serving") / "models"
    write_triton_repository(bundle, folder)
    return folder


@pytest.fixture(scope="module")
def started(models):
    with pytest.MonkeyPatch.context() as patch:
        yield TritonStandIn(models, patch)


@pytest.fixture
def server(started):
    """A TritonStandIn of `models`, whose copy of the bundle and network are put back after the test."""
    copy, run = started.folder / "1" / "line.omniad", started.run
    whole = copy.read_bytes()
    yield started
    copy.write_bytes(whole)
    started.run = run


@pytest.fixture(scope="module")
def frames(small_run) -> list[np.ndarray]:
    paths = sorted(small_run.data.rglob("test/*/*.png"))[:6]
    sizes = [(64, 48), (72, 72), (90, 200), (47, 33), (640, 480), (1, 1)]
    return [cv2.resize(cv2.imread(str(path)), size) for path, size in zip(paths, sizes, strict=True)]


def text(*values: str) -> np.ndarray:
    return np.array([value.encode() for value in values], np.object_)


def described(result: Result) -> dict:
    """`to_dict`, but for how long it took."""
    return result.to_dict() | {"speed_ms": None}


def told(answer: dict[str, np.ndarray]) -> dict:
    result = json.loads(answer["result"][0])
    assert list(result["speed_ms"]) == ["preprocess", "engine", "postprocess", "total"]
    return result | {"speed_ms": None}


# ---- the files


def test_the_repository_of_a_server_without_a_gpu(bundle, models):
    files = sorted(str(path.relative_to(models)) for path in models.rglob("*") if path.is_file())
    detector, network = "omniad_line_3", "omniad_line_3_network"
    assert files == [
        f"{detector}/1/line.omniad",
        f"{detector}/1/model.py",
        f"{detector}/config.pbtxt",
        f"{network}/1/model.onnx",
        f"{network}/config.pbtxt",
    ]
    assert (models / detector / "1" / "line.omniad").read_bytes() == bundle.read_bytes()
    assert (models / network / "1" / "model.onnx").read_bytes() == read_bundle(bundle).onnx("cpu")
    config = read_config(models / detector / "config.pbtxt")
    assert (config.name, config.backend, config.max_batch_size) == (detector, "python", 0)
    assert [io.name for io in config.input] == ["frame", "product"]
    assert [io.optional for io in config.input] == [False, True]
    assert [io.name for io in config.output] == ["pred_label", "pred_score", "threshold", "anomaly_map", "result"]
    config = read_config(models / network / "config.pbtxt")
    assert (config.name, config.platform, config.max_batch_size) == (network, "onnxruntime_onnx", 1)
    assert not config.HasField("dynamic_batching")  # a map's last bits would depend on its neighbours
    assert [group.kind for group in config.instance_group] == [config.instance_group[0].KIND_CPU]
    assert list(config.model_warmup[0].inputs["pixels"].dims) == list(config.input[0].dims) == [64, 64, 3]
    assert config.output[1].HasField("reshape") and not config.output[1].reshape.shape


def test_the_repository_of_a_server_with_a_gpu(bundle, tmp_path):
    detector, network = write_triton_repository(bundle, tmp_path / "models", gpu=True)
    assert (tmp_path / "models" / network / "1" / "model.onnx").read_bytes() == read_bundle(bundle).onnx("fp16")
    config = read_config(tmp_path / "models" / network / "config.pbtxt")
    assert (config.platform, config.max_batch_size) == ("onnxruntime_onnx", 8)
    assert config.HasField("dynamic_batching")
    assert [group.kind for group in config.instance_group] == [config.instance_group[0].KIND_GPU]
    assert [sample.batch_size for sample in config.model_warmup] == list(range(1, 9))
    config = read_config(tmp_path / "models" / detector / "config.pbtxt")
    assert config.parameters["precision"].string_value == "fp16"
    assert config.instance_group[0].count == 8  # as many as a batch may hold: each has one frame under way


def test_the_repository_of_a_tensorrt_plan(bundle, tmp_path):
    (tmp_path / "line.plan").write_bytes(b"a plan")
    detector, network = write_triton_repository(bundle, tmp_path / "models", plan=tmp_path / "line.plan")
    assert (tmp_path / "models" / network / "1" / "model.plan").read_bytes() == b"a plan"
    config = read_config(tmp_path / "models" / network / "config.pbtxt")
    assert config.platform == "tensorrt_plan"
    assert (config.max_batch_size, config.HasField("dynamic_batching")) == (0, False)  # the server asks the plan
    assert [group.kind for group in config.instance_group] == [config.instance_group[0].KIND_GPU]
    assert [sample.batch_size for sample in config.model_warmup] == [1]
    config = read_config(tmp_path / "models" / detector / "config.pbtxt")
    stated = {name: value.string_value for name, value in config.parameters.items()}
    assert (stated["backend"], stated["precision"]) == ("tensorrt", "fp16")


def test_what_is_refused_leaves_nothing(bundle, small_bundle, models, tmp_path):
    before = sorted(models.parent.rglob("*"))
    with pytest.raises(ExportError, match="expected a new or an empty folder"):
        write_triton_repository(bundle, models)
    with pytest.raises(ExportError, match="expected a new or an empty folder"):
        write_triton_repository(bundle, models / "omniad_line_3" / "config.pbtxt")
    with pytest.raises(ExportError, match="no fp16 graph for the GPU: export it with --fp16"):
        write_triton_repository(small_bundle, tmp_path / "new", gpu=True)
    with pytest.raises(InputError, match="no such file; expected a TensorRT plan"):
        write_triton_repository(bundle, tmp_path / "new", plan=tmp_path / "missing.plan")
    with pytest.raises(BundleError, match="does not exist"):
        write_triton_repository(tmp_path / "missing.omniad", tmp_path / "new")
    assert sorted(models.parent.rglob("*")) == before and list(tmp_path.iterdir()) == []


def test_a_folder_appears_as_a_whole_or_not_at_all(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "new") as folder:
        (folder / "half").write_text("")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "new").mkdir()
    with atomic_folder(tmp_path / "new") as folder:
        (folder / "whole").write_text("")
        assert list((tmp_path / "new").iterdir()) == []
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["whole"]
    (tmp_path / "beside").mkdir()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "beside").stat().st_mode
    with pytest.raises(OSError), atomic_folder(tmp_path / "new") as folder:  # filled by another in the meantime
        (folder / "other").write_text("")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["beside", "new", "whole"]


def test_on_the_command_line(bundle, tmp_path, capsys):
    arguments = ["triton-repository", str(bundle), "--out", str(tmp_path / "models")]
    assert main(arguments) == 0
    assert capsys.readouterr().out.endswith("ask the model omniad_line_3; its network is omniad_line_3_network\n")
    assert main(arguments) == 1
    assert "expected a new or an empty folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        main([*arguments, "--gpu", "--plan", "line.plan"])
    assert exit.value.code == 2


# ---- the model, beside a stand-in for the server


@pytest.mark.parametrize("product", ["board", "cap", "gear", None])
def test_verdicts_are_the_detectors_bit_for_bit(server, bundle, frames, product):
    detector = Detector(bundle, "onnxruntime")
    labels = set()
    for frame in frames:
        named = {} if product is None else {"product": text(product)}
        answer, result = server.ask(frame=frame, **named), detector(frame, product)
        assert told(answer) == described(result)
        assert (answer["anomaly_map"] == result.anomaly_map).all()
        assert answer["pred_label"][0].decode() == result.pred_label
        assert answer["pred_score"][0] == result.pred_score and answer["threshold"][0] == result.threshold
        labels.add(result.pred_label)
    assert product is None or labels == ({"defective"} if product == "board" else {"good"})


def test_the_graph_for_gpus_gives_the_same_verdicts(bundle, frames, tmp_path, monkeypatch):
    """Here ONNX Runtime runs it on the CPU, in fp16 too."""
    write_triton_repository(bundle, tmp_path / "models", gpu=True)
    server, detector = TritonStandIn(tmp_path / "models", monkeypatch), Detector(bundle, "onnxruntime")
    for frame in frames:
        answer, result = server.ask(frame=frame, product=text("board")), detector(frame, "board")
        assert told(answer)["precision"] == "fp16"
        assert answer["pred_label"][0].decode() == result.pred_label
        assert np.abs(answer["anomaly_map"] - result.anomaly_map).max() <= MAX_MAP_ERROR


def test_a_threshold_of_the_copy_applies_from_the_next_frame_on(server, frames):
    copy = server.folder / "1" / "line.omniad"
    assert server.ask(frame=frames[0], product=text("gear"))["pred_label"] == [b"good"]
    assert main(["threshold", str(copy), "--product", "gear", "0.001"]) == 0
    answer = server.ask(frame=frames[0], product=text("gear"))
    assert answer["threshold"] == [0.001] and answer["pred_label"] == [b"defective"]
    assert told(answer)["regions"]


def test_a_damaged_copy_gives_no_verdict_until_it_is_whole_again(server, frames):
    copy = server.folder / "1" / "line.omniad"
    whole = copy.read_bytes()
    copy.write_bytes(whole[:-100])
    for _ in range(2):
        with pytest.raises(Refused, match=r"line\.omniad: has no checksum at its end") as refused:
            server.ask(frame=frames[0])
        assert refused.value.code == "internal"
    copy.write_bytes(whole)
    assert server.ask(frame=frames[0], product=text("board"))["pred_label"] == [b"defective"]
    copy.unlink()
    with pytest.raises(Refused, match=r"line\.omniad"):
        server.ask(frame=frames[0])


def test_a_bundle_of_another_network_gives_no_verdict(server, small_bundle, frames):
    """Its thresholds are not for the scores of this one."""
    (server.folder / "1" / "line.omniad").write_bytes(small_bundle.read_bytes())
    with pytest.raises(Refused, match="its network is not the one served here; write a new repository") as refused:
        server.ask(frame=frames[0])
    assert refused.value.code == "internal"


def test_several_requests_at_once_get_an_answer_each(server, frames):
    from triton_stand_in import Tensor

    requests = [{"frame": Tensor("frame", frame)} for frame in frames[:3]]
    answers = [response.tensors["anomaly_map"].array for response in server.model.execute(requests)]
    expected = [server.ask(frame=frame)["anomaly_map"] for frame in frames[:3]]
    assert all((a == b).all() for a, b in zip(answers, expected, strict=True))


@pytest.mark.parametrize(
    ("inputs", "code", "words"),
    [
        ({"product": text("bolt")}, "invalid argument", "expected one of board, cap, gear; got 'bolt'"),
        ({"product": np.array([b"\xff"], np.object_)}, "invalid argument", "expected one of board, cap, gear"),
        ({"frame": np.zeros((0, 5, 3), np.uint8)}, "invalid argument", "it is empty"),
        ({"frame": np.zeros((5, 5, 4), np.uint8)}, "server", "expected"),
        ({"frame": np.zeros((5, 5, 3), np.float32)}, "server", "expected"),
    ],
)
def test_what_is_not_a_frame_or_product_is_answered_in_words(server, frames, inputs, code, words):
    with pytest.raises(Refused, match=words) as refused:
        server.ask(**{"frame": frames[0], **inputs})
    assert refused.value.code == code


def test_a_network_that_fails_gives_no_verdict(server, frames):
    def fails(pixels):
        raise RuntimeError("out of memory")

    server.run = fails
    with pytest.raises(Refused, match=r"failed on pixels \(1, 64, 64, 3\): out of memory") as refused:
        server.ask(frame=frames[0])
    assert refused.value.code == "internal"
    server.run = lambda pixels: (
        np.full((1, 64, 64), np.nan, np.float32),
        np.zeros(1, np.float32),
        np.zeros((1, 448), np.float32),
    )
    with pytest.raises(Refused, match="expected finite values; got 4096 others") as refused:
        server.ask(frame=frames[0])
    assert refused.value.code == "internal"


# ---- a running server


def post(url: str, body: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read() or "{}")


def infer(url: str, frame: np.ndarray, product: str) -> dict[str, list]:
    """Outputs by name, flat."""
    inputs = [
        {"name": "frame", "datatype": "UINT8", "shape": frame.shape, "data": frame.ravel().tolist()},
        {"name": "product", "datatype": "BYTES", "shape": [1], "data": [product]},
    ]
    answer = post(f"{url}/v2/models/omniad_line_3/infer", {"inputs": inputs})
    return {output["name"]: output["data"] for output in answer["outputs"]}


@pytest.fixture
def running(bundle, tmp_path):
    """(address, repository, whether the network runs in the server's own ONNX Runtime)."""
    if not shutil.which("tritonserver"):
        pytest.skip("no tritonserver on the PATH")
    models = tmp_path / "models"
    write_triton_repository(bundle, models)
    network = models / "omniad_line_3_network"
    own = Path("/opt/tritonserver/backends/onnxruntime").is_dir()
    if not own:
        config = (network / "config.pbtxt").read_text()
        (network / "config.pbtxt").write_text(config.replace('platform: "onnxruntime_onnx"', 'backend: "python"'))
        shutil.copy(Path(__file__).with_name("triton_network.py"), network / "1" / "model.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", tmp_path / "server.log"
    command = ["tritonserver", f"--model-repository={models}", f"--http-port={port}"]
    command += ["--allow-grpc=false", "--allow-metrics=false"]
    # Elsewhere, as the server's Python would find omniad_edge/ here ahead of the installed package.
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file, cwd=tmp_path) as server:
        try:
            wait_until_ready(url, server, log)
            yield url, models, own
        finally:
            server.terminate()


def wait_until_ready(url: str, server: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(log.read_text(errors="replace"))


@pytest.mark.slow
def test_in_a_running_server(running, bundle, frames):
    (url, models, own), detector = running, Detector(bundle, "onnxruntime")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda frame: infer(url, frame, "board"), frames * 2))
    for frame, answer in zip(frames * 2, answers, strict=True):
        result = detector(frame, "board")
        error = np.abs(np.array(answer["anomaly_map"], np.float32) - result.anomaly_map.ravel()).max()
        assert error <= MAX_MAP_ERROR if own else told(answer) == described(result) and error == 0
        assert answer["pred_label"] == [result.pred_label] and answer["threshold"] == [result.threshold]
    with pytest.raises(HTTPError) as refused:
        infer(url, frames[0], "bolt")
    assert refused.value.code == 400 and b"expected one of board, cap, gear" in refused.value.read()
    assert main(["threshold", str(models / "omniad_line_3/1/line.omniad"), "--product", "board", "0.5"]) == 0
    assert infer(url, frames[0], "board")["threshold"] == [0.5]
