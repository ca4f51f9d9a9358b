"""Which parts of the network earn their place: variants trained alike, tables like the paper's II to VI.

    python benchmarks/ablation.py --data DATA --out ablation.json                  a small network, for a CPU
    python benchmarks/ablation.py --data DATA --out ablation.json --preset base --size 256 --epochs 500

output    what maps the attention's concatenated heads (the published code: new random weights in every pass)
order     the order of the two attention steps
branches  the global and the local branch
tokens    learnable tokens per attention step

Every variant is trained on all good images of all products with the same budget, order of images and noise, once
for each seed, and measured on the test images. The teacher's features do not depend on the variant: they are
computed once. The file is written after every run, and the same command goes on where it was interrupted.
Tables on stdout, progress on stderr; exit code 0, 1 failure or interrupted, 2 usage.
"""

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic

import numpy as np
import torch
from command import exit_code, make_parser, positive, write_json
from machine import facts
from torch import Tensor

from omniad_edge.anomaly_map import anomaly_map
from omniad_edge.backbone import ResNet
from omniad_edge.data import Images, find_samples, load_images, load_masks
from omniad_edge.distributed import World, choose_device
from omniad_edge.errors import DataError, InputError
from omniad_edge.evaluate import Predictions
from omniad_edge.files import file_sha256
from omniad_edge.metrics import evaluate_maps, mean_metrics
from omniad_edge.model import ATTENTION_OUTPUTS, ATTENTIONS, BRANCHES, PRESETS, ModelConfig, OmniAD, normalise
from omniad_edge.progress import say
from omniad_edge.run_folder import differences
from omniad_edge.train import Trainer, learning_rate
from omniad_edge.training_images import check_memory, load_good_images
from omniad_edge.weights import load_backbone

