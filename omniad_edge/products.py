"""A small procedural product line, for the demo and for tests: pictures of good and of defective parts.

A part is layers of colour, coverage, height and gloss, seen from above. The camera turns and shifts it a
little, lights it from the top left (Lambert, a highlight, a cast shadow), blurs it and adds sensor noise.
A defect changes the layers of an otherwise good part, so its mask is the difference of two pictures which
share pose, light and noise. Lengths are fractions of the picture's width unless their name ends in _px.

The same seed gives the same bytes with the same versions of Python, NumPy and OpenCV on one kind of CPU.
"""

import csv
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np

from .errors import DataError, InputError
from .files import atomic_write
from .product_defects import paint
from .product_parts import Part, backdrop, blueprint, texture

GOOD = "good"
PRODUCTS = ("gear", "board", "cap")
DEFECTS = {
    "gear": ("scratch", "dent", "stain", "missing_part", "wrong_colour"),
    "board": ("scratch", "stain", "missing_part", "wrong_colour"),
    "cap": ("scratch", "dent", "stain", "missing_part", "wrong_colour"),
}
MIN_SIZE_PX, MAX_SIZE_PX = 32, 1024
FRAMES_PER_PART = 5
LINE_VERSION = 3  # in params.json; a change of the drawings needs a new one
DEFECTIVE_SHARE = 0.3  # of the parts on the conveyor
VISIBLE = 12 / 255  # change of a colour channel that the mask counts; five times the sensor noise

LIGHT = np.array([-0.45, -0.55, 1.0]) / np.linalg.norm([-0.45, -0.55, 1.0])
# Half way between the lamp and the camera straight above: a surface facing this way flashes.
HALF = (LIGHT + np.array([0, 0, 1])) / np.linalg.norm(LIGHT + np.array([0, 0, 1]))


@dataclass(frozen=True)
class Shot:
    """How the camera saw a part: its pose, the belt under it, light, focus and sensor noise."""

    turn_deg: float
    shift: tuple[float, float]  # x, y of the part from the picture's centre
    belt: tuple[float, float]  # place on the belt, 0..1
    gain: float
    gradient: tuple[float, float]  # change of brightness from the centre to the right and lower edge
    warmth: float  # red up and blue down by this share
    blur: float  # standard deviation
    noise_seed: int


def render(
    product: str, rng: np.random.Generator, kind: str = GOOD, size_px: int = 256
) -> tuple[np.ndarray, np.ndarray]:
    """One picture of one part, and where it is defective.

    kind: "good" or one of DEFECTS[product]. The same state of `rng` gives the same part, pose, light and
    noise whatever the kind, so a defect is painted on an otherwise good part.
    Returns the image (size_px, size_px, 3) uint8 BGR and the mask (size_px, size_px) bool, True where the
    defect changes a colour channel visibly (by more than 12 of 255 before noise); all False for "good".
    Raises InputError, listing the choices, for an unknown product or kind, a wrong size or no Generator.
    """
    _check(product, kind, size_px)
    if not isinstance(rng, np.random.Generator):
        came = type(rng).__name__
        raise InputError(f"rng: expected a Generator, got {came}; use numpy.random.default_rng(seed)")
    part_rng, defect_rng = (np.random.default_rng(seed) for seed in rng.integers(2**63, size=2))
    part, shot = _make(product, part_rng, size_px), _aim(part_rng)
    picture = _expose(product, part, shot)
    mask = np.zeros((size_px, size_px), bool)
    if kind != GOOD:
        good = picture
        paint(part, product, kind, defect_rng)
        picture = _expose(product, part, shot)
        mask = _visible_change(good, picture)
    return _develop(picture, shot.noise_seed), mask


