"""Scores of many images: for evaluation, for calibration and for the export's parity gate."""

import platform
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from .bundle import is_bundle, quantised_graph, read_bundle, set_thresholds
from .calibration import Calibration, calibrate
from .data import Images, Sample, find_samples, load_images, load_masks
from .engine import open_engine
from .errors import CalibrationError, DataError, InputError
from .files import file_sha256
from .image import read_image
from .metrics import ProductMetrics, evaluate_maps
from .progress import counting, say
from .recognition import ProductLimit, ProductSpace, Recogniser, limit_of, read_recogniser, shown_product
from .report import Case, ProductScores, choose_cases, write_report
from .result import DEFECTIVE, GOOD, UNKNOWN_PRODUCT, WRONG_PRODUCT, Result, decide
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
    """The seven metrics per product; published: see `evaluate_maps`.

    Those of pixels are nan of a product that lacks masks. Raises DataError for a mask that cannot be read.
    """
    samples, size = predictions.images.samples, predictions.images.pixels.shape[1:3]
    metrics, lacking = [], without_masks(samples)
    for product in predictions.products:
        of = predictions.of(product)
        masks = np.zeros((len(of), *size), bool)  # no pixel to find, hence nan: from some masks it would be wrong
        if product not in lacking:
            masks = load_masks([samples[i] for i in of], *size)
        metrics.append(
            evaluate_maps(
                product,
                predictions.anomaly_maps[of],
                masks,
                predictions.pred_scores[of],
                predictions.labels[of],
                published,
            )
        )
    return metrics


def without_masks(samples: list[Sample]) -> Counter[str]:
    """How many defective images of a product have no mask; only products of which some have none."""
    return Counter(sample.product for sample in samples if not sample.is_good and sample.mask_path is None)


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
    """What a model starts with: thresholds from the predictions of `held_out_samples`.

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
    if is_bundle(path):
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
    samples = held_out_samples(good_samples(data, facts), data, facts["holdout"])
    images = load_images(samples, *tiling.size)
    calibrations = first_calibrations(predict_images(predict, images), data, facts["holdout"])
    facts = config.to_dict() | {"backbone_weights": facts["backbone"], "engine": "torch in fp32"}
    return Model(predict, tiling.size, calibrations, words(facts))


def words(facts: dict) -> dict[str, str]:
    words = {name.replace("_", " "): str(value) for name, value in facts.items()}
    return words | {"machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}"}


def good_samples(data: Path, facts: dict) -> list[Sample]:
    """The good images of `data`, less those that the run of these facts skipped as broken: they are so still.

    Raises DataError if the data set is not there.
    """
    if not data.is_dir():
        raise DataError(f"{data}: the data set that was trained on is not there; give its new place with --data")
    broken = {(data / path).resolve() for path in facts.get("broken", ())}  # older runs do not say
    return [sample for sample in find_samples(data, "train") if sample.path.resolve() not in broken]


def held_out_samples(samples: list[Sample], data: Path, holdout: list[str]) -> list[Sample]:
    """Those of `good_samples` that training held out; all of a product of which it held out none.

    holdout: paths relative to the data set. Raises DataError if one is not there.
    """
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
    """What `evaluate_model` measured; pred_labels: what `judge` says; facts go on top of reports."""

    metrics: list[ProductMetrics]
    predictions: Predictions
    pred_labels: list[str]
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
    shown = shown_products(predictions, model.recogniser)
    pred_labels = judge(predictions, model.calibrations, shown)
    facts = {"data": str(data), "pixel F1-max and AUPRO": form, **mistakes(predictions, pred_labels)}
    facts |= recognised(predictions, shown)
    if lacking := without_masks(samples):
        facts["no pixel metrics"] = ", ".join(
            f"{product}: {count} defective images without a mask" for product, count in lacking.items()
        )
    facts |= model.facts
    return Evaluation(evaluate(predictions, published), predictions, pred_labels, model.calibrations, facts)


def shown_products(predictions: Predictions, recogniser: Recogniser | None) -> list[str] | None:
    """What each image shows to who expects its own product; None where nothing recognises them."""
    if recogniser is None or predictions.embeddings is None:
        return None
    samples, ratios = predictions.images.samples, recogniser.ratios(predictions.embeddings)
    return [shown_product(ratio, sample.product) for ratio, sample in zip(ratios, samples, strict=True)]


def judge(predictions: Predictions, calibrations: dict[str, Calibration], shown: list[str] | None) -> list[str]:
    """The pred_label that a Detector gives each image when asked for the image's own product.

    shown: see `shown_products`. "" of a product that the model does not have.
    """
    products = [sample.product for sample in predictions.images.samples]
    labels = []
    for product, score, seen in zip(products, predictions.pred_scores, shown or products, strict=True):
        if product not in calibrations:
            labels.append("")
        elif seen != product:
            labels.append(WRONG_PRODUCT if seen else UNKNOWN_PRODUCT)
        else:  # in float64, as `decide` compares
            labels.append(DEFECTIVE if float(score) > calibrations[product].threshold else GOOD)
    return labels


def mistakes(predictions: Predictions, pred_labels: list[str]) -> dict[str, str]:
    """For people: how many images of the model's products are judged wrongly; empty if there is none of them."""
    judged = np.array(pred_labels) != ""
    defective, passed = predictions.labels & judged, np.array(pred_labels) == GOOD
    good = judged & ~defective
    if not judged.any():
        return {}
    return {
        "defects missed": f"{(defective & passed).sum()} of {defective.sum()}",
        "good rejected": f"{(good & ~passed).sum()} of {good.sum()}",
    }


