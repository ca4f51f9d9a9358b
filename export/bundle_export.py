"""A training run in, a bundle out: fold, build the graphs, pass the parity gate, calibrate, write."""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np

from ..bundle import describe_input, write_bundle
from ..calibration import Calibration
from ..data import Images, Sample, find_samples, load_images, load_masks
from ..engine import OnnxRuntimeEngine, OpenVinoEngine, cpu_has_bf16
from ..errors import DataError, ExportError, MissingDependencyError
from ..evaluate import (
    Predictions,
    check_maps_fit,
    first_calibrations,
    good_samples,
    held_out_products,
    held_out_samples,
    predict_images,
    product_limits,
)
from ..files import check_writable, file_sha256
from ..kernels.fold import fold
from ..model import OmniAD
from ..recognition import LIGHT_COPIES, RECOGNITION, ProductLimit, ProductSpace, fit, other_light
from ..self_test import SELF_TEST
from ..tiles import AT_ONCE, Tiling
from ..versions import versions
from ..weights import checkpoint_of, load_run
from .cubins import check_targets
from .fused_parts import fused_parts, self_test
from .onnx_graph import build_graph, weights_message
from .parity import DETECTION_LIMITS, compare, good_only
from .quantised_graph import FORMATS, activation_ranges, build_quantised_graph

FITTED_IMAGES = 50  # of each product, for recognising it
IMAGES_PER_KIND = 32  # of each product, good and defective, that the gate looks at
CALIBRATION_IMAGES = 48  # that show which range each tensor has

Calibrated = tuple[dict[str, Calibration], dict[str, ProductLimit]]  # first thresholds and limits per product


@dataclass(frozen=True)
class ExportReport:
    """path of the bundle, its size, the gate's report per engine, the first thresholds and limits per product."""

    path: Path
    size_bytes: int
    engines: dict[str, dict]
    calibrations: dict[str, Calibration]
    recognition: dict[str, ProductLimit]


def export_bundle(
    run: str | Path,
    out: str | Path,
    fp16: bool = False,
    data: str | Path | None = None,
    targets: Sequence[str] = (),
    report: Callable[[str, dict], None] | None = None,
    progress: Callable[[str], None] | None = None,
    quantise: str | None = None,
) -> ExportReport:
    """Write the bundle of a training run.

    run:      folder of `train`, or a checkpoint file
    fp16:     store matrices in fp16 and add the graph that computes in it, for GPUs; CPUs compute in fp32 still
    data:     the data set, where it is no longer at the place it was trained from
    targets:  GPU architectures to compile the fused engine's kernels for, like "sm_87"; they need fp16
    report:   called with each engine's name and its parity report as soon as it is known
    progress: called with a line for each architecture that is compiled
    quantise: "int8" adds the graph that computes in it, and with fp16 another for TensorRT; "fp8" adds one for
              TensorRT and needs fp16. Both need test images with defects and masks, to measure what they lose

    The gate compares every engine that can run here with the trained network, on good images that were not
    trained on (or on training images, where none were held out) and on test images if there are any. Raises
    ExportError, and writes nothing, if one is beyond its limits, which differ for int8 and fp8; bf16 may fail, it
    is then refused at run time.
    """
    if targets and not fp16:
        raise ExportError("targets: the fused kernels compute in fp16; export with --fp16 too")
    if quantise == "fp8" and not fp16:
        raise ExportError("fp8 is computed by TensorRT, in a graph of fp16; export with --fp16 too")
    check_targets(targets)
    check_writable(Path(out), is_folder=False)  # before the minutes that the gate takes
    model, facts = load_run(run)
    config, data = model.config, Path(data or facts["data"])
    samples = good_samples(data, facts)
    good, test = held_out_samples(samples, data, facts["holdout"]), test_samples(data)
    if quantise:
        check_measurable(test, quantise)
    check_maps_fit(len(good + test), config.tiling.size, maps=3)  # trained network, default engine, one more
    images = load_images(good + test, *config.tiling.size)
    network = fold(model)
    cpu, weights = build_graph(network, half=False, half_weights=fp16)
    parts = {"graphs/cpu.onnx": cpu, "weights.onnx": weights_message(weights)}
    if fp16:
        parts["graphs/fp16.onnx"], _ = build_graph(network, half=True, half_weights=True)
    graphs = {None: [], "int8": ["int8", "int8_fp16"] if fp16 else ["int8"], "fp8": ["fp8"]}[quantise]
    if graphs:
        ranges = activation_ranges(network, calibration_pixels(calibration_samples(samples, good), config.tiling))
        parts |= {f"graphs/{name}.onnx": build_quantised_graph(network, name, fp16, ranges) for name in graphs}

    space = fit_products(model, samples, good)
    parts[RECOGNITION] = space.to_bytes()

    def calibrate(predictions: Predictions) -> Calibrated:
        held_out = good_only(first(predictions, len(good)))
        calibrations = first_calibrations(held_out, data, facts["holdout"])
        used = set(calibrations) - held_out_products(held_out, data, facts["holdout"])
        return calibrations, product_limits(held_out, space, used)

    engines, reference, predictions, quantised = pass_gate(model, images, parts, space, calibrate, report)
    if fp16:
        parts[SELF_TEST] = self_test(reference, model)
    if targets:
        parts |= fused_parts(network, targets, progress)
    calibrations, limits = calibrate(predictions)
    of_graphs = {name: quantised[f"onnxruntime {name}"] for name in graphs}
    manifest = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "model": config.to_dict() | {"backbone_weights": facts["backbone"]},
        "precision": "fp16" if fp16 else "fp32",
        "input": describe_input(config.tiling),
        "outputs": ["anomaly_map", "pred_score", "embedding"],
        "products": entries(calibrations),
        "quantised": {name: entries(made) for name, (made, _) in of_graphs.items()},
        "recognition": limit_entries(limits),
        "quantised_recognition": {name: limit_entries(made) for name, (_, made) in of_graphs.items()},
        "parity": {"engines": engines},
        "trained_on": facts["trained_on"],
        "checkpoint": file_sha256(checkpoint_of(run)),
        "history": [],
    }
    out = Path(out)
    write_bundle(out, manifest, parts)
    return ExportReport(out, out.stat().st_size, engines, calibrations, limits)


