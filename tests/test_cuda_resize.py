"""Frames in front of the graph, against a stand-in for the driver that resizes as the kernel does."""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fake_cuda import FakeCuda, OnGpu, OverDlpack, check_all_freed, cubin

from omniad_edge.cuda_driver import STICKY
from omniad_edge.cuda_graph import CudaGraphPlan
from omniad_edge.errors import EngineError, InputError
from omniad_edge.kernels.plan import Buffer, Call, Kernel, Launch
from omniad_edge.kernels.resize_tables import TABLES, resample_tables
from omniad_edge.kernels.schedule import arrange, for_batch
from omniad_edge.preprocess import resize

H, W = 16, 32
FRONT = Launch((Call("resize.resize", ("frame", *TABLES, "pixels"), (), programs=2),))
RESIZE = Kernel("step", cubin("p" * 9, "resize", (H, W)), 60 * 1024, 4)


def make_plan():
    """Its network copies the pixels to its output."""
    tables = vars(resample_tables(H, W, H, W))
    buffers = {
        "frame": Buffer((0, 0, 3), "uint8", "frame", 0),
        **{name: Buffer(table.shape, str(table.dtype), "table", 0) for name, table in tables.items()},
        "pixels": Buffer((1, H, W, 3), "uint8", "input", 0),
        "seen": Buffer((1, H, W, 3), "uint8", "output", 0),
    }
    return arrange(1, H, W, buffers, (Launch((Call("a.a", ("pixels", "seen"), (), 1),)),), FRONT)


def open_plan(cuda: FakeCuda, batch: int = 1) -> CudaGraphPlan:
    copy = Kernel("step", cubin("pppp", "copy", batch * H * W * 3), 0, 1)
    return CudaGraphPlan(for_batch(make_plan(), batch), [RESIZE, copy], {}, True, cuda)


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def graph(cuda):
    with open_plan(cuda) as graph:
        yield graph


@pytest.fixture
def frame(rng) -> np.ndarray:
    return rng.integers(0, 256, (50, 70, 3), np.uint8)


def check_resized(graph: CudaGraphPlan, *frames: np.ndarray, given=None) -> None:
    """What the network sees is what preprocessing on the CPU gives, but for its rounding."""
    outputs, prepare_ms = graph.run_frames(frames if given is None else given)
    assert len(prepare_ms) == len(frames) and min(prepare_ms) > 0
    for image, frame in zip(outputs["seen"], frames, strict=True):
        difference = np.abs(image - resize(frame, H, W).astype(float))
        assert difference.max() <= 2 and difference.mean() <= 0.5


def copies(cuda: FakeCuda) -> list[tuple[int, int]]:
    """Target and bytes of each copy to the GPU."""
    return [(int(a[0]), a[2]) for name, a in cuda.calls if name == "cuMemcpyHtoDAsync"]


# ---- what is launched


def test_the_front_is_launched_before_the_graph_and_not_in_it(cuda, graph, frame):
    assert len(cuda.launches) == 1  # the network's, before the capture
    check_resized(graph, frame)
    _, front, network = cuda.launches
    assert (front.grid, front.block, front.shared) == ((2, 1, 1), (128, 1, 1), 60 * 1024)
    assert front.attributes == [] and network.attributes != []
    addresses = [int(graph.address(name)) for name in (*TABLES, "pixels")]
    assert front.values[1:] == [*addresses, 0, 0]
    assert cuda.alive[front.values[0]] == "device memory"


@pytest.mark.parametrize("size", [(50, 70), (300, 40), (H, W), (1, 1), (9, 200)])
def test_a_frame_of_any_size(cuda, graph, rng, size):
    check_resized(graph, rng.integers(0, 256, (*size, 3), np.uint8))


def test_the_same_size_is_a_copy(graph, rng):
    frame = rng.integers(0, 256, (H, W, 3), np.uint8)
    assert (graph.run_frames([frame])[0]["seen"][0] == frame[..., ::-1]).all()


