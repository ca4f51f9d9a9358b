"""The decoder's kernels against float64, allowed twice the error of plain torch in the same dtype."""

import pytest
import torch
from guarded import empty, guarded, unharmed
from torch.nn import functional as F

pytest.importorskip("triton", reason="the kernels need Triton: pip install 'omniad-edge[kernels]'")

from omniad_edge.kernels import jit
from omniad_edge.kernels.depthwise import depthwise_call, depthwise_reference
from omniad_edge.kernels.expand import expand_call, expand_reference
from omniad_edge.kernels.mix import mix_call, mix_reference
from omniad_edge.kernels.norm import tile_rows
from omniad_edge.kernels.plan import Launch
from omniad_edge.kernels.pointwise import pointwise_call, pointwise_reference

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of rows beyond the image
EPS = 1e-5
DTYPES = [torch.float16, torch.float32]
# height, width, channels: the smallest, odd, a tile less and more, and the default network's stages
SIZES = [(2, 2, 64), (3, 5, 64), (1, 17, 128), (4, 8, 128)]
STAGES = [
    pytest.param(*s, marks=pytest.mark.slow) for s in ((8, 8, 512), (16, 16, 256), (32, 32, 128), (64, 64, 64))
]
slow_and_fast = pytest.mark.parametrize("height, width, channels", [*SIZES, *STAGES])
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def run(launch: Launch, tensors: dict[str, torch.Tensor]) -> None:
    """As jit.run, with a guard around every buffer."""
    held = {name: guarded(value) for name, value in tensors.items()}
    jit.run(launch, held)
    for name, value in held.items():
        assert unharmed(value), name
        tensors[name].copy_(value)


def doubles(values):
    return [v.double().cpu() if isinstance(v, torch.Tensor) else v for v in values]


def check(kernel: torch.Tensor, reference, *inputs, **options) -> None:
    """kernel: its result; reference: of inputs, in their dtype and in float64."""
    wide = {k: v.double().cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    truth = reference(*doubles(inputs), **wide)
    plain = reference(
        *[v.cpu() if isinstance(v, torch.Tensor) else v for v in inputs],
        **{k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()},
    )
    allowed = 2 * (plain.double() - truth).abs().max() + torch.finfo(kernel.dtype).eps * truth.abs().max()
    error = (kernel.cpu().double() - truth).abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}, largest value {truth.abs().max():.3g}"


def stats_of(x: torch.Tensor) -> torch.Tensor:
    """(N, HW, C) -> statistics of its tiles, as a kernel before would have left them."""
    parts = x.double().split(tile_rows(x.shape[1]), 1)
    pairs = [torch.stack((p.mean(1), ((p - p.mean(1, keepdim=True)) ** 2).sum(1)), 1) for p in parts]
    return torch.stack(pairs, 1).float().contiguous()


def stats_are_right(stats: torch.Tensor, y: torch.Tensor) -> None:
    """stats against y itself, which is rounded to its dtype after they were taken."""
    truth = stats_of(y).double().cpu()
    scale = y.abs().max().double().cpu() * torch.finfo(y.dtype).eps
    rows = min(tile_rows(y.shape[1]), y.shape[1])
    assert ((stats[:, :, 0].double().cpu() - truth[:, :, 0]).abs() <= scale).all()
    largest = y.abs().max().double().cpu()
    assert ((stats[:, :, 1].double().cpu() - truth[:, :, 1]).abs() <= 8 * rows * scale * largest).all()