def recognised(predictions: Predictions, shown: list[str] | None) -> dict[str, str]:
    """For people: how many of the images are recognised as what they are; empty where nothing recognises them."""
    if shown is None:
        return {}
    right = np.array(
        [seen == sample.product for seen, sample in zip(shown, predictions.images.samples, strict=True)]
    )
    good = ~predictions.labels
    of = (f"{right[some].sum()} of {some.sum()} {kind}" for kind, some in (("good", good), ("defective", ~good)))
    return {"product recognised": ", ".join(of)}


def report_evaluation(
    path: Path, title: str, evaluation: Evaluation, latency: dict[str, str] | None = None
) -> None:
    """The HTML report of an evaluation, with pictures of the worst misses and of each kind."""
    predictions, calibrations = evaluation.predictions, evaluation.calibrations
    rejected = np.array(evaluation.pred_labels) != GOOD
    scores, cases = [], []
    for product in predictions.products:
        if product not in calibrations:
            raise InputError(f"product {product!r}: expected one of the model's: {', '.join(calibrations)}")
        of, calibration = predictions.of(product), calibrations[product]
        product_scores = predictions.pred_scores[of]
        scores.append(
            ProductScores(product, product_scores, predictions.labels[of], calibration.threshold, rejected[of])
        )
        kinds = [predictions.images.samples[i].kind for i in of]
        for chosen in choose_cases(kinds, product_scores, rejected[of]):
            index = int(of[chosen])
            cases.append(case_of(predictions, index, calibration, evaluation.pred_labels[index]))
    write_report(path, title, evaluation.facts, evaluation.metrics, scores, cases, latency)


def case_of(predictions: Predictions, index: int, calibration: Calibration, pred_label: str) -> Case:
    """One image with its overlay for the report."""
    sample = predictions.images.samples[index]
    frame = read_image(sample.path)
    decision = decide(
        predictions.anomaly_maps[index], predictions.pred_scores[index], calibration, *frame.shape[:2]
    )
    decision |= {"pred_label": pred_label, "product": sample.product, "product_assumed": False}
    result = Result(**decision, speed_ms={}, backend="", precision="")
    numbers = result.pred_score, result.threshold
    return Case(
        frame, result.draw(frame), sample.product, sample.kind, *numbers, str(sample.path), result.pred_label
    )


def refuse_strays(predictions: Predictions, recogniser: Recogniser) -> None:
    """One image of another product would move the limit so far that all of that product are taken for this one."""
    rows = zip(predictions.images.samples, recogniser.ratios(predictions.embeddings), strict=True)
    shown = [(sample, shown_product(ratios, sample.product)) for sample, ratios in rows]
    strays = [f"{sample.path} shows {name}" for sample, name in shown if name not in ("", sample.product)]
    if strays:
        raise CalibrationError(
            f"expected good images of the product that their folder names; {len(strays)} show another: "
            f"{'; '.join(strays[:3])}. Move them away, or if they belong there, train and export with them"
        )


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
    bundle does not have, CalibrationError if the images cannot support the wish, or some show another product than
    their folder says.
    """
    contents = read_bundle(bundle)
    trained_on = set(contents.manifest["trained_on"])
    samples = find_samples(good, "train")
    unknown = {sample.product for sample in samples} - set(contents.products)
    if unknown:
        raise InputError(
            f"{good}: product {', '.join(sorted(unknown))}: the bundle has {', '.join(contents.products)}"
        )
    pictures = {(sample.product, file_sha256(sample.path)[:16]): sample for sample in samples}
    if copies := len(samples) - len(pictures):
        say(f"left out {copies} copies: the same picture twice says nothing more")
    unseen = [sample for (_, digest), sample in pictures.items() if digest not in trained_on]
    empty = {product for product, _ in pictures} - {sample.product for sample in unseen}
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
        refuse_strays(predictions, recogniser)
        limits = product_limits(predictions, recogniser.space)
    action = f"calibrated with {engine.backend} in {engine.precision}"
    set_thresholds(bundle, calibrations, action, limits, graph)
    return calibrations, limits, len(pictures) - len(unseen)
