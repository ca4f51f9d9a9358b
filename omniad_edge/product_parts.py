"""The parts of the demo's product line as drawings: a machined gear, a circuit board and a bottle cap.

Coordinates, lengths and heights are fractions of the picture's width, y points down; colours are BGR, 0..1.
"""

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

Colour = tuple[float, float, float]

STEEL, STEEL_WEB, ENGRAVED = (0.66, 0.65, 0.63), (0.52, 0.51, 0.50), (0.30, 0.29, 0.28)
LAMINATE, TRACE, SILK = (0.20, 0.36, 0.09), (0.32, 0.53, 0.20), (0.86, 0.88, 0.86)
TIN, GOLD, HOLE = (0.74, 0.74, 0.72), (0.36, 0.66, 0.82), (0.08, 0.10, 0.06)
EPOXY, EPOXY_DARK, EPOXY_MARK = (0.13, 0.12, 0.12), (0.08, 0.07, 0.07), (0.42, 0.42, 0.42)
CERAMIC, TAN, LED, CREAM, SLOT = (
    (0.10, 0.09, 0.09),
    (0.42, 0.58, 0.70),
    (0.80, 0.88, 0.88),
    (0.74, 0.82, 0.84),
    (0.50, 0.56, 0.58),
)
CAP_BLUE, CAP_PRINT = (0.62, 0.30, 0.10), (0.88, 0.87, 0.84)

# x, y of the centre, width and height of the body, and what it is.
COMPONENTS = (
    (0.36, 0.42, 0.17, 0.13, "chip"),
    (0.66, 0.62, 0.11, 0.09, "chip"),
    (0.69, 0.36, 0.115, 0.115, "can"),
    (0.36, 0.265, 0.07, 0.032, "resistor"),
    (0.48, 0.265, 0.07, 0.032, "resistor"),
    (0.20, 0.36, 0.032, 0.07, "capacitor"),
    (0.20, 0.47, 0.032, 0.07, "capacitor"),
    (0.53, 0.42, 0.032, 0.07, "capacitor"),
    (0.53, 0.56, 0.07, 0.032, "resistor"),
    (0.53, 0.63, 0.07, 0.032, "resistor"),
    (0.53, 0.70, 0.07, 0.036, "led"),
    (0.25, 0.64, 0.16, 0.09, "connector"),
    (0.82, 0.62, 0.05, 0.12, "crystal"),
)
# Copper traces as x, y, x, y, ... and the vias where some of them end.
TRACES = (
    (0.28, 0.34, 0.28, 0.265, 0.32, 0.265),
    (0.40, 0.265, 0.45, 0.265),
    (0.51, 0.265, 0.57, 0.31, 0.64, 0.31),
    (0.20, 0.33, 0.20, 0.28, 0.16, 0.24),
    (0.20, 0.50, 0.20, 0.59),
    (0.44, 0.34, 0.48, 0.34, 0.52, 0.39),
    (0.42, 0.50, 0.46, 0.56, 0.50, 0.56),
    (0.56, 0.56, 0.62, 0.56),
    (0.56, 0.63, 0.61, 0.63),
    (0.56, 0.70, 0.62, 0.70, 0.64, 0.67),
    (0.70, 0.57, 0.74, 0.53, 0.82, 0.53, 0.82, 0.57),
    (0.71, 0.67, 0.75, 0.71, 0.80, 0.71, 0.82, 0.67),
    (0.28, 0.50, 0.25, 0.53, 0.25, 0.60),
    (0.33, 0.50, 0.30, 0.55, 0.30, 0.60),
    (0.69, 0.42, 0.69, 0.50, 0.66, 0.54, 0.66, 0.57),
    (0.32, 0.70, 0.36, 0.74, 0.50, 0.74),
)
VIAS = (
    (0.16, 0.24),
    (0.50, 0.76),
    (0.46, 0.53),
    (0.74, 0.53),
    (0.64, 0.31),
    (0.42, 0.62),
    (0.80, 0.45),
    (0.84, 0.40),
)


@dataclass(frozen=True)
class Part:
    """Layers of one part seen from above, each (S, S, 3) float32.

    colour: BGR 0..1, already multiplied by the coverage.
    form: coverage 0..1; height above the belt as a fraction of the picture's width; gloss 0..1.
    """

    colour: np.ndarray
    form: np.ndarray

    def copy(self) -> "Part":
        return Part(self.colour.copy(), self.form.copy())


