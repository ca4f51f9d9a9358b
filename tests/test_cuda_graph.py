"""The CUDA runtime against a stand-in for the driver: what is called in which order, and every byte that moves."""

import ctypes
import gc
import inspect
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fake_cuda import FakeCuda, OnGpu, OverDlpack, check_all_freed, cubin

from omniad_edge import cuda_driver, cuda_graph, cuda_kernel, cuda_resize
from omniad_edge.cuda_array import dense, from_dlpack
from omniad_edge.cuda_driver import MEANING, STICKY
from omniad_edge.cuda_graph import CudaGraphPlan, device_architecture
from omniad_edge.cuda_kernel import parameters
from omniad_edge.errors import EngineError, InputError, MissingDependencyError
from omniad_edge.kernels.plan import Buffer, Call, Kernel, Launch, Plan

PIXELS = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
WEIGHTS = {
    "weight": np.linspace(0, 1, 40, dtype=np.float16).reshape(4, 10),
    "bias": np.linspace(1, 2, 3, dtype=np.float32),
}
MAP = PIXELS.tobytes()  # the kernels copy the pixels' bytes to the map, and `bias` to the peaks

PLAN = Plan(
    batch=1,
    height=2,
    width=2,
    buffers={
        "weight": Buffer((4, 10), "float16", "weight", 256),
        "bias": Buffer((3,), "float32", "weight", 512),
        "pixels": Buffer((1, 2, 2, 3), "uint8", "input", 768),
        "x": Buffer((12,), "uint8", "scratch", 1024),
        "anomaly_map": Buffer((1, 3), "float32", "output", 1280),
        "peaks": Buffer((1, 3), "float32", "output", 0),
    },
    launches=(
        Launch((Call("a.a", ("pixels", "x", None, "weight"), (3,), programs=5, num_warps=2),)),
        Launch((Call("a.b", ("x", "anomaly_map"), (), 3), Call("a.c", (None, "weight", "bias"), (), 4))),
        Launch((Call("a.d", ("bias", "peaks"), (True,), 1, num_warps=8),)),
    ),
)
FIRST, PAIR = cubin("ppppp", "copy", 12), cubin("ppippp" + "p", "copy", 12)
LAST = Kernel("step", cubin("pppp", "copy", 12), 0, 8)
KERNELS = [Kernel("step", FIRST, 1024, 2), Kernel("step", PAIR, 100 * 1024, 4), LAST]


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def graph(cuda):
    with CudaGraphPlan(PLAN, KERNELS, WEIGHTS, True, cuda) as plan:
        yield plan


# What is launched


def test_launches_in_order_with_addresses_of_the_arena(cuda, graph):
    (arena,) = (handle for handle, kind in cuda.alive.items() if kind == "device memory")
    graph.run({"pixels": PIXELS})
    eager, replayed = cuda.launches[:3], cuda.launches[3:]
    for first, pair, last in (eager, replayed):
        assert [launch.grid for launch in (first, pair, last)] == [(5, 1, 1), (7, 1, 1), (1, 1, 1)]
        assert [launch.block for launch in (first, pair, last)] == [(64, 1, 1), (128, 1, 1), (256, 1, 1)]
        assert [launch.shared for launch in (first, pair, last)] == [1024, 100 * 1024, 0]
        assert first.values == [arena + 768, arena + 1024, arena + 256, 0, 0]
        assert pair.values == [arena + 1024, arena + 1280, 3, arena + 256, arena + 512, 0, 0]
        assert last.values == [arena + 512, arena, 0, 0]


@pytest.mark.parametrize("pdl", [True, False])
def test_programmatic_dependent_launch(cuda, pdl):
    CudaGraphPlan(PLAN, KERNELS, WEIGHTS, pdl, cuda).close()
    wanted = (
        "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION",
        {"programmaticStreamSerializationAllowed": 1},
    )
    assert [launch.attributes for launch in cuda.launches] == [[wanted] if pdl else []] * 3


