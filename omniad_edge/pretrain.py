"""A backbone from procedural pictures alone: no photographs, no download, no licence but this product's.

Dense contrastive learning of what an anomaly map needs: two views of a picture that differ in light, contrast,
colour cast, blur, noise and a small movement must agree at each place, and differ from every other place of every
picture, also from the same place where a defect was painted on it. So features ignore the light and the pose, and
tell neighbouring structures, and a sound one from a damaged one, apart.

Source: InfoNCE (van den Oord et al., arXiv 1807.03748) at each position (Wang et al., "Dense Contrastive
Learning", CVPR 2021), on formula-driven pictures (after Kataoka et al., ACCV 2020). The defects are ours.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import ARCHITECTURES, ResNet
from .errors import BundleError, InputError, TrainingError
from .files import check_writable
from .model import IMAGENET_MEAN, IMAGENET_STD, initialise
from .pictures import PICTURE_PX, alter_picture, draw_picture
from .train import checked_seed
from .weights import listed, read_tensors, write_tensors

CROP_PX = 64
PICTURES = 4000
BATCH_SIZE = 16  # pictures a step, three views of each
POSITIONS = 16  # per picture and scale
EMBEDDING = 64
TEMPERATURE = 0.1
TURN_DEG, ZOOM, SHIFT_PX = 20, 1.12, 3  # largest movement between two views
COVERED = 0.4  # the share of a position that must have changed for it to count as defective
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.02


def pretrain(
    out: str | Path,
    backbone: str = "resnet18",
    steps: int = 5000,
    seed: int = 42,
    start: str | Path | None = None,
    pictures: int = PICTURES,
    batch_size: int = BATCH_SIZE,
    progress: Callable[[int, float], None] | None = None,
) -> float:
    """Train a backbone and write it, in fp16, as safetensors with torchvision's names.

    start: weights to begin with, in place of random ones: of the same architecture or of one with fewer blocks,
        which is grown to this one
    pictures: how many are drawn before the first step, 8 ms and 65 kB each; batch_size: of them a step
    progress: called with the steps done and the loss
    On a GPU, if there is one, in bf16. Returns the last loss, the mean of 50 steps. Raises InputError for an
    unknown backbone, a number below one or a seed below zero, BundleError for a start that does not fit, and
    TrainingError, writing nothing, if the loss is not finite.
    """
    if backbone not in ARCHITECTURES:
        raise InputError(f"backbone: expected one of {', '.join(ARCHITECTURES)}; got {backbone!r}")
    check_writable(Path(out), is_folder=False)
    for name, value in {"steps": steps, "pictures": pictures, "batch_size": batch_size}.items():
        if value < 1:
            raise InputError(f"{name}: expected at least 1; got {value}")
    checked_seed(seed)
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    net = ResNet(backbone).apply(initialise).train()
    if start is not None:
        grow(net, read_tensors(start))
    with torch.device("cuda" if torch.cuda.is_available() else "cpu") as device:
        net.to(device)
        images = [some.to(device) for some in draw_pictures(pictures, rng)]
        losses = fit(net, images, steps, batch_size, rng, progress)
    state = {
        name: t.half().cpu() for name, t in net.state_dict().items() if not name.endswith("num_batches_tracked")
    }
    recipe = f"omniad pretrain, {steps} steps, seed {seed}" + (", grown from a smaller one" if start else "")
    write_tensors(out, state, {"backbone": backbone, "recipe": recipe})
    return float(np.mean(losses[-50:]))


def fit(
    net: ResNet,
    images: list[Tensor],
    steps: int,
    batch_size: int,
    rng: np.random.Generator,
    progress: Callable[[int, float], None] | None,
) -> list[float]:
    """Train `net` on `draw_pictures`' tensors; the losses. Raises TrainingError if one is not finite."""
    heads = nn.ModuleList(nn.Linear(channels, EMBEDDING) for channels in net.channels)
    parameters = [*net.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    device, losses = images[0].device.type, []
    for step in range(steps):
        for group in optimizer.param_groups:
            cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / 50) * max(cosine, 0.02)
        rows = torch.from_numpy(rng.integers(0, len(images[0]), batch_size))
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = contrastive_loss(net, heads, *crop([some[rows] for some in images], rng))
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        losses.append(loss.item())
        if not (math.isfinite(losses[-1]) and norm.isfinite()):
            raise TrainingError(
                f"loss or gradient is not finite in step {step + 1} of {steps}; nothing was written: try another "
                "seed, a larger batch or another start"
            )
        if progress:
            progress(step + 1, losses[-1])
    return losses


