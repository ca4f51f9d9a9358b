"""Data sets on disk: which image is of which product, good or not, and its defect mask.

Four layouts are recognised by what is in the folder:

    MVTec     <product>/train/good, <product>/test/<kind>, <product>/ground_truth/<kind>/<stem>_mask.png
    plain     <product>/good; defects, if any, in <product>/<kind> or <product>/test/<kind>; masks as in MVTec
    VisA      split_csv/1cls.csv beside the product folders, as published
    Real-IAD  realiad_jsons/<product>.json beside the images, as published

The kind `good` is not a defect, every other is. In the first two the folder itself may be one product.
"""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import DataError, InputError
from .image import is_image, natural_order, read_image, read_mask, walk_images
from .preprocess import resize

GOOD = "good"
THREADS = 2  # decoding and resampling release the interpreter lock
NOT_KINDS = (GOOD, "train", "test", "ground_truth")


@dataclass(frozen=True)
class Sample:
    """One image file. kind: "good" or the defect's name; mask_path: where its defect is, if that is known."""

    path: Path
    product: str
    kind: str
    mask_path: Path | None = None

    @property
    def is_good(self) -> bool:
        return self.kind == GOOD


@dataclass(frozen=True)
class Images:
    """pixels (N, H, W, 3) uint8 RGB of the N `samples`; broken: files left out, each with the reason."""

    pixels: np.ndarray
    samples: list[Sample]
    broken: list[tuple[Path, str]]


def find_samples(data: str | Path, split: str) -> list[Sample]:
    """List the images of a data set in one of the layouts above, without reading them.

    split: "train", good images only, or "test", which may be empty in the plain layout.
    Ordered by product, then kind, then path, numbers by value. Products that VisA or Real-IAD lists but
    whose folder is not there are left out.
    Raises DataError naming what is wrong: no such folder, no product, a product without images or, for
    "train", without good ones, a defect among the training images, a defect without mask (MVTec, VisA).
    """
    data = Path(data)
    if split not in ("train", "test"):
        raise InputError(f'split: expected "train" or "test"; got {split!r}')
    if not data.is_dir():
        came = "this is a file" if data.exists() else "there is no such folder"
        raise DataError(f"{data}: expected the folder of a data set; {came}")
    try:
        samples = _find(data, split)
    except OSError as exc:
        raise DataError(f"{data}: cannot be listed: {exc}") from exc
    return sorted(samples, key=lambda s: [natural_order(name) for name in (s.product, s.kind, s.path)])


def load_images(
    samples: list[Sample],
    height: int,
    width: int,
    on_broken: str = "stop",
    progress: Callable[[int], None] | None = None,
) -> Images:
    """Read and resize every sample.

    on_broken: "stop" raises DataError at the first file that cannot be read; "skip" leaves such files out
    and lists them in `broken`; if none can be read that is a DataError too.
    progress: called in this thread with the number of samples done so far.
    """
    if on_broken not in ("stop", "skip"):
        raise InputError(f'on_broken: expected "stop" or "skip"; got {on_broken!r}')

    def load(sample: Sample) -> np.ndarray | InputError:
        try:
            return resize(read_image(sample.path), height, width)
        except InputError as exc:
            return exc

    pixels = np.empty((len(samples), height, width, 3), np.uint8)
    kept, broken = [], []
    with in_threads(load, samples) as results:
        for done, (sample, result) in enumerate(zip(samples, results, strict=True), 1):
            if isinstance(result, np.ndarray):
                pixels[len(kept)] = result
                kept.append(sample)
            elif on_broken == "stop":
                raise DataError(str(result)) from result
            else:
                broken.append((sample.path, str(result)))
            if progress:
                progress(done)
    if broken and not kept:
        raise DataError(f"none of the {len(samples)} images can be read; the first: {broken[0][1]}")
    return Images(pixels[: len(kept)], kept, broken)


def load_masks(samples: list[Sample], height: int, width: int) -> np.ndarray:
    """(N, height, width) bool, True where the defect is; all False for good samples.

    Raises DataError naming the file if a defective sample has no mask or it cannot be read.
    """
    masks = np.zeros((len(samples), height, width), bool)

    def load(index: int) -> None:
        sample = samples[index]
        if sample.is_good:
            return
        if sample.mask_path is None:
            raise DataError(f"{sample.path}: this image with a defect ({sample.kind}) has no mask")
        try:
            masks[index] = read_mask(sample.mask_path, height, width)
        except InputError as exc:
            raise DataError(f"mask of {sample.path}: {exc}") from exc

    with in_threads(load, range(len(samples))) as results:
        for _ in results:
            pass
    return masks


@contextmanager
def in_threads(load: Callable, items: Sequence) -> Iterator[Iterator]:
    """Give the results of `load` in the order of the items; after an error the rest is not loaded."""
    pool = ThreadPoolExecutor(THREADS)
    try:
        yield pool.map(load, items)
    finally:
        pool.shutdown(cancel_futures=True)


def _find(data: Path, split: str) -> list[Sample]:
    for listing, read in ((data / "split_csv" / "1cls.csv", _visa), (data / "realiad_jsons", _real_iad)):
        if listing.exists():
            samples = list(read(data, listing, split))
            if not samples:
                raise DataError(f"{listing}: lists no {split} images of a product that is in {data}")
            return samples
    if _is_product(data):
        return _product(data, data.resolve().name, split)
    products = _folders(data)
    if not products:
        raise DataError(
            f"{data}: there is no product; expected images in <product>/{GOOD} or <product>/train/{GOOD}"
        )
    return [sample for folder in products for sample in _product(folder, folder.name, split)]