def test_parameters_are_those_of_step():
    """`n_first`, a constant for one call, lies between the pointers of two."""
    pytest.importorskip("triton")
    from omniad_edge.kernels.jit import step

    names = ["first", "first_arguments", "n_first", "second", "second_arguments", "PDL"]
    assert list(inspect.signature(step.fn).parameters) == names
    assert len(parameters(PLAN.launches[0], lambda name: 0)) == 5
    assert parameters(PLAN.launches[1], lambda name: 0)[2] == 3


def test_construction_and_run_call_the_driver_as_planned(cuda, graph):
    names = [name for name in cuda.names() if name != "cuDeviceGetAttribute"]
    launches, weights = ["cuLaunchKernelEx"] * 3, ["cuMemcpyHtoDAsync"] * 2
    assert names[names.index("cuMemAlloc") :] == [
        *("cuMemAlloc", "cuStreamCreate", "cuEventCreate", "cuEventCreate", "cuMemHostAlloc", "cuMemsetD8Async"),
        *(*weights, *launches, "cuStreamSynchronize"),
        *("cuStreamBeginCapture", *launches, "cuStreamEndCapture", "cuGraphInstantiate", "cuGraphDestroy"),
        *("cuGraphUpload", "cuStreamSynchronize", "cuCtxPopCurrent"),
    ]
    cuda.calls.clear()
    graph.run({"pixels": PIXELS})
    assert cuda.names() == [
        *("cuCtxPushCurrent", "cuMemcpyHtoDAsync", "cuGraphLaunch", "cuMemcpyDtoHAsync", "cuMemcpyDtoHAsync"),
        *("cuStreamSynchronize", "cuCtxPopCurrent"),
    ]


def test_one_arena_of_the_plans_size(cuda, graph):
    assert graph.arena_bytes == PLAN.arena_bytes == 1536
    assert [arguments for name, arguments in cuda.calls if name == "cuMemAlloc"] == [(1536,)]


def test_equal_machine_code_is_loaded_once(cuda):
    kernels = [KERNELS[0], Kernel("step", PAIR, 0, 4), LAST]
    plan = Plan(1, 2, 2, PLAN.buffers, PLAN.launches + PLAN.launches)
    equal = [Kernel(k.name, k.cubin, k.shared_bytes, k.num_warps) for k in kernels]
    with CudaGraphPlan(plan, kernels + equal, WEIGHTS, False, cuda):
        assert cuda.names().count("cuModuleLoadData") == 3
        assert len(cuda.launches) == 6


def test_shared_memory_is_asked_for_above_48_kib(cuda, graph):
    (asked,) = (arguments for name, arguments in cuda.calls if name == "cuFuncSetAttribute")
    assert asked[1].name == "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"
    assert asked[2] == 100 * 1024


def test_an_integrated_gpu_uses_the_hosts_memory_in_place():
    cuda = FakeCuda(integrated=True)
    with CudaGraphPlan(PLAN, KERNELS, WEIGHTS, True, cuda) as graph:
        cuda.calls.clear()
        outputs = graph.run({"pixels": PIXELS})
        assert outputs["anomaly_map"].tobytes() == MAP and (outputs["peaks"] == WEIGHTS["bias"]).all()
        graph.run({"pixels": OnGpu(cuda, PIXELS)})
        assert [name for name in cuda.names() if name.startswith("cuMemcpy")] == ["cuMemcpyDtoDAsync"]
        assert {cuda.alive[start] for start in places(cuda, graph)} == {"pinned memory"}
    check_all_freed(cuda)


def places(cuda: FakeCuda, graph: CudaGraphPlan) -> set[int]:
    """Where the allocations start that inputs and outputs lie in."""
    addresses = [int(graph.address(name)) for name in ("pixels", "anomaly_map", "peaks")]
    return {start for start, (size, _) in cuda.memory.items() for a in addresses if start <= a < start + size}


def test_too_much_shared_memory_is_refused():
    cuda = FakeCuda(arch=89, shared_bytes=99 * 1024)
    with pytest.raises(
        EngineError, match=r"needs 102400 bytes of shared memory, this GPU has 101376; .*--targets"
    ):
        CudaGraphPlan(PLAN, KERNELS, WEIGHTS, True, cuda)
    check_all_freed(cuda)


