"""The images a network is trained on: read once, kept in memory as uint8, a part of each product held out."""

import os
import zlib
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from .data import Images, Sample, find_samples, load_images
from .errors import OmniADError, TrainingError
from .files import file_sha256
from .progress import counting, say


def load_good_images(
    data: str, height: int, width: int, on_broken: str, sharers: int = 1, shown: bool = False
) -> Images:
    """All good images of the training split, resized. sharers: processes of this machine that do the same.

    shown: say on stderr what is read. Raises DataError, and TrainingError if they would take more than half
    of the free memory.
    """
    samples = find_samples(data, "train")
    needed = len(samples) * height * width * 3
    check_memory(f"{len(samples)} images of {height} x {width}", needed, sharers)
    with counting("reading images", len(samples)) if shown else nullcontext(None) as progress:
        images = load_images(samples, height, width, on_broken, progress)
    if shown:
        products = len({sample.product for sample in images.samples})
        say(f"{len(images.samples)} good images of {products} product(s), {needed / 1e6:.0f} MB in memory")
        for path, reason in images.broken:
            say(f"left out {path}: {reason}")
    return images


def split_holdout(samples: list[Sample], fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the samples to train on and of those held out, both ascending.

    Held out of each product: the rounded fraction, at least one and not all, none of a single image. A
    product's choice depends on the seed and its own images only.
    """
    held_out = np.zeros(len(samples), bool)
    products = np.array([sample.product for sample in samples])
    for product in np.unique(products):
        of_product = np.flatnonzero(products == product)
        if fraction > 0 and len(of_product) > 1:
            count = min(max(1, round(fraction * len(of_product))), len(of_product) - 1)
            rng = np.random.default_rng([seed, zlib.crc32(str(product).encode())])
            held_out[rng.choice(of_product, count, replace=False)] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def describe_images(samples: list[Sample], training: np.ndarray, held_out: np.ndarray, data: str) -> dict:
    """Facts for the checkpoint.

    products: names; holdout: paths relative to `data`; trained_on: the first 16 hex digits of each training
    file's SHA-256.
    """
    return {
        "products": sorted({sample.product for sample in samples}),
        "holdout": relative_paths([samples[i].path for i in held_out], data),
        "trained_on": [file_sha256(samples[i].path)[:16] for i in training],
    }


def relative_paths(paths: list[Path], data: str) -> list[str]:
    """As a checkpoint has them: they hold where the data set is moved."""
    return [Path(os.path.relpath(path, data)).as_posix() for path in paths]


def check_memory(what: str, needed_bytes: int, sharers: int = 1, error: type[OmniADError] = TrainingError) -> None:
    """Raises `error` if `sharers` times these bytes are more than half of the free memory."""
    free = free_memory_bytes()
    if free is not None and needed_bytes * sharers > free / 2:
        each = f" in each of {sharers} processes" if sharers > 1 else ""
        raise error(
            f"{what} take {needed_bytes / 1e9:.2f} GB{each}; allowed is half of the {free / 1e9:.2f} GB of "
            "free memory: use a smaller input size, fewer images or a machine with more memory"
        )


def free_memory_bytes() -> int | None:
    """What this machine, or the container around this process, can still give; None if that is not known."""
    free = []
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if meminfo.is_file():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free.append(int(fields["MemAvailable"].split()[0]) * 1024)
    if (group / "memory.max").is_file() and (limit := (group / "memory.max").read_text().strip()) != "max":
        free.append(int(limit) - int((group / "memory.current").read_text()))
    return min(free, default=None)
