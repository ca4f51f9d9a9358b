"""The fused engine's bundle parts and choice, without a GPU: launches go to a stand-in that runs nothing."""

import json
from typing import ClassVar

import numpy as np
import onnx
import pytest

pytest.importorskip("triton", reason="the kernels need Triton: pip install 'omniad-edge[kernels]'")

from omniad_edge import Detector, fused, native
from omniad_edge.bundle import Bundle, read_bundle, write_bundle
from omniad_edge.engine import OnnxRuntimeEngine, open_engine
from omniad_edge.errors import BundleError, EngineError, ExportError, InputError
from omniad_edge.export import fused_parts as parts_module
from omniad_edge.export.bundle_export import export_bundle
from omniad_edge.export.onnx_graph import weights_message
from omniad_edge.export.plugin_graph import block_nodes, with_kernels
from omniad_edge.image import check_frame
from omniad_edge.kernels.plan import Kernel
from omniad_edge.onnx_weights import read_weights
from omniad_edge.preprocess import resize
from omniad_edge.self_test import MAX_MAP_ERROR, SELF_TEST


@pytest.fixture
def compiled(monkeypatch):
    """Kernels are not compiled but named after their key."""

    def compile_plan(plan, arch):
        for key in sorted({plan.kernel_key(launch) for launch in plan.all_launches}):
            yield key, Kernel("step", f"{arch} {key}".encode(), 1024, 4)

    monkeypatch.setattr(parts_module, "compile_plan", compile_plan)


@pytest.fixture
def bundle(small_run, tmp_path, compiled) -> Bundle:
    lines = []
    targets = ["sm_90", "sm_87"]
    export_bundle(small_run.folder, tmp_path / "b.omniad", True, targets=targets, progress=lines.append)
    assert [line.split(":")[0] for line in lines] == ["sm_87", "sm_90"]
    return read_bundle(tmp_path / "b.omniad")


def self_test_of(bundle: Bundle) -> dict[str, np.ndarray]:
    test = read_weights(bundle.parts[SELF_TEST])
    return test | {"pixels": test["pixels"].astype(np.uint8)}


def with_self_test(bundle: Bundle, score_deviation: float | None) -> Bundle:
    arrays = read_weights(bundle.parts[SELF_TEST])
    del arrays["score_deviation"]
    if score_deviation is not None:
        arrays["score_deviation"] = np.array(score_deviation, np.float32)
    return Bundle(bundle.manifest, bundle.parts | {SELF_TEST: weights_message(arrays)})


class Graph:
    """Stands for CudaGraphPlan: gives the self-test's maps and embeddings, off by these errors."""

    made: ClassVar[list] = []
    error: ClassVar[float] = 0.0
    embedding_error: ClassVar[float] = 0.0
    wrong: ClassVar[tuple] = (1, 8)  # batch sizes of which the maps are off
    truth: ClassVar[dict] = {}
    embeddings: ClassVar[dict] = {}
    frames: ClassVar[list] = []  # how many were given to each `run_frames`

    def __init__(self, plan, kernels, weights, pdl) -> None:
        self.plan, self.kernels, self.weights, self.pdl = plan, kernels, weights, pdl
        Graph.made.append(self)

    def frame_size(self, frame):
        check_frame(frame)
        return frame.shape[:2]

    def run_frames(self, frames):
        size = self.plan.height, self.plan.width
        Graph.frames.append(len(frames))
        return self.run({"pixels": np.stack([resize(frame, *size) for frame in frames])}), [0.5] * len(frames)

    def run(self, inputs):
        pixels = inputs["pixels"]
        assert pixels.shape == self.plan.buffers["pixels"].shape
        maps = np.stack([Graph.truth.get(image.tobytes(), np.zeros(image.shape[:2])) for image in pixels])
        maps = (maps + (Graph.error if len(pixels) in Graph.wrong else 0)).astype(np.float32)
        known = [Graph.embeddings.get(image.tobytes(), np.zeros(448)) for image in pixels]
        embedding = (np.stack(known) + Graph.embedding_error).astype(np.float32)
        return {"anomaly_map": maps, "peaks": maps.reshape(len(maps), -1), "embedding": embedding}