# What goes in and out


def test_weights_are_uploaded(cuda, graph):
    graph.run({"pixels": PIXELS})
    for name, value in WEIGHTS.items():
        assert ctypes.string_at(int(graph.address(name)), value.nbytes) == value.tobytes()


@pytest.mark.parametrize(
    "pixels",
    [PIXELS, np.asfortranarray(PIXELS), np.repeat(PIXELS, 2, 3)[..., ::2], PIXELS[:, ::-1, ::-1, ::-1]],
    ids=["contiguous", "Fortran", "strided", "reversed"],
)
def test_run_takes_any_numpy_layout(graph, pixels):
    outputs = graph.run({"pixels": pixels})
    assert list(outputs) == ["anomaly_map", "peaks"]
    assert outputs["anomaly_map"].tobytes() == pixels.tobytes()
    assert outputs["anomaly_map"].shape == (1, 3)
    np.testing.assert_array_equal(outputs["peaks"], WEIGHTS["bias"][None])


def test_outputs_are_arrays_of_their_own(graph):
    first = graph.run({"pixels": PIXELS})["anomaly_map"]
    second = graph.run({"pixels": PIXELS + 1})["anomaly_map"]
    graph.close()
    assert first.flags.owndata and first.flags.writeable
    assert (first.tobytes(), second.tobytes()) == (MAP, (PIXELS + 1).tobytes())


def test_cuda_array_interface(cuda, graph):
    strides = (12, 6, 3, 1)
    for changes in (
        {},
        {"strides": None},
        {"strides": strides},
        {"shape": (1, 2, 2, 3), "strides": (99, 6, 3, 1)},
    ):
        array = OnGpu(cuda, PIXELS, **changes)
        cuda.calls.clear()
        assert graph.run({"pixels": array})["anomaly_map"].tobytes() == MAP
        assert "cuMemcpyHtoDAsync" not in cuda.names() and "cuCtxSynchronize" not in cuda.names()


def test_cuda_array_interface_waits_for_its_stream(cuda, graph):
    producer = cuda.make("stream")
    cuda.queues[int(producer)] = []
    array = OnGpu(cuda, np.zeros_like(PIXELS), stream=int(producer))
    pending = PIXELS.copy()
    cuda.queues[int(producer)].append(lambda: ctypes.memmove(array.address, pending.ctypes.data, 12))
    assert graph.run({"pixels": array})["anomaly_map"].tobytes() == MAP
    cuda.drop(producer, "stream")


def test_cuda_array_interface_without_streams_waits_for_the_device(cuda, graph):
    cuda.queues[1] = []
    array = OnGpu(cuda, np.zeros_like(PIXELS), version=2)
    del array.__cuda_array_interface__["stream"]
    cuda.queues[1].append(lambda: ctypes.memmove(array.address, PIXELS.ctypes.data, 12))
    assert graph.run({"pixels": array})["anomaly_map"].tobytes() == MAP