@dataclass(frozen=True)
class Blueprint:
    """What all parts of one product share.

    part: the nominal part; bare: the same with every removable piece away.
    pieces: outlines (K, 2) of what can be missing; bodies: outlines of what can have the wrong colour.
    surface_px: (M, 2) x, y of the pixels where a scratch, dent or stain may be centred.
    """

    part: Part
    bare: Part
    pieces: list[np.ndarray]
    bodies: list[np.ndarray]
    surface_px: np.ndarray


@lru_cache(maxsize=8)
def blueprint(product: str, size_px: int) -> Blueprint:
    """The drawing of a product for one picture size; drawn larger and averaged down, so edges are smooth."""
    draw = {"gear": _draw_gear, "board": _draw_board, "cap": _draw_cap}[product]
    large_px = size_px * (4 if size_px <= 256 else 2)
    parts = []
    for bare in (False, True):
        large = Part(*np.zeros((2, large_px, large_px, 3), np.float32))
        pieces, bodies = draw(large, bare)
        layers = (
            cv2.resize(a, (size_px, size_px), interpolation=cv2.INTER_AREA) for a in (large.colour, large.form)
        )
        part = Part(*layers)
        # Machined and moulded edges are never sharp: their radius catches the light.
        part.form[..., 1] = cv2.GaussianBlur(part.form[..., 1], (0, 0), size_px * 0.0035)
        parts.append(part)
    solid = (parts[0].form[..., 0] > 0.99).astype(np.uint8)
    y, x = np.nonzero(cv2.erode(solid, np.ones((3, 3)), iterations=max(1, round(size_px * 0.02))))
    return Blueprint(*parts, pieces, bodies, np.stack([x, y], axis=1))


def soft_polygon(size_px: int, outline: np.ndarray, blur_px: float = 0.0) -> np.ndarray:
    """(S, S) float32, 1 inside the outline (K, 2), anti-aliased, then blurred."""
    mask = np.zeros((size_px, size_px), np.uint8)
    cv2.fillPoly(mask, [np.round((outline * size_px - 0.5) * 256).astype(np.int32)], 255, cv2.LINE_AA, 8)
    mask = mask.astype(np.float32) / 255
    return cv2.GaussianBlur(mask, (0, 0), blur_px) if blur_px > 0 else mask