def write_line(
    folder: str | Path,
    n_train: int,
    n_calibration: int,
    n_test_good: int,
    n_test_per_kind: int,
    size_px: int = 256,
    seed: int = 0,
) -> None:
    """Write the pictures of a whole line: every product, and every kind of defect it can have.

    folder/data/ is a data set in the layout of MVTec AD: <product>/train/good, <product>/test/<kind> and
    <product>/ground_truth/<kind>/<stem>_mask.png. folder/calibration/<product>/good holds good parts which
    are in neither split. folder/params.json, complete only when everything else is, records the parameters:
    a complete line of the same parameters is left as it is, any other line is replaced.
    A picture depends on `seed`, `size_px` and its path alone, not on how many others there are.
    Raises InputError for a wrong count, size or seed, and DataError if folder holds a data/ or calibration/
    which was not written by this function.
    """
    counts = {"n_train": n_train, "n_calibration": n_calibration}
    counts |= {"n_test_good": n_test_good, "n_test_per_kind": n_test_per_kind}
    _check_counts(**counts, seed=seed)
    _check(PRODUCTS[0], GOOD, size_px)
    folder = Path(folder)
    pictures = list(_line(**counts))
    params = {"line": LINE_VERSION, **counts, "size_px": size_px, "seed": seed}
    if _is_complete(folder, params, pictures):
        return
    _clear(folder)
    _write_params(folder, {**params, "complete": False})
    for path, product, kind, mask_path in pictures:
        image, mask = render(product, np.random.default_rng([seed, *path.encode()]), kind, size_px)
        _write_png(folder / path, image)
        if kind != GOOD:
            _write_png(folder / mask_path, mask.astype(np.uint8) * 255)
    _write_params(folder, {**params, "complete": True})