@pytest.mark.parametrize("strides", [None, (12, 6, 3, 1)])
def test_dlpack(cuda, graph, strides):
    array = OverDlpack(cuda, PIXELS, strides=strides)
    dropped_at = []
    cuda.hook = lambda name: dropped_at.append((name, array.dropped))
    assert graph.run({"pixels": array})["anomaly_map"].tobytes() == MAP
    assert array.stream == int(graph.stream)  # the producer makes it wait
    assert dict(dropped_at)["cuStreamSynchronize"] is False and array.dropped


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda cuda: PIXELS.astype(np.int8),
            r"expected uint8 \(1, 2, 2, 3\), contiguous; got int8 \(1, 2, 2, 3\)",
        ),
        (lambda cuda: PIXELS[0], r"got uint8 \(2, 2, 3\)"),
        (lambda cuda: PIXELS.tolist(), "expected a NumPy array or an array on the GPU, got list"),
        (lambda cuda: OnGpu(cuda, PIXELS[0]), r"got uint8 \(2, 2, 3\)"),
        (lambda cuda: OnGpu(cuda, PIXELS, typestr="|i1"), "got int8"),
        (lambda cuda: OnGpu(cuda, PIXELS, strides=(12, 6, 1, 2)), "not C-contiguous"),
        (lambda cuda: OverDlpack(cuda, PIXELS[0]), r"got uint8 \(2, 2, 3\)"),
        (lambda cuda: OverDlpack(cuda, PIXELS, code=0), "got int8"),
        (lambda cuda: OverDlpack(cuda, PIXELS, code=4), "got DLPack type 4 of 8 bits x 1"),
        (lambda cuda: OverDlpack(cuda, PIXELS, strides=(12, 6, 1, 2)), "not C-contiguous"),
        (lambda cuda: OverDlpack(cuda, PIXELS, device=1), "expected an array on GPU 0, got one on GPU 1"),
    ],
)
def test_wrong_inputs_are_refused_and_the_next_run_works(cuda, graph, make, message):
    with pytest.raises(InputError, match=message) as error:
        graph.run({"pixels": make(cuda)})
    assert str(error.value).startswith("pixels: expected ")
    assert cuda.stack() == []
    assert graph.run({"pixels": PIXELS})["anomaly_map"].tobytes() == MAP


def test_dlpack_that_cannot_be_lent(cuda, graph):
    class Refusing(OverDlpack):
        def __dlpack__(self, stream):
            raise BufferError("requires gradient")

    with pytest.raises(InputError, match="requires gradient"):
        graph.run({"pixels": Refusing(cuda, PIXELS)})


def test_a_torch_tensor_on_the_cpu_is_not_taken(graph):
    torch = pytest.importorskip("torch")
    with pytest.raises(InputError, match="got Tensor"):
        graph.run({"pixels": torch.from_numpy(PIXELS)})


def test_dlpack_structure_is_that_of_torch():
    torch = pytest.importorskip("torch")
    tensor = torch.arange(24, dtype=torch.float16).reshape(4, 6)[1:, ::2]
    array = from_dlpack(tensor.__dlpack__())
    assert (array.address, array.shape, array.dtype) == (tensor.data_ptr(), (3, 3), "float16")
    assert not array.contiguous and from_dlpack(tensor.contiguous().__dlpack__()).contiguous


def test_dense_agrees_with_numpy():
    for array in (PIXELS, PIXELS[:, :, :1], PIXELS[:, :1], PIXELS.transpose(0, 1, 3, 2), PIXELS[..., ::-1]):
        assert dense(array.shape, array.strides) == array.flags.c_contiguous
    assert dense((2, 3), None)


@pytest.mark.parametrize("inputs", [{}, {"image": PIXELS}, {"pixels": PIXELS, "mask": PIXELS}])
def test_wrong_input_names_are_refused(graph, inputs):
    with pytest.raises(InputError, match="inputs: expected pixels; got"):
        graph.run(inputs)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"weight": WEIGHTS["weight"]}, "weights: expected bias, weight; got weight"),
        (WEIGHTS | {"more": PIXELS}, "got bias, more, weight"),
        (WEIGHTS | {"bias": np.zeros(3)}, r"weight bias: expected float32 \(3,\), contiguous; got float64"),
        (WEIGHTS | {"bias": np.zeros(4, np.float32)}, r"weight bias: .*got float32 \(4,\)"),
        (WEIGHTS | {"weight": np.zeros((10, 4), np.float16).T}, r"weight weight: .*not C-contiguous"),
    ],
)
def test_wrong_weights_are_refused(cuda, weights, message):
    with pytest.raises(InputError, match=message):
        CudaGraphPlan(PLAN, KERNELS, weights, True, cuda)
    assert cuda.calls == []


def test_wrong_number_of_kernels_is_refused(cuda):
    with pytest.raises(InputError, match="kernels: expected 3, one for each launch; got 2"):
        CudaGraphPlan(PLAN, KERNELS[:2], WEIGHTS, True, cuda)


def test_time(cuda, graph):
    assert graph.time_ms(4) == 3.0
    assert cuda.replays == 4 and len(cuda.launches) == 3 + 4 * 3
    for repeats in (0, -1, 2.0, True):
        with pytest.raises(InputError, match="repeats: expected a whole number from 1 on"):
            graph.time_ms(repeats)


