"""Recognising products, with each product left out in turn: the others are fitted, and it has to be unknown.

    python benchmarks/unknown_product.py --data DATA [DATA ...] --json FILE

DATA are data sets as for `omniad train`, with test images; `omniad demo` leaves one in demo/line/data. Only the
teacher's features count, so nothing is trained: --backbone-weights says of which weights.
"""

import argparse
import random
import sys
from pathlib import Path

import numpy as np
from command import exit_code, make_parser, positive, write_json
from machine import facts
from rich.console import Console
from rich.table import Table

from omniad_edge.data import Sample, find_samples, load_images
from omniad_edge.errors import DataError
from omniad_edge.model import ModelConfig, OmniAD
from omniad_edge.progress import say
from omniad_edge.recognition import LIGHT_COPIES, Recogniser, fit, limit_of, other_light, shown_product
from omniad_edge.weights import load_backbone

SETS = ("fit", "fit in other light", "limit", "good", "good in other light", "defective")
HELD_OUT = 5  # of the training images every fifth is for the limit


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--size", type=positive, default=128, help="input size in pixels")
    parser.add_argument("--images", type=positive, default=50, help="of each product and kind at most")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--backbone-weights", default="procedural")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    return exit_code("unknown_product", lambda: measure(args))


def measure(options: argparse.Namespace) -> None:
    model = OmniAD(ModelConfig(backbone=options.backbone, height=options.size, width=options.size)).eval()
    weights = load_backbone(model.teacher, options.backbone, options.backbone_weights)
    embedded = {}
    for data in options.data:
        train, test = find_samples(data, "train"), find_samples(data, "test")
        for product in sorted({sample.product for sample in train}):
            if product in embedded:
                raise DataError(f"{data}: {product} is in two data sets; give each product once")
            of = [[sample for sample in samples if sample.product == product] for samples in (train, test)]
            if len(of[0]) < 2 or len({sample.is_good for sample in of[1]}) < 2:
                raise DataError(
                    f"{data}: {product}: expected two training images or more, and good and defective test images"
                )
            embedded[product] = embed(model, *of, options.images)
            say(f"{product}: " + ", ".join(f"{name} {len(of)}" for name, of in embedded[product].items()))
    if len(embedded) < 2:
        raise DataError(
            f"--data: expected two products or more, of which each is left out; got {', '.join(embedded)}"
        )
    rows = [leave_out(product, embedded) for product in embedded]
    show(rows)
    images = {product: {name: len(of[name]) for name in SETS} for product, of in embedded.items()}
    conditions = {"size_px": options.size, "backbone": options.backbone, "backbone_weights": weights}
    write_json(options.json, {"machine": facts(), **conditions, "images": images, "left_out": rows})


def embed(model: OmniAD, train: list[Sample], test: list[Sample], limit: int) -> dict[str, np.ndarray]:
    """Embeddings (n, D) of one product's images by what they are for."""
    pick, rng = random.Random(0), np.random.default_rng(0)
    kinds = train, [s for s in test if s.is_good], [s for s in test if not s.is_good]
    pixels = []
    for samples in kinds:
        chosen = pick.sample(samples, min(limit, len(samples)))
        pixels.append(load_images(chosen, model.config.height, model.config.width).pixels)
    trained, good, defective = pixels
    for_limit = np.arange(len(trained)) % HELD_OUT == 0
    copies = [other_light(image, rng) for image in trained[~for_limit] for _ in range(LIGHT_COPIES)]
    images = trained[~for_limit], copies, trained[for_limit], good, [other_light(g, rng) for g in good], defective
    return {name: embed_all(model, np.stack(some)) for name, some in zip(SETS, images, strict=True)}


def embed_all(model: OmniAD, pixels: np.ndarray) -> np.ndarray:
    return np.concatenate([model.embed(pixels[start : start + 8]) for start in range(0, len(pixels), 8)])


def leave_out(product: str, embedded: dict[str, dict[str, np.ndarray]]) -> dict:
    """Counts of images with this product unknown: of the others by kind, and of its own, all of them."""
    known = {name: of for name, of in embedded.items() if name != product}
    space = fit({name: np.concatenate((of["fit"], of["fit in other light"])) for name, of in known.items()})
    limits = {name: limit_of(space.own_distances(of["limit"], name)) for name, of in known.items()}
    recogniser, row = Recogniser(space, limits), {"product": product}
    for kind in SETS[3:]:
        shown = {name: names(recogniser, of[kind]) for name, of in known.items()}
        counts = [
            [sum(s == "" for s in of), sum(s not in ("", name) for s in of), len(of)] for name, of in shown.items()
        ]
        unknown, mistaken, images = map(sum, zip(*counts, strict=True))
        row[kind] = {"unknown": unknown, "taken for another": mistaken, "images": images}
    own = np.concatenate([embedded[product][kind] for kind in ("fit", "limit", "good", "defective")])
    row["left out"] = {"taken for another": sum(s != "" for s in names(recogniser, own)), "images": len(own)}
    row["left out"]["nearest"] = round(min(min(ratios.values()) for ratios in recogniser.ratios(own)), 3)
    return row


def names(recogniser: Recogniser, embeddings: np.ndarray) -> list[str]:
    return [shown_product(ratios) for ratios in recogniser.ratios(embeddings)]


def show(rows: list[dict]) -> None:
    table = Table(
        caption="of the products that are fitted: called unknown; of the one left out: taken for another"
    )
    for heading in ("left out", *SETS[3:], "left out, taken for another", "its nearest image"):
        table.add_column(heading)
    for row in rows:
        cells = [f"{row[kind]['unknown']} of {row[kind]['images']}" for kind in SETS[3:]]
        left = row["left out"]
        table.add_row(
            row["product"], *cells, f"{left['taken for another']} of {left['images']}", str(left["nearest"])
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