def _folders(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]


def _is_product(folder: Path) -> bool:
    return any((folder / name).is_dir() for name in (GOOD, "train", "test"))


def _product(folder: Path, name: str, split: str) -> list[Sample]:
    """The samples of one product folder, MVTec or plain."""
    if next(walk_images(folder), None) is None:
        raise DataError(f"{folder}: the product {name} is empty; expected images in {GOOD} or train/{GOOD}")
    if not _is_product(folder):
        raise DataError(
            f"{folder}: has neither {GOOD} nor train/{GOOD}; put its good images into {folder / GOOD}, "
            "or give the folder whose sub-folders are products"
        )
    plain = not (folder / "train").is_dir()
    return list(_test(folder, name, plain)) if split == "test" else _train(folder, name, plain)


def _train(folder: Path, name: str, plain: bool) -> list[Sample]:
    good = folder / GOOD if plain else folder / "train" / GOOD
    others = [] if plain else [*_folders(good.parent), *filter(is_image, good.parent.iterdir())]
    for entry in others:
        if entry != good:
            raise DataError(
                f"{entry}: training takes good images only, and those in {good}; "
                f"move defective ones to {folder / 'test' / '<defect>'}"
            )
    images = list(walk_images(good)) if good.is_dir() else []
    if not images:
        raise DataError(f"{folder}: the product {name} has no training images; expected good ones in {good}")
    return [Sample(path, name, GOOD) for path in images]


def _test(folder: Path, name: str, plain: bool) -> Iterator[Sample]:
    test = folder / "test"
    kinds = []
    if test.is_dir():
        kinds += _folders(test)
        loose = next(filter(is_image, test.iterdir()), None)
        if loose:
            raise DataError(f"{loose}: not known to be good; move it to {test / GOOD} or {test / '<defect>'}")
    if plain:
        kinds += [entry for entry in _folders(folder) if entry.name not in NOT_KINDS]
    for kind in kinds:
        for path in walk_images(kind):
            if kind.name == GOOD:
                yield Sample(path, name, GOOD)
                continue
            mask = _mask(folder / "ground_truth" / path.relative_to(kind.parent))
            if mask is None and not plain:
                raise DataError(
                    f"{path}: this image with a defect has no mask {path.stem}_mask.png in "
                    f"{folder / 'ground_truth' / kind.name}; a product without masks has its good images in "
                    f"{folder / GOOD} instead of {folder / 'train' / GOOD}"
                )
            yield Sample(path, name, kind.name, mask)


def _mask(beside: Path) -> Path | None:
    """beside: where the image would be in ground_truth. VisA in the MVTec form names a mask as its image."""
    masks = (beside.with_name(f"{beside.stem}_mask.png"), beside.with_suffix(".png"))
    return next((mask for mask in masks if mask.is_file()), None)


def _visa(data: Path, table: Path, split: str) -> Iterator[Sample]:
    columns = ("object", "split", "label", "image", "mask")
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if not set(columns) <= set(reader.fieldnames or ()):
                raise DataError(f"{table}: expected the columns {', '.join(columns)}; got {reader.fieldnames}")
            lines = [(reader.line_num, *(row[column] for column in columns)) for row in reader]
    except (UnicodeDecodeError, csv.Error) as exc:
        raise DataError(f"{table}: not a CSV table: {exc}") from exc
    for line, product, part, label, image, mask in lines:
        where = f"{table}, line {line}"
        if part not in ("train", "test") or label not in ("normal", "anomaly") or not product or not image:
            raise DataError(
                f"{where}: expected an object, train or test, normal or anomaly, and an image; "
                f"got {product}, {part}, {label}, {image}"
            )
        if part != split or not (data / product).is_dir():
            continue
        if label == "normal":
            yield Sample(data / image, product, GOOD)
        elif split == "train":
            raise DataError(f"{where}: {image} has a defect, but is listed for training")
        elif not mask:
            raise DataError(f"{where}: {image} has a defect, but no mask")
        else:
            yield Sample(data / image, product, label, data / mask)


def _real_iad(data: Path, jsons: Path, split: str) -> Iterator[Sample]:
    if (jsons / "realiad_jsons").is_dir():  # as published: beside it lie the single-view and noisy variants
        jsons = jsons / "realiad_jsons"
    roots = [data, *(entry for entry in _folders(data) if not entry.name.startswith("realiad_jsons"))]
    for listing in jsons.glob("[!.]*.json"):
        try:
            content = json.loads(listing.read_text(encoding="utf-8"))
            normal, prefix = content["meta"]["normal_class"], content["meta"].get("prefix", listing.stem)
            entries = [(e["anomaly_class"], e["image_path"], e["mask_path"] or "") for e in content[split]]
            folders = [root / prefix for root in roots if (root / prefix).is_dir()]
            if any(not isinstance(value, str) for entry in entries for value in entry):
                raise TypeError("anomaly_class, image_path and mask_path must be text")
        except (ValueError, LookupError, TypeError, AttributeError) as exc:
            reason = f"{type(exc).__name__}: {exc}"
            raise DataError(f"{listing}: expected meta, train and test as in Real-IAD; {reason}") from exc
        if len(folders) > 1:
            raise DataError(f"expected the images of {listing.stem} once; got {folders[0]} and {folders[1]}")
        for kind, image, mask in entries if folders else ():
            if kind == normal:
                yield Sample(folders[0] / image, listing.stem, GOOD)
            elif split == "train":
                raise DataError(f"{listing}: {image} has a defect ({kind}), but is listed for training")
            else:
                yield Sample(folders[0] / image, listing.stem, kind, folders[0] / mask if mask else None)
