"""Scores of many images: for evaluation, for calibration and for the export's parity gate."""

import platform
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from .bundle import quantised_graph, read_bundle, set_thresholds
from .calibration import Calibration, calibrate
from .data import Images, Sample, find_samples, load_images, load_masks
from .engine import open_engine
from .errors import CalibrationError, DataError, InputError
from .files import file_sha256
from .image import read_image
from .metrics import ProductMetrics, evaluate_maps
from .progress import counting
from .recognition import ProductLimit, ProductSpace, Recogniser, limit_of, read_recogniser, shown_product
from .report import Case, ProductScores, choose_cases, write_report
from .result import Result, decide
from .tiles import Predict
from .training_images import check_memory


@dataclass(frozen=True)
class Predictions:
    """anomaly_maps (N, H, W), pred_scores (N,) and, where they were computed, embeddings (N, D) of `images`."""

    images: Images
    anomaly_maps: np.ndarray
    pred_scores: np.ndarray
    embeddings: np.ndarray | None = None

    def of(self, product: str) -> np.ndarray:
        """Indices of a product's images."""
        return np.flatnonzero([sample.product == product for sample in self.images.samples])

    @property
    def products(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(sample.product for sample in self.images.samples))

    @property
    def labels(self) -> np.ndarray:
        """(N,) bool, True for defective."""
        return np.array([not sample.is_good for sample in self.images.samples], dtype=bool)


def predict_images(
    predict: Predict, images: Images, batch: int = 8, progress: Callable[[int], None] | None = None
) -> Predictions:
    """Run `predict` over all images; progress is called with the number done."""
    count, height, width, _ = images.pixels.shape
    anomaly_maps, pred_scores = np.empty((count, height, width), np.float32), np.empty(count, np.float32)
    embeddings = []
    for start in range(0, count, batch):
        part = slice(start, start + batch)
        anomaly_maps[part], pred_scores[part], *embedding = predict(images.pixels[part])
        embeddings += [some for some in embedding if some is not None]
        if progress:
            progress(min(start + batch, count))
    return Predictions(images, anomaly_maps, pred_scores, np.concatenate(embeddings) if embeddings else None)


def check_maps_fit(count: int, size: tuple[int, int], maps: int = 1) -> None:
    """DataError if so many images of this size, each with so many maps and a mask, would take too much memory."""
    rows, columns = size
    needed_bytes = count * rows * columns * (3 + 4 * maps + 1)
    check_memory(f"{count} images of {rows} x {columns} and their maps", needed_bytes, error=DataError)


def evaluate(predictions: Predictions, published: bool = False) -> list[ProductMetrics]:
    """The seven metrics per product; published: see `evaluate_maps`. Raises DataError for a missing mask."""
    masks = load_masks(predictions.images.samples, *predictions.images.pixels.shape[1:3])
    metrics = []
    for product in predictions.products:
        of = predictions.of(product)
        metrics.append(
            evaluate_maps(
                product,
                predictions.anomaly_maps[of],
                masks[of],
                predictions.pred_scores[of],
                predictions.labels[of],
                published,
            )
        )
    return metrics


def calibrate_products(
    predictions: Predictions, max_false_reject: float | None = None, confidence: float = 0.95
) -> dict[str, Calibration]:
    """A calibration per product from predictions of good images.

    The map's floor is the median pixel of the product's good maps. Raises CalibrationError naming every
    product whose images cannot support the wish.
    """
    calibrations, refused = {}, []
    for product in predictions.products:
        of = predictions.of(product)
        floor = float(np.median(predictions.anomaly_maps[of]))
        try:
            calibrations[product] = calibrate(
                predictions.pred_scores[of], floor, max_false_reject, confidence, product
            )
        except CalibrationError as exc:
            refused.append(str(exc))
    if refused:
        raise CalibrationError("\n".join(refused))
    return calibrations


def first_calibrations(predictions: Predictions, data: Path, holdout: list[str]) -> dict[str, Calibration]:
    """What a model starts with: thresholds from the predictions of `held_out_samples(data, holdout)`.

    Where nothing was held out they come from images that were trained on, and say so.
    """
    covered = held_out_products(predictions, data, holdout)
    return {
        product: made if product in covered else replace(made, false_reject_bound=None, source="training")
        for product, made in calibrate_products(predictions).items()
    }