def entries(calibrations: dict[str, Calibration]) -> dict[str, dict]:
    return {product: calibration.to_dict() for product, calibration in calibrations.items()}


def limit_entries(limits: dict[str, ProductLimit]) -> dict[str, dict]:
    return {product: asdict(limit) for product, limit in limits.items()}


def fit_products(model: OmniAD, samples: list[Sample], held_out: list[Sample]) -> ProductSpace:
    """From at most FITTED_IMAGES of each product's good images, those held out only where there are no others."""
    pick, unfit = random.Random(0), {sample.path.resolve() for sample in held_out}
    trained = [sample for sample in samples if sample.path.resolve() not in unfit]
    rng, embeddings = np.random.default_rng(0), {}
    for product in dict.fromkeys(sample.product for sample in samples):
        of = [s for s in trained if s.product == product] or [s for s in samples if s.product == product]
        originals, copies = [], []
        for sample in pick.sample(of, min(len(of), FITTED_IMAGES)):
            # One at a time: an image that is seen in tiles takes up to 800 MB.
            (image,) = load_images([sample], *model.config.tiling.size).pixels
            originals.append(embed(model, image))
            copies += [embed(model, other_light(image, rng)) for _ in range(LIGHT_COPIES)]
        embeddings[product] = np.stack(originals + copies)
    return fit(embeddings)


def embed(model: OmniAD, image: np.ndarray) -> np.ndarray:
    """(rows, columns, 3) uint8 RGB -> (D,): the mean of its tiles, as `Tiling.predict` gives it."""
    tiles = model.config.tiling.cut(image)
    return np.concatenate([model.embed(tiles[i : i + AT_ONCE]) for i in range(0, len(tiles), AT_ONCE)]).mean(0)


def test_samples(data: Path) -> list[Sample]:
    """Test images for the gate, good and defective, at most IMAGES_PER_KIND of each and product."""
    pick = random.Random(0)
    by_kind = groupby(sorted(find_samples(data, "test"), key=gate_kind), gate_kind)
    return [sample for _, kind in by_kind for sample in limited(list(kind), pick)]


def calibration_samples(samples: list[Sample], held_out: list[Sample]) -> list[Sample]:
    """Good images of all products for the ranges of 8 bits. Trained on: thresholds come from the held out ones."""
    samples = [sample for sample in samples if sample not in held_out] or samples
    spread = np.linspace(0, len(samples) - 1, min(len(samples), CALIBRATION_IMAGES)).astype(int)
    return [samples[index] for index in spread]  # sorted by product: each is seen as much


def calibration_pixels(samples: list[Sample], tiling: Tiling) -> np.ndarray:
    """(N, H, W, 3) uint8 RGB as the network sees these images: whole, or as many of their tiles as they are."""
    tiles = np.concatenate([tiling.cut(image) for image in load_images(samples, *tiling.size).pixels])
    return tiles[np.linspace(0, len(tiles) - 1, len(samples)).astype(int)]