def draw_pictures(count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures and each with a defect, (N, 3, H, W) uint8, and where that is, (N, 1, H, W) bool."""
    pictures = [draw_picture(rng) for _ in range(count)]
    others = pictures[1:] + pictures[:1]
    altered, changed = zip(
        *(alter_picture(*pair, rng) for pair in zip(pictures, others, strict=True)), strict=True
    )
    images = (torch.from_numpy(np.stack(some)).permute(0, 3, 1, 2) for some in (pictures, altered))
    return *images, torch.from_numpy(np.stack(changed))[:, None]


def grow(net: ResNet, tensors: dict[str, Tensor]) -> None:
    """Weights of a network with fewer blocks a layer into `net`; the blocks it lacks begin as the identity.

    Raises BundleError if they do not fit.
    """
    state = net.state_dict()
    strange = [name for name, t in tensors.items() if name not in state or state[name].shape != t.shape]
    whole = {block_of(name) for name in tensors} | {"", "layer1.0", "layer2.0", "layer3.0"}
    counts = "num_batches_tracked"  # not in what `pretrain` writes
    missing = [n for n in state if block_of(n) in whole and n not in tensors and not n.endswith(counts)]
    if strange or missing:
        raise BundleError(
            f"start: expected weights of a smaller ResNet of the same kind; {listed(strange)} do not fit, "
            f"{listed(missing)} missing"
        )
    for name, module in net.named_modules():
        last = getattr(module, "bn3", getattr(module, "bn2", None))  # of a block
        if last is not None and f"{name}.bn1.weight" not in tensors:
            nn.init.zeros_(last.weight)
    net.load_state_dict(state | {name: t.float() for name, t in tensors.items()})


def block_of(name: str) -> str:
    """ "layer1.0.conv1.weight" -> "layer1.0"; "" of the stem."""
    return ".".join(name.split(".")[:2]) if name.startswith("layer") else ""


def contrastive_loss(
    net: ResNet, heads: nn.ModuleList, pixels: Tensor, altered: Tensor, changed: Tensor
) -> Tensor:
    """pixels, altered: (N, 3, S, S) in 0..1; changed: (N, 1, S, S), 1 where they differ.

    Summed over the scales: of the features themselves, whose cosine the anomaly map is, and of their embedding.
    """
    there, back = movements(len(pixels))
    grid = F.affine_grid(there, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)
    loss = pixels.new_zeros(())
    for head, features in zip(heads, net(torch.cat([view(pixels), view(moved), view(altered)])), strict=True):
        a, b, defective = features.chunk(3)
        grid = F.affine_grid(back, list(b.shape), align_corners=False)
        b = F.grid_sample(b, grid, padding_mode="border", align_corners=False)
        seen = (grid.abs().amax(-1) < 1 - 1 / a.shape[3]).flatten(1)
        covered = F.interpolate(changed, size=a.shape[2:], mode="area").flatten(1) > COVERED
        chosen = torch.multinomial((covered * 4 + 0.25) * seen + 1e-6, POSITIONS)  # (N, P)
        seen, covered = (mask.gather(1, chosen).flatten() for mask in (seen, covered))
        a, b, defective = (at(some, chosen) for some in (a, b, defective))
        triple = a[seen], b[seen], defective[covered]
        loss = loss + (contrast(*triple) + contrast(*map(head, triple))) / 2
    return loss


def movements(count: int) -> tuple[Tensor, Tensor]:
    """(count, 2, 3) each: random small movements of a crop, as affine_grid takes them, and their inverses."""
    angle = (2 * torch.rand(count) - 1) * math.radians(TURN_DEG)
    zoom = ZOOM ** (2 * torch.rand(count) - 1)
    matrix = torch.eye(3).repeat(count, 1, 1)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    matrix[:, 0, 0], matrix[:, 0, 1], matrix[:, 1, 0], matrix[:, 1, 1] = cos, -sin, sin, cos
    matrix[:, :2, 2] = (2 * torch.rand(count, 2) - 1) * 2 * SHIFT_PX / CROP_PX
    return matrix[:, :2], torch.linalg.inv(matrix)[:, :2]


def at(features: Tensor, chosen: Tensor) -> Tensor:
    """features (N, C, H, W) at the positions `chosen` (N, P) -> (N * P, C)"""
    index = chosen[:, None].expand(-1, features.shape[1], -1)
    return features.flatten(2).gather(2, index).transpose(1, 2).flatten(0, 1)


def contrast(a: Tensor, b: Tensor, defective: Tensor) -> Tensor:
    """InfoNCE between rows of two views (M, C), where row i of both is the same place; `defective` is no one's."""
    a, b, defective = (F.normalize(t, dim=1) for t in (a, b, defective))
    same = torch.arange(len(a))
    one = torch.cat([a @ b.T, a @ defective.T], dim=1) / TEMPERATURE
    other = torch.cat([b @ a.T, b @ defective.T], dim=1) / TEMPERATURE
    return (F.cross_entropy(one, same) + F.cross_entropy(other, same)) / 2


def crop(images: list[Tensor], rng: np.random.Generator) -> list[Tensor]:
    """The same random crop, mirrored or not and turned by quarters, of pictures and masks, in 0..1."""
    top, left = rng.integers(0, PICTURE_PX - CROP_PX + 1, 2)
    quarters, mirrored = int(rng.integers(4)), rng.random() < 0.5
    crops = []
    for image in images:
        some = image[:, :, top : top + CROP_PX, left : left + CROP_PX]
        some = some.float() if some.dtype == torch.bool else some.float() / 255
        some = torch.rot90(some, quarters, (2, 3))
        crops.append(some.flip(3) if mirrored else some)
    return crops


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
