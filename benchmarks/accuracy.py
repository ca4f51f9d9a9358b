"""How well it detects: per product, in every precision and backend, beside the paper's figures and beside peers.

    python benchmarks/accuracy.py --data DIR --preset small --size 128 --epochs 60
    python benchmarks/accuracy.py --data DIR --run runs/line3 --peers peers/bin/python --report accuracy.html
    python benchmarks/accuracy.py --data mvtec_ad --paper mvtec --json mvtec.json --report mvtec.html

Trains one model of all products (the same command again goes on with a training that was interrupted; --run takes
one that is there), exports it as `omniad-export --fp16` does, parity gate included (--bundle takes one that is
there, with int8 perhaps), and runs all test images through the trained network in fp32 and every engine that opens
here. What does not open says why. Needs torch: pip install "omniad-edge[train]".

--paper  the paper's Table I: its network, backbone, input size, epochs, all good images for training; pixel
         F1-max and AUPRO beside its figures in the published evaluator's form. Needs the data set as published and
         a GPU: 500 epochs of MVTec AD. Not the paper's: the attention output, which is a trained layer here.
--peers  PaDiM and PatchCore, by a Python that has anomalib (see peers.py), on the same backbone weights, training
         and test images. They are one model a product; Omni-AD is one of all.

Times are of one image, pixels to anomaly map, every method in a process of its own, all of them in turn.
Data on stdout, progress on stderr; exit code 0, 1 failure, 2 usage.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accuracy_report import print_report, write_html
from command import exit_code, make_parser, natural, positive, write_json
from detection import REFERENCE, as_json, bundle_of_run, exported, measure_products, open_engines, training_samples
from machine import facts, load_average
from one_image import time_in_turns
from peer_runs import Peers

from omniad_edge.cli import PRESETS, image_size
from omniad_edge.data import Sample, find_samples
from omniad_edge.engine import Engine
from omniad_edge.errors import DataError, InputError
from omniad_edge.metrics import METRICS, mean_metrics
from omniad_edge.model import PRESETS as CONFIGS
from omniad_edge.model import OmniAD
from omniad_edge.progress import say
from omniad_edge.train import train
from omniad_edge.weights import checkpoint_of, load_run

SCHEMA = 1  # of the JSON
HOLDOUT = 0.1  # as `omniad train`; the paper trains on all good images


@dataclass(frozen=True)
class Paper:
    """What Table I of the paper says of a data set: epochs, and METRICS and mAD in percent."""

    title: str
    epochs: int
    figures: tuple[float, ...]


PAPERS = {
    "mvtec": Paper("MVTec AD", 500, (99.0, 99.7, 98.3, 97.9, 56.8, 59.9, 93.4, 86.4)),
    "visa": Paper("VisA", 500, (94.6, 95.0, 90.3, 98.8, 38.7, 43.3, 91.9, 78.9)),
    "real-iad": Paper("Real-IAD", 100, (88.2, 86.5, 79.1, 98.8, 34.3, 39.7, 91.6, 74.0)),
}


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)

    def work() -> None:
        report = measure(args)
        print_report(report)
        write_json(args.json, report)
        if args.report:
            write_html(args.report, report)

    return exit_code("accuracy", work)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="data set with test images and masks")
    parser.add_argument("--run", type=Path, nargs="+", help="measure these runs or checkpoints, train none")
    parser.add_argument("--bundle", type=Path, help="of the one --run: measure this one, export none")
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"), help="folder of what it trains")
    parser.add_argument("--preset", choices=PRESETS, help="network to train (default: base)")
    parser.add_argument("--size", type=image_size, help="its input, N or HxW (default: the preset's)")
    parser.add_argument("--epochs", type=positive, help="of training (default: 500)")
    parser.add_argument(
        "--seed", type=natural, nargs="+", default=[42], help="one training for each (default: 42)"
    )
    parser.add_argument(
        "--backbone-weights", help="as of `omniad train` (default: procedural; with --paper imagenet, as it had)"
    )
    parser.add_argument("--paper", choices=PAPERS, help="train as the paper did; its figures beside ours")
    parser.add_argument("--peers", type=Path, metavar="PYTHON", help="also PaDiM and PatchCore, by this Python")
    parser.add_argument("--torch-only", action="store_true", help="no export, no engines: large sets on a GPU")
    parser.add_argument("--threads", type=positive, default=os.cpu_count(), help="of every method (default: all)")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--report", type=Path, help="write the tables as HTML to this file")
    args = parser.parse_args(argv)
    if (args.paper or args.run) and (args.preset or args.size or args.epochs):
        parser.error("--preset, --size, --epochs: --paper and --run have their own; leave them out")
    if args.bundle and (args.torch_only or len(args.run or ()) != 1):
        parser.error("--bundle: expected with --run and one run, and without --torch-only")
    if args.peers and not args.peers.is_file():
        parser.error(f"--peers: expected the Python of an environment with anomalib; there is no {args.peers}")
    return args


# ---- the networks


def measure(args: argparse.Namespace) -> dict:
    torch.set_num_threads(args.threads)
    header = facts() | {"load_before": load_average(), "threads": args.threads, "data": str(args.data)}
    samples = find_samples(args.data, "test")
    if not samples:
        raise DataError(f"{args.data}: expected test images (PRODUCT/test/KIND/*), there are none")
    folders = args.run or [trained(args, seed) for seed in args.seed]
    runs = [measure_run(folder, args, samples, first=folder == folders[0]) for folder in folders]
    report = {"schema": SCHEMA, "header": header | {"load_after": load_average()}, "paper": None, "runs": runs}
    if args.paper:
        paper = PAPERS[args.paper]
        figures = {name: value / 100 for name, value in zip((*METRICS, "mad"), paper.figures, strict=True)}
        report["paper"] = {"data": paper.title, "epochs": paper.epochs, "figures": figures}
    return report


def trained(args: argparse.Namespace, seed: int) -> Path:
    """The folder of a training with this seed, which is done, or is gone on with, or started."""
    config = CONFIGS[args.preset or "base"]
    if args.size:
        config = replace(config, height=args.size[0], width=args.size[1])
    out = args.out / f"seed-{seed}"
    train(
        args.data,
        out,
        config,
        epochs=PAPERS[args.paper].epochs if args.paper else args.epochs or 500,
        backbone_weights=args.backbone_weights or ("imagenet" if args.paper else "procedural"),
        holdout=0 if args.paper else HOLDOUT,
        seed=seed,
        resume=(out / "last.safetensors").exists(),
    )
    return out


def measure_run(path: Path, args: argparse.Namespace, samples: list[Sample], first: bool) -> dict:
    """All that is measured of one trained network; peers and times with the first only."""
    network, run_facts = load_run(path)
    if network.config.tiles:
        raise InputError(f"{path}: its images are seen in tiles, not measured here; use `omniad evaluate`")
    training = training_samples(args.data, run_facts, samples)
    with tempfile.TemporaryDirectory() as scratch:
        bundle, peers = args.bundle or Path(scratch, "line.omniad"), None
        engines, left_out = {}, {}
        if args.bundle:
            engines, left_out = open_engines(bundle_of_run(bundle, path), args.threads)
        elif not args.torch_only:
            engines, left_out = open_engines(exported(path, args.data, bundle), args.threads)
        if args.peers and first:
            middle = sorted(training, key=lambda product: len(training[product]))[len(training) // 2]
            folder = Path(scratch, "peers")
            folder.mkdir()
            peers = Peers(args.peers, folder, network, middle, run_facts["seed"], args.threads)
        predicts = {REFERENCE: on_gpu(network).predict} | {name: engine.run for name, engine in engines.items()}
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # fp32 is fp32
            methods, published = measure_products(
                predicts, samples, training, network.config, peers, bool(args.paper)
            )
        return {
            "run": str(path),
            "facts": shown_facts(network, run_facts),
            "methods": [method.to_dict() for method in methods],
            "left_out": left_out,
            "published": as_json(mean_metrics(published)) if published else None,
            "peers": peers.facts | {"timed_product": peers.timed_product} if peers else None,
            "one_image": time_methods(path, bundle, engines, network, peers, args.threads) if first else [],
        }


def on_gpu(network: OmniAD) -> OmniAD:
    return network.cuda() if torch.cuda.is_available() else network


def shown_facts(network: OmniAD, run_facts: dict) -> dict:
    names = ("seed", "epochs", "batch_size", "holdout_fraction", "loss", "val_loss")
    shown = {name: run_facts[name] for name in names if name in run_facts}
    fixed = {"model": network.config.to_dict(), "backbone_weights": run_facts["backbone"]}
    return fixed | {"trained_on": len(run_facts["trained_on"])} | shown


def time_methods(
    run: Path, bundle: Path, engines: dict[str, Engine], network: OmniAD, peers: Peers | None, threads: int
) -> list[dict]:
    """What one image takes, and what is stored for all products, of what a user can run."""
    script, config = Path(__file__).with_name("one_image.py"), network.config
    files = {REFERENCE: (checkpoint_of(run), "torch", "fp32")}
    for name, engine in engines.items():
        if name == f"{engine.backend} {engine.precision}":  # not a GPU's graph on the CPU
            files[name] = (bundle, engine.backend, engine.precision)
    served = {}
    for name, (file, backend, precision) in files.items():
        values = (file, backend, precision, threads, config.height, config.width)
        served[name] = [sys.executable, script, *map(str, values)], file.stat().st_size
    if peers:
        served |= peers.served()
    say("timing one image")
    times = time_in_turns({name: command for name, (command, _) in served.items()})
    return [{"name": name, "stored_bytes": served[name][1], **row} for name, row in times.items()]


if __name__ == "__main__":
    sys.exit(main())