@pytest.fixture
def gpu(monkeypatch, bundle):
    """A GPU of sm_90, and no native runtime."""
    test = self_test_of(bundle)
    known = [image.tobytes() for image in test["pixels"]]
    Graph.truth = dict(zip(known, test["anomaly_map"], strict=True))
    Graph.embeddings = dict(zip(known, test["embedding"], strict=True))
    Graph.made, Graph.error, Graph.embedding_error, Graph.wrong, Graph.frames = [], 0.0, 0.0, (1, 8), []
    monkeypatch.setattr(fused, "CudaGraphPlan", Graph)
    monkeypatch.setattr(fused, "device_architecture", lambda: 90)
    monkeypatch.setattr(native, "why_absent", lambda: "it was not built")


def test_the_parts(bundle):
    index = json.loads(bundle.parts["fused/sm_87.json"])
    code = bundle.parts["fused/sm_87.bin"]
    assert index["arch"] == "sm_87" and index["versions"]["triton"]
    assert all(key in str(code[e["offset"] :][: e["bytes"]]) for key, e in index["kernels"].items())


def test_the_graph_for_tensorrt_has_its_weights_and_kernels(bundle):
    model = onnx.load_from_string(bundle.onnx("plugin"))
    index, code = json.loads(bundle.parts["fused/sm_87.json"])["kernels"], bundle.parts["fused/sm_87.bin"]
    for read in (model, block_nodes(model)):
        nodes = [node for node in with_kernels(read, "sm_87", index, code).graph.node if node.domain == "omniad"]
        assert len(nodes) == (1 if read is model else 4)
    test = self_test_of(bundle)
    maps, _ = OnnxRuntimeEngine(model.SerializeToString()).run(test["pixels"])
    assert np.abs(maps - test["anomaly_map"]).max() <= MAX_MAP_ERROR


def test_it_is_chosen_where_it_can_run(bundle, gpu):
    engine = open_engine(bundle)
    assert (engine.backend, engine.precision) == ("fused", "fp16")
    assert engine.reason.endswith("the bundle has them for this GPU; launched from Python: it was not built")
    assert sorted(graph.plan.batch for graph in Graph.made) == [1, 8]
    graph = next(graph for graph in Graph.made if graph.plan.batch == 1)
    assert graph.pdl
    assert [kernel.cubin for kernel in graph.kernels] == [
        f"90 {graph.plan.kernel_key(launch)}".encode() for launch in graph.plan.all_launches
    ]
    assert [call.op for call in graph.plan.front.calls] == ["resize.resize"]
    weights = {name for name, buffer in graph.plan.buffers.items() if buffer.kind == "weight"}
    assert graph.weights.keys() == weights


@pytest.mark.parametrize("count", [1, 3, 8, 11])
def test_any_number_of_images(bundle, gpu, count):
    engine = open_engine(bundle, "fused")
    pixels = np.zeros((count, bundle.height, bundle.width, 3), np.uint8)
    anomaly_map, pred_score = engine.run(pixels)
    assert anomaly_map.shape == (count, bundle.height, bundle.width) and pred_score.shape == (count,)


def test_a_detector_hands_frames_over(bundle, gpu, tmp_path):
    write_bundle(tmp_path / "again.omniad", bundle.manifest, bundle.parts)
    detector = Detector(tmp_path / "again.omniad", "fused")
    Graph.frames.clear()
    frames = [np.full((rows, 90, 3), 7, np.uint8) for rows in range(40, 51)]
    results = detector(frames, product="gear")
    assert Graph.frames == [8, 1, 1, 1]
    assert [(r.frame_height, r.frame_width) for r in results] == [frame.shape[:2] for frame in frames]
    for result in results:
        assert (result.backend, result.precision) == ("fused", "fp16")
        speed = result.speed_ms
        assert speed["preprocess"] == 0.5
        assert speed["total"] == pytest.approx(speed["preprocess"] + speed["engine"] + speed["postprocess"])
    with pytest.raises(InputError, match="COLOR_GRAY2BGR"):
        detector([frames[0], frames[0][..., 0]])
    assert Graph.frames == [8, 1, 1, 1]  # all are looked at before the first is computed


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("error", [4e-4, np.nan])
def test_a_gpu_that_computes_something_else_is_refused(bundle, gpu, error, batch):
    Graph.error, Graph.wrong = error, (batch,)
    with pytest.raises(EngineError, match=r"anomaly map of a self-test image is .* off"):
        open_engine(bundle, "fused")


