"""Latency of a bundle's engines beside plain exports of the same network on the CPU, interleaved in one run.

    python benchmarks/latency.py --device cpu --json latency.json

Groups of cases, each `group/backend-precision`:
ours       the bundle given, or one with seeded weights (latency does not depend on their values); on the CPU, and
           a bundle that was given also on the GPU that it has kernels or a TensorRT engine for
ours-fp16  the same with fp16 storage; CPUs compute in fp32 from it
torch      OmniAD.predict, eager, in inference mode
paper      torch.onnx.export of the published structure, made deterministic (see networks.py)
module     torch.onnx.export of our own torch module as it is
Ours and torch take uint8 images, the plain exports take normalised ones: their normalisation is not counted.

Every round times one call of every case at every batch size, in an order shuffled anew, so that the machine's
noise hits all alike. On a Jetson also the power mode, clocks and temperatures before and after, and the energy of
an image. Data on stdout, progress on stderr; exit code 0, 1 failure, 2 usage.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from time import perf_counter, sleep

import numpy as np
from cases import FRAME_SHAPE, Case, Run, open_case, random_pixels
from command import exit_code, make_parser, natural, positive, write_json
from cpu_report import PLAIN_FORMS, print_report
from energy import measure_energy
from machine import JETSON, facts, jetson_state, load_average
from paced import measure_paced

from omniad_edge import Detector, fused, tensorrt_engine
from omniad_edge.bundle import Bundle, read_bundle
from omniad_edge.engine import cpu_has_bf16, import_openvino, objection
from omniad_edge.errors import InputError, MissingDependencyError, OmniADError
from omniad_edge.progress import say

SCHEMA = 1  # of the JSON
GROUPS = ("ours", "ours-fp16", "torch", "paper", "module")
ENGINES = (("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16"))
GPU_NAMES = ("ours/fused-fp16", "ours/tensorrt-fp16")
NAMES = [
    *GPU_NAMES,
    *(
        f"{group}/{backend}-{precision}"
        for group in GROUPS
        for backend, precision in ((("eager", "fp32"),) if group == "torch" else ENGINES)
    ),
]
# Threads of the case before spin on for some ms, and its data fill the caches. So each timed call comes after a
# pause and an untimed one: without that call p50 lay 7 to 19 % above the minimum, with it 3 to 9 %.
SETTLE_S = 0.02
IMPORT_RUNS = 5
MAX_FP32_ERROR = 1e-3  # of an anomaly map's value; cases further apart do not compute the same network
PRESETS = ("base", "fast", "small")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)

    def work() -> None:
        report = measure(args)
        print_report(report)
        write_json(args.json, report)

    return exit_code("latency", work)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--bundle", type=Path, help="measure this bundle instead of one with seeded weights")
    parser.add_argument("--preset", choices=PRESETS, help="network, if no bundle is given (default: base)")
    parser.add_argument("--size", type=int, help="input height and width, if no bundle is given (default: 256)")
    parser.add_argument("--json", type=Path, help="write everything, raw samples too, to this file")
    parser.add_argument("--samples", type=positive, default=30, help="timed calls per case (default: 30)")
    parser.add_argument("--warm-up", type=natural, default=2, help="rounds before these (default: 2)")
    parser.add_argument("--threads", type=positive, default=os.cpu_count(), help="of every case (default: all)")
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 8], help="(default: 1 8)")
    parser.add_argument("--paced", action="store_true", help="also parts that arrive 1, 5 and 20 times a second")
    parser.add_argument("--only", nargs="+", default=GROUPS, metavar="NAME", help="cases, or groups of cases")
    args = parser.parse_args(argv)
    if args.bundle and (args.preset or args.size):
        parser.error("--preset and --size: a bundle has its own network and size; leave them out")
    if args.size and (args.size < 64 or args.size % 32):
        parser.error(f"--size: expected a multiple of 32 from 64 on; got {args.size}")
    for name in args.only:
        if name not in (*GROUPS, *NAMES):
            parser.error(f"--only: expected one of {', '.join((*GROUPS, *NAMES))}; got {name!r}")
    return args


# ---- what to measure


def measure(args: argparse.Namespace) -> dict:
    header = facts() | {"load_before": load_average(), "jetson_before": jetson_state()}
    with tempfile.TemporaryDirectory() as folder:
        say("exporting the networks")
        files, missing = make_files(args, Path(folder))
        cases, left_out = select_cases(files, args.only)
        height, width, config = input_of(files["ours"])
        rows, detectors = time_cases(cases, args, height, width)
        stages = time_stages(detectors, args)
        named = {case.name: detector for case, detector in detectors.items()}
        paced = measure_paced(named, args.samples) if args.paced else []
        inspect = {name: partial(call, random_pixels(FRAME_SHAPE)) for name, call in named.items()}
        energy = measure_energy(inspect, JETSON)
        costs = [process_cost(case, args.threads, height, width) for case in cases]
        bundles = {group: files[group].stat().st_size for group in ("ours", "ours-fp16") if group in files}
    header |= {name: getattr(args, name) for name in ("threads", "samples", "warm_up", "batch")}
    header |= {
        "load_after": load_average(),
        "jetson_after": jetson_state(),
        "network": config,
        "input": [height, width],
    }
    header |= {"weights": str(args.bundle or "seeded"), "bundle_bytes": bundles}
    return {
        "schema": SCHEMA,
        "header": header,
        "latency": with_speedups(rows),
        "stages": stages,
        "paced": paced,
        "energy": energy,
        "import_s": import_seconds(),
        "processes": costs,
        "left_out": missing + left_out,
    }


def make_files(args: argparse.Namespace, folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The file of each group, in `folder`; and why groups are missing."""
    files = {"ours": args.bundle} if args.bundle else {}
    bundle = read_bundle(args.bundle) if args.bundle else None
    try:
        from networks import export_plain, seeded_model, write_seeded_bundle

        from omniad_edge.model import PRESETS, ModelConfig
        from omniad_edge.weights import save_checkpoint
    except ModuleNotFoundError as exc:  # torch, or another that its extra brings
        reason = str(MissingDependencyError(exc.name or "PyTorch", "train"))
        if bundle is None:
            raise InputError(f"the networks cannot be made; give a --bundle, or: {reason}") from exc
        return files, [f"torch, paper, module: {reason}"]
    if bundle is None:
        size = {"height": args.size or 256, "width": args.size or 256}
        config = ModelConfig(**PRESETS[args.preset or "base"].to_dict() | size)
    else:
        described = bundle.manifest["model"]
        config = ModelConfig(**{name: described[name] for name in ModelConfig().to_dict()})
    model = seeded_model(config)
    groups = {name.split("/")[0] for name in args.only}
    for group, fp16 in (("ours", False), ("ours-fp16", True)):
        if bundle is None and (group in groups or group == "ours"):
            files[group] = folder / f"{group}.omniad"
            write_seeded_bundle(files[group], model, fp16)
    for form in PLAIN_FORMS:
        if form in groups:
            files[form] = folder / f"{form}.onnx"
            files[form].write_bytes(export_plain(model, form))
    files["torch"] = folder / "model.safetensors"
    save_checkpoint(files["torch"], model, {})
    return files, []