def held_out_products(predictions: Predictions, data: Path, holdout: list[str]) -> set[str]:
    """Products of which training held out images."""
    unseen = {(data / path).resolve() for path in holdout}
    return {sample.product for sample in predictions.images.samples if sample.path.resolve() in unseen}


def product_limits(
    predictions: Predictions, space: ProductSpace, used_for_fit: Container[str] = ()
) -> dict[str, ProductLimit]:
    """Of recognition, from predictions of good images with embeddings."""
    return {
        product: limit_of(
            space.own_distances(predictions.embeddings[predictions.of(product)], product), product in used_for_fit
        )
        for product in predictions.products
    }


@dataclass(frozen=True)
class Model:
    """A trained run or a bundle, ready to predict.

    size: rows and columns of the images it takes; facts: what reports say of it
    """

    predict: Predict
    size: tuple[int, int]
    calibrations: dict[str, Calibration]
    facts: dict[str, str]
    recogniser: Recogniser | None = None


def open_model(path: Path, data: Path) -> Model:
    """A bundle, or a run's folder or checkpoint, which needs torch.

    A run's thresholds come from its held-out images; `data` is where they are if the data set has moved.
    """
    if path.suffix == ".omniad":
        bundle = read_bundle(path)
        engine = open_engine(bundle)
        facts = bundle.manifest["model"] | {"engine": engine.reason}
        return Model(engine.run_all, bundle.tiling.size, bundle.products, words(facts), read_recogniser(bundle))
    from .weights import load_run

    network, facts = load_run(path)
    config, trained_from = network.config, Path(facts["data"])
    tiling = config.tiling
    predict = partial(tiling.predict, network.predict)
    data = trained_from if trained_from.is_dir() else data
    images = load_images(held_out_samples(data, facts["holdout"]), *tiling.size)
    calibrations = first_calibrations(predict_images(predict, images), data, facts["holdout"])
    facts = config.to_dict() | {"backbone_weights": facts["backbone"], "engine": "torch in fp32"}
    return Model(predict, tiling.size, calibrations, words(facts))


def words(facts: dict) -> dict[str, str]:
    words = {name.replace("_", " "): str(value) for name, value in facts.items()}
    return words | {"machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}"}