# Contexts, threads, freeing


def test_the_callers_context_is_used_and_left_as_it_was(cuda):
    cuda.stack().append(5)
    with CudaGraphPlan(PLAN, KERNELS, WEIGHTS, True, cuda) as graph:
        assert cuda.stack() == [5]
        cuda.stack()[:] = [9]  # the thread turns to another one
        graph.run({"pixels": PIXELS})
        graph.time_ms(1)
    pushed = [int(arguments[0]) for name, arguments in cuda.calls if name == "cuCtxPushCurrent"]
    assert pushed == [5] * 4
    assert cuda.stack() == [9]
    assert "cuDevicePrimaryCtxRetain" not in cuda.names() and "cuDevicePrimaryCtxRelease" not in cuda.names()
    assert cuda.alive == {}


def test_a_thread_without_context_gets_the_primary_one(cuda):
    with CudaGraphPlan(PLAN, KERNELS, WEIGHTS, True, cuda) as graph:
        assert cuda.primary_references == 1
        graph.run({"pixels": PIXELS})
        assert cuda.stack() == []
    check_all_freed(cuda)


def test_threads_take_turns(cuda, graph):
    def work(index: int) -> bool:
        pixels = PIXELS + np.uint8(index)
        right = graph.run({"pixels": pixels})["anomaly_map"].tobytes() == pixels.tobytes()
        return right and cuda.stack() == []

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(200)))


def test_close_may_be_called_twice_and_ends_everything(cuda):
    graph = CudaGraphPlan(PLAN, KERNELS, WEIGHTS, True, cuda)
    graph.close()
    graph.close()
    check_all_freed(cuda)
    for use in (lambda: graph.run({"pixels": PIXELS}), lambda: graph.time_ms(1)):
        with pytest.raises(EngineError, match="was closed"):
            use()


def test_close_in_another_thread(cuda):
    graph = CudaGraphPlan(PLAN, KERNELS, WEIGHTS, True, cuda)
    thread = threading.Thread(target=graph.close)
    thread.start()
    thread.join()
    check_all_freed(cuda)


def test_a_dropped_plan_frees_everything(cuda):
    graph = CudaGraphPlan(PLAN, KERNELS, WEIGHTS, True, cuda)
    graph.run({"pixels": PIXELS})
    del graph
    gc.collect()
    check_all_freed(cuda)


def names_of_a_construction() -> list[str]:
    cuda = FakeCuda()
    with CudaGraphPlan(PLAN, KERNELS, WEIGHTS, True, cuda):
        freeing = {"cuCtxPopCurrent", "cuGraphDestroy"}  # their failures are not looked at
        return sorted(set(cuda.names()) - freeing)


@pytest.mark.parametrize("function", names_of_a_construction())
def test_a_construction_that_fails_anywhere_frees_everything(cuda, function):
    cuda.failures[function] = "CUDA_ERROR_OUT_OF_MEMORY"
    with pytest.raises(EngineError, match=f"{function}: CUDA_ERROR_OUT_OF_MEMORY: .*too little free memory"):
        CudaGraphPlan(PLAN, KERNELS, WEIGHTS, True, cuda)
    check_all_freed(cuda)


def test_a_launch_that_fails_in_the_capture_ends_the_capture(cuda):
    counts = iter(range(100))

    def second_round(name):
        if name == "cuLaunchKernelEx" and next(counts) == 4:
            cuda.failures[name] = "CUDA_ERROR_INVALID_VALUE"

    cuda.hook = second_round
    with pytest.raises(EngineError, match="cuLaunchKernelEx: CUDA_ERROR_INVALID_VALUE: the driver refused"):
        CudaGraphPlan(PLAN, KERNELS, WEIGHTS, True, cuda)
    assert cuda.capturing == {}
    check_all_freed(cuda)


# Errors