def input_of(path: Path) -> tuple[int, int, dict]:
    bundle = read_bundle(path)
    return bundle.height, bundle.width, bundle.manifest["model"]


def select_cases(files: dict[str, Path], only: list[str]) -> tuple[list[Case], list[str]]:
    """The cases that were asked for and can run here; and why others cannot."""
    objections = {("openvino", precision): unavailable(precision, None) for precision in ("fp32", "bf16")}
    bundle = read_bundle(files["ours"])
    cases, left_out = [], {}
    for name in NAMES:
        group, engine = name.split("/")
        backend, precision = engine.split("-")
        if group not in files or not {group, name} & set(only):
            continue
        reason = gpu_objection(bundle, backend) if name in GPU_NAMES else objections.get((backend, precision), "")
        if not reason and group == "ours" and precision == "bf16":
            reason = unavailable(precision, bundle)
        if reason:
            left_out.setdefault(reason, []).append(name)
            continue
        cases.append(Case(name, files[group], "torch" if group == "torch" else backend, precision))
    lines = [f"{', '.join(names)}: {reason}" for reason, names in left_out.items()]
    if not cases:
        raise InputError("nothing is left to measure. " + "; ".join(lines or ["--only names what is not there"]))
    return cases, lines


def gpu_objection(bundle: Bundle, backend: str) -> str:
    """Why this backend cannot run the bundle on this machine's GPU; empty if it can."""
    if backend == "tensorrt":
        return tensorrt_engine.objection(bundle)
    return fused.objection(bundle, fused.device_architecture())


def unavailable(precision: str, bundle: Bundle | None) -> str:
    """Why OpenVINO cannot run here in this precision; empty if it can."""
    if bundle is not None:
        return objection(bundle, "bf16")
    try:
        import_openvino()
        return "" if precision == "fp32" or cpu_has_bf16() else "this CPU does not have bf16"
    except MissingDependencyError as exc:
        return str(exc)


# ---- latency


