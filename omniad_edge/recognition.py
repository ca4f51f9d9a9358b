"""Which trained product a frame shows; a wrong part on the line is no defect, and is said to be what it is.

An image's embedding is the teacher's features averaged over its positions, (D,), all scales side by side. Its
distance from a product is

    sqrt(mean over D of (W (embedding - mean of the product's good images))^2),

1 or less for most good images: W whitens how good images differ from their product's mean, over all products and
with copies of each image in other light (Mahalanobis). Few images cannot give D^2 numbers, so the correlations are
shrunk to a third; only directions that many channels share, as of light, still count less. Each product has a
limit, above which a frame does not show it: MARGIN times the largest distance of good images that the fit has not
seen.
`benchmarks/unknown_product.py` measures all of it with products left out.
"""

import io
from dataclasses import asdict, dataclass, fields
from reprlib import repr as short
from zipfile import BadZipFile

import numpy as np

from .calibration import false_reject_bound
from .errors import BundleError, InputError

RECOGNITION = "recognition.npz"
# With products left out, at 0.1, 0.3 and 0.6: 30, 16 and 4 of 400 good images are unknown in other light, but 71,
# 82 and 114 of 656 defective ones.
SHRUNK_TO = 0.3  # of each correlation
# Of few good images the largest is not the line's largest, nor have they all its light; at 2 a product that was
# left out is taken for another.
MARGIN = 1.75
LIGHT_COPIES = 2  # of each image of the fit
CONFIDENCE = 0.95


@dataclass(frozen=True)
class ProductLimit:
    """How far from a product's mean its images may be, and what is known about that.

    false_unknown_bound: at this confidence at most such a share of good images is above the limit, a fraction;
                         None of images that the fit was made of
    """

    limit: float
    n_good: int
    false_unknown_bound: float | None
    confidence: float = CONFIDENCE

    def __post_init__(self) -> None:
        bound = self.false_unknown_bound
        numbers = (self.limit, self.n_good, self.confidence, 0 if bound is None else bound)
        valid = all(type(value) in (int, float) for value in numbers)
        valid = valid and 0 < self.limit < 1e9 and type(self.n_good) is int and self.n_good >= 1
        valid = valid and 0 < self.confidence < 1 and (bound is None or 0 <= bound <= 1)
        if not valid:
            raise InputError(f"recognition: expected a limit above 0 and its bound, got {short(asdict(self))}")

    @classmethod
    def from_dict(cls, values: dict) -> "ProductLimit":
        """Inverse of `asdict`. Raises InputError for missing, unknown or wrong fields."""
        names = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or set(values) != set(names):
            raise InputError(f"recognition: expected an object with {', '.join(names)}, got {short(values)}")
        return cls(**values)


def limit_of(distances: np.ndarray, used_for_fit: bool = False) -> ProductLimit:
    """From the distances (N,) of one product's good images from it.

    The bound is that of the largest distance, as in `calibration`; the margin on top can only make it better.
    """
    bound = None if used_for_fit else false_reject_bound(len(distances), 0, CONFIDENCE)
    return ProductLimit(MARGIN * float(np.max(distances)), len(distances), bound)


@dataclass(frozen=True, eq=False)
class ProductSpace:
    """Where the products' means are. centre (D,), whitening (D, D), means (P, D), whitened; float32."""

    products: tuple[str, ...]
    centre: np.ndarray
    whitening: np.ndarray
    means: np.ndarray

    def whitened(self, embeddings: np.ndarray) -> np.ndarray:
        """(N, D) -> (N, D), scaled so that the norm of a difference is a distance."""
        return (embeddings - self.centre) @ self.whitening.T

    def distances(self, embeddings: np.ndarray) -> np.ndarray:
        """(N, D) -> (N, P)."""
        return np.linalg.norm(self.whitened(embeddings)[:, None] - self.means, axis=2)

    def own_distances(self, embeddings: np.ndarray, product: str) -> np.ndarray:
        return self.distances(embeddings)[:, self.products.index(product)]

    def to_bytes(self) -> bytes:
        file = io.BytesIO()
        arrays = {"centre": self.centre, "whitening": self.whitening, "means": self.means}
        np.savez(file, products=np.array(self.products), **arrays)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> "ProductSpace":
        """Raises BundleError where it is not as `to_bytes` writes it."""
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                products = tuple(map(str, file["products"]))
                centre, whitening, means = (file[name] for name in ("centre", "whitening", "means"))
            (d,) = centre.shape
            if whitening.shape != (d, d) or means.shape != (len(products), d):
                raise ValueError(f"centre {centre.shape}, whitening {whitening.shape}, means {means.shape}")
            if not all(a.dtype == np.float32 and np.isfinite(a).all() for a in (centre, whitening, means)):
                raise ValueError("expected finite float32 arrays")
            return cls(products, centre, whitening, means)
        except (KeyError, TypeError, ValueError, OSError, EOFError, BadZipFile) as exc:
            raise BundleError(f"{RECOGNITION} is not as omniad-export writes it: {exc!r}; export again") from exc


