"""Training steps a second: of images, of cached features, and on a GPU compiled too, interleaved in one run.

    python benchmarks/training.py --json training.json                            the preset base at 256, batch 16
    python benchmarks/training.py --preset small --size 128 --json training.json  a CPU's share

images          as `omniad train`: the teacher runs in every step
cached          as with --cache-features
compile         on a GPU: cached, and the student through torch.compile, which `omniad train` does not do yet
compile-graphs  on a GPU: the same in torch's mode "reduce-overhead", that is CUDA graphs
Weights and images are random: the time of a step does not depend on them. A sample is the mean of several steps,
as training too waits for a GPU only now and then. cpu_s is what the process used, all threads together.
Data on stdout, progress on stderr; exit code 0, 1 failure, 2 usage.
"""

import argparse
import random
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
import torch
from command import exit_code, make_parser, positive, write_json
from machine import facts, load_average

from omniad_edge.distributed import World, choose_device
from omniad_edge.errors import OmniADError
from omniad_edge.model import PRESETS, ModelConfig, OmniAD
from omniad_edge.progress import say
from omniad_edge.train import Trainer

SCHEMA = 1  # of the JSON
CASES = ("images", "cached", "compile", "compile-graphs")
STEPS_A_SAMPLE = {"cpu": 1, "cuda": 20}


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)

    def work() -> None:
        report = measure(args)
        print_report(report)
        write_json(args.json, report)

    return exit_code("training", work)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--json", type=Path, help="write everything, raw samples too, to this file")
    parser.add_argument("--preset", choices=PRESETS, default="base", help="(default: base)")
    parser.add_argument("--depths", type=positive, nargs=4, help="blocks per stage (default: the preset's)")
    parser.add_argument("--size", type=positive, default=256, help="input height and width (default: 256)")
    parser.add_argument("--batch-size", type=positive, default=16, help="images per step (default: 16)")
    parser.add_argument("--samples", type=positive, default=10, help="per case (default: 10)")
    parser.add_argument("--warm-up", type=positive, default=2, help="samples before these (default: 2)")
    parser.add_argument("--threads", type=positive, help="of the CPU (default: torch's choice)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> dict:
    if args.threads:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    preset = PRESETS[args.preset]
    config = replace(preset, depths=args.depths or preset.depths, height=args.size, width=args.size)
    header = facts() | {"load_before": load_average(), "device": device.type, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        header |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    header |= {"network": config.to_dict()}
    header |= {name: getattr(args, name) for name in ("batch_size", "samples", "warm_up")}
    cases = CASES if device.type == "cuda" else CASES[:2]
    trainers = {case: make_trainer(case, config, args.batch_size, device) for case in cases}
    samples = {case: [] for case in cases}
    shuffle = random.Random(0).shuffle
    for index in range(-args.warm_up, args.samples):
        say(f"round {index + 1} of {args.samples}" if index >= 0 else "warming up")
        shuffle(order := list(cases))
        for case in order:
            sample = time_steps(trainers[case], STEPS_A_SAMPLE[device.type])
            if index >= 0:
                samples[case].append(sample)
    rows = [row_of(case, samples[case], args.batch_size) for case in cases]
    return {"schema": SCHEMA, "header": header | {"load_after": load_average()}, "training": rows}


def make_trainer(case: str, config: ModelConfig, batch_size: int, device: torch.device) -> Trainer:
    torch.manual_seed(0)
    shape = (batch_size, config.height, config.width, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    images = np.arange(batch_size)
    trainer = Trainer(OmniAD(config), pixels, images, images[:0], batch_size, World(device))
    trainer.model.train()
    if case != "images":
        trainer.cache_features()
    if case.startswith("compile"):
        mode = "reduce-overhead" if case == "compile-graphs" else "default"
        trainer.student = torch.compile(trainer.student, mode=mode)
    return trainer


def time_steps(trainer: Trainer, steps: int) -> tuple[float, float]:
    """Wall-clock ms and CPU seconds of a step, mean of some. OmniADError if the loss is not finite."""
    rows = torch.arange(trainer.batch_size)
    used, start = process_time(), perf_counter()
    for _ in range(steps):
        loss = trainer.step(rows)
    if not np.isfinite(loss.item()):  # which also waits for the GPU
        raise OmniADError("the loss is not finite")
    return 1e3 * (perf_counter() - start) / steps, (process_time() - used) / steps


def row_of(case: str, samples: list[tuple[float, float]], batch_size: int) -> dict:
    wall_ms, cpu_s = (list(values) for values in zip(*samples, strict=True))
    p50, p90 = np.percentile(wall_ms, (50, 90))
    return {
        "case": case,
        "p50_ms": round(float(p50), 3),
        "p90_ms": round(float(p90), 3),
        "min_ms": round(min(wall_ms), 3),
        "steps_per_s": round(1e3 / float(p50), 3),
        "images_per_s": round(1e3 * batch_size / float(p50), 2),
        "cpu_s": round(float(np.median(cpu_s)), 4),
        "samples_ms": [round(value, 3) for value in wall_ms],
        "samples_cpu_s": [round(value, 4) for value in cpu_s],
    }


def print_report(report: dict) -> None:
    header = report["header"]
    network = header["network"]
    print(f"{header['date']}  commit {header['commit']}  {header.get('gpu', header['cpu'])}, ", end="")
    print(f"{header['threads']} CPU threads, load average {header['load_before']} to {header['load_after']}")
    print(f"{network['backbone']}, depths {network['depths']}, {network['height']} px, ", end="")
    print(f"batches of {header['batch_size']}, {header['samples']} samples")
    print(f"{'case':<16}{'p50 ms':>10}{'p90 ms':>10}{'min ms':>10}{'steps/s':>10}{'images/s':>10}{'CPU s':>8}")
    for row in report["training"]:
        times = "".join(f"{row[name]:10.1f}" for name in ("p50_ms", "p90_ms", "min_ms"))
        print(f"{row['case']:<16}{times}{row['steps_per_s']:10.2f}{row['images_per_s']:10.1f}{row['cpu_s']:8.2f}")


if __name__ == "__main__":
    sys.exit(main())
