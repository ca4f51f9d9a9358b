"""The detector: frames in, verdicts out, from any thread, with the training packages absent."""

import json
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from fake_cuda import FakeCuda, OnGpu, OverDlpack

from omniad_edge import Detector, Result
from omniad_edge import detector as detector_module
from omniad_edge.bundle import read_bundle, set_thresholds, write_bundle
from omniad_edge.engine import CpuEngine
from omniad_edge.errors import BundleError, EngineError, InputError
from omniad_edge.preprocess import resize
from omniad_edge.recognition import RECOGNITION


@pytest.fixture(scope="module")
def bundle(small_bundle, tmp_path_factory) -> Path:
    """Three products, which it cannot recognise; a good part scores above the threshold of board only."""
    path = tmp_path_factory.mktemp("detector") / "line.omniad"
    contents = read_bundle(small_bundle)
    products, parts = contents.products, {k: v for k, v in contents.parts.items() if k != RECOGNITION}
    write_bundle(path, contents.manifest | {"recognition": {}}, parts)
    limits = {"board": 0.01, "cap": 0.9, "gear": 0.8}
    set_thresholds(path, {name: products[name].with_threshold(t) for name, t in limits.items()}, "for this test")
    return path


@pytest.fixture(scope="module")
def detector(bundle) -> Detector:
    return Detector(bundle, "onnxruntime", threads=2)


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def each(bundle, request) -> Detector:
    pytest.importorskip(request.param)
    return Detector(bundle, request.param, "fp32", threads=2)


@pytest.fixture(scope="module")
def frames(small_run) -> list[np.ndarray]:
    """Ten frames of different sizes."""
    paths = sorted(small_run.data.rglob("test/*/*.png"))[:10]
    sizes = [(48, 64), (72, 72), (200, 90), (33, 47), (480, 640)]
    return [cv2.resize(cv2.imread(str(path)), sizes[i % 5][::-1]) for i, path in enumerate(paths)]


def same(a: Result, b: Result) -> bool:
    equal = (a.anomaly_map == b.anomaly_map).all() and (a.pred_mask == b.pred_mask).all()
    values = [{**r.to_dict(), "speed_ms": None} for r in (a, b)]
    return bool(equal) and values[0] == values[1]


# ---- results


def test_a_result_has_everything(detector, frames):
    frame = frames[2]
    result = detector(frame, product="board")
    maps, scores = detector.engine.run(resize(frame, 64, 64)[None])
    assert (result.anomaly_map == maps[0]).all() and result.anomaly_map.dtype == np.float32
    assert result.pred_score == scores[0] == result.anomaly_map.max()
    assert (result.pred_label, result.is_defective, result.threshold) == ("defective", True, 0.01)
    assert (result.product, result.product_assumed) == ("board", False)
    assert result.pred_mask.dtype == bool and (result.pred_mask == (maps[0] > 0.01)).all()
    assert (result.frame_height, result.frame_width) == (200, 90)
    region = result.regions[0]
    assert (region.x, region.y, region.width, region.height) == (0, 0, 90, 200)
    assert (result.backend, result.precision) == ("onnxruntime", "fp32")
    speed = result.speed_ms
    assert list(speed) == ["preprocess", "engine", "postprocess", "total"] and min(speed.values()) > 0
    assert speed["total"] == pytest.approx(speed["preprocess"] + speed["engine"] + speed["postprocess"])
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False)) == result.to_dict()
    assert result.draw(frame).shape == frame.shape


def test_a_list_gives_a_list_and_a_frame_a_result(detector, frames):
    assert isinstance(detector(frames[0]), Result)
    assert [type(r) for r in detector(frames[:1])] == [Result]
    assert len(detector(tuple(frames[:3]))) == 3
    assert detector([]) == []


def test_batches_equal_single_frames(each, frames):
    assert len(frames) > detector_module.BATCH  # two calls of the engine
    together, alone = each(frames, product="gear"), [each(frame, product="gear") for frame in frames]
    for a, b in zip(together, alone, strict=True):
        # Matrix products may be cut into other blocks: a few roundings of each of three cosines.
        np.testing.assert_allclose(a.anomaly_map, b.anomaly_map, rtol=0, atol=1.5e-6)
        assert (a.pred_label, a.frame_height, a.frame_width) == (b.pred_label, b.frame_height, b.frame_width)
        assert a.pred_score == a.anomaly_map.max()