def check_measurable(test: list[Sample], precision: str) -> None:
    """Raises ExportError if these images cannot show what a quantised graph loses."""
    kinds = {gate_kind(sample) for sample in test}
    if not any({(product, True), (product, False)} <= kinds for product, _ in kinds):
        why = "no product has good and defective test images (PRODUCT/test/good/*, PRODUCT/test/KIND/*)"
    else:
        try:
            load_masks([sample for sample in test if not sample.is_good], 32, 32)
            return
        except DataError as exc:
            why = str(exc)
    raise ExportError(
        f"--{precision}: what it costs in detection cannot be measured: {why}; nothing was written. Add them to "
        f"the data set (--data), or export without --{precision}"
    )


def gate_kind(sample: Sample) -> tuple[str, bool]:
    return sample.product, sample.is_good


def limited(samples: list[Sample], pick: random.Random) -> list[Sample]:
    return pick.sample(samples, IMAGES_PER_KIND) if len(samples) > IMAGES_PER_KIND else samples


def pass_gate(
    model: OmniAD,
    images: Images,
    parts: dict[str, bytes],
    space: ProductSpace,
    calibrate: Callable[[Predictions], Calibrated],
    report: Callable[[str, dict], None] | None,
) -> tuple[dict[str, dict], Predictions, Predictions, dict[str, Calibrated]]:
    """Reports of all engines; the predictions of the trained network and of the default engine, ONNX Runtime; and
    what `calibrate` makes of those of each engine in 8 bits."""
    tiling = model.config.tiling
    reference = predict_images(partial(tiling.predict, model.predict_all), images)
    reports, failures, lossy, quantised, default = {}, [], [], {}, None
    for name, precision, predict in candidates(parts):
        predictions = predict_images(partial(tiling.predict, predict), images)
        default = default or predictions
        reports[name] = compare(reference, predictions, precision, space)
        if report:
            report(name, reports[name])
        if precision != "bf16":
            found = lossy if precision in DETECTION_LIMITS else failures
            found += [f"{name}: {failure}" for failure in reports[name]["failures"]]
        if precision in DETECTION_LIMITS and reports[name]["passed"]:
            quantised[name] = calibrate(predictions)
    if failures:
        raise ExportError(
            "the export is not the trained network any more; nothing was written. " + "; ".join(failures)
        )
    if lossy:
        raise ExportError(
            "in 8 bits this network detects too much worse; nothing was written. Export without --int8 and --fp8; "
            "TensorRT's int8 is left out where --fp16 is. " + "; ".join(lossy)
        )
    return reports, reference, default, quantised


def candidates(parts: dict[str, bytes]):
    """(name, precision, predict) of every engine that this machine can run."""
    model = parts["graphs/cpu.onnx"] + parts["weights.onnx"]
    yield "onnxruntime fp32", "fp32", OnnxRuntimeEngine(model).run_all
    if "graphs/fp16.onnx" in parts:
        half = parts["graphs/fp16.onnx"] + parts["weights.onnx"]
        yield "onnxruntime fp16", "fp16", OnnxRuntimeEngine(half).run_all
    quantised = {name: parts[f"graphs/{name}.onnx"] for name in FORMATS if f"graphs/{name}.onnx" in parts}
    for name, graph in quantised.items():
        # Those for a GPU node by node: this is the arithmetic that TensorRT is asked for.
        engine = OnnxRuntimeEngine(graph + parts["weights.onnx"], as_written=FORMATS[name].half)
        yield f"onnxruntime {name}", name.removesuffix("_fp16"), engine.run_all
    try:
        precisions = ("fp32", "bf16") if cpu_has_bf16() else ("fp32",)
    except MissingDependencyError:
        return
    for precision in precisions:
        yield f"openvino {precision}", precision, OpenVinoEngine(model, precision).run_all
    if "int8" in quantised:
        yield "openvino int8", "int8", OpenVinoEngine(quantised["int8"] + parts["weights.onnx"], "int8").run_all


def first(predictions: Predictions, count: int) -> Predictions:
    images = predictions.images
    images = Images(images.pixels[:count], images.samples[:count], images.broken)
    embeddings = predictions.embeddings
    embeddings = None if embeddings is None else embeddings[:count]
    return Predictions(images, predictions.anomaly_maps[:count], predictions.pred_scores[:count], embeddings)
