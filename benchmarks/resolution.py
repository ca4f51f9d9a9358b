"""What resolution buys and costs: detection and time a frame, whole and in tiles, on a data set with test images.

    python benchmarks/resolution.py --data DATA --json resolution.json

Each case is a small network on the procedural backbone, trained for the same number of steps on as many images a
step: enough to compare cases, not to judge what the method finds. Pixels are judged at one size for all, 512x512,
to which maps are enlarged. Time is that of resizing a frame, the network (OpenVINO in fp32) and merging, all cases
in turns.
Data on stdout, progress on stderr; exit code 0, 1 failure, 2 usage.
"""

import json
import os
import sys
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from time import perf_counter

os.environ.setdefault("GOMP_SPINCOUNT", "4000")  # as the command line does, before torch is imported

import cv2
import numpy as np
import torch
from command import exit_code, make_parser, positive, write_json
from machine import facts, load_average

from omniad_edge.data import Sample, find_samples, load_images, load_masks
from omniad_edge.distributed import World
from omniad_edge.engine import Engine, OpenVinoEngine, TiledEngine
from omniad_edge.errors import DataError
from omniad_edge.evaluate import predict_images
from omniad_edge.export.onnx_graph import build_graph, weights_message
from omniad_edge.image import read_image
from omniad_edge.kernels.fold import fold
from omniad_edge.metrics import auroc, evaluate_maps
from omniad_edge.model import PRESETS, ModelConfig, OmniAD
from omniad_edge.progress import say
from omniad_edge.train import LEARNING_RATE, LR_DROP, LR_DROP_AT, Trainer
from omniad_edge.weights import load_backbone

CASES = ((128, None), (256, None), (128, 256), (256, 512))  # input size, size seen in tiles
JUDGED_PX = 512
ROUNDS = 15  # of timing, after one that warms up
SEED = 42


def configs() -> list[ModelConfig]:
    return [
        replace(PRESETS["small"], height=size, width=size, tiles=tiles and (tiles, tiles)) for size, tiles in CASES
    ]


def trained(config: ModelConfig, samples: list[Sample], steps: int, batch: int) -> OmniAD:
    """A network after so many steps on images, or tiles of them, that are drawn at random."""
    torch.manual_seed(SEED)
    model = OmniAD(config)
    load_backbone(model.teacher, config.backbone, "procedural")
    images, none = load_images(samples, *config.tiling.size), np.empty(0, int)
    seen = config.tiling.tiles_of(np.arange(len(samples)))
    trainer = Trainer(model, images.pixels, seen, none, batch, World(torch.device("cpu")))
    model.train()
    for step in range(steps):
        dropped = step >= LR_DROP_AT * steps
        trainer.optimizer.param_groups[0]["lr"] = LEARNING_RATE * (LR_DROP if dropped else 1)
        trainer.step(torch.randint(len(seen), (trainer.batch_size,)))
    return model.eval()


def opened(model: OmniAD) -> Engine:
    """OpenVINO on the folded network, as a bundle would open it."""
    graph, weights = build_graph(fold(model), half=False, half_weights=False)
    engine, tiling = OpenVinoEngine(graph + weights_message(weights)), model.config.tiling
    return engine if tiling.count == 1 else TiledEngine(engine, tiling)


def judge(engine: Engine, samples: list[Sample], masks: np.ndarray) -> dict[str, float]:
    """Mean over the products, as fractions.

    small_auroc: image AUROC of the good images and of the half of the defective ones whose defects are smaller
    """
    predictions = predict_images(engine.run, load_images(samples, *engine.input_size))
    maps = np.stack([cv2.resize(map, (JUDGED_PX, JUDGED_PX)) for map in predictions.anomaly_maps])
    scores, labels, area = predictions.pred_scores, predictions.labels, masks.sum((1, 2))
    rows = []
    for product in predictions.products:
        of = predictions.of(product)
        metrics = evaluate_maps(product, maps[of], masks[of], scores[of], labels[of])
        some = of[area[of] <= np.median(area[of][labels[of]])]
        small = auroc(scores[some], labels[some])
        rows.append((metrics.image_auroc, small, metrics.pixel_auroc, metrics.aupro))
    names = ("image_auroc", "small_auroc", "pixel_auroc", "aupro")
    return dict(zip(names, np.round(np.mean(rows, axis=0), 4).tolist(), strict=True))


def frame_ms(engines: list[Engine], frame: np.ndarray) -> list[list[float]]:
    """Of each engine, a time a round."""
    spent = [[] for _ in engines]
    for _ in range(1 + ROUNDS):
        for engine, times in zip(engines, spent, strict=True):
            start = perf_counter()
            engine.run_frames([frame])
            times.append(round(1e3 * (perf_counter() - start), 3))
    return [times[1:] for times in spent]


def measure(data: Path, steps: int, batch: int) -> list[dict]:
    training, test = find_samples(data, "train"), find_samples(data, "test")
    for product, of in groupby(test, key=lambda sample: sample.product):
        if len({sample.is_good for sample in of}) < 2:
            raise DataError(f"{data}: expected good and defective test images of {product}")
    if not test:
        raise DataError(f"{data}: expected good and defective test images; there are none")
    masks = load_masks(test, JUDGED_PX, JUDGED_PX)
    rows, engines = [], []
    for config in configs():
        start = perf_counter()
        model = trained(config, training, steps, batch)
        seconds = round(perf_counter() - start, 1)
        engines.append(opened(model))
        row = {"seen": str(config.tiling), "tiles": config.tiling.count, "train_seconds": seconds}
        rows.append(row | judge(engines[-1], test, masks))
        say(json.dumps(rows[-1]))
    frame = read_image(test[0].path)
    frame_size = f"{frame.shape[1]}x{frame.shape[0]}"
    for row, samples in zip(rows, frame_ms(engines, frame), strict=True):
        row |= {"frame": frame_size, "p50_ms": float(np.median(samples)), "samples_ms": samples}
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="data set with good and defective test images")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--steps", type=positive, default=100, help="of training each case (default: 100)")
    parser.add_argument("--batch", type=positive, default=8, help="images or tiles a step (default: 8)")
    args = parser.parse_args(argv)
    report = {"schema": 1, "machine": facts(), "load_before": load_average(), "preset": "small"}
    report |= {"backbone_weights": "procedural", "steps": args.steps, "batch": args.batch, "seed": SEED}
    report |= {"data": args.data.name, "engine": "OpenVINO fp32", "judged_px": JUDGED_PX}

    def work() -> None:
        report["rows"] = measure(args.data, args.steps, args.batch)
        report["load_after"] = load_average()
        for row in report["rows"]:
            print(json.dumps({name: value for name, value in row.items() if name != "samples_ms"}))
        write_json(args.json, report)

    return exit_code("resolution", work)


if __name__ == "__main__":
    sys.exit(main())
