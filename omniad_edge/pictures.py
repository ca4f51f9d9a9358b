"""Procedural pictures: figures of one texture before a ground of another, and the same with a local change.

Formula-driven pictures (after Kataoka et al., ACCV 2020): no photograph, no other model and no licence but this
product's is behind them.
"""

from dataclasses import dataclass

import cv2
import numpy as np

PICTURE_PX = 96
VISIBLE = 12  # of 255, in a colour channel: what counts as changed
CHANGES = ("other", "moved", "brighter", "flat", "blurred", "bent")


@dataclass(frozen=True)
class Spectrum:
    """A texture: noise with this much power per frequency (cycles per picture) and direction."""

    frequency: float
    bandwidth: float
    direction: float
    spread: float
    contour: str  # "smooth", "binary" or "ridged"


def draw_picture(rng: np.random.Generator) -> np.ndarray:
    """(PICTURE_PX, PICTURE_PX, 3) uint8 RGB: figures of one texture before a ground of another."""
    ground, figure = draw_surface(rng), draw_surface(rng)
    mask = draw_figures(rng)[..., None]
    if rng.random() < 0.5:  # a cast shadow
        shadow = np.roll(cv2.GaussianBlur(mask[..., 0], (0, 0), 2), (2, 2), (0, 1))[..., None]
        ground = ground * (1 - 0.4 * shadow)
    return (255 * (ground + (figure - ground) * mask).clip(0, 1)).astype(np.uint8)


def draw_surface(rng: np.random.Generator) -> np.ndarray:
    """(PICTURE_PX, PICTURE_PX, 3) float in 0..1: a texture between two colours, which may be shades of one."""
    a, b = rng.uniform(0.1, 0.9, (2, 3))
    if rng.random() < 0.4:
        b = a * rng.uniform(0.4, 1.6)
    spectrum = Spectrum(
        frequency=rng.uniform(2, 24),
        bandwidth=rng.uniform(0.5, 6),
        direction=rng.uniform(0, np.pi),
        spread=rng.choice([0.15, 0.4, 3.0]),
        contour=rng.choice(["smooth", "binary", "ridged"]),
    )
    level = (1 + draw_texture(spectrum, rng) * rng.uniform(0.3, 1)) / 2
    return a + (b - a) * level[..., None]


def draw_texture(spectrum: Spectrum, rng: np.random.Generator) -> np.ndarray:
    """(PICTURE_PX, PICTURE_PX) in -1..1: white noise filtered to the spectrum."""
    y, x = np.meshgrid(*2 * [np.fft.fftfreq(PICTURE_PX, 1 / PICTURE_PX)], indexing="ij")
    radius = np.hypot(y, x)
    turned = np.abs((np.arctan2(y, x) - spectrum.direction + np.pi / 2) % np.pi - np.pi / 2)
    gain = np.exp(-0.5 * ((radius - spectrum.frequency) / spectrum.bandwidth) ** 2)
    gain = gain * np.exp(-0.5 * (turned / spectrum.spread) ** 2) + 0.02 / (1 + radius)
    noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal(radius.shape)) * gain).real
    noise /= noise.std()
    if spectrum.contour == "binary":
        noise = np.sign(noise)
    elif spectrum.contour == "ridged":
        noise = np.abs(noise) - 0.8
    return noise.clip(-2.5, 2.5) / 2.5