def noise(rng: np.random.Generator, size_px: int, blur_x_px: float, blur_y_px: float) -> np.ndarray:
    """(S, S) float32 smooth noise of mean 0 and standard deviation 1, seamless in x."""
    # Drawn on a grid of one to two samples per sigma and enlarged: 5 times faster than blurring every pixel.
    step_x, step_y = max(1, int(blur_x_px / 1.5)), max(1, int(blur_y_px / 1.5))
    columns, rows = -(-size_px // step_x), -(-size_px // step_y)
    grain = rng.standard_normal((rows, columns), np.float32)
    grain = cv2.copyMakeBorder(grain, 0, 0, 4, 4, cv2.BORDER_WRAP)
    sigma_x, sigma_y = max(blur_x_px / step_x, 0.1), max(blur_y_px / step_y, 0.1)
    grain = cv2.GaussianBlur(grain, (0, 0), sigma_x, sigmaY=sigma_y)
    if step_x > 1 or step_y > 1:
        grain = cv2.resize(grain, (size_px * (columns + 8) // columns, size_px), interpolation=cv2.INTER_CUBIC)
    margin = (grain.shape[1] - size_px) // 2
    grain = grain[:, margin : margin + size_px]
    return (grain - grain.mean()) / grain.std()


def texture(product: str, rng: np.random.Generator, size_px: int) -> np.ndarray:
    """(S, S) float32 factor of brightness, about 1: turned metal, laminate or moulded plastic."""
    px = size_px / 256
    if product == "gear":
        angle, radius, sheen = _turned(size_px)
        grooves = 0.7 * noise(rng, size_px, 30 * px, 0.5 * px) + 0.6 * noise(rng, size_px, 5 * px, 0.5 * px)
        grooves = cv2.remap(grooves, angle, radius, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        return 1 + 0.045 * grooves + (0.26 + 0.03 * rng.standard_normal(dtype=np.float32)) * (sheen - 0.3)
    if product == "board":
        return 1 + 0.025 * noise(rng, size_px, 0.8 * px, 0.8 * px) + 0.02 * noise(rng, size_px, 20 * px, 20 * px)
    return 1 + 0.012 * noise(rng, size_px, 0.7 * px, 0.7 * px) + 0.025 * noise(rng, size_px, 25 * px, 25 * px)


@lru_cache(maxsize=4)
def _turned(size_px: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Angle and radius of every pixel as remap coordinates, and the sheen of a turned face under the lamp."""
    axis = (np.arange(size_px, dtype=np.float32) + 0.5) / size_px - 0.5
    x, y = np.meshgrid(axis, axis)
    angle, radius = np.arctan2(y, x), np.hypot(x, y)
    # Concentric grooves flash along the two rays which cross the light at a right angle.
    sheen = np.abs(np.cos(angle + np.float32(np.pi / 4))) ** 6 * np.clip(radius / 0.1, 0, 1)
    return (angle / (2 * np.pi) + 0.5).astype(np.float32) * (size_px - 1), radius * 1.4 * size_px, sheen


def backdrop(product: str, size_px: int, x: float, y: float) -> np.ndarray:
    """(S, S, 3) float32 BGR: what lies under the part when the camera is over x, y (0..1) of the belt."""
    x_px, y_px = (round(min(max(at, 0.0), 1.0) * size_px) for at in (x, y))
    return _belt(product, size_px)[y_px : y_px + size_px, x_px : x_px + size_px]


@lru_cache(maxsize=8)
def _belt(product: str, size_px: int) -> np.ndarray:
    rng = np.random.default_rng(len(product))
    px, large_px = size_px / 256, size_px * 2
    y, x = np.mgrid[:large_px, :large_px].astype(np.float32) * np.float32(2 * np.pi / px)
    grain = noise(rng, large_px, 0.6 * px, 0.6 * px)
    if product == "gear":  # woven rubber belt
        belt = (0.20, 0.185, 0.17) * (1 + 0.10 * np.sin(x / 6) * np.sin(y / 6) + 0.09 * grain)[..., None]
    elif product == "board":  # brushed steel fixture
        belt = (0.56, 0.57, 0.58) * (1 + 0.035 * noise(rng, large_px, 14 * px, 0.5 * px))[..., None]
    else:  # ribbed fabric belt
        belt = (0.50, 0.58, 0.60) * (1 + 0.02 * np.sin(y / 11) + 0.04 * grain)[..., None]
    return belt.astype(np.float32)


def _disc(x: float, y: float, radius: float) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1)


def _box(x: float, y: float, width: float, height: float) -> np.ndarray:
    return np.array([x, y]) + np.array([width, height]) / 2 * [[-1, -1], [1, -1], [1, 1], [-1, 1]]


def _rounded(x: float, y: float, width: float, height: float, radius: float) -> np.ndarray:
    corner = _disc(0, 0, radius)
    return np.array([x, y]) + corner + np.sign(corner) * (np.array([width, height]) / 2 - radius)


def _sector(inner: float, outer: float, start: float, stop: float, x: float = 0.5, y: float = 0.5) -> np.ndarray:
    angle = np.linspace(start, stop, 16)
    ray = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return np.array([x, y]) + np.concatenate([outer * ray, inner * ray[::-1]])


def _points_px(part: Part, outline: np.ndarray) -> list[np.ndarray]:
    return [np.round(np.asarray(outline) * len(part.colour) - 0.5).astype(np.int32)]


def _fill(part: Part, outline: np.ndarray, colour: Colour, height: float, gloss: float) -> None:
    cv2.fillPoly(part.colour, _points_px(part, outline), colour)
    cv2.fillPoly(part.form, _points_px(part, outline), (1.0, height, gloss))


def _cut(part: Part, outline: np.ndarray) -> None:
    cv2.fillPoly(part.colour, _points_px(part, outline), (0, 0, 0))
    cv2.fillPoly(part.form, _points_px(part, outline), (0, 0, 0))


def _print(part: Part, text: str, x: float, y: float, height: float, colour: Colour) -> None:
    """Write `text` centred on x, y; capitals are `height` tall."""
    part.colour[_letters(part, text, x, y, height) > 127] = colour


def _print_arc(part: Part, text: str, radius: float, step_deg: float, height: float, colour: Colour) -> None:
    """Write `text` along the top of a circle round the picture's centre, a letter every step_deg."""
    size_px = len(part.colour)
    centre_px = (size_px / 2 - 0.5, size_px / 2 - 0.5)
    for i, letter in enumerate(text):
        mask = _letters(part, letter, 0.5, 0.5 - radius, height)
        turn = cv2.getRotationMatrix2D(centre_px, -step_deg * (i - (len(text) - 1) / 2), 1.0)
        part.colour[cv2.warpAffine(mask, turn, (size_px, size_px)) > 127] = colour


def _letters(part: Part, text: str, x: float, y: float, height: float) -> np.ndarray:
    size_px = len(part.colour)
    mask = np.zeros((size_px, size_px), np.uint8)
    scale, stroke_px = height * size_px / 21, max(1, round(height * size_px / 7))
    (width_px, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, stroke_px)
    corner = (round(x * size_px - width_px / 2), round((y + height / 2) * size_px))
    return cv2.putText(mask, text, corner, cv2.FONT_HERSHEY_SIMPLEX, scale, 255, stroke_px)


def _draw_gear(part: Part, bare: bool) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Draw the gear; returns the teeth, which can break off, and no separately coloured bodies."""
    teeth, root, tip = 24, 0.35, 0.405
    pitch = 2 * np.pi / teeth
    outline = _disc(0.5, 0.5, root)
    if not bare:
        flank, radius = (
            np.array([-0.30, -0.26, -0.14, 0.14, 0.26, 0.30]),
            np.array([0.0, 0.2, 1.0, 1.0, 0.2, 0.0]),
        )
        angle = (pitch * (np.arange(teeth)[:, None] + flank)).ravel()
        outline = 0.5 + np.tile(root + (tip - root) * radius, teeth)[:, None] * np.stack(
            [np.cos(angle), np.sin(angle)], axis=1
        )
    _fill(part, outline, STEEL, 0.034, 0.5)
    _fill(part, _disc(0.5, 0.5, 0.292), STEEL_WEB, 0.024, 0.35)
    _fill(part, _disc(0.5, 0.5, 0.152), STEEL, 0.042, 0.5)
    _fill(part, _disc(0.5, 0.5, 0.120), STEEL, 0.040, 0.5)
    for i in range(6):
        x, y = 0.5 + 0.222 * np.cos(i * np.pi / 3), 0.5 + 0.222 * np.sin(i * np.pi / 3)
        _fill(part, _disc(x, y, 0.050), STEEL, 0.022, 0.5)
        _cut(part, _disc(x, y, 0.042))
    _cut(part, _disc(0.5, 0.5, 0.072))
    _cut(part, _box(0.5, 0.425, 0.036, 0.04))
    _print_arc(part, "Z24", 0.222, 8.5, 0.034, ENGRAVED)
    return [_sector(root - 0.004, tip + 0.01, (i - 0.42) * pitch, (i + 0.42) * pitch) for i in range(teeth)], []


def _draw_cap(part: Part, bare: bool) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Draw the bottle cap; returns the pieces of the rim, which can break out, and no separate bodies."""
    ridges, rim = 72, 0.375
    angle = np.linspace(0, 2 * np.pi, ridges * 8, endpoint=False)
    wave = np.sin(angle * ridges)
    radius = np.full_like(angle, 0.318) if bare else rim + 0.007 * np.sign(wave) * np.sqrt(np.abs(wave))
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    _fill(part, 0.5 + ring * radius[:, None], CAP_BLUE, 0.040, 0.5)
    steps = ((0.345, 0.055), (0.330, 0.062), (0.255, 0.058), (0.248, 0.054), (0.150, 0.057), (0.138, 0.054))
    for step_radius, height in steps[bare * 2 :]:
        _fill(part, _disc(0.5, 0.5, step_radius), CAP_BLUE, height, 0.5)
    drop = np.concatenate([_sector(0, 0.075, 0, np.pi, 0.5, 0.522)[:16], [[0.5, 0.395]]])
    _fill(part, drop, CAP_PRINT, 0.054, 0.5)
    _print_arc(part, "AQUA PURA", 0.202, 13.5, 0.040, CAP_PRINT)
    starts = np.linspace(0, 2 * np.pi, 36, endpoint=False)
    return [_sector(0.322, rim + 0.02, start, start + 0.22) for start in starts], []


def _draw_board(part: Part, bare: bool) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Draw the circuit board; returns what can be unplaced and what can be the wrong component."""
    _fill(part, _rounded(0.5, 0.5, 0.84, 0.64, 0.025), LAMINATE, 0.012, 0.3)
    for path in TRACES:
        points, width_px = _points_px(part, np.reshape(path, (-1, 2))), round(0.010 * len(part.colour))
        cv2.polylines(part.colour, points, False, TRACE, width_px)
        cv2.polylines(part.form, points, False, (1.0, 0.0132, 0.35), width_px)
    for x, y in VIAS:
        _fill(part, _disc(x, y, 0.010), TIN, 0.0132, 0.5)
        _fill(part, _disc(x, y, 0.005), HOLE, 0.006, 0.0)
    for i in range(9):
        _fill(part, _box(0.40 + 0.035 * i, 0.798, 0.020, 0.044), GOLD, 0.0128, 0.6)
    for x, y in ((0.12, 0.22), (0.88, 0.22), (0.12, 0.78), (0.88, 0.78)):
        _fill(part, _disc(x, y, 0.026), GOLD, 0.0125, 0.5)
        _cut(part, _disc(x, y, 0.016))
    _print(part, "OM-3 REV B", 0.70, 0.245, 0.024, SILK)
    for name, x, y in (("U1", 0.255, 0.325), ("U2", 0.622, 0.520), ("C5", 0.79, 0.32), ("J1", 0.15, 0.59)):
        _print(part, name, x, y, 0.020, SILK)
    for x, y, width, height, what in COMPONENTS:
        _footprint(part, x, y, width, height, what)
        if not bare:
            _component(part, x, y, width, height, what)
    pieces = [_box(x, y, width + 0.035, height + 0.050) for x, y, width, height, _ in COMPONENTS]
    bodies = [_body(x, y, w, h) for x, y, w, h, what in COMPONENTS if what in ("resistor", "capacitor", "led")]
    return pieces, bodies


def _legs(x: float, y: float, width: float, height: float, what: str) -> list[np.ndarray]:
    """Outlines of the soldered ends of a component."""
    if what == "chip":
        columns = x + 0.024 * (np.arange(n := round(width / 0.024)) - (n - 1) / 2)
        return [_box(column, y + s * (height / 2 + 0.008), 0.012, 0.026) for column in columns for s in (-1, 1)]
    if what == "connector":
        return [_box(x + (i - 1.5) * 0.034, y - height / 2 - 0.008, 0.016, 0.026) for i in range(4)]
    if what == "can":
        return [_box(x + s * width * 0.43, y, width * 0.16, height * 0.5) for s in (-1, 1)]
    if width > height:
        return [_box(x + s * width * 0.40, y, width * 0.22, height) for s in (-1, 1)]
    return [_box(x, y + s * height * 0.40, width, height * 0.22) for s in (-1, 1)]


def _body(x: float, y: float, width: float, height: float) -> np.ndarray:
    """Outline of what lies between the two soldered ends of a small component."""
    return _box(x, y, width * 0.62, height) if width > height else _box(x, y, width, height * 0.62)


def _footprint(part: Part, x: float, y: float, width: float, height: float, what: str) -> None:
    if what in ("resistor", "capacitor", "led"):
        frame = _points_px(part, _box(x, y, width + 0.026, height + 0.024))
        cv2.polylines(part.colour, frame, True, SILK, max(1, round(0.004 * len(part.colour))))
    for leg in _legs(x, y, width, height, what):
        centre = leg.mean(axis=0)
        _fill(part, centre + (leg - centre) * 1.25, TIN, 0.0132, 0.6)


def _component(part: Part, x: float, y: float, width: float, height: float, what: str) -> None:
    for leg in _legs(x, y, width, height, what):
        _fill(part, leg, TIN, 0.018 if what == "chip" else 0.024, 0.7)
    if what == "chip":
        _fill(part, _box(x, y, width, height), EPOXY, 0.034, 0.25)
        _fill(part, _disc(x - width / 2 + 0.016, y + height / 2 - 0.016, 0.007), EPOXY_DARK, 0.032, 0.1)
        _print(part, "OM74", x, y, 0.020, EPOXY_MARK)
    elif what == "can":
        _fill(part, _rounded(x, y, width, height, 0.012), EPOXY, 0.024, 0.3)
        _fill(part, _disc(x, y, width * 0.46), TIN, 0.062, 0.5)
        _fill(part, _sector(0, width * 0.43, 2.5, 3.8, x, y), CERAMIC, 0.062, 0.2)
    elif what == "connector":
        _fill(part, _box(x, y, width, height), CREAM, 0.050, 0.3)
        _fill(part, _box(x, y + 0.006, width * 0.86, height * 0.62), SLOT, 0.028, 0.1)
        for i in range(4):
            _fill(part, _box(x + (i - 1.5) * 0.034, y + 0.006, 0.012, 0.020), GOLD, 0.040, 0.6)
    elif what == "crystal":
        _fill(part, _rounded(x, y, width, height, 0.024), TIN, 0.040, 0.7)
        _fill(part, _rounded(x, y, width * 0.78, height * 0.90, 0.018), TIN, 0.043, 0.7)
    else:
        colour = {"resistor": CERAMIC, "capacitor": TAN, "led": LED}[what]
        _fill(part, _body(x, y, width, height), colour, 0.026, 0.3)
