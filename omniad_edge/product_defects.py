"""The defects of the demo's product line, painted on the layers of one part.

Lengths are fractions of the picture's width unless their name ends in _px; colours are BGR, 0..1.
"""

import cv2
import numpy as np

from .product_parts import Part, blueprint, noise, soft_polygon


def paint(part: Part, product: str, kind: str, rng: np.random.Generator) -> None:
    """Give the part a defect of this kind, in place; `rng` decides where, how large and how strong."""
    draw = {
        "scratch": _scratch,
        "dent": _dent,
        "stain": _stain,
        "missing_part": _missing_part,
        "wrong_colour": _wrong_colour,
    }[kind]
    draw(part, product, rng)


def _somewhere(product: str, rng: np.random.Generator, size_px: int) -> np.ndarray:
    """x, y of a place on the part, away from its edges."""
    surface_px = blueprint(product, size_px).surface_px
    return (surface_px[rng.integers(len(surface_px))] + 0.5) / size_px


def _blob(rng: np.random.Generator, centre: np.ndarray, radius: float, rough: float) -> np.ndarray:
    """Outline of an irregular patch, (64, 2)."""
    angle = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    waves = sum(rng.normal() / k * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in range(2, 7))
    reach = radius * np.clip(1 + rough * waves, 0.4, 1.8)
    turn, squeeze = rng.uniform(0, np.pi), rng.uniform(0.65, 1.0)
    u, v = reach * np.cos(angle), squeeze * reach * np.sin(angle)
    return centre + np.stack([u * np.cos(turn) - v * np.sin(turn), u * np.sin(turn) + v * np.cos(turn)], axis=1)


def _blend(part: Part, mask: np.ndarray, colour: tuple[float, float, float]) -> None:
    """Paint the colour over the part where mask is 1, keeping it multiplied by the coverage."""
    part.colour[:] += mask[..., None] * (np.array(colour, np.float32) * part.form[..., :1] - part.colour)


def _scratch(part: Part, product: str, rng: np.random.Generator) -> None:
    size_px = len(part.colour)
    length, bend, turn = rng.uniform(0.16, 0.30), rng.uniform(-0.2, 0.2), rng.uniform(0, 2 * np.pi)
    along = np.linspace(-0.5, 0.5, 24)
    across = bend * (along**2 - 0.1) + np.cumsum(rng.normal(0, 0.003, 24))
    width = rng.uniform(0.006, 0.010) / length * np.sin(np.pi * np.linspace(0.12, 0.88, 24))
    line = np.stack([np.r_[along, along[::-1]], np.r_[across + width, (across - width)[::-1]]], axis=1)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    groove = soft_polygon(size_px, _somewhere(product, rng, size_px) + length * line @ rotation)
    groove *= part.form[..., 0]
    fresh = {"gear": (0.97, 0.97, 0.96), "board": (0.50, 0.72, 0.90), "cap": (0.86, 0.72, 0.60)}[product]
    _blend(part, rng.uniform(0.75, 0.95) * groove, fresh)
    part.form[..., 1] -= 0.008 * cv2.GaussianBlur(groove, (0, 0), 0.002 * size_px)


def _dent(part: Part, product: str, rng: np.random.Generator) -> None:
    size_px = len(part.colour)
    radius = rng.uniform(0.045, 0.075)
    outline = _blob(rng, _somewhere(product, rng, size_px), radius, 0.12)
    bowl = soft_polygon(size_px, outline, 0.35 * radius * size_px) * part.form[..., 0]
    part.form[..., 1] -= rng.uniform(0.4, 0.7) * radius * bowl
    part.colour[:] *= 1 - 0.15 * bowl[..., None]


def _stain(part: Part, product: str, rng: np.random.Generator) -> None:
    size_px = len(part.colour)
    outline = _blob(rng, _somewhere(product, rng, size_px), rng.uniform(0.055, 0.09), 0.35)
    film = soft_polygon(size_px, outline, 0.004 * size_px)
    film *= 0.8 + 0.2 * np.clip(noise(rng, size_px, 0.012 * size_px, 0.012 * size_px), -1, 1)
    # Rusty oil, dried flux, grease.
    tint = {"gear": (0.12, 0.22, 0.30), "board": (0.42, 0.62, 0.72), "cap": (0.07, 0.08, 0.09)}[product]
    _blend(part, rng.uniform(0.6, 0.85) * film, tint)
    part.form[..., 2] *= 1 - 0.7 * film


def _missing_part(part: Part, product: str, rng: np.random.Generator) -> None:
    size_px = len(part.colour)
    plan = blueprint(product, size_px)
    gone = soft_polygon(size_px, plan.pieces[rng.integers(len(plan.pieces))])[..., None]
    part.colour[:] += gone * (plan.bare.colour - part.colour)
    part.form[:] += gone * (plan.bare.form - part.form)


def _wrong_colour(part: Part, product: str, rng: np.random.Generator) -> None:
    size_px = len(part.colour)
    if product == "board":  # a component from the wrong reel
        bodies = sorted(blueprint(product, size_px).bodies, key=lambda body: -np.ptp(body, axis=0).prod())[:6]
        paint = ((0.10, 0.14, 0.62), (0.66, 0.34, 0.12), (0.12, 0.56, 0.72))[rng.integers(3)]
        _blend(part, 0.85 * soft_polygon(size_px, bodies[rng.integers(len(bodies))]), paint)
        return
    outline = _blob(rng, _somewhere(product, rng, size_px), rng.uniform(0.08, 0.12), 0.4)
    patch = soft_polygon(size_px, outline, 0.012 * size_px)
    if product == "gear":  # heat tint: blue or straw
        tint = ((1.15, 0.80, 0.72), (0.55, 0.85, 1.08))[rng.integers(2)]
        part.colour[:] *= 1 + patch[..., None] * (np.array(tint, np.float32) - 1)
    else:  # a streak of another batch's pigment
        _blend(part, 0.75 * patch, ((0.36, 0.52, 0.10), (0.50, 0.16, 0.42))[rng.integers(2)])