def test_a_gpu_that_averages_something_else_is_refused(bundle, gpu):
    Graph.embedding_error = 0.1
    with pytest.raises(EngineError, match=r"embedding of a self-test image is .* off, 0\.01"):
        open_engine(bundle, "fused")


def test_products_are_recognised(bundle, gpu, tmp_path):
    write_bundle(tmp_path / "again.omniad", bundle.manifest, bundle.parts)
    detector = Detector(tmp_path / "again.omniad", "fused")
    assert detector.not_recognised == ""
    frame = self_test_of(bundle)["pixels"][0][..., ::-1]
    on_cpu = Detector(tmp_path / "again.omniad", "onnxruntime")(frame)
    assert detector(frame).product_distance == pytest.approx(on_cpu.product_distance, rel=1e-3)


@pytest.mark.parametrize("error, refused", [(1.9e-4, False), (2.1e-4, True)])
def test_scores_are_judged_by_the_gates_deviation(bundle, gpu, error, refused):
    Graph.error = error
    open_engine(with_self_test(bundle, score_deviation=0.0), "fused")  # of too few images
    judged = with_self_test(bundle, score_deviation=0.01)
    if not refused:
        open_engine(judged, "fused")
        return
    with pytest.raises(
        EngineError, match=r"score in standard deviations of a self-test image is 0\.021 off, 0\.02"
    ):
        open_engine(judged, "fused")


def test_the_self_test_has_the_deviation_of_all_scores(bundle, small_run):
    test = self_test_of(bundle)
    assert len(test["pixels"]) == len(test["anomaly_map"]) == 4
    assert 0 < test["score_deviation"] < 0.1 and test["score_deviation"].shape == ()


@pytest.mark.parametrize(
    "arch, words",
    [(None, "no NVIDIA GPU"), (86, r"kernels for sm_87, sm_90; export it with --targets sm_86 too")],
)
def test_where_it_cannot_run_it_says_what_to_do(bundle, monkeypatch, arch, words):
    monkeypatch.setattr(fused, "device_architecture", lambda: arch)
    with pytest.raises(EngineError, match=f"backend fused: .*{words}"):
        open_engine(bundle, "fused")
    engine = open_engine(bundle)
    assert engine.backend != "fused"
    assert ("not the GPU, because the bundle has kernels for sm_87, sm_90" in engine.reason) == (arch == 86)


def test_precisions(bundle, gpu):
    assert open_engine(bundle, precision="fp16").backend == "fused"
    with pytest.raises(EngineError, match="fused kernels compute in fp16; for fp32"):
        open_engine(bundle, "fused", "fp32")
    with pytest.raises(EngineError, match="fp16 is the precision of backend='fused'"):
        open_engine(bundle, "onnxruntime", "fp16")
    assert open_engine(bundle, precision="fp32").backend != "fused"


@pytest.mark.parametrize(
    "part, content",
    [
        (fused.PLAN, b"{}"),
        (fused.PLAN, b"x"),
        ("fused/sm_90.json", b"[]"),
        (SELF_TEST, b""),
        (SELF_TEST, b"PK"),
        (SELF_TEST, b"PK\3\4 cut"),
    ],
)
def test_a_crafted_part_is_refused(bundle, gpu, part, content):
    with pytest.raises(BundleError, match="not as omniad-export writes it"):
        open_engine(Bundle(bundle.manifest, bundle.parts | {part: content}), "fused")


def test_a_self_test_of_before_is_refused(bundle, gpu):
    with pytest.raises(BundleError, match=r"score_deviation.*export again"):
        open_engine(with_self_test(bundle, score_deviation=None), "fused")


def test_targets_need_fp16_and_known_names(small_run, tmp_path):
    with pytest.raises(ExportError, match="--fp16"):
        export_bundle(small_run.folder, tmp_path / "b.omniad", False, targets=["sm_90"])
    with pytest.raises(ExportError, match="got 'sm_1'"):
        export_bundle(small_run.folder, tmp_path / "b.omniad", True, targets=["sm_1"])
    assert not list(tmp_path.iterdir())