@slow_and_fast
@both_dtypes
def test_depthwise(draw, dtype, height, width, channels):
    t = {
        "x": draw(2, height * width, channels, dtype=dtype),
        "w3": draw(9, channels, dtype=dtype, scale=0.3),
        "w5": draw(25, channels, dtype=dtype, scale=0.2),
        "y": empty(2, height * width, 2 * channels, dtype=dtype),
        "s": empty(2, -(-height * width // tile_rows(height * width)), 2, 2 * channels),
    }
    run(Launch((depthwise_call("x", "w3", "w5", "y", "s", height, width, channels, 2),)), t)
    check(t["y"], depthwise_reference, t["x"], t["w3"], t["w5"], height, width)
    stats_are_right(t["s"], t["y"])


@slow_and_fast
@both_dtypes
@pytest.mark.parametrize("groups", [1, 2])
def test_pointwise_behind_a_norm(draw, dtype, height, width, channels, groups):
    n, c_out = height * width, channels * groups
    x = draw(2, n, groups * channels, dtype=dtype, mean=3.0)
    t = {
        "x": x,
        "xs": stats_of(x),
        "w": draw(c_out, channels, dtype=dtype, scale=channels**-0.5),
        "y": empty(2, n, c_out, dtype=dtype),
        "ys": empty(2, -(-n // tile_rows(n)), 2, c_out),
    }
    sizes = {"positions": n, "c_in": channels, "c_out": c_out, "batch": 2, "groups": groups}
    run(Launch((pointwise_call("x", "w", "y", x_stats="xs", eps=EPS, y_stats="ys", **sizes),)), t)
    check(t["y"], pointwise_reference, t["x"], t["w"], groups=groups, eps=EPS)
    stats_are_right(t["ys"], t["y"])


@pytest.mark.parametrize("height, width, channels", SIZES)
@both_dtypes
def test_pointwise_with_all_that_may_follow(draw, dtype, height, width, channels):
    n = height * width
    t = {
        "x": draw(1, n, channels, dtype=dtype),
        "w": draw(2 * channels, channels, dtype=dtype, scale=channels**-0.5),
        "b": draw(2 * channels),
        "r": draw(1, n, 2 * channels, dtype=dtype),
        "y": empty(1, n, 2 * channels, dtype=dtype),
    }
    sizes = {"positions": n, "c_in": channels, "c_out": 2 * channels, "batch": 1}
    run(Launch((pointwise_call("x", "w", "y", bias="b", silu=True, residual="r", **sizes),)), t)
    bias = t["b"].to(dtype) if dtype == torch.float32 else t["b"].half()
    t["b"].copy_(bias)
    run(Launch((pointwise_call("x", "w", "y", bias="b", silu=True, residual="r", **sizes),)), t)
    check(t["y"], pointwise_reference, t["x"], t["w"], bias=bias, silu=True, residual=t["r"])


@slow_and_fast
@both_dtypes
@pytest.mark.parametrize("with_y", [True, False])
def test_mix(draw, dtype, height, width, channels, with_y):
    n, grid = height * width, 6
    y = draw(2, n, channels, dtype=dtype, mean=-2.0)
    t = {
        "o": draw(2, n, channels, dtype=dtype),
        "x": draw(2, n, channels, dtype=dtype),
        "y": y,
        "ys": stats_of(y),
        "w2": draw(channels, channels, dtype=dtype, scale=channels**-0.5),
        "w": draw(channels, channels, dtype=dtype, scale=channels**-0.5),
        "t": draw(2, grid * grid, 2 * channels, dtype=dtype).float(),
        "u": empty(2, n, channels, dtype=dtype),
        "us": empty(2, -(-n // tile_rows(n)), 2, channels),
    }
    call = mix_call(
        *("o", "x", "y" if with_y else None, "ys" if with_y else None, "w2", "w", "t", "u", "us"),
        **{"height": height, "width": width, "channels": channels, "grid": grid, "eps": EPS, "batch": 2},
        tokens_stride=2 * channels,
        tokens_offset=channels,
    )
    run(Launch((call,)), t)
    tokens = t["t"][:, :, channels:].to(dtype)
    inputs = (t["o"], t["x"], t["y"] if with_y else None, t["w2"], t["w"], tokens, EPS, (height, width))
    check(t["u"], mix_reference, *inputs)
    stats_are_right(t["us"], t["u"])


@pytest.mark.parametrize(
    "height, width, channels",
    [
        (2, 2, 64),
        (3, 5, 64),
        *(pytest.param(*s, marks=pytest.mark.slow) for s in ((8, 8, 256), (16, 16, 128), (32, 32, 64))),
    ],
)
@both_dtypes
def test_expand(draw, dtype, height, width, channels):
    t = {
        "x": draw(2, height * width, 2 * channels, dtype=dtype),
        "w": draw(4 * channels, 2 * channels, dtype=dtype, scale=(2 * channels) ** -0.5),
        "g": draw(channels, dtype=dtype).float(),
        "b": draw(channels, dtype=dtype).float(),
        "y": empty(2, 4 * height * width, channels, dtype=dtype),
    }
    run(Launch((expand_call("x", "w", "g", "b", "y", height, width, channels, 2),)), t)
    check(t["y"], expand_reference, t["x"], t["w"], t["g"].to(dtype), t["b"].to(dtype), (height, width))


def test_an_image_does_not_depend_on_its_place_in_the_batch(draw):
    height, width, channels = 3, 3, 64
    x = draw(3, height * width, channels, dtype=torch.float16)
    w3, w5 = draw(9, channels, dtype=torch.float16), draw(25, channels, dtype=torch.float16)

    def raw(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        n = len(images)
        y = empty(n, height * width, 2 * channels, dtype=torch.float16)
        s = empty(n, -(-height * width // tile_rows(height * width)), 2, 2 * channels)
        t = {"x": images.contiguous(), "w3": w3, "w5": w5, "y": y, "s": s}
        run(Launch((depthwise_call("x", "w3", "w5", "y", "s", height, width, channels, n),)), t)
        z = empty(n, height * width, 2 * channels, dtype=torch.float16)
        t |= {"w": torch.cat((w5, w5, w5))[:64].repeat(2, 1).contiguous(), "z": z}
        sizes = {"positions": height * width, "c_in": channels, "c_out": 2 * channels, "batch": n, "groups": 2}
        run(Launch((pointwise_call("y", "w", "z", x_stats="s", eps=EPS, **sizes),)), t)
        return y, z

    together = raw(x)
    for index in range(3):
        for whole, alone in zip(together, raw(x[index : index + 1]), strict=True):
            assert torch.equal(whole[index], alone[0])
    assert all(torch.equal(a, b) for a, b in zip(together, raw(x), strict=True))


def test_statistics_survive_a_mean_far_larger_than_the_deviation(draw):
    x = draw(1, 40, 64, mean=1000.0)
    t = {"x": x, "xs": stats_of(x), "w": torch.eye(64), "y": empty(1, 40, 64)}
    sizes = {"positions": 40, "c_in": 64, "c_out": 64, "batch": 1}
    run(Launch((pointwise_call("x", "w", "y", x_stats="xs", eps=EPS, **sizes),)), t)
    truth = F.silu(F.instance_norm(x.double().transpose(1, 2), eps=EPS)).transpose(1, 2)
    assert (t["y"] - truth).abs().max() < 1e-3  # x itself is rounded to 6e-5; one-pass sums of squares lose 0.06