def test_eight_threads_get_what_one_gets(each, frames):
    serial = [each(frame, product="cap") for frame in frames]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: each(frames[i % 10], product="cap"), range(80)))
    assert all(same(result, serial[i % 10]) for i, result in enumerate(results))


def test_a_mirrored_view_is_inspected_as_its_copy(detector, frames):
    view = frames[0][:, ::-1]
    assert same(detector(view), detector(view.copy()))


def test_frames_are_left_as_they_are(detector, frames):
    copies = [frame.copy() for frame in frames]
    for result, frame in zip(detector(frames), frames, strict=True):
        result.draw(frame)
    assert all((a == b).all() for a, b in zip(frames, copies, strict=True))


# ---- products


def test_without_a_product_the_lowest_threshold_counts(detector, frames):
    result = detector(frames[0])
    assert (result.product, result.product_assumed, result.threshold) == ("board", True, 0.01)
    assert result.to_dict()["product_assumed"] is True
    assert result.is_defective and not detector(frames[0], product="cap").is_defective
    assert all(r.product_assumed and r.product == "board" for r in detector(frames[:2]))


def test_the_only_product_is_assumed_too(bundle, tmp_path, frames):
    contents = read_bundle(bundle)
    one = {"products": {"gear": contents.manifest["products"]["gear"]}}
    write_bundle(tmp_path / "one.omniad", contents.manifest | one, contents.parts)
    result = Detector(tmp_path / "one.omniad", "onnxruntime")(frames[0])
    assert (result.product, result.product_assumed) == ("gear", True)


@pytest.mark.parametrize("name", ["bolt", "", "Gear", 0, ["gear"]])
def test_an_unknown_product_is_answered_with_the_known_ones(detector, frames, name):
    with pytest.raises(InputError, match=rf"expected one of board, cap, gear; got {re.escape(repr(name))}"):
        detector(frames[0], product=name)


# ---- bad frames


@pytest.mark.parametrize(
    "frame, came",
    [
        (None, "NoneType: the camera gave no frame"),
        (np.zeros((8, 8, 3), np.float32), "float32 .*multiply it by 255"),
        (np.full((8, 8, 3), np.nan), "float64 .*it holds NaN"),
        (np.zeros((8, 8, 3), np.uint16), "uint16 .*8 bits"),
        (np.zeros((8, 8), np.uint8), r"uint8 \(8, 8\): convert it with cv2.cvtColor"),
        (np.zeros((8, 8, 4), np.uint8), r"uint8 \(8, 8, 4\): drop alpha"),
        (np.zeros((3, 8, 9), np.uint8), r"uint8 \(3, 8, 9\): channels come last"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"uint8 \(2, 8, 8, 3\): pass the frames"),
        (np.zeros((0, 8, 3), np.uint8), r"uint8 \(0, 8, 3\): it is empty"),
        ("part.png", "str"),
        (7, "int"),
    ],
    ids=["none", "float", "nan", "uint16", "gray", "rgba", "chw", "nhwc", "empty", "path", "int"],
)
def test_a_bad_frame_is_refused_in_words(detector, frames, frame, came):
    expected = rf"frame: expected a uint8 BGR array of shape \(height, width, 3\); got {came}"
    with pytest.raises(InputError, match=expected):
        detector(frame)
    with pytest.raises(InputError, match=expected):
        detector([frames[0], frame])


@pytest.mark.parametrize("make", [OnGpu, OverDlpack])
def test_a_frame_on_the_gpu_is_not_for_a_cpu(each, frames, make):
    array = make(FakeCuda(), frames[0])
    message = rf"got {make.__name__}: a CPU does not take frames on the GPU; pass frame.cpu\(\).numpy\(\)"
    with pytest.raises(InputError, match=message):
        each(array)
    with pytest.raises(InputError, match=message):
        each([frames[0], array])


def test_a_tensor_on_the_cpu_is_asked_for_as_an_array(each):
    torch = pytest.importorskip("torch")
    with pytest.raises(InputError, match="got Tensor: pass one frame as a NumPy array"):
        each(torch.zeros(8, 8, 3, dtype=torch.uint8))


# ---- opening