def fit(embeddings: dict[str, np.ndarray]) -> ProductSpace:
    """embeddings: of each product's good images, (n, D), copies in other light among them."""
    means = {product: values.mean(0, dtype=np.float64) for product, values in embeddings.items()}
    within = np.concatenate([values - means[product] for product, values in embeddings.items()])
    deviation = within.std(0, dtype=np.float64)
    # A channel that no image of these products excites would make the faintest trace of it infinitely far.
    deviation = np.maximum(deviation, max(0.1 * np.median(deviation), 1e-6))
    correlation = SHRUNK_TO * (within / deviation).T @ (within / deviation) / len(within)
    correlation += (1 - SHRUNK_TO) * np.eye(len(deviation))
    whitening = np.linalg.inv(np.linalg.cholesky(correlation)) / deviation / np.sqrt(len(deviation))
    centre = np.mean(list(means.values()), axis=0)
    arrays = centre, whitening, (np.stack(list(means.values())) - centre) @ whitening.T
    return ProductSpace(tuple(means), *(array.astype(np.float32) for array in arrays))


def other_light(pixels: np.ndarray, rng: "np.random.Generator") -> np.ndarray:
    """A copy of an image (H, W, 3) uint8 as another lamp or exposure would give it: a fifth more or less light."""
    gamma, gain, offset = rng.uniform(0.85, 1.18), rng.uniform(0.8, 1.25), rng.uniform(-15, 15)
    balance = rng.uniform(0.93, 1.07, 3)
    light = np.arange(256)[:, None] / 255
    table = np.clip(255 * light**gamma * gain * balance + offset, 0, 255).astype(np.uint8)  # (256, 3)
    return np.stack([table[pixels[..., c], c] for c in range(3)], axis=-1)


@dataclass(frozen=True, eq=False)
class Recogniser:
    """What a detector asks. limits: of every product of the space."""

    space: ProductSpace
    limits: dict[str, ProductLimit]

    def ratios(self, embeddings: np.ndarray) -> list[dict[str, float]]:
        """(N, D) -> of each image its distance from each product over its limit; above 1 it does not fit."""
        limits = [self.limits[product].limit for product in self.space.products]
        rows = self.space.distances(embeddings) / limits
        return [dict(zip(self.space.products, map(float, row), strict=True)) for row in rows]


def read_recogniser(bundle, graph: str = "") -> Recogniser | None:
    """With the limits for this graph's embeddings; None of a bundle that cannot recognise products.

    Raises BundleError for a damaged one.
    """
    if RECOGNITION not in bundle.parts and not bundle.recognition:
        return None
    if RECOGNITION not in bundle.parts:
        raise BundleError(f"the manifest has limits of recognition, but {RECOGNITION} is missing; export again")
    space, limits = ProductSpace.from_bytes(bundle.parts[RECOGNITION]), bundle.recognition_of(graph)
    if set(space.products) != set(limits) or set(limits) != set(bundle.products):
        raise BundleError(f"{RECOGNITION} and the manifest have different products; export again")
    return Recogniser(space, limits)


def embedding_channels(bundle) -> int:
    """Of the graphs' embedding; 0 where they have none."""
    recogniser = read_recogniser(bundle)
    return 0 if recogniser is None else len(recogniser.space.centre)


def shown_product(ratios: dict[str, float], expected: str | None = None) -> str:
    """The product that fits best, or the expected one if it fits; "" if none does. NaN fits nothing."""
    fitting = {product: ratio for product, ratio in ratios.items() if ratio <= 1}
    return expected if expected in fitting else min(fitting, key=fitting.get, default="")
