"""The fused engine on an NVIDIA GPU: is it right, and how fast is it beside torch and ONNX Runtime, in one run.

    python benchmarks/gpu.py e2e latency --json benchmarks/results/gpu.json

e2e      the plan by Triton's compiler and as compiled kernels in a CUDA graph, against the network in float64; the
         same of an input four times as large; the native runtime beside the Python executor, to the bit; the
         parity gate on frames of a generated product line
latency  batch 1, 8, 32: engine alone (CUDA events) and pixels in to map and score out (wall clock), interleaved; a
         1920x1080 frame in host memory to map and score, resized on the GPU and on the CPU; paced arrivals;
         what a run costs the host beside the GPU's time, launched from C++ and from Python
probes   what this GPU needs at least: to read each weight once, do each product once, start that many kernels
Weights are seeded: latency does not depend on their values. With --run the parity gate takes a trained network and
defective images too; an untrained one ranks them by chance, and near ties would decide.
Data on stdout, progress on stderr; exit code 0, 1 failure, 2 usage.
"""

import argparse
import random
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, sleep

import numpy as np
import torch
from command import exit_code, make_parser, write_json
from energy import measure_energy, print_energy
from gpu_cases import Bench, Case, make_cases
from machine import JETSON, facts, jetson_state
from networks import seeded_model

from omniad_edge.cuda_graph import device_architecture
from omniad_edge.data import find_samples, load_images
from omniad_edge.errors import OmniADError
from omniad_edge.evaluate import predict_images
from omniad_edge.export.parity import compare
from omniad_edge.fused import BATCHES as FUSED_BATCHES
from omniad_edge.fused import with_score
from omniad_edge.kernels.fold import Network, named_arrays
from omniad_edge.kernels.jit import JitPlan
from omniad_edge.kernels.network import TorchOps, forward
from omniad_edge.kernels.pack import pack
from omniad_edge.kernels.plan import PDL_FROM
from omniad_edge.kernels.schedule import for_batch
from omniad_edge.model import ModelConfig
from omniad_edge.native import why_absent
from omniad_edge.preprocess import resize
from omniad_edge.products import write_line
from omniad_edge.self_test import MAX_EMBEDDING_ERROR, MAX_MAP_ERROR
from omniad_edge.weights import load_run

SCHEMA = 1  # of the JSON
PARTS = ("e2e", "latency", "probes")
BATCHES = (1, 8, 32)
MAX_AUROC_DIFFERENCE = 5e-4  # half of what the parity gate allows
LINE = {"n_train": 1, "n_calibration": 1, "n_test_good": 40, "n_test_per_kind": 10, "size_px": 256}
FRAME = (1080, 1920, 3)
PACED_HZ = (1, 5, 20)
PACED_CALLS = 20
COPY_BYTES = 1 << 30
MATMUL_SIZE = 8192


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument(
        "parts", nargs="*", default=PARTS, metavar="PART", help=f"{', '.join(PARTS)} (default: all)"
    )
    parser.add_argument("--json", type=Path, help="write everything, raw samples too, to this file")
    parser.add_argument("--samples", type=int, default=200, help="timed passes per case (default: 200)")
    parser.add_argument("--warm-up", type=int, default=20, help="passes before these (default: 20)")
    parser.add_argument("--run", type=Path, help="folder of a trained run, for the parity gate of e2e")
    parser.add_argument("--skip-compile", action="store_true", help="leave out torch.compile, minutes at batch 32")
    args = parser.parse_args(argv)
    for part in args.parts:
        if part not in PARTS:
            parser.error(f"expected some of {', '.join(PARTS)}; got {part!r}")
    return exit_code("gpu", lambda: measure(args))


def measure(args: argparse.Namespace) -> bool:
    """Whether all that is checked passed. Raises OmniADError without a GPU."""
    arch = device_architecture()
    if arch is None or not torch.cuda.is_available():
        raise OmniADError("no NVIDIA GPU, or torch cannot use it")
    report = {"schema": SCHEMA, "header": header(args, arch), "jetson_before": jetson_state()}
    bench = Bench(arch, seeded_model(ModelConfig()))
    if "e2e" in args.parts:
        report["e2e"] = end_to_end(bench)
        trained = args.run and Bench(arch, load_run(args.run)[0])
        report["e2e"].append(product_line(trained or bench, labelled=trained is not None))
        print_check(report["e2e"][-1])
    if "latency" in args.parts:
        report |= latency(bench, args)
    if {"latency", "probes"} & set(args.parts):
        report["floors"] = measure_floors(bench)
        print("floors  " + "  ".join(f"{name} {value:.4g}" for name, value in report["floors"].items()))
        for row in report.get("latency", []):
            row["times_floor"] = round(row["engine"]["p50_ms"] / floor_ms(report["floors"], row["batch"]), 2)
            print(f"batch {row['batch']:<3} {row['case']:<36} {row['times_floor']:.2f} times the floor")
    report["jetson_after"] = jetson_state()
    write_json(args.json, report)
    return all(row["passed"] for row in report.get("e2e", []))