def time_cases(
    cases: list[Case], args: argparse.Namespace, height: int, width: int
) -> tuple[list[dict], dict[Case, Detector]]:
    """A row per case and batch size with its raw samples and its error; the detectors that were opened."""
    runs: dict[Case, Run] = {}
    detectors: dict[Case, Detector] = {}
    for case in cases:
        say(f"loading {case.name}")
        runs[case], detector = open_case(case, args.threads)
        if detector is not None:
            detectors[case] = detector
    inputs = {}
    for batch in args.batch:
        inputs[batch, False] = random_pixels((batch, height, width, 3))
        if any(case.takes_normalised for case in cases):
            from networks import normalised

            inputs[batch, True] = normalised(inputs[batch, False])
    errors = output_errors(runs, inputs, args)
    turns = [(case, batch) for batch in args.batch for case in cases]
    samples = {turn: [] for turn in turns}
    shuffle = random.Random(0).shuffle
    for index in range(-args.warm_up, args.samples):
        shuffle(order := list(turns))
        say(f"round {index + 1} of {args.samples}" if index >= 0 else "warming up")
        for case, batch in order:
            sleep(SETTLE_S)
            runs[case](inputs[batch, case.takes_normalised])
            start = perf_counter()
            runs[case](inputs[batch, case.takes_normalised])
            elapsed_ms = 1e3 * (perf_counter() - start)
            if index >= 0:
                samples[case, batch].append(round(elapsed_ms, 3))
    rows = [latency_row(case, batch, samples[case, batch], errors[case]) for case, batch in turns]
    return rows, detectors


def output_errors(runs: dict[Case, Run], inputs: dict, args: argparse.Namespace) -> dict[Case, dict]:
    """Each case's largest difference from the first case with the same weights; None if it is not finite.

    Raises OmniADError if a case in fp32 does not compute what the others do: its time would mean nothing.
    """
    errors, references = {}, {}
    for case, run in runs.items():
        weights = "bundle" if args.bundle and case.group == "ours" else "seeded"
        anomaly_map, _ = run(inputs[args.batch[0], case.takes_normalised])
        name, reference = references.setdefault(weights, (case.name, anomaly_map))
        error = float(np.abs(anomaly_map - reference).max())
        if case.precision == "fp32" and not error <= MAX_FP32_ERROR:
            raise OmniADError(f"{case.name} does not compute what {name} does: its map differs by {error:.2g}")
        errors[case] = {"reference": name, "max_error": error if np.isfinite(error) else None}
    return errors


def latency_row(case: Case, batch: int, samples_ms: list[float], error: dict) -> dict:
    p50, p90, p99 = np.percentile(samples_ms, (50, 90, 99))
    times = {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "max_ms": max(samples_ms)}
    return {
        "case": case.name,
        "batch": batch,
        **{name: round(float(value), 3) for name, value in times.items()},
        "images_per_s": round(1e3 * batch / float(p50), 2),
        **error,
        "samples_ms": samples_ms,
    }


def with_speedups(rows: list[dict]) -> list[dict]:
    """Each row with how many times faster it is than ONNX Runtime on the two plain exports.

    The median of what each round says, as a machine that changes its speed during the run does so for all.
    """
    samples = {(row["case"], row["batch"]): np.array(row["samples_ms"]) for row in rows}
    for row in rows:
        own = samples[row["case"], row["batch"]]
        for form in PLAIN_FORMS:
            plain = samples.get((f"{form}/onnxruntime-fp32", row["batch"]))
            row[f"speedup_{form}"] = None if plain is None else round(float(np.median(plain / own)), 3)
    return rows


def time_stages(detectors: dict[Case, Detector], args: argparse.Namespace) -> list[dict]:
    """Preprocess, engine and postprocess of Detector calls on one 1920x1080 frame, interleaved."""
    frame = random_pixels(FRAME_SHAPE)
    samples = {case: [] for case in detectors}
    for index in range(-args.warm_up, args.samples if detectors else 0):
        for case, detector in detectors.items():
            sleep(SETTLE_S)
            detector(frame)
            speed_ms = detector(frame).speed_ms
            if index >= 0:
                samples[case].append(speed_ms)
    return [stage_row(case, speeds) for case, speeds in samples.items()]


def stage_row(case: Case, speeds: list[dict[str, float]]) -> dict:
    row = {"case": case.name}
    for stage in ("preprocess", "engine", "postprocess", "total"):
        values = [round(speed[stage], 3) for speed in speeds]
        p50, p99 = np.percentile(values, (50, 99))
        row[stage] = {"p50_ms": round(float(p50), 3), "p99_ms": round(float(p99), 3), "samples_ms": values}
    around = row["preprocess"]["p50_ms"] + row["postprocess"]["p50_ms"]
    return row | {"share_of_engine": round(around / row["engine"]["p50_ms"], 4)}


# ---- processes of their own


def process_cost(case: Case, threads: int, height: int, width: int) -> dict:
    say(f"memory of {case.name}")
    script = Path(__file__).with_name("cases.py")
    values = (case.file, case.backend, case.precision, threads, height, width)
    return {"case": case.name, **json.loads(python(script, *map(str, values)))}


def import_seconds() -> float:
    """`import omniad_edge` in a fresh interpreter, the fastest of some."""
    code = "from time import perf_counter as t; s = t(); import omniad_edge; print(t() - s)"
    return round(min(float(python("-c", code)) for _ in range(IMPORT_RUNS)), 3)


def python(*arguments: str | Path) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OmniADError(f"{' '.join(map(str, arguments))} failed:\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