def test_each_image_of_a_batch_has_its_place(cuda, rng):
    sizes = [(50, 70), (20, 90), (20, 90), (80, 80)]
    frames = [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    with open_plan(cuda, 4) as graph:
        cuda.launches.clear()
        check_resized(graph, *frames)
        check_resized(graph, *reversed(frames))
        pixels = int(graph.address("pixels"))
        for launches in (cuda.launches[:5], cuda.launches[5:]):
            assert [front.values[6] - pixels for front in launches[:4]] == [i * H * W * 3 for i in range(4)]
        assert cuda.names().count("cuGraphInstantiate") == 1


def test_the_calls_for_a_frame(cuda, graph, frame):
    graph.run_frames([frame])
    cuda.calls.clear()
    graph.run_frames([frame])
    assert cuda.names() == [
        *("cuCtxPushCurrent", "cuEventSynchronize", "cuMemcpyHtoDAsync", "cuEventRecord", "cuLaunchKernelEx"),
        *("cuGraphLaunch", "cuMemcpyDtoHAsync", "cuStreamSynchronize", "cuCtxPopCurrent"),
    ]


def test_tables_go_up_only_where_the_size_changes(cuda, graph, frame):
    names = {int(graph.address(name)): name for name in TABLES}
    uploads = []
    for shown in (frame, frame, frame[:40], frame[:40], frame, np.rot90(frame)):
        cuda.calls.clear()
        check_resized(graph, shown)
        uploads.append([names[target] for target, _ in copies(cuda) if target in names])
    assert uploads == [list(TABLES), [], list(TABLES), [], list(TABLES), list(TABLES)]


def test_staging_grows_to_the_largest_frame(cuda, graph, frame):
    def device_memory() -> list[int]:
        return sorted(cuda.memory[a][0] for a, kind in cuda.alive.items() if kind == "device memory")

    assert len(device_memory()) == 1  # the arena
    grown = []
    for shown in (frame[:20], frame, frame[:30], np.repeat(frame, 2, 0)):
        cuda.calls.clear()
        check_resized(graph, shown)
        grown.append("cuMemAlloc" in cuda.names())
        assert shown.nbytes in [size for _, size in copies(cuda)]
    assert grown == [True, True, False, True]
    assert device_memory()[0] == 2 * frame.nbytes and len(device_memory()) == 2
    assert list(cuda.alive.values()).count("pinned memory") == 2


def test_pinned_memory_is_written_again_only_after_its_copy(cuda, frame):
    """The stand-in copies as late as it may."""
    frames = [np.full_like(frame, level) for level in (10, 200, 30)]
    with open_plan(cuda, 3) as graph:
        outputs, _ = graph.run_frames(frames)
        assert [np.unique(image).tolist() for image in outputs["seen"]] == [[10], [200], [30]]


@pytest.mark.parametrize(
    "layout", [np.asfortranarray, lambda f: f[:, ::-1], lambda f: f[::2], lambda f: f[..., ::-1]]
)
def test_any_numpy_layout(graph, frame, layout):
    check_resized(graph, layout(frame))


def test_threads_take_turns(cuda, graph, rng):
    frames = [rng.integers(0, 256, (20 + index, 40, 3), np.uint8) for index in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda index: check_resized(graph, frames[index % 8]), range(80)))


# ---- frames that lie on the GPU


@pytest.mark.parametrize("make", [OnGpu, OverDlpack, lambda cuda, value: OnGpu(cuda, value, version=2)])
def test_a_frame_on_the_gpu_is_read_where_it_lies(cuda, graph, frame, make):
    graph.run_frames([frame])
    array = make(cuda, frame)
    assert graph.frame_size(array) == (50, 70)
    cuda.calls.clear()
    check_resized(graph, frame, given=[array])
    assert copies(cuda) == [] and "cuMemcpyDtoDAsync" not in cuda.names()
    assert cuda.launches[-2].values[0] == getattr(array, "memory", array).address


def test_dlpack_makes_the_stream_wait_and_is_given_back_after_the_run(cuda, graph, frame):
    array, held = OverDlpack(cuda, frame), []
    assert graph.frame_size(array) == (50, 70) and array.stream == -1 and array.dropped
    array.dropped = False
    cuda.hook = lambda name: held.append((name, array.dropped))
    check_resized(graph, frame, given=[array])
    assert array.stream == int(graph.stream)
    assert dict(held)["cuStreamSynchronize"] is False and array.dropped


def test_cuda_array_interface_waits_for_its_stream(cuda, graph, frame):
    producer = cuda.make("stream")
    cuda.queues[int(producer)] = []
    array = OnGpu(cuda, np.zeros_like(frame), stream=int(producer))
    cuda.queues[int(producer)].append(lambda: ctypes.memmove(array.address, frame.ctypes.data, frame.nbytes))
    check_resized(graph, frame, given=[array])
    cuda.drop(producer, "stream")