def header(args: argparse.Namespace, arch: int) -> dict:
    device = torch.cuda.get_device_properties(0)
    gpu = {"name": device.name, "arch": f"sm_{arch}", "multiprocessors": device.multi_processor_count}
    gpu |= {"memory_mib": device.total_memory >> 20, "cuda": torch.version.cuda}
    return facts() | {"gpu": gpu, "samples": args.samples, "warm_up": args.warm_up}


# ---- correctness


def end_to_end(bench: Bench) -> list[dict]:
    pixels = bench.pixels(8)
    truth, embedding = in_float64(bench.network, pixels)
    jit = JitPlan(for_batch(bench.plan, 8), bench.weights, "cuda").run
    runs = {"jit": jit}
    for pdl in (False, True):
        graph, alone = bench.graph(8, pdl), bench.graph(1, pdl)
        runs[f"graph{' pdl' * pdl}"] = lambda p, graph=graph: with_score(graph.run({"pixels": p}))
        runs[f"graph{' pdl' * pdl}, one by one"] = lambda p, alone=alone: tuple(
            np.concatenate(part)
            for part in zip(*(with_score(alone.run({"pixels": image[None]})) for image in p), strict=True)
        )
    rows, first = [], None
    for name, run in runs.items():
        made = run(pixels)
        maps, scores, means = made
        first = made if first is None else first
        error = float(np.abs(maps - truth).max())
        embedding_error = float(np.abs(means - embedding).max() / np.abs(embedding).max())
        row = {
            "case": name,
            "map_error": error,
            "score_error": float(np.abs(scores - truth.max((1, 2))).max()),
            "embedding_error": embedding_error,
            "same_bits_twice": same_bits(run(pixels), made),
            "same_bits_as_jit": same_bits(made, first),
        }
        row["passed"] = (
            error <= MAX_MAP_ERROR
            and embedding_error <= MAX_EMBEDDING_ERROR
            and row["same_bits_twice"]
            and bool((scores == maps.max((1, 2))).all())
        )
        rows.append(row)
        print_check(row)
    rows.append(four_times(bench))
    print_check(rows[-1])
    if absent := why_absent():
        print(f"e2e  native runtime: left out, {absent}")
    else:
        rows.append(native_beside_python(bench))
        print_check(rows[-1])
    return rows


def same_bits(some: tuple[np.ndarray, ...], others: tuple[np.ndarray, ...]) -> bool:
    return all(bool((one == other).all()) for one, other in zip(some, others, strict=True))