def test_the_first_slow_call_is_made_while_opening(bundle, monkeypatch):
    calls = []

    class Engine(CpuEngine):
        backend, precision, reason, input_size = "test", "fp32", "for this test", (64, 64)

        def run(self, pixels):
            calls.append((pixels.shape, pixels.dtype))
            return np.zeros(pixels.shape[:3], np.float32), np.zeros(len(pixels), np.float32)

    monkeypatch.setattr(detector_module, "open_engine", lambda *arguments: Engine(None))
    detector = Detector(bundle)
    assert calls == [((1, 64, 64, 3), np.uint8)]
    assert (detector.backend, detector.precision, detector.reason) == ("test", "fp32", "for this test")
    assert repr(detector) == "Detector(64x64, test fp32, products: board, cap, gear)"
    detector([np.zeros((9, 9, 3), np.uint8)] * 10)
    assert [shape[0] for shape, _ in calls] == [1, 8, 2]


def test_an_engine_that_gives_nan_gives_no_verdict(bundle, monkeypatch):
    class Engine(CpuEngine):
        backend, precision, reason, input_size = "test", "bf16", "", (64, 64)

        def run(self, pixels):
            maps = np.zeros(pixels.shape[:3], np.float32)
            maps[:, 3, 3] = np.nan
            return maps, np.zeros(len(pixels), np.float32)  # the maximum passed over it

    monkeypatch.setattr(detector_module, "open_engine", lambda *arguments: Engine(None))
    with pytest.raises(EngineError, match="expected finite values; got 1 others"):
        Detector(bundle)(np.zeros((9, 9, 3), np.uint8))


def test_what_cannot_be_opened(bundle, tmp_path):
    with pytest.raises(BundleError, match="does not exist"):
        Detector(tmp_path / "missing.omniad")
    (tmp_path / "short.omniad").write_bytes(bundle.read_bytes()[:5000])
    with pytest.raises(BundleError, match="truncated"):
        Detector(tmp_path / "short.omniad")
    contents = read_bundle(bundle)
    parts = contents.parts | {"graphs/cpu.onnx": b"garbage", "weights.onnx": b""}
    write_bundle(tmp_path / "garbage.omniad", contents.manifest, parts)
    with pytest.raises(EngineError, match="cannot load the model"):
        Detector(tmp_path / "garbage.omniad", "onnxruntime")
    size = {"input": contents.manifest["input"] | {"height": 96}}
    write_bundle(tmp_path / "other.omniad", contents.manifest | size, contents.parts)
    with pytest.raises(EngineError, match=r"failed on pixels \(1, 96, 64, 3\)"):  # in opening, not on the line
        Detector(tmp_path / "other.omniad", "onnxruntime")


# ---- in a process of its own


def in_process(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_verdict_without_any_package_of_training(bundle):
    output = in_process(
        """
        import sys
        for name in ("torch", "onnx", "safetensors", "openvino"):
            sys.modules[name] = None
        import numpy as np
        import omniad_edge
        detector = omniad_edge.Detector(sys.argv[1], threads=1)
        result = detector(np.full((50, 70, 3), 128, np.uint8), product="board")
        print(result.pred_label, detector.backend, detector.reason)
        """,
        bundle,
    )
    assert output.startswith("defective onnxruntime ONNX Runtime in fp32: not OpenVINO, because OpenVINO is not")


MEMORY = """
    import sys
    import numpy as np
    from omniad_edge import Detector
    detector = Detector(sys.argv[1], sys.argv[2], "fp32", threads=2)
    for _ in range(3):
        detector(np.full((1080, 1920, 3), 128, np.uint8))
    with open("/proc/self/status") as file:
        fields = dict(line.split(":") for line in file)
    print(int(fields["VmRSS"].split()[0]) / 1024)
"""


@pytest.fixture(scope="module")
def small_preset(bundle, tmp_path_factory) -> Path:
    from omniad_edge.export.onnx_graph import build_graph, weights_message
    from omniad_edge.kernels.fold import fold
    from omniad_edge.model import PRESETS, OmniAD

    graph, weights = build_graph(fold(OmniAD(PRESETS["small"]).eval()), half=False, half_weights=False)
    manifest = read_bundle(bundle).manifest
    manifest = manifest | {"input": manifest["input"] | {"height": 256, "width": 256}}
    parts = {"graphs/cpu.onnx": graph, "weights.onnx": weights_message(weights)}
    path = tmp_path_factory.mktemp("preset") / "small.omniad"
    write_bundle(path, manifest, parts)
    return path


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="resident memory is read from /proc")
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_memory_of_the_small_network(small_preset, backend):
    """Resident with the preset `small` at 256 x 256 and frames of 1920 x 1080, in MiB."""
    pytest.importorskip(backend)
    resident = float(in_process(MEMORY, small_preset, backend))
    assert resident < 600, resident
