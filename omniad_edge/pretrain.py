"""A backbone from procedural pictures alone: no photographs, no download, no licence but this product's.

Dense contrastive learning: two views of a picture that differ in light, contrast, colour cast, blur and noise
must agree at each position, and differ from every other position of every picture. What an anomaly map needs
follows directly: features that ignore the light, and tell neighbouring structures apart.

Source: InfoNCE (van den Oord et al., arXiv 1807.03748) at each position (Wang et al., "Dense Contrastive
Learning", CVPR 2021), on formula-driven pictures (after Kataoka et al., ACCV 2020).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import ARCHITECTURES, ResNet
from .errors import InputError
from .files import atomic_write
from .model import IMAGENET_MEAN, IMAGENET_STD, initialise

PICTURE_PX = 96
CROP_PX = 64
PICTURES = 4000
PAIRS = 24  # pictures per step, two views each
POSITIONS = 16  # per picture and scale
EMBEDDING = 64
TEMPERATURE = 0.1
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.02


def pretrain(
    out: str | Path,
    backbone: str = "resnet18",
    steps: int = 2500,
    seed: int = 42,
    progress: Callable[[int, float], None] | None = None,
) -> float:
    """Train a backbone and write it, in fp16, as safetensors with torchvision's names.

    progress: called with the steps done and the loss. Returns the last loss, the mean of 50 steps. Raises
    InputError for an unknown backbone or less than one step.
    """
    if backbone not in ARCHITECTURES:
        raise InputError(f"backbone: expected one of {', '.join(ARCHITECTURES)}; got {backbone!r}")
    if steps < 1:
        raise InputError(f"steps: expected at least 1; got {steps}")
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    pictures = torch.from_numpy(np.stack([draw_picture(rng) for _ in range(PICTURES)])).permute(0, 3, 1, 2)
    net = ResNet(backbone).apply(initialise).train()
    heads = nn.ModuleList(nn.Conv2d(channels, EMBEDDING, 1) for channels in net.channels)
    parameters = [*net.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 50) * max(cosine, 0.02)
        pixels = crop(pictures[torch.from_numpy(rng.integers(0, len(pictures), PAIRS))].float() / 255, rng)
        embeddings = [head(f) for head, f in zip(heads, net(torch.cat([view(pixels), view(pixels)])), strict=True)]
        loss = sum(contrast(embedding[:PAIRS], embedding[PAIRS:]) for embedding in embeddings)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        losses.append(loss.item())
        if progress:
            progress(step + 1, losses[-1])
    state = {name: t.half() for name, t in net.state_dict().items() if not name.endswith("num_batches_tracked")}
    with atomic_write(out) as part:
        save_file(state, part, {"backbone": backbone, "recipe": f"omniad pretrain, {steps} steps, seed {seed}"})
    return float(np.mean(losses[-50:]))


def contrast(a: Tensor, b: Tensor) -> Tensor:
    """InfoNCE between two views' embeddings (N, E, H, W) at the same random positions of every picture."""
    chosen = torch.randperm(a.shape[2] * a.shape[3])[:POSITIONS]
    a, b = (F.normalize(t.flatten(2)[:, :, chosen].transpose(1, 2).flatten(0, 1), dim=1) for t in (a, b))
    likeness = a @ b.T / TEMPERATURE
    same = torch.arange(len(a))
    return (F.cross_entropy(likeness, same) + F.cross_entropy(likeness.T, same)) / 2


def crop(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """The same random crop and quarter turn of (N, 3, PICTURE_PX, PICTURE_PX)."""
    top, left = rng.integers(0, PICTURE_PX - CROP_PX + 1, 2)
    pixels = pixels[:, :, top : top + CROP_PX, left : left + CROP_PX]
    return torch.rot90(pixels, int(rng.integers(4)), (2, 3))


def view(pixels: Tensor) -> Tensor:
    """pixels (N, 3, H, W) in 0..1 as another camera setting sees them, normalised for the backbone."""
    count = len(pixels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *(shape or (1, 1, 1))) * (high - low) + low

    x = pixels.clamp(1e-3, 1) ** uniform(0.7, 1.4)
    mean = x.mean((2, 3), keepdim=True)
    x = (x - mean) * uniform(0.7, 1.3) + mean * uniform(0.8, 1.2) * uniform(0.94, 1.06, 3, 1, 1)
    ramp = torch.linspace(-1, 1, x.shape[3])
    x = x * (1 + uniform(-0.15, 0.15) * ramp + uniform(-0.15, 0.15) * ramp[:, None])
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, blurred, uniform(-1, 1).clamp(min=0))
    x = x + torch.randn(x.shape) * uniform(0, 0.05)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD))
    return (x.clamp(0, 1) - mean) / std


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
