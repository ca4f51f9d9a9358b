"""Omni-AD in plain torch: the readable reference that every faster form must equal.

Source: "Omni-AD: Learning to Reconstruct Global and Local Features for Multi-class Anomaly Detection",
ICME 2025 (arXiv 2503.21125). Where the paper is silent the published code decides, with one exception:
there each attention builds a new, randomly initialised output MLP at every call, so that one image gives
another map each time. Here the attention output is a trained layer (Eq. 1) and results repeat bit for bit.

Shapes: N batch, C channels, H W rows and columns, T learnable tokens seen as a square grid, d = C / heads.
"""

from dataclasses import asdict, dataclass
from math import isqrt

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .anomaly_map import anomaly_map
from .backbone import ARCHITECTURES, Bottleneck, ResNet
from .errors import InputError
from .tiles import MAX_INPUT_PX, MAX_SIDE_PX, Tiling

HEADS = 8
STRIDE = 32  # of the neck's output: sizes are multiples of it
JITTER = 20.0  # feature jitter in training (paper III-C)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

ATTENTIONS = ("q+kv", "kv+q", "q+q", "kv+kv", "self")
ATTENTION_OUTPUTS = ("linear", "none", "mlp")
BRANCHES = ("both", "global", "local")


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of one network; the default is the paper's.

    attention:        order of the two attention steps (Table III; "self" is Table II's first row)
    attention_output: what maps the concatenated heads: "linear" (Eq. 1), "none", or "mlp" (C, SiLU, C)
    branches:         which branches an Omni-block has (Table IV)
    tokens:           learnable tokens per step, a square number
    height, width:    input size, multiples of 32 from 64 to 4096, as a bundle takes it
    tiles:            rows and columns that a frame is resized to, to be seen in tiles of the input size; None: a
                      frame is resized to the input size itself
    """

    backbone: str = "resnet34"
    depths: tuple[int, int, int, int] = (3, 9, 9, 7)
    attention: str = "q+kv"
    attention_output: str = "linear"
    branches: str = "both"
    tokens: int = 64
    height: int = 256
    width: int = 256
    tiles: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "depths", tuple(self.depths))
        object.__setattr__(self, "tiles", self.tiles and tuple(self.tiles))
        for name, choices in (
            ("backbone", tuple(ARCHITECTURES)),
            ("attention", ATTENTIONS),
            ("attention_output", ATTENTION_OUTPUTS),
            ("branches", BRANCHES),
        ):
            if getattr(self, name) not in choices:
                raise InputError(f"{name}: expected one of {', '.join(choices)}; got {getattr(self, name)!r}")
        if len(self.depths) != 4 or min(self.depths) < 1:
            raise InputError(f"depths: expected four numbers of blocks, each at least 1; got {self.depths}")
        if self.tokens < 1 or isqrt(self.tokens) ** 2 != self.tokens:
            raise InputError(f"tokens: expected a square number such as 64; got {self.tokens}")
        sides = self.height, self.width
        if any(side % STRIDE or not 2 * STRIDE <= side <= MAX_INPUT_PX for side in sides):
            raise InputError(
                f"input size: height and width must be multiples of {STRIDE} from {2 * STRIDE} to {MAX_INPUT_PX}; "
                f"got {self.height} x {self.width}"
            )
        if self.tiles is not None:
            check_tiles(self.tiles, self.height, self.width)

    @property
    def tiling(self) -> Tiling:
        """How a frame is seen."""
        return Tiling(*(self.tiles or (self.height, self.width)), self.height, self.width)

    def to_dict(self) -> dict:
        """JSON-safe; without `tiles` where there are none, as older checkpoints are."""
        lists = {"depths": list(self.depths)} | ({"tiles": list(self.tiles)} if self.tiles else {})
        return {name: value for name, value in (asdict(self) | lists).items() if value is not None}


def check_tiles(tiles: tuple[int, int], height: int, width: int) -> None:
    rows, columns = tiles
    larger = height <= rows <= MAX_SIDE_PX and width <= columns <= MAX_SIDE_PX
    if not larger or (rows, columns) == (height, width):
        raise InputError(
            f"tiles: expected the size of a larger image than the input's {height} x {width}, no side above "
            f"{MAX_SIDE_PX}; got {rows} x {columns}"
        )


PRESETS = {
    "base": ModelConfig(),
    "fast": ModelConfig(depths=(3, 6, 6, 3)),
    "small": ModelConfig(backbone="resnet18", depths=(2, 2, 2, 2)),
}


class Neck(nn.Module):
    """Fuses the teacher's features f0, f1, f2 into one bottleneck map (N, 2 C2, H/32, W/32)."""

    def __init__(self, c0: int, c1: int, c2: int) -> None:
        super().__init__()
        self.down0 = ConvNorm(c0, c1, 3, stride=2, bias=False)
        self.lateral1 = ConvNorm(c1, c1, 1)
        self.down1 = ConvNorm(c1, c2, 3, stride=2, bias=False)
        self.lateral2 = ConvNorm(c2, c2, 1)
        self.fuse = ConvNorm(c2, c2, 1)
        first = Bottleneck(c2, 2 * c2, c2 // 2, stride=2)
        self.blocks = nn.Sequential(first, *(Bottleneck(2 * c2, 2 * c2, c2 // 2) for _ in range(2)))
        self.draw_noise = draw_noise  # another where several processes share a batch

    def forward(self, f0: Tensor, f1: Tensor, f2: Tensor) -> Tensor:
        a = self.down0(f0) + self.lateral1(f1)
        b = self.down1(a) + self.lateral2(f2)
        x = self.blocks(self.fuse(b))
        return add_jitter(x, self.draw_noise(x)) if self.training else x


class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=bias)
        self.norm = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


def draw_noise(x: Tensor) -> Tensor:
    """Normal noise, as x; other than randn_like's it does not depend on x's memory layout."""
    return torch.randn(x.shape, dtype=x.dtype, device=x.device)


def add_jitter(x: Tensor, noise: Tensor) -> Tensor:
    """Noise in proportion to each position's feature norm (paper III-C), so that copying does not pay."""
    norm = x.norm(dim=1, keepdim=True) / x.shape[1]
    return x + noise * norm * JITTER


class QueryAttention(nn.Module):
    """Learnable queries gather from every position; the result is spread back over the image.

    x (N, C, H, W) -> (N, C, H, W). `pe` is added after the softmax, as published; since it does not
    depend on the position, (softmax + pe 1^T) V = softmax V + pe (sum of V).
    """

    def __init__(self, dim: int, tokens: int, output: str) -> None:
        super().__init__()
        self.grid = isqrt(tokens)
        self.tokens = nn.Parameter(torch.zeros(1, tokens, dim))
        self.pe = nn.Parameter(torch.zeros(1, HEADS, tokens, 1))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.out = attention_output(dim, output)

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        q = split_heads(self.q(self.tokens)).expand(n, -1, -1, -1)  # (N, heads, T, d)
        k, v = map(split_heads, self.kv(to_tokens(x)).chunk(2, dim=-1))  # (N, heads, H*W, d)
        t = F.scaled_dot_product_attention(q, k, v) + self.pe * v.sum(2, keepdim=True)
        t = to_map(self.out(merge_heads(t)), self.grid, self.grid)
        return F.interpolate(t, size=(height, width), mode="nearest")


class KeyValueAttention(nn.Module):
    """Every position gathers from learnable keys and values. x (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, dim: int, tokens: int, output: str) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(1, tokens, dim))
        self.pe = nn.Parameter(torch.zeros(1, HEADS, 1, tokens))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.out = attention_output(dim, output)

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        q = split_heads(self.q(to_tokens(x)))  # (N, heads, H*W, d)
        k, v = map(split_heads, self.kv(self.tokens).chunk(2, dim=-1))  # (1, heads, T, d)
        g = F.scaled_dot_product_attention(q, k.expand(n, -1, -1, -1), v.expand(n, -1, -1, -1))
        return to_map(self.out(merge_heads(g + self.pe @ v)), height, width)


class SelfAttention(nn.Module):
    """Queries, keys and values all from the input (Table II, first row). x (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, dim: int, output: str) -> None:
        super().__init__()
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.out = attention_output(dim, output)

    def forward(self, x: Tensor) -> Tensor:
        tokens = to_tokens(x)
        k, v = map(split_heads, self.kv(tokens).chunk(2, dim=-1))
        g = F.scaled_dot_product_attention(split_heads(self.q(tokens)), k, v)
        return to_map(self.out(merge_heads(g)), *x.shape[2:])


def attention_output(dim: int, kind: str) -> nn.Module:
    """The map behind the concatenated heads, one of ATTENTION_OUTPUTS."""
    if kind == "none":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(dim, dim)
    return nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))


def attention_step(kind: str, dim: int, tokens: int, output: str) -> nn.Module:
    if kind == "q":
        return QueryAttention(dim, tokens, output)
    if kind == "kv":
        return KeyValueAttention(dim, tokens, output)
    return SelfAttention(dim, output)


class GlobalBranch(nn.Module):
    """Two attention steps, each with its residual: m = step1(x) + x; g = step2(m) + m + x."""

    def __init__(self, dim: int, config: ModelConfig) -> None:
        super().__init__()
        first, second = ("self", "self") if config.attention == "self" else config.attention.split("+")
        self.step1 = attention_step(first, dim, config.tokens, config.attention_output)
        self.step2 = attention_step(second, dim, config.tokens, config.attention_output)

    def forward(self, x: Tensor) -> Tensor:
        m = self.step1(x) + x
        return self.step2(m) + m + x


class LocalBranch(nn.Module):
    """3x3 and 5x5 depthwise-separable convolutions side by side, mixed by a 1x1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.depthwise3 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.pointwise3 = nn.Conv2d(dim, dim, 1)
        self.depthwise5 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.pointwise5 = nn.Conv2d(dim, dim, 1)
        self.mix = nn.Conv2d(2 * dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        z3 = norm_silu(self.pointwise3(norm_silu(self.depthwise3(x))))
        z5 = norm_silu(self.pointwise5(norm_silu(self.depthwise5(x))))
        return norm_silu(self.mix(torch.cat((z3, z5), dim=1)))


class OmniBlock(nn.Module):
    """x (N, C, H, W) -> (N, C, H, W): the global and the local branch, mixed, around a residual."""

    def __init__(self, dim: int, config: ModelConfig) -> None:
        super().__init__()
        self.global_branch = GlobalBranch(dim, config) if config.branches != "local" else None
        self.local_branch = LocalBranch(dim) if config.branches != "global" else None
        self.mix = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        branches = [branch(x) for branch in (self.global_branch, self.local_branch) if branch is not None]
        y = branches[0] + branches[1] if len(branches) == 2 else branches[0]
        y = norm_silu(pointwise(self.mix, y))
        return x + pointwise(self.out, y)


def norm_silu(x: Tensor) -> Tensor:
    """Instance norm (statistics of this image, always; no affine) and SiLU."""
    return F.silu(F.instance_norm(x, eps=1e-5))


def pointwise(linear: nn.Linear, x: Tensor) -> Tensor:
    """A Linear over the channels of x (N, C, H, W)."""
    return F.conv2d(x, linear.weight[:, :, None, None], linear.bias)


class PatchExpand(nn.Module):
    """Twice finer and half as wide: (N, 2D, H, W) -> (N, D, 2H, 2W)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.expand = nn.Linear(2 * dim, 4 * dim, bias=False)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        y = self.expand(x.permute(0, 2, 3, 1)).view(n, height, width, 2, 2, c // 2)
        y = y.permute(0, 1, 3, 2, 4, 5).reshape(n, 2 * height, 2 * width, c // 2)
        return self.norm(y).permute(0, 3, 1, 2).contiguous()


class Decoder(nn.Module):
    """Neck output -> the three student features, ordered as the teacher's (strides 4, 8, 16)."""

    def __init__(self, dim: int, config: ModelConfig) -> None:
        super().__init__()
        dims = [dim >> stage for stage in range(4)]
        self.stages = nn.ModuleList(
            nn.Sequential(*(OmniBlock(d, config) for _ in range(depth)))
            for d, depth in zip(dims, config.depths, strict=True)
        )
        self.expands = nn.ModuleList(PatchExpand(d) for d in dims[1:])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s3 = self.stages[0](x)
        s2 = self.stages[1](self.expands[0](s3))
        s1 = self.stages[2](self.expands[1](s2))
        return self.stages[3](self.expands[2](s1)), s1, s2


class OmniAD(nn.Module):
    """Teacher, neck and decoder. `train()` never touches the frozen teacher."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.teacher = ResNet(config.backbone).requires_grad_(False)
        self.neck = Neck(*self.teacher.channels)
        self.decoder = Decoder(2 * self.teacher.channels[2], config)
        self.apply(initialise)
        self.teacher.eval()

    def train(self, mode: bool = True) -> "OmniAD":
        super().train(mode)
        self.teacher.eval()
        return self

    def student(self, features: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Teacher features -> their reconstruction, the same shapes."""
        return self.decoder(self.neck(*features))

    def forward(self, image: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Normalised image (N, 3, H, W) -> teacher and student features at strides 4, 8, 16."""
        features = self.teacher(image)
        return features, self.student(features)

    @torch.inference_mode()
    def predict(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """pixels (N, H, W, 3) uint8 RGB -> smoothed anomaly_map (N, H, W), pred_score (N,): its maximum."""
        return self.predict_all(pixels)[:2]

    @torch.inference_mode()
    def predict_all(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same, and the embedding (N, D): the teacher's features averaged over positions."""
        height, width = pixels.shape[1:3]
        teacher, student = self(self.image(pixels))
        maps = anomaly_map(teacher, student, height, width)
        return tuple(value.cpu().numpy() for value in (maps, maps.amax((1, 2)), mean_features(teacher)))

    @torch.inference_mode()
    def embed(self, pixels: np.ndarray) -> np.ndarray:
        """pixels (N, H, W, 3) uint8 RGB -> the embedding alone, of the teacher alone."""
        return mean_features(self.teacher(self.image(pixels))).cpu().numpy()

    def image(self, pixels: np.ndarray) -> Tensor:
        like = next(self.parameters())
        return normalise(torch.from_numpy(pixels).to(like.device), like)


def normalise(pixels: Tensor, like: Tensor) -> Tensor:
    """pixels (N, H, W, 3) uint8 RGB -> (N, 3, H, W), ImageNet mean 0 and deviation 1, in `like`'s dtype."""
    x = pixels.permute(0, 3, 1, 2).to(like) / 255
    mean, std = (x.new_tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (x - mean) / std


def mean_features(features: tuple[Tensor, ...]) -> Tensor:
    """(N, C, H, W) each -> (N, sum of C)."""
    return torch.cat([x.mean((2, 3)) for x in features], dim=1)


def reconstruction_loss(teacher: tuple[Tensor, ...], student: tuple[Tensor, ...]) -> Tensor:
    """Mean squared error, summed over the three scales (paper III-C)."""
    return sum(F.mse_loss(s, t) for s, t in zip(student, teacher, strict=True))


def initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (ConvNorm, Bottleneck, ResNet)):
        for conv in (m for m in module.modules() if isinstance(m, nn.Conv2d)):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")


def to_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)  # (N, H*W, C)


def to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, (height, width))  # (N, C, H, W)


def split_heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)  # (N, heads, tokens, d)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # (N, tokens, C)