def write_conveyor(
    path: str | Path,
    truth_csv_path: str | Path,
    n_parts: int,
    seed: int = 1,
    size_px: int = 256,
    fps: int = 10,
) -> None:
    """Write a film of parts passing under a camera, and the truth of every frame.

    path: an .mp4 file of (size_px, size_px) frames. n_parts of each product pass in blocks, in the order of
    PRODUCTS; each part is seen in 5 frames, moving a little. About 30 % of the parts are defective.
    truth_csv_path: columns frame (from 0), product, kind ("good" or the defect's name), a row per frame.
    Raises InputError for wrong arguments, DataError if OpenCV cannot write the film.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise InputError(f"path: expected a name ending in .mp4, got {path.name!r}")
    _check(PRODUCTS[0], GOOD, size_px)
    _check_counts(n_parts=n_parts, fps=fps, seed=seed)
    if n_parts < 1 or fps < 1:
        raise InputError(f"n_parts and fps: expected at least 1, got {n_parts} and {fps}")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    with atomic_write(path) as part_path, _film(part_path, fps, size_px) as writer:
        for product, kind, frame in _conveyor(n_parts, seed, size_px):
            writer.write(frame)
            rows.append((len(rows), product, kind))
    with atomic_write(truth_csv_path) as part_path, part_path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([("frame", "product", "kind"), *rows])


@contextmanager
def _film(path: Path, fps: int, size_px: int) -> Iterator[cv2.VideoWriter]:
    """A writer of an mp4v film which is at `path` when the block ends without an error."""
    # OpenCV picks the container by the suffix, which a temporary file does not have.
    with TemporaryDirectory(dir=path.parent, prefix=".film.") as folder:
        mp4 = Path(folder) / "film.mp4"
        writer = cv2.VideoWriter(str(mp4), cv2.VideoWriter_fourcc(*"mp4v"), fps, (size_px, size_px))
        if not writer.isOpened():
            raise DataError(
                "OpenCV cannot write an mp4v film here; the opencv-python-headless of PyPI can, with FFmpeg"
            )
        try:
            yield writer
        finally:
            writer.release()
        if not mp4.is_file() or mp4.stat().st_size == 0:
            raise DataError(f"OpenCV wrote an empty film in {path.parent}; is the disk full?")
        mp4.replace(path)


def _line(n_train: int, n_calibration: int, n_test_good: int, n_test_per_kind: int) -> Iterator[tuple[str, ...]]:
    """Path of every picture, its product, its kind, and the path of the mask a defect has."""
    for product in PRODUCTS:
        data = f"data/{product}"
        groups = [
            (f"{data}/train/good", GOOD, n_train),
            (f"calibration/{product}/good", GOOD, n_calibration),
            (f"{data}/test/good", GOOD, n_test_good),
            *((f"{data}/test/{kind}", kind, n_test_per_kind) for kind in DEFECTS[product]),
        ]
        for name, kind, count in groups:
            for i in range(count):
                yield f"{name}/{i:03d}.png", product, kind, f"{data}/ground_truth/{kind}/{i:03d}_mask.png"


def _conveyor(n_parts: int, seed: int, size_px: int) -> Iterator[tuple[str, str, np.ndarray]]:
    """Product, kind and (S, S, 3) uint8 BGR of every frame."""
    for product in PRODUCTS:
        rng = np.random.default_rng([seed, *product.encode()])
        n_defective = round(DEFECTIVE_SHARE * n_parts)
        kinds = [DEFECTS[product][i % len(DEFECTS[product])] for i in range(n_defective)]
        for kind in rng.permutation(kinds + [GOOD] * (n_parts - n_defective)):
            part, shot = _make(product, rng, size_px), _aim(rng)
            if kind != GOOD:
                paint(part, product, kind, rng)
            for travel in np.linspace(-0.005, 0.005, FRAMES_PER_PART):
                shift = (shot.shift[0] * 0.5 + travel, shot.shift[1] + rng.normal(0, 0.001))
                turn_deg = shot.turn_deg + rng.normal(0, 0.1)
                seen = replace(shot, shift=shift, turn_deg=turn_deg, noise_seed=int(rng.integers(2**63)))
                yield product, str(kind), _develop(_expose(product, part, seen), seen.noise_seed)


def _check(product: str, kind: str, size_px: int) -> None:
    if product not in PRODUCTS:
        raise InputError(f"product: expected one of {', '.join(PRODUCTS)}, got {product!r}")
    if kind not in (GOOD, *DEFECTS[product]):
        raise InputError(
            f"kind: expected one of {', '.join((GOOD, *DEFECTS[product]))} for {product}, got {kind!r}"
        )
    if not isinstance(size_px, int) or not MIN_SIZE_PX <= size_px <= MAX_SIZE_PX:
        raise InputError(f"size_px: expected a whole number from {MIN_SIZE_PX} to {MAX_SIZE_PX}, got {size_px!r}")


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise InputError(f"{name}: expected a whole number from 0, got {count!r}")


def _is_complete(folder: Path, params: dict, pictures: list[tuple[str, ...]]) -> bool:
    if _read_params(folder) != {**params, "complete": True}:
        return False
    masks = (mask_path for _, _, kind, mask_path in pictures if kind != GOOD)
    return all((folder / name).is_file() for name in (*(path for path, *_ in pictures), *masks))


def _read_params(folder: Path) -> dict | None:
    """The parameters of the line in this folder, whole or not; None if there is no line."""
    try:
        params = json.loads((folder / "params.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    return params if isinstance(params, dict) and "line" in params else None


def _clear(folder: Path) -> None:
    """Remove the line in this folder; refuse to remove what write_line did not write."""
    trees = [folder / name for name in ("data", "calibration") if (folder / name).exists()]
    if trees and _read_params(folder) is None:
        raise DataError(
            f"{trees[0]}: expected a line written here before, but {folder} has no params.json of one; "
            "choose another folder, or remove this one yourself"
        )
    for tree in trees:
        shutil.rmtree(tree)


def _write_params(folder: Path, params: dict) -> None:
    with atomic_write(folder / "params.json") as part_path:
        part_path.write_text(json.dumps(params, indent=2) + "\n", encoding="utf-8")


def _write_png(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", image)[1].tobytes())


def _make(product: str, rng: np.random.Generator, size_px: int) -> Part:
    """A good part with its own surface and its own tone of the material."""
    part = blueprint(product, size_px).part.copy()
    tone = 1 + rng.uniform(-0.012, 0.012, 3) + rng.uniform(-0.025, 0.025)
    part.colour[:] *= texture(product, rng, size_px)[..., None] * tone.astype(np.float32)
    return part


def _aim(rng: np.random.Generator) -> Shot:
    return Shot(
        turn_deg=rng.uniform(-2.0, 2.0),
        shift=tuple(rng.uniform(-0.010, 0.010, 2)),
        belt=tuple(rng.uniform(0.05, 0.95, 2)),
        gain=rng.uniform(0.94, 1.06),
        gradient=tuple(rng.uniform(-0.03, 0.03, 2)),
        warmth=rng.uniform(-0.012, 0.012),
        blur=rng.uniform(0.0018, 0.0028),
        noise_seed=int(rng.integers(2**63)),
    )


def _expose(product: str, part: Part, shot: Shot) -> np.ndarray:
    """(S, S, 3) float32 BGR picture without sensor noise, nominally 0..1."""
    size_px = len(part.colour)
    pose = cv2.getRotationMatrix2D((size_px / 2 - 0.5, size_px / 2 - 0.5), shot.turn_deg, 1.0)
    pose[:, 2] += np.array(shot.shift) * size_px
    colour, form = (cv2.warpAffine(layer, pose, (size_px, size_px)) for layer in (part.colour, part.form))
    cover, height_px, gloss = form[..., 0], form[..., 1] * size_px, form[..., 2]
    # The belt moves with the part, so the camera's place on it moves the other way.
    belt = backdrop(product, size_px, shot.belt[0] - shot.shift[0], shot.belt[1] - shot.shift[1])
    colour = colour + belt * (1 - cover)[..., None]

    slope_x = cv2.Scharr(height_px, cv2.CV_32F, 1, 0, scale=1 / 32)
    slope_y = cv2.Scharr(height_px, cv2.CV_32F, 0, 1, scale=1 / 32)
    steep = 1 / np.sqrt(1 + slope_x * slope_x + slope_y * slope_y)
    facing_lamp, facing_half = (
        np.maximum((float(d[2]) - slope_x * float(d[0]) - slope_y * float(d[1])) * steep, 0) for d in (LIGHT, HALF)
    )
    x, y = _axes(size_px)
    lamp = shot.gain * (1 + shot.gradient[0] * x + shot.gradient[1] * y - 0.05 * (x * x + y * y))
    diffuse = (0.38 + 0.62 / float(LIGHT[2]) * facing_lamp) * (1 - 0.5 * _shadow(height_px)) * lamp
    highlight = 0.55 * gloss * np.exp((facing_half - 1) * 60) * lamp
    picture = colour * diffuse[..., None] + highlight[..., None]
    picture *= np.array([1 - shot.warmth, 1, 1 + shot.warmth], np.float32)
    return cv2.GaussianBlur(picture, (0, 0), max(shot.blur * size_px, 0.2))


@lru_cache(maxsize=4)
def _axes(size_px: int) -> list[np.ndarray]:
    """x and y of every pixel, (S, S) float32 each, -1..1 from edge to edge."""
    axis = (np.arange(size_px, dtype=np.float32) + 0.5) / size_px * 2 - 1
    return np.meshgrid(axis, axis)


def _shadow(height_px: np.ndarray) -> np.ndarray:
    """(S, S) float32 0..1: how much of the lamp is hidden by what stands between."""
    size_px = len(height_px)
    shade = np.zeros_like(height_px)
    for reach in (0.010, 0.022):
        step = np.array([[1, 0, 0.63 * reach * size_px], [0, 1, 0.77 * reach * size_px]])
        towards_lamp = cv2.warpAffine(height_px, step, (size_px, size_px))
        hidden = (towards_lamp - height_px) / size_px - 0.9 * reach
        np.maximum(shade, np.clip(hidden / 0.008, 0, 1), out=shade)
    return cv2.GaussianBlur(shade, (0, 0), max(0.006 * size_px, 0.3))


def _develop(picture: np.ndarray, noise_seed: int) -> np.ndarray:
    """Add sensor noise, more where it is bright (photon noise), and round to uint8."""
    grain = np.random.default_rng(noise_seed).standard_normal(picture.shape, np.float32)
    level = np.clip(picture, 0, 1) * 255
    return np.clip(level + grain * np.sqrt(1.2 + 0.018 * level) + 0.5, 0, 255).astype(np.uint8)


def _visible_change(good: np.ndarray, defective: np.ndarray) -> np.ndarray:
    """(S, S) bool: where a colour channel of one picture differs visibly from the other."""
    change = cv2.absdiff(np.clip(defective, 0, 1), np.clip(good, 0, 1))
    same = cv2.inRange(change, (0.0, 0.0, 0.0), (VISIBLE, VISIBLE, VISIBLE))
    # The slopes of a dent cross the good brightness somewhere: close these gaps.
    width_px = 2 * round(len(good) / 85) + 1
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width_px, width_px))
    return cv2.morphologyEx(255 - same, cv2.MORPH_CLOSE, disc) > 0