def draw_figures(rng: np.random.Generator) -> np.ndarray:
    """(PICTURE_PX, PICTURE_PX) float in 0..1: one to six alike stars, blobs, ellipses or strokes."""
    kind, line_px = rng.choice(["star", "blob", "ellipse", "stroke"]), int(rng.integers(4))
    corners, waves, sharpness = int(rng.integers(3, 9)), int(rng.integers(2, 9)), rng.uniform(0, 0.5)
    size_px, aspect = rng.uniform(12, 44), rng.uniform(0.3, 0.95)
    canvas = np.zeros((2 * PICTURE_PX, 2 * PICTURE_PX), np.uint8)  # twice as fine, then reduced
    for _ in range(rng.integers(1, 7)):
        centre = rng.uniform(0.15, 0.85, 2) * len(canvas)
        radius, turn = size_px * rng.uniform(0.8, 1.2), rng.uniform(0, 2 * np.pi)
        if kind == "stroke":
            bends = turn + np.cumsum(rng.uniform(-3, 3, corners)) * sharpness
            steps = radius / 2 * np.stack([np.cos(bends), np.sin(bends)], 1)
            points = centre + np.cumsum(np.vstack([[0, 0], steps]), axis=0)
            cv2.polylines(canvas, [points.astype(np.int32)], False, 255, 1 + 2 * line_px, cv2.LINE_AA)
            continue
        angle = np.linspace(0, 2 * np.pi, 2 * corners if kind == "star" else 60, endpoint=False)
        reach = {
            "star": np.where(np.arange(len(angle)) % 2, 1, aspect),
            "blob": 1 + sharpness * np.sin(waves * angle),
            "ellipse": 1 / np.hypot(np.cos(angle), np.sin(angle) / aspect),
        }[kind]
        outline = (radius * reach)[:, None] * np.stack([np.cos(angle + turn), np.sin(angle + turn)], 1)
        points = [(centre + outline).astype(np.int32)]
        if line_px:
            cv2.polylines(canvas, points, True, 255, 1 + line_px, cv2.LINE_AA)
        else:
            cv2.fillPoly(canvas, points, 255, cv2.LINE_AA)
    return cv2.resize(canvas, (PICTURE_PX, PICTURE_PX), interpolation=cv2.INTER_AREA) / 255


def alter_picture(
    picture: np.ndarray, other: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A defect somewhere in `picture`, perhaps with something of another one in it.

    Returns the changed picture, like `picture`, and where it differs visibly, (PICTURE_PX, PICTURE_PX) bool.
    """
    where = cv2.GaussianBlur(draw_spots(rng), (0, 0), rng.uniform(0.3, 1.5))[..., None]
    pixels = picture.astype(np.float32)
    altered = pixels + (draw_change(pixels, other, rng) - pixels) * where
    altered = altered.clip(0, 255).astype(np.uint8)
    return altered, np.abs(altered - pixels).max(axis=2) > VISIBLE


def draw_change(pixels: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a defect shows in place of `pixels`, everywhere."""
    kind = rng.choice(CHANGES)
    if kind == "other":
        return other.astype(np.float32)
    if kind == "moved":
        return np.roll(pixels, rng.integers(3, PICTURE_PX // 3, 2), (0, 1))
    if kind == "brighter":  # or darker
        return pixels * rng.choice([rng.uniform(0.3, 0.75), rng.uniform(1.3, 1.8)])
    if kind == "flat":
        return np.full_like(pixels, rng.uniform(0, 255, 3))
    if kind == "blurred":
        return cv2.GaussianBlur(pixels, (0, 0), rng.uniform(2, 6))
    shift = np.float32([[1, 0, rng.uniform(-6, 6)], [0, 1, rng.uniform(-6, 6)]])
    return cv2.warpAffine(pixels, shift, (PICTURE_PX, PICTURE_PX), borderMode=cv2.BORDER_REFLECT)


def draw_spots(rng: np.random.Generator) -> np.ndarray:
    """(PICTURE_PX, PICTURE_PX) float32 in 0..1: one to three scratches or uneven spots."""
    canvas = np.zeros((PICTURE_PX, PICTURE_PX), np.float32)
    for _ in range(rng.integers(1, 4)):
        centre, turn = rng.uniform(0, PICTURE_PX, 2), rng.uniform(0, 2 * np.pi)
        if rng.random() < 0.4:
            end = centre + rng.uniform(4, 0.4 * PICTURE_PX) * np.array([np.cos(turn), np.sin(turn)])
            ends = [tuple(int(v) for v in point) for point in (centre, end)]
            cv2.line(canvas, *ends, 1.0, int(rng.integers(1, 4)), cv2.LINE_AA)
            continue
        angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        radius = rng.uniform(2, PICTURE_PX / 7) * (
            1 + 0.5 * np.convolve(rng.uniform(-1, 1, 24), [0.3, 0.4, 0.3], "same")
        )
        reach = radius * np.stack([np.cos(angle), rng.uniform(0.4, 1) * np.sin(angle)])
        cv2.fillPoly(canvas, [(centre + reach.T).astype(np.int32)], 1.0, cv2.LINE_AA)
    return canvas