SCHEMA = 1  # of the JSON
TABLES = {  # what a table varies: a field of ModelConfig, and its values
    "output": ("attention_output", ATTENTION_OUTPUTS),
    "order": ("attention", ATTENTIONS),
    "branches": ("branches", BRANCHES),
    "tokens": ("tokens", (16, 36, 64, 100)),
}
METRICS = {"image_auroc": "image AUROC", "image_ap": "image AP", "pixel_auroc": "pixel AUROC", "aupro": "AUPRO"}
SMALLEST = replace(PRESETS["small"], depths=(1, 1, 1, 1))
CHUNK = 16  # images whose features are computed at once


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)

    def work() -> None:
        report = open_report(args)
        sweep(args, report)
        print_tables(args, report)

    try:
        return exit_code("ablation", work)
    except FloatingPointError as exc:
        say(f"ablation: {exc}")
    except KeyboardInterrupt:
        say(f"ablation: interrupted; the same command goes on from {args.out}")
    return 1


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="data set with test images and masks")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of all runs; gone on with if it exists")
    parser.add_argument("--table", choices=TABLES, nargs="+", default=list(TABLES), help="(default: all)")
    parser.add_argument("--seeds", type=positive, default=3, help="runs of each variant (default: 3)")
    parser.add_argument("--preset", choices=PRESETS, help="(default: ResNet18 and one block a stage)")
    parser.add_argument("--size", type=positive, default=128, help="input height and width (default: 128)")
    parser.add_argument("--epochs", type=positive, default=6, help="of every run (default: 6)")
    parser.add_argument("--batch-size", type=positive, default=16, help="images per step (default: 16)")
    parser.add_argument("--backbone-weights", help="(default: procedural; with --preset: imagenet)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    args = parser.parse_args(argv)
    args.backbone_weights = args.backbone_weights or ("imagenet" if args.preset else "procedural")
    return args


# ---- runs


def open_report(args: argparse.Namespace) -> dict:
    """The runs so far. InputError if they are of other settings: their numbers do not compare."""
    config = PRESETS[args.preset] if args.preset else SMALLEST
    settings = {
        "model": replace(config, height=args.size, width=args.size).to_dict(),
        "data": args.data.resolve().name,
        "epochs": args.epochs,
        "batch_size": args.batch_size,
        "backbone_weights": args.backbone_weights,
        "device": choose_device(args.device).type,
    }
    if not args.out.exists():
        return {"schema": SCHEMA, "header": facts(), "settings": settings, "runs": []}
    report = json.loads(args.out.read_text(encoding="utf-8"))
    different = differences(report["settings"], settings)
    if different:
        raise InputError(f"{args.out} holds runs with other settings: {'; '.join(different)}")
    return report


def sweep(args: argparse.Namespace, report: dict) -> None:
    """Train and measure what `report` still lacks; write it after every run."""
    base = ModelConfig(**report["settings"]["model"])
    wanted = {(config, seed): None for seed in range(args.seeds) for config in variants(args.table, base)}
    done = {(ModelConfig(**run["model"]), run["seed"]) for run in report["runs"]}
    lacking = [turn for turn in wanted if turn not in done]
    if not lacking:
        return
    bench = Bench(args, base)
    for name, value in bench.facts.items():
        if report.setdefault(name, value) != value:
            raise InputError(f"{args.out}: {name} was {report[name]}, now {value}; the runs would not compare")
    for index, (config, seed) in enumerate(lacking, 1):
        run = bench.run(config, seed)
        report["runs"].append(run)
        write_json(args.out, report)
        what = ", ".join(f"{name} {getattr(config, name)}" for name, _ in TABLES.values())
        aurocs = ", ".join(f"{p['product']} {p['image_auroc']:.3f}" for p in run["products"])
        say(
            f"run {index} of {len(lacking)}: {what}, seed {seed}: loss {run['loss']:.4f}, image AUROC {aurocs}, "
            f"{run['train_s']:.0f} s"
        )


def variants(tables: list[str], base: ModelConfig) -> list[ModelConfig]:
    """The tables' variants, each once; the base is in every table."""
    rows = (replace(base, **{field: value}) for field, values in map(TABLES.get, tables) for value in values)
    return list(dict.fromkeys(rows))


@dataclass(frozen=True)
class Split:
    """Images and the teacher's features of them, on the CPU in fp32."""

    images: Images
    features: list[Tensor]


class Bench:
    """Data and teacher's features that all runs share. facts: what must be the same to go on with a report."""

    def __init__(self, args: argparse.Namespace, base: ModelConfig) -> None:
        self.epochs, self.batch_size = args.epochs, args.batch_size
        self.world = World(choose_device(args.device))
        teacher = OmniAD(base).teacher
        backbone = load_backbone(teacher, base.backbone, args.backbone_weights)
        teacher.to(self.world.device, memory_format=torch.channels_last)
        samples = find_samples(args.data, "test")
        if not samples:
            raise DataError(f"{args.data}: expected test images (PRODUCT/test/KIND/*), there are none")
        good = load_good_images(args.data, base.height, base.width, "stop", shown=True)
        test = load_images(samples, base.height, base.width)
        self.good = Split(good, self.features(teacher, good.pixels))
        self.test = Split(test, self.features(teacher, test.pixels))
        self.masks = load_masks(samples, base.height, base.width)
        digests = [file_sha256(sample.path)[:16] for sample in (*good.samples, *samples)]
        self.facts = {"backbone": backbone, "images": digests}

    @torch.no_grad()
    def features(self, teacher: ResNet, pixels: np.ndarray) -> list[Tensor]:
        parts = []
        for chunk in torch.from_numpy(pixels).split(CHUNK):
            image = normalise(chunk.to(self.world.device), next(teacher.parameters()))
            part = teacher(image.contiguous(memory_format=torch.channels_last))
            if not parts:
                needed = sum(f[0].nbytes for f in part) * len(pixels)
                check_memory(f"the features of {len(pixels)} images", needed)
            parts.append([f.cpu() for f in part])
        return [torch.cat(scale) for scale in zip(*parts, strict=True)]

    def run(self, config: ModelConfig, seed: int) -> dict:
        torch.manual_seed(seed)
        model = OmniAD(config)
        started = monotonic()
        loss = self.train(model, seed)
        trained = monotonic()
        products = self.measure(model)
        return {
            "model": config.to_dict(),
            "seed": seed,
            "parameters": sum(p.numel() for part in (model.neck, model.decoder) for p in part.parameters()),
            "loss": loss,
            "train_s": round(trained - started, 2),
            "measure_s": round(monotonic() - trained, 2),
            "products": products,
        }

    def train(self, model: OmniAD, seed: int) -> float:
        """The mean loss of the last epoch."""
        pixels = self.good.images.pixels
        trainer = Trainer(model, pixels, np.arange(len(pixels)), np.arange(0), self.batch_size, self.world)
        trainer.cached = self.good.features
        for epoch in range(1, self.epochs + 1):
            torch.manual_seed(seed + 1_000_003 * epoch)  # the same order and noise for every variant
            *_, (_, loss) = trainer.epoch(learning_rate(epoch, self.epochs))
        return loss

    @torch.no_grad()
    def measure(self, model: OmniAD) -> list[dict]:
        """The metrics of every product, then their mean; null where there is no such metric."""
        model.eval()
        maps = []
        for chunk in zip(*(f.split(CHUNK) for f in self.test.features), strict=True):
            features = tuple(f.to(self.world.device) for f in chunk)
            maps.append(anomaly_map(features, model.student(features), *self.masks.shape[1:]).cpu())
        maps = torch.cat(maps).numpy()
        predictions = Predictions(self.test.images, maps, maps.max((1, 2)))
        labels, scores = predictions.labels, predictions.pred_scores
        measured = []
        for product in predictions.products:
            of = predictions.of(product)
            measured.append(evaluate_maps(product, maps[of], self.masks[of], scores[of], labels[of]))
        rows = [metrics.to_dict() for metrics in (*measured, mean_metrics(measured))]
        return [{k: None if v != v else v for k, v in row.items()} for row in rows]


# ---- tables


def print_tables(args: argparse.Namespace, report: dict) -> None:
    base = ModelConfig(**report["settings"]["model"])
    print_header(report)
    for table in args.table:
        field, values = TABLES[table]
        heads = "".join(f"{head:>15}" for head in METRICS.values())
        print(f"\n{table:<10}{'product':<20}{heads}{'parameters M':>15}{'train s':>9}")
        for value in values:
            runs = runs_of(report, replace(base, **{field: value}), args.seeds)
            for product in (row["product"] for row in runs[0]["products"]):
                cells = "".join(f"{spread(column(runs, product, name)):>15}" for name in METRICS)
                print(f"{value!s:<10}{product:<20}{cells}", end="")
                if product == "mean":
                    seconds = np.median([run["train_s"] for run in runs])
                    print(f"{runs[0]['parameters'] / 1e6:15.2f}{seconds:9.1f}", end="")
                print()
        print_differences(table, report, base, args.seeds)
    print("\nmetrics in %, mean and standard deviation over the seeds; parameters: of the neck and the decoder")


def print_header(report: dict) -> None:
    settings, header = report["settings"], report["header"]
    model = settings["model"]
    print(f"{header['date']}  commit {header['commit']}  {header['cpu']}, {settings['device']}")
    print(f"{model['backbone']} ({report['backbone']}), depths {model['depths']}, {model['height']} px, ", end="")
    print(f"{settings['epochs']} epochs of batches of {settings['batch_size']}, data {settings['data']}")


def print_differences(table: str, report: dict, base: ModelConfig, seeds: int) -> None:
    """How far each variant is from the default, seed by seed: two runs of a seed share order and noise."""
    field, values = TABLES[table]
    default = runs_of(report, base, seeds)
    for value in values:
        if value == getattr(base, field):
            continue
        runs = runs_of(report, replace(base, **{field: value}), seeds)
        words = []
        for name, head in METRICS.items():
            mine, its = column(runs, "mean", name), column(default, "mean", name)
            words.append(f"{head} {spread([m - i for m, i in zip(mine, its, strict=True)], '+')}")
        print(f"{value} against {getattr(base, field)}: {', '.join(words)}")


def runs_of(report: dict, config: ModelConfig, seeds: int) -> list[dict]:
    """A variant's runs, by seed."""
    model = config.to_dict()
    runs = [run for run in report["runs"] if run["model"] == model and run["seed"] < seeds]
    return sorted(runs, key=lambda run: run["seed"])


def column(runs: list[dict], product: str, metric: str) -> list[float]:
    """One metric of a product in each run; nan where there is none."""
    rows = (row for run in runs for row in run["products"] if row["product"] == product)
    return [float("nan") if row[metric] is None else row[metric] for row in rows]


def spread(values: list[float], sign: str = "") -> str:
    """Mean and standard deviation in %."""
    if np.isnan(values).any():
        return "-"
    deviation = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):{sign}.1f}{deviation}"


if __name__ == "__main__":
    sys.exit(main())