@torch.inference_mode()
def in_float64(network: Network, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Map and embedding."""
    anomaly_map, _, embedding = forward(TorchOps(torch.float64), network, torch.from_numpy(pixels))
    return anomaly_map.numpy(), embedding.numpy()


def four_times(bench: Bench) -> dict:
    """A contrast that no camera gives: is there room left in fp16?"""
    stem = bench.network.backbone.stem
    larger = replace(bench.network.backbone, stem=replace(stem, weight=4 * stem.weight))
    network = replace(bench.network, backbone=larger)
    pixels = bench.pixels(8)
    maps, *_ = with_score(bench.graph(8, True, pack(bench.plan, named_arrays(network))).run({"pixels": pixels}))
    error = float(np.abs(maps - in_float64(network, pixels)[0]).max())
    return {"case": "graph pdl, input times four", "map_error": error, "passed": error <= MAX_MAP_ERROR}


def native_beside_python(bench: Bench) -> dict:
    """Pixels, frames on the host, and frames on the GPU, in each batch size: the same bits."""
    native, rng, same = bench.native(), np.random.default_rng(12), []
    for batch in FUSED_BATCHES:
        graph, pixels = bench.graph(batch, bench.arch >= PDL_FROM), bench.pixels(batch)
        frames = [rng.integers(0, 256, (300 + 40 * index, 500, 3), np.uint8) for index in range(batch)]
        of_pixels, of_frames = with_score(graph.run({"pixels": pixels})), with_score(graph.run_frames(frames)[0])
        for ours, wanted in (
            (native.run(pixels), of_pixels),
            (native.run_frames(frames), of_frames),
            (native.run_frames([torch.from_numpy(frame).cuda() for frame in frames]), of_frames),
        ):
            same.append(same_bits(ours[: len(wanted)], wanted))
    return {"case": "native runtime", "same_bits_as_python": all(same), "passed": all(same)}


def product_line(bench: Bench, labelled: bool) -> dict:
    """The parity gate against torch in fp32; the graph gets frames. labelled: of defective parts too."""
    height, width = bench.plan.height, bench.plan.width
    with TemporaryDirectory() as folder:
        write_line(folder, **LINE)
        samples = [s for s in find_samples(Path(folder, "data"), "test") if labelled or s.is_good]
        images = load_images(samples, height, width)
        graph = bench.graph(8, True)

        def predict(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            fill = np.zeros((8 - len(pixels), *pixels.shape[1:]), np.uint8)
            made, _ = graph.run_frames([image[..., ::-1] for image in np.concatenate((pixels, fill))])
            return tuple(values[: len(pixels)] for values in with_score(made)[:2])

        model = deepcopy(bench.model).cuda()
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            truth = predict_images(model.predict, images)
        report = compare(truth, predict_images(predict, images), "fp16")
    passed = report["passed"] and (report["measured"]["auroc_difference"] or 0) <= MAX_AUROC_DIFFERENCE
    case = f"parity gate, {'trained' if labelled else 'untrained'}, {report['images']} frames"
    return {"case": case, **report["measured"], "failures": report["failures"], "passed": passed}


def print_check(row: dict) -> None:
    print("e2e  " + "  ".join(f"{key} {value}" for key, value in row.items()))


# ---- speed


def latency(bench: Bench, args: argparse.Namespace) -> dict:
    rows, left_out = [], []
    for batch in BATCHES:
        cases = make_cases(bench, batch, args.skip_compile, left_out)
        samples = {case.name: ([], []) for case in cases}
        pixels = bench.pixels(batch)
        for index in range(-args.warm_up, args.samples):
            random.Random(index).shuffle(order := list(cases))
            for case in order:
                device_ms, wall_ms = time_launch(case), time_run(case, pixels)
                if index >= 0:
                    samples[case.name][0].append(device_ms)
                    samples[case.name][1].append(wall_ms)
        for case in cases:
            rows.append(latency_row(case, bench, *samples[case.name]))
            print_row(rows[-1])
        del cases
        torch.cuda.empty_cache()
    frames = [frame_to_score(bench, args, on_gpu) for on_gpu in (True, False)]
    made = {
        "latency": rows,
        "frames": frames,
        "paced": paced(bench),
        "energy": energy(bench),
        "left_out": left_out,
    }
    if absent := why_absent():
        left_out.append(f"native runtime: {absent}")
        return made
    return made | {"launch": [launch_overhead(bench, args, batch) for batch in FUSED_BATCHES]}


def launch_overhead(bench: Bench, args: argparse.Namespace, batch: int) -> dict:
    """Pixels in to map and score out, less what the graph takes on the GPU: copies, launching, waiting.

    From C++ and from Python in turn; both copy the same bytes, so their difference is the host's work alone.
    """
    graph, native, pixels = bench.graph(batch, bench.arch >= PDL_FROM), bench.native(), bench.pixels(batch)
    runs = {"native": lambda: native.run(pixels), "python": lambda: with_score(graph.run({"pixels": pixels}))}
    samples_us = {"graph": [], **{name: [] for name in runs}}
    for index in range(-args.warm_up, args.samples):
        random.Random(index).shuffle(order := list(runs))
        taken_us = {"graph": 1e3 * graph.time_ms(1)}
        for name in order:
            start = perf_counter()
            runs[name]()
            taken_us[name] = 1e6 * (perf_counter() - start)
        if index >= 0:
            for name, value in taken_us.items():
                samples_us[name].append(value)
    p50_us = {name: float(np.median(values)) for name, values in samples_us.items()}
    beside_us = {name: p50_us[name] - p50_us["graph"] for name in runs}
    print(f"launch  batch {batch}: beside the GPU's {p50_us['graph']:.1f} us a run takes the host", end=" ")
    print(", ".join(f"{value:.1f} us from {name}" for name, value in beside_us.items()))
    return {"batch": batch, "p50_us": p50_us, "beside_the_gpu_us": beside_us, "samples_us": samples_us}


def frame_to_score(bench: Bench, args: argparse.Namespace, on_gpu: bool) -> dict:
    """A 1920x1080 frame in host memory to map and score there, wall clock; resized on the GPU or on the CPU."""
    graph = bench.graph(1, True)
    frame = np.random.default_rng(11).integers(0, 256, FRAME, np.uint8)
    samples = []
    for index in range(-args.warm_up, args.samples):
        start = perf_counter()
        if on_gpu:
            graph.run_frames([frame])
        else:
            graph.run({"pixels": resize(frame, bench.plan.height, bench.plan.width)[None]})
        if index >= 0:
            samples.append(1e3 * (perf_counter() - start))
    p50, p99 = (float(value) for value in np.percentile(samples, (50, 99)))
    where = "GPU" if on_gpu else "CPU"
    print(f"frame of 1920x1080 to score, resized on the {where}: p50 {p50:.3f} ms, p99 {p99:.3f} ms")
    return {"resized_on": where, "p50_ms": p50, "p99_ms": p99, "samples_ms": samples}


def energy(bench: Bench) -> list[dict]:
    """Of a 1920x1080 frame, on a Jetson."""
    graph, frame = bench.graph(1, True), np.random.default_rng(11).integers(0, 256, FRAME, np.uint8)
    rows = measure_energy({"graph, 1920x1080 frame": lambda: graph.run_frames([frame])}, JETSON)
    print_energy(rows)
    return rows


def time_launch(case: Case) -> float:
    if case.graph is not None:
        return case.graph.time_ms(1)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    case.launch()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def time_run(case: Case, pixels: np.ndarray) -> float:
    start = perf_counter()
    case.run(pixels)
    return 1e3 * (perf_counter() - start)


def latency_row(case: Case, bench: Bench, device_ms: list[float], wall_ms: list[float]) -> dict:
    row = {"case": case.name, "batch": case.batch}
    for name, samples in (("engine", device_ms), ("pixels_to_score", wall_ms)):
        p50, p90, p99 = np.percentile(samples, (50, 90, 99))
        row[name] = {"p50_ms": float(p50), "p90_ms": float(p90), "p99_ms": float(p99), "samples_ms": samples}
    row["images_per_s"] = 1e3 * case.batch / row["engine"]["p50_ms"]
    row["tflop_per_s"] = case.batch * flop(bench) / row["engine"]["p50_ms"] / 1e9
    return row


def flop(bench: Bench) -> float:
    """Of the plain network for one image, counted by torch: 2 for a multiplication and addition."""
    if not hasattr(bench, "flop"):
        from torch.utils.flop_counter import FlopCounterMode

        # On the meta device: on the CPU the counter does not know the kernel of attention, 9 % of the work.
        model = deepcopy(bench.model).requires_grad_(False).to("meta")
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(torch.zeros(1, 3, bench.plan.height, bench.plan.width, device="meta"))
        bench.flop = counter.get_total_flops()
    return bench.flop


def measure_floors(bench: Bench) -> dict:
    """What this GPU needs at least: each weight read once, each product once, one empty kernel per launch."""
    source, target = (torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
    copy_ms = best_ms(lambda: target.copy_(source))
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, dtype=torch.float16, device="cuda") for _ in range(2))
    matmul_ms = best_ms(lambda: a @ b)
    weights = sum(value.nbytes for value in bench.weights.values())
    launches = len(bench.plan.launches)
    tiny, graph = torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            tiny.add_(1)
    return {
        "launches": launches,
        "weight_bytes": weights,
        "bytes_per_s": 2 * COPY_BYTES / copy_ms * 1e3,
        "flop_per_s": 2 * MATMUL_SIZE**3 / matmul_ms * 1e3,
        "weights_ms": weights / (2 * COPY_BYTES) * copy_ms,
        "flop_ms": flop(bench) / (2 * MATMUL_SIZE**3) * matmul_ms,
        "chain_ms": best_ms(graph.replay),
        "compile_s": bench.compile_s,
    }


def floor_ms(floors: dict, batch: int) -> float:
    """No pass is quicker: launches follow each other, weights are read once, and each image has its products."""
    return max(floors["chain_ms"], floors["weights_ms"], batch * floors["flop_ms"])


def best_ms(call: Callable[[], object], repeats: int = 20) -> float:
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return min(times[2:])


def paced(bench: Bench) -> list[dict]:
    """Single images that arrive slowly: an idle GPU lowers its clocks."""
    graph, pixels = bench.graph(1, True), bench.pixels(1)
    rows = []
    for rate in PACED_HZ:
        samples = []
        for _ in range(PACED_CALLS):
            sleep(1 / rate)
            start = perf_counter()
            graph.run({"pixels": pixels})
            samples.append(1e3 * (perf_counter() - start))
        p50, p99 = np.percentile(samples, (50, 99))
        rows.append({"per_s": rate, "p50_ms": float(p50), "p99_ms": float(p99), "samples_ms": samples})
        print(f"paced  {rate} per s: p50 {p50:.3f} ms, p99 {p99:.3f} ms")
    return rows


def print_row(row: dict) -> None:
    times = "  ".join(
        f"{name} p50 {row[name]['p50_ms']:.3f} p99 {row[name]['p99_ms']:.3f} ms"
        for name in ("engine", "pixels_to_score")
    )
    print(f"batch {row['batch']:<3} {row['case']:<36} {times}  {row['images_per_s']:.0f} images/s")


if __name__ == "__main__":
    sys.exit(main())