@pytest.mark.parametrize("name", MEANING)
def test_errors_say_what_happened_and_what_to_do(cuda, graph, name):
    cuda.failures["cuGraphLaunch"] = name
    with pytest.raises(EngineError, match=f"^cuGraphLaunch: {name}: {re.escape(MEANING[name])}$"):
        graph.run({"pixels": PIXELS})
    assert cuda.stack() == []
    cuda.failures.clear()
    assert graph.run({"pixels": PIXELS})["anomaly_map"].tobytes() == MAP  # it may go on


@pytest.mark.parametrize("name", STICKY)
def test_after_a_sticky_error_every_call_fails_at_once(cuda, name):
    graph = CudaGraphPlan(PLAN, KERNELS, WEIGHTS, True, cuda)
    cuda.failures["cuStreamSynchronize"] = name
    with pytest.raises(EngineError, match=f"cuStreamSynchronize: {name}: .*start the process anew.*dmesg"):
        graph.run({"pixels": PIXELS})
    assert cuda.stack() == []
    cuda.calls.clear()
    for use in (lambda: graph.run({"pixels": PIXELS}), lambda: graph.time_ms(1)):
        with pytest.raises(EngineError, match=name):
            use()
    assert cuda.calls == []
    graph.close()
    assert {"cuMemFree", "cuMemFreeHost", "cuStreamDestroy", "cuModuleUnload"} <= set(cuda.names())
    assert cuda.primary_references == 0 and cuda.stack() == []


def test_no_driver(cuda):
    cuda.missing_library = True
    with pytest.raises(EngineError, match=r"cuInit: Failed to dlopen libcuda.so.1; .*install or update"):
        CudaGraphPlan(PLAN, KERNELS, WEIGHTS, True, cuda)
    assert device_architecture(cuda) is None


def test_no_cuda_bindings(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(
        MissingDependencyError, match=r'cuda-bindings is not installed; run: pip install ".*\[cuda\]"'
    ):
        CudaGraphPlan(PLAN, KERNELS, WEIGHTS, True)
    assert device_architecture() is None


@pytest.mark.parametrize("arch", [87, 90, 120])
def test_device_architecture(arch):
    cuda = FakeCuda(arch)
    assert device_architecture(cuda) == arch
    cuda.stack().append(5)
    assert device_architecture(cuda) == arch
    assert cuda.stack() == [5] and cuda.alive == {}


@pytest.mark.parametrize(
    "name", ["CUDA_ERROR_NO_DEVICE", "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "CUDA_ERROR_UNKNOWN"]
)
def test_no_architecture_without_a_device(cuda, name):
    cuda.failures["cuInit"] = name
    assert device_architecture(cuda) is None


# The real bindings, which can be imported without a driver


def test_every_name_used_is_in_cuda_bindings():
    driver = pytest.importorskip("cuda.bindings.driver")
    modules = cuda_driver, cuda_graph, cuda_kernel, cuda_resize
    source = "".join(Path(module.__file__).read_text() for module in modules)
    assert set(re.findall(r"\bcu[A-Z]\w+", source)) <= set(dir(driver))
    for path in re.findall(r"\bapi\.(CU[\w.]+)", source):
        value = driver
        for part in path.split("."):
            value = getattr(value, part)
    for name in (*STICKY, *MEANING):
        assert name in driver.CUresult.__members__
    for name in FakeCuda.CUdevice_attribute.__members__:
        assert name in driver.CUdevice_attribute.__members__


def test_launch_configuration_is_taken_by_cuda_bindings():
    driver = pytest.importorskip("cuda.bindings.driver")
    early, value = driver.CUlaunchAttribute(), driver.CUlaunchAttributeValue()
    value.programmaticStreamSerializationAllowed = 1
    early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    early.value = value
    config = driver.CUlaunchConfig()
    config.attrs, config.numAttrs = [early], 1
    assert config.attrs[0].value.programmaticStreamSerializationAllowed == 1
    for name in ("gridDimX", "gridDimY", "gridDimZ", "blockDimX", "blockDimY", "blockDimZ", "sharedMemBytes"):
        setattr(config, name, 3)
        assert getattr(config, name) == 3
    config.hStream = driver.CUstream(5)
    assert int(config.hStream) == 5
