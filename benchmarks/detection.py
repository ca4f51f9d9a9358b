"""What a trained network, its engines and the peers find in the same test images, product by product."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import numpy as np
from peer_runs import Peers

from omniad_edge.bundle import Bundle, read_bundle
from omniad_edge.data import Sample, find_samples, load_images
from omniad_edge.engine import Engine, OnnxRuntimeEngine, open_engine
from omniad_edge.errors import InputError, OmniADError
from omniad_edge.evaluate import Predict, Predictions, evaluate, predict_images
from omniad_edge.export.bundle_export import export_bundle
from omniad_edge.export.parity import verdict_flips
from omniad_edge.files import file_sha256
from omniad_edge.fused import device_architecture
from omniad_edge.metrics import ProductMetrics, mean_metrics
from omniad_edge.model import ModelConfig
from omniad_edge.progress import say
from omniad_edge.weights import checkpoint_of

REFERENCE = "torch fp32"
ENGINES = (
    ("onnxruntime", "fp32"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("fused", "fp16"),
    ("tensorrt", "fp16"),
)
QUANTISED = {"int8": ("onnxruntime", "openvino", "tensorrt"), "fp8": ("tensorrt",)}  # of bundles with such a graph


@dataclass
class Method:
    """name; models: how many stand for all products; of each product its metrics and changes.

    changes: from the reference: verdict_flips (images; every product's threshold is at its highest good score, on
    either side), image_auroc, pixel_auroc and map (the largest difference). Empty for the reference and peers.
    """

    name: str
    models: int
    metrics: list[ProductMetrics] = field(default_factory=list)
    changes: list[dict] = field(default_factory=list)

    def to_dict(self) -> dict:
        """JSON-safe: mean over the products, the changes of all (flips added, else the largest), products."""
        products = [as_json(one) for one in self.metrics]
        report = {"name": self.name, "models": self.models, "mean": as_json(mean_metrics(self.metrics))}
        if self.changes:
            products = [one | {"changes": change} for one, change in zip(products, self.changes, strict=True)]
            report["changes"] = {name: combined(name, self.changes) for name in self.changes[0]}
        return report | {"products": products}


def as_json(metrics: ProductMetrics) -> dict:
    return {name: None if value != value else value for name, value in metrics.to_dict().items()}  # nan


def combined(name: str, changes: list[dict]) -> float | None:
    values = [change[name] for change in changes if change[name] is not None]
    return (sum(values) if name == "verdict_flips" else max(values)) if values else None


# ---- what is compared


def exported(run: Path, data: Path, out: Path) -> Bundle:
    """The run's bundle, with kernels for this machine's GPU if it has one. Raises ExportError."""
    arch = device_architecture()
    targets = (f"sm_{arch}",) if arch and find_spec("triton") else ()
    say(f"exporting {run}")
    export_bundle(run, out, fp16=True, data=data, targets=targets)
    return read_bundle(out)


def bundle_of_run(path: Path, run: Path) -> Bundle:
    """A bundle that was exported before. Raises InputError if it is not this run's, or does not say whose it is.

    The checkpoint's digest tells: two runs on the same images may differ in their weights alone.
    """
    bundle = read_bundle(path)
    made_of = bundle.manifest.get("checkpoint")
    if made_of is None:
        raise InputError(f"{path}: expected a bundle that names its run; it is from before that: export it again")
    if made_of != file_sha256(checkpoint_of(run)):
        raise InputError(f"{path}: expected the bundle of the run that is measured, {run}; it is of another")
    return bundle


def open_engines(bundle: Bundle, threads: int) -> tuple[dict[str, Engine], dict[str, str]]:
    """The engines that run here, by name; and of the others, why not.

    Also the fp16 graph in ONNX Runtime on the CPU: a GPU's arithmetic without a GPU.
    """
    engines, left_out = {}, {}
    quantised = [
        (backend, precision)
        for precision, backends in QUANTISED.items()
        for backend in backends
        if f"graphs/{precision}.onnx" in bundle.parts
    ]
    for backend, precision in (*ENGINES, *quantised):
        name = f"{backend} {precision}"
        try:
            engines[name] = open_engine(bundle, backend, precision, threads)
        except OmniADError as exc:
            left_out[name] = str(exc)
    if "graphs/fp16.onnx" in bundle.parts:
        engines["onnxruntime, fp16 graph"] = OnnxRuntimeEngine(bundle.onnx("fp16"), threads)
    return engines, left_out


def training_samples(data: Path, run_facts: dict, test: list[Sample]) -> dict[str, list[Sample]]:
    """Of each tested product the good images that the run was trained on. InputError for one it was not."""
    held_out = {(data / path).resolve() for path in run_facts["holdout"]}
    used = {
        product: [sample for sample in samples if sample.path.resolve() not in held_out]
        for product, samples in by_product(find_samples(data, "train"))
    }
    tested = dict.fromkeys(sample.product for sample in test)
    if strangers := [product for product in tested if product not in run_facts["products"]]:
        trained = ", ".join(run_facts["products"])
        raise InputError(f"{data}: {', '.join(strangers)}: the run was trained on {trained}; give its data set")
    return {product: used[product] for product in tested}


def by_product(samples: list[Sample]) -> Iterator[tuple[str, list[Sample]]]:
    return ((product, list(group)) for product, group in groupby(samples, key=lambda sample: sample.product))


# ---- the measurement


def measure_products(
    predicts: dict[str, Predict],
    samples: list[Sample],
    training: dict[str, list[Sample]],
    config: ModelConfig,
    peers: Peers | None,
    published: bool,
) -> tuple[list[Method], list[ProductMetrics]]:
    """Every method on the test images; and if published, the first in the published evaluator's form.

    predicts: by name, the reference first. One product after the other: a data set's maps may not fit in memory.
    """
    methods = {name: Method(name, models=1) for name in predicts}
    in_published_form = []
    for product, of_product in by_product(samples):
        say(f"{product}: {len(of_product)} test images")
        images = load_images(of_product, config.height, config.width)
        reference = None
        for name, predict in predicts.items():
            predictions = predict_images(predict, images)
            [metrics] = evaluate(predictions)
            methods[name].metrics.append(metrics)
            if reference is None:
                reference, reference_metrics = predictions, metrics
            else:
                moved = changes(reference, predictions, reference_metrics, metrics)
                methods[name].changes.append(moved)
        if published:
            in_published_form += evaluate(reference, published=True)
        if peers:
            train = load_images(training[product], config.height, config.width)
            for name, predictions in peers.fit(product, train, images).items():
                method = methods.setdefault(name, Method(name, models=len(training)))
                method.metrics += evaluate(predictions)
    return list(methods.values()), in_published_form


def changes(
    reference: Predictions, predictions: Predictions, of_reference: ProductMetrics, metrics: ProductMetrics
) -> dict:
    """See Method; None of what one product's images cannot tell."""
    moved = {"verdict_flips": None}
    if not reference.labels.all():
        share = verdict_flips(reference, predictions, allowed_error=0.0)
        moved["verdict_flips"] = round(share * len(reference.labels))
    for name in ("image_auroc", "pixel_auroc"):
        difference = abs(getattr(metrics, name) - getattr(of_reference, name))
        moved[name] = None if np.isnan(difference) else difference
    return moved | {"map": float(np.abs(predictions.anomaly_maps - reference.anomaly_maps).max())}