def held_out_samples(data: Path, holdout: list[str]) -> list[Sample]:
    """The good images of `data` that training held out; all good ones of a product of which it held out none.

    holdout: paths relative to the data set. Raises DataError if one is not there.
    """
    if not data.is_dir():
        raise DataError(f"{data}: the data set that was trained on is not there; give its new place with --data")
    samples = find_samples(data, "train")
    wanted = {(data / path).resolve() for path in holdout}
    found = [sample for sample in samples if sample.path.resolve() in wanted]
    if len(found) < len(wanted):
        raise DataError(
            f"{data}: {len(wanted) - len(found)} of the {len(wanted)} images held out of training are not there; "
            "give the data set that was trained on with --data"
        )
    covered = {sample.product for sample in found}  # not those of a single image, which is trained on
    return [s for s in samples if s.product not in covered or s.path.resolve() in wanted]


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_model` measured; facts go on top of reports."""

    metrics: list[ProductMetrics]
    predictions: Predictions
    calibrations: dict[str, Calibration]
    facts: dict[str, str]


def evaluate_model(path: Path, data: Path, published: bool = False) -> Evaluation:
    """Run a model over the test images of a data set and measure detection. Raises DataError without any."""
    model = open_model(path, data)
    samples = find_samples(data, "test")
    if not samples:
        raise DataError(f"{data}: expected test images (PRODUCT/test/KIND/*), there are none")
    check_maps_fit(len(samples), model.size)
    with counting("inspecting", len(samples)) as progress:
        images = load_images(samples, *model.size)
        predictions = predict_images(model.predict, images, progress=progress)
    form = "published grids" if published else "exact"
    facts = {"data": str(data), "pixel F1-max and AUPRO": form, **recognised(predictions, model.recogniser)}
    facts |= model.facts
    return Evaluation(evaluate(predictions, published), predictions, model.calibrations, facts)


def recognised(predictions: Predictions, recogniser: Recogniser | None) -> dict[str, str]:
    """For people: how many of the images are recognised as what they are; empty where nothing recognises them."""
    if recogniser is None or predictions.embeddings is None:
        return {}
    samples, ratios = predictions.images.samples, recogniser.ratios(predictions.embeddings)
    right = np.array([shown_product(r, s.product) == s.product for r, s in zip(ratios, samples, strict=True)])
    good = ~predictions.labels
    of = (f"{right[some].sum()} of {some.sum()} {kind}" for kind, some in (("good", good), ("defective", ~good)))
    return {"product recognised": ", ".join(of)}


def report_evaluation(
    path: Path, title: str, evaluation: Evaluation, latency: dict[str, str] | None = None
) -> None:
    """The HTML report of an evaluation, with pictures of the worst misses and of each kind."""
    predictions, calibrations = evaluation.predictions, evaluation.calibrations
    scores, cases = [], []
    for product in predictions.products:
        if product not in calibrations:
            raise InputError(f"product {product!r}: expected one of the model's: {', '.join(calibrations)}")
        of, calibration = predictions.of(product), calibrations[product]
        product_scores = predictions.pred_scores[of]
        scores.append(ProductScores(product, product_scores, predictions.labels[of], calibration.threshold))
        kinds = [predictions.images.samples[i].kind for i in of]
        for chosen in choose_cases(kinds, product_scores, calibration.threshold):
            cases.append(case_of(predictions, int(of[chosen]), calibration))
    write_report(path, title, evaluation.facts, evaluation.metrics, scores, cases, latency)


def case_of(predictions: Predictions, index: int, calibration: Calibration) -> Case:
    """One image with its overlay for the report."""
    sample = predictions.images.samples[index]
    frame = read_image(sample.path)
    decision = decide(
        predictions.anomaly_maps[index], predictions.pred_scores[index], calibration, *frame.shape[:2]
    )
    result = Result(
        **decision, product=sample.product, product_assumed=False, speed_ms={}, backend="", precision=""
    )
    overlay = result.draw(frame)
    return Case(frame, overlay, sample.product, sample.kind, result.pred_score, result.threshold, str(sample.path))


def calibrate_bundle(
    bundle: Path,
    good: Path,
    max_false_reject: float | None = None,
    confidence: float = 0.95,
    backend: str = "auto",
    precision: str = "auto",
) -> tuple[dict[str, Calibration], dict[str, ProductLimit], int]:
    """Set thresholds and limits of recognition of the products in `good` from its images.

    The bundle is replaced atomically.

    good: data set of good images (PRODUCT/good/*); images the model was trained on score too low and are left
    out. backend, precision: of the engine that scores them, as for `open_engine`; in 8 bits both are its graph's.
    Returns the products' calibrations and limits, and the number left out. Raises InputError for a product the
    bundle does not have, CalibrationError if the images cannot support the wish.
    """
    contents = read_bundle(bundle)
    trained_on = set(contents.manifest["trained_on"])
    samples = find_samples(good, "train")
    unknown = {sample.product for sample in samples} - set(contents.products)
    if unknown:
        raise InputError(
            f"{good}: product {', '.join(sorted(unknown))}: the bundle has {', '.join(contents.products)}"
        )
    unseen = [sample for sample in samples if file_sha256(sample.path)[:16] not in trained_on]
    empty = {sample.product for sample in samples} - {sample.product for sample in unseen}
    if empty:
        raise CalibrationError(
            f"{good}: every image of {', '.join(sorted(empty))} was trained on and scores too low to calibrate "
            "with; bring good images the model has not seen"
        )
    engine = open_engine(contents, backend, precision)
    check_maps_fit(len(unseen), contents.tiling.size)
    with counting("inspecting", len(unseen)) as progress:
        images = load_images(unseen, *contents.tiling.size)
        predictions = predict_images(engine.run_all, images, progress=progress)
    calibrations = calibrate_products(predictions, max_false_reject, confidence)
    graph = quantised_graph(engine.backend, engine.precision)
    limits = {name: limit for name, limit in contents.recognition_of(graph).items() if name in calibrations}
    recogniser = read_recogniser(contents, graph)
    if recogniser is not None and predictions.embeddings is not None:
        limits = product_limits(predictions, recogniser.space)
    action = f"calibrated with {engine.backend} in {engine.precision}"
    set_thresholds(bundle, calibrations, action, limits, graph)
    return calibrations, limits, len(samples) - len(unseen)
