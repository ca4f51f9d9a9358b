"""Images larger than the network's input: cut into overlapping tiles, and the tiles' maps merged without a seam.

A frame is resized to rows x columns and seen in tiles of height x width; a frame that is seen whole is one tile.
Training, calibration and the line cut by this one definition, which a checkpoint and a bundle carry.

Near a tile's border the map is of less worth: the network pads with zeros, and smoothing mirrors within 16 pixels.
A tile's features are off from those of the whole image by a cosine distance of 0.7 in the outer 16 pixels, 0.4 in
the next 16, then 0.2, 0.04 and less, whatever the tile's size (20 screws, packaged ResNet18 at stride 16, whose
training on small crops made it sensitive to borders). The network learns tiles with their borders; still, in
merging a tile counts nothing along its border, and then gradually more, up to where its neighbour's begins. The
image's own border is in no other tile, and counts fully.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

OVERLAP_PX = 64  # that neighbours share, at least; of tiles under 128 half a tile
MARGIN = 1 / 4  # of the overlap: this border counts nothing where a neighbour has it too
MAX_SIDE_PX = 16384  # of an image
MAX_INPUT_PX = 4096  # side of the network's input: of a tile, or of an image that is seen whole
AT_ONCE = 8  # tiles per call of an engine, for which those on a GPU have a graph; bounds memory on a CPU

# pixels (N, H, W, 3) uint8 RGB -> anomaly_map (N, H, W) and pred_score (N,), float32
Predict = Callable[[np.ndarray], tuple]


@dataclass(frozen=True)
class Tiling:
    """Images of rows x columns in tiles of height x width, which are no larger than the image."""

    rows: int
    columns: int
    height: int
    width: int

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of an image and its map."""
        return self.rows, self.columns

    @property
    def count(self) -> int:
        """Tiles of an image; 1 for one that is seen whole."""
        return len(starts(self.rows, self.height)) * len(starts(self.columns, self.width))

    @property
    def places(self) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of each tile, row by row."""
        for top in starts(self.rows, self.height):
            for left in starts(self.columns, self.width):
                yield slice(top, top + self.height), slice(left, left + self.width)

    def cut(self, image: np.ndarray) -> np.ndarray:
        """(rows, columns, ...) -> its tiles (count, height, width, ...)."""
        return np.stack([image[place] for place in self.places])

    def pick(self, images: np.ndarray, tiles: np.ndarray) -> np.ndarray:
        """Tiles of images (N, rows, columns, ...), by numbers that `tiles_of` gives -> (n, height, width, ...)."""
        places = list(self.places)
        return np.stack([images[tile // len(places)][places[tile % len(places)]] for tile in tiles])

    def tiles_of(self, images: np.ndarray) -> np.ndarray:
        """Numbers of images (n,) -> those of all their tiles (n * count,): tiles are numbered image by image."""
        return (images[:, None] * self.count + np.arange(self.count)).ravel()

    def merge(self, maps: np.ndarray) -> np.ndarray:
        """Maps of an image's tiles (count, height, width) -> the image's (rows, columns) float32.

        At each pixel a mean of the tiles that have it, weighted; the weights change gradually and sum to 1.
        """
        by_row, by_column = weights(self.rows, self.height), weights(self.columns, self.width)
        merged = np.zeros(self.size, np.float32)
        windows = ((y[:, None], x) for y in by_row for x in by_column)
        for place, (y, x), anomaly_map in zip(self.places, windows, maps, strict=True):
            merged[place] += y * x * anomaly_map
        return merged

    def predict(self, network: Predict, pixels: np.ndarray) -> tuple:
        """What `network` finds in images (N, rows, columns, 3): maps (N, rows, columns) and scores, their maxima.

        Where it gives embeddings, also (N, D): the mean of each image's tiles.

        Each image's tiles are computed by themselves, so that a map does not depend on the images beside it.
        """
        if self.count == 1:
            return network(pixels)
        anomaly_maps, embeddings = np.empty((len(pixels), *self.size), np.float32), []
        for image, anomaly_map in zip(pixels, anomaly_maps, strict=True):
            tiles = self.cut(image)
            parts = [network(tiles[start : start + AT_ONCE]) for start in range(0, len(tiles), AT_ONCE)]
            anomaly_map[:] = self.merge(np.concatenate([maps for maps, *_ in parts]))
            given = [embedding for _, _, *rest in parts for embedding in rest if embedding is not None]
            embeddings += [np.concatenate(given).mean(0)] if given else []
        made = anomaly_maps, anomaly_maps.max((1, 2))
        return (*made, np.stack(embeddings)) if embeddings else made

    def __str__(self) -> str:
        whole = f"{self.columns}x{self.rows}"
        return whole if self.count == 1 else f"{whole} in {self.count} tiles of {self.width}x{self.height}"


def starts(total: int, tile: int) -> list[int]:
    """First pixels of as few tiles as overlap enough, evenly spread; the last one ends at `total`."""
    steps = -(-(total - tile) // (tile - overlap(tile)))
    return [step * (total - tile) // max(steps, 1) for step in range(steps + 1)]


def overlap(tile: int) -> int:
    return min(OVERLAP_PX, tile // 2)


@lru_cache(maxsize=64)
def weights(total: int, tile: int) -> np.ndarray:
    """(tiles, tile) float32: how much each pixel of each tile counts along this axis. Read-only, shared.

    From 0 at MARGIN to 1 at as much before the overlap's end along a raised cosine, so that of two tiles that
    overlap by that much the weights already sum to 1; where they overlap by more, they are divided by their sum.
    """
    first = starts(total, tile)
    margin = MARGIN * overlap(tile)
    inside = (np.arange(tile) + 0.5 - margin) / (overlap(tile) - 2 * margin)
    rising = (1 - np.cos(np.pi * np.clip(inside, 0, 1))) / 2
    window = np.ones((len(first), tile))
    window[1:] *= rising  # the first has no neighbour before it
    window[:-1] *= rising[::-1]
    sums = np.zeros(total)
    for start, row in zip(first, window, strict=True):
        sums[start : start + tile] += row
    for start, row in zip(first, window, strict=True):
        row /= sums[start : start + tile]
    window = window.astype(np.float32)
    window.flags.writeable = False
    return window