@pytest.mark.parametrize(
    ("make", "came"),
    [
        (lambda cuda, f: OnGpu(cuda, f[None]), r"uint8 \(1, 50, 70, 3\):"),
        (lambda cuda, f: OnGpu(cuda, f[..., :1]), r"uint8 \(50, 70, 1\):"),
        (lambda cuda, f: OnGpu(cuda, f[:0]), r"uint8 \(0, 70, 3\):"),
        (lambda cuda, f: OnGpu(cuda, f, typestr="|i1"), r"int8 \(50, 70, 3\):"),
        (lambda cuda, f: OnGpu(cuda, f, strides=(3, 150, 1)), r"uint8 \(50, 70, 3\), not C-contiguous:"),
        (lambda cuda, f: OverDlpack(cuda, f.astype(np.float32), code=2), r"float32 \(50, 70, 3\):"),
        (lambda cuda, f: OverDlpack(cuda, f, strides=(1, 50, 3500)), r"uint8 \(50, 70, 3\), not C-contiguous:"),
    ],
)
def test_wrong_arrays_on_the_gpu_are_refused(cuda, graph, frame, make, came):
    message = rf"frame: expected a C-contiguous uint8 BGR array of shape \(height, width, 3\); got {came} bring it"
    for use in (graph.frame_size, lambda array: graph.run_frames([array])):
        with pytest.raises(InputError, match=message):
            use(make(cuda, frame))
    assert cuda.stack() == []
    check_resized(graph, frame)


def test_a_frame_on_another_gpu_is_refused(cuda, graph, frame):
    with pytest.raises(InputError, match="frame: expected an array on GPU 0, got one on GPU 1"):
        graph.frame_size(OverDlpack(cuda, frame, device=1))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "the camera gave no frame"),
        (np.zeros((8, 8), np.uint8), "COLOR_GRAY2BGR"),
        (np.zeros((8, 8, 3)), "multiply it by 255"),
        ("part.png", "read_image"),
    ],
)
def test_frames_on_the_host_are_refused_as_everywhere(graph, value, words):
    for use in (graph.frame_size, lambda frame: graph.run_frames([frame])):
        with pytest.raises(InputError, match=rf"frame: expected a uint8 BGR array .*{words}"):
            use(value)


def test_a_frame_beyond_the_kernels_limits(cuda, frame):
    """The one before it, which is being read, is waited for."""
    array, held = OverDlpack(cuda, frame), []
    with open_plan(cuda, 2) as graph:
        cuda.hook = lambda name: held.append((name, array.dropped))
        with pytest.raises(InputError, match="16384 x 1 pixels are too many for 32 x 16"):
            graph.run_frames([array, np.zeros((1, 16384, 3), np.uint8)])
        assert ("cuStreamSynchronize", False) in held
        cuda.hook = None
        check_resized(graph, frame, frame)


def test_the_number_of_frames_is_the_batch(graph, frame):
    for frames in ([], [frame, frame]):
        with pytest.raises(InputError, match=f"frames: expected 1; got {len(frames)}"):
            graph.run_frames(frames)


# ---- freeing and errors


def test_close_frees_everything(cuda, graph, frame):
    check_resized(graph, frame)
    graph.close()
    check_all_freed(cuda)
    for use in (lambda: graph.run_frames([frame]), lambda: graph.frame_size(frame)):
        with pytest.raises(EngineError, match="was closed"):
            use()


def test_a_dropped_plan_frees_everything(cuda, frame):
    graph = open_plan(cuda)
    check_resized(graph, frame)
    del graph
    check_all_freed(cuda)


@pytest.mark.parametrize("function", ["cuMemHostAlloc", "cuMemAlloc"])
def test_too_little_memory_for_a_larger_frame(cuda, graph, frame, function):
    check_resized(graph, frame[:20])
    cuda.failures[function] = "CUDA_ERROR_OUT_OF_MEMORY"
    with pytest.raises(EngineError, match=f"{function}: CUDA_ERROR_OUT_OF_MEMORY: .*too little free memory"):
        graph.run_frames([frame])
    cuda.failures.clear()
    check_resized(graph, frame)
    graph.close()
    check_all_freed(cuda)


@pytest.mark.parametrize("function", ["cuLaunchKernelEx", "cuMemcpyHtoDAsync", "cuEventSynchronize"])
def test_a_sticky_error(cuda, graph, frame, function):
    cuda.failures[function] = STICKY[0]
    with pytest.raises(EngineError, match=f"{function}: {STICKY[0]}: .*start the process anew"):
        graph.run_frames([frame])
    with pytest.raises(EngineError, match=STICKY[0]):
        graph.frame_size(frame)
    graph.close()
    assert cuda.stack() == []


def test_tables_that_did_not_arrive_are_sent_again(cuda, graph, frame):
    cuda.failures["cuMemcpyHtoDAsync"] = "CUDA_ERROR_INVALID_VALUE"
    with pytest.raises(EngineError, match="cuMemcpyHtoDAsync: CUDA_ERROR_INVALID_VALUE"):
        graph.run_frames([frame])
    cuda.failures.clear()
    check_resized(graph, frame)
