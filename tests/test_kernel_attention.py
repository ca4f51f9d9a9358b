"""The attention kernels against float64, allowed twice the error of plain torch in the same dtype."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton: pip install 'omniad-edge[kernels]'")

from omniad_edge.kernels.attention import (
    HEADS,
    attend_positions_call,
    attend_tokens_call,
    merge_tokens_call,
    part_shapes,
    positions_reference,
    token_splits,
    tokens_reference,
)
from omniad_edge.kernels.jit import run
from omniad_edge.kernels.plan import Launch
from test_kernel_block import DEVICE, DTYPES, check, draw, empty  # noqa: F401

PARTS = ("part_max", "part_sum", "part_o", "part_v")
SIZES = [(2, 2, 64, 64), (3, 5, 64, 36), (1, 17, 128, 1), (16, 24, 64, 16)]
STAGES = [
    pytest.param(*s, 64, marks=pytest.mark.slow) for s in ((8, 8, 512), (16, 16, 256), (32, 32, 128), (64, 64, 64))
]
all_sizes = pytest.mark.parametrize("height, width, channels, tokens", [*SIZES, *STAGES])
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def gather(t: dict[str, torch.Tensor], positions: int, c_out: int, silu: bool = False) -> torch.Tensor:
    """Both token kernels on t's x, q, key, value, weight, pe, bias."""
    n, _, channels = t["x"].shape
    tokens = t["q"].shape[1]
    t = t | {name: empty(n, *s) for name, s in zip(PARTS, part_shapes(positions, channels, tokens), strict=True)}
    t["out"] = empty(n, tokens, c_out)
    sizes = {"positions": positions, "channels": channels, "tokens": tokens, "batch": n}
    run(Launch((attend_tokens_call("x", "q", "key", "value", PARTS, **sizes),)), t)
    run(Launch((merge_tokens_call(PARTS, "weight", "pe", "bias", "out", c_out=c_out, silu=silu, **sizes),)), t)
    return t["out"]


def token_inputs(draw, dtype, n, positions, channels, tokens, c_out, mean=0.0, pe=0.05):  # noqa: F811
    d = channels // HEADS
    return {
        "x": draw(n, positions, channels, dtype=dtype, mean=mean),
        "q": draw(HEADS, tokens, d, dtype=dtype, scale=d**-0.5),
        "key": draw(channels, channels, dtype=dtype, scale=channels**-0.5),
        "value": draw(channels, channels, dtype=dtype, scale=channels**-0.5),
        "weight": draw(c_out, channels, dtype=dtype, scale=channels**-0.5),
        "pe": draw(HEADS, tokens, dtype=dtype, scale=pe).float(),
        "bias": draw(tokens, c_out, dtype=dtype).float(),
    }


def references(t: dict[str, torch.Tensor], dtype) -> tuple[torch.Tensor, float]:
    """float64 truth, and the error of plain torch in dtype that keeps pe (sum of V) in fp32."""
    names = ("x", "q", "key", "value", "weight", "pe", "bias")
    truth = tokens_reference(*(t[name].cpu().double() for name in names))
    plain = tokens_reference(*(t[name].cpu().to(dtype) for name in names), exact=torch.float32)
    return truth, float((plain.double() - truth).abs().max())


@all_sizes
@both_dtypes
def test_tokens(draw, dtype, height, width, channels, tokens):  # noqa: F811
    t = token_inputs(draw, dtype, 2, height * width, channels, tokens, 2 * channels)
    out = gather(t, height * width, 2 * channels).cpu().double()
    truth, base = references(t, dtype)
    # The truth's own largest value counts with fp32's eps: the sums are fp32, whatever the operands are.
    allowed = 2 * base + torch.finfo(torch.float32).eps * truth.abs().max()
    assert (out - truth).abs().max() <= allowed


@both_dtypes
def test_the_sum_of_v_stays_exact_where_it_is_far_larger_than_the_softmax_part(draw, dtype):  # noqa: F811
    t = token_inputs(draw, dtype, 1, 400, 64, 16, 64, mean=4.0, pe=0.5)
    truth, base = references(t, dtype)
    without = tokens_reference(*(t[n].cpu().double() * (n != "pe") for n in PARTS_OF))
    assert (truth - without).abs().max() > 100 * (without - t["bias"].cpu()).abs().max()
    out = gather(t, 400, 64).cpu().double()
    assert (out - truth).abs().max() <= 2 * base + torch.finfo(torch.float32).eps * truth.abs().max()


PARTS_OF = ("x", "q", "key", "value", "weight", "pe", "bias")


def test_silu_of_the_tokens(draw):  # noqa: F811
    t = token_inputs(draw, torch.float32, 1, 15, 64, 36, 64)
    truth = torch.nn.functional.silu(references(t, torch.float32)[0])
    assert (gather(t, 15, 64, silu=True).cpu() - truth).abs().max() <= 1e-5 * truth.abs().max()


@all_sizes
@both_dtypes
def test_positions(draw, dtype, height, width, channels, tokens):  # noqa: F811
    n, d = height * width, channels // HEADS
    given = draw(2, tokens, channels, dtype=dtype)
    t = {
        "x": draw(2, n, channels, dtype=dtype),
        "query": draw(channels, channels, dtype=dtype, scale=channels**-0.5),
        "tokens": torch.cat((given.float(), empty(2, tokens, channels)), 2).contiguous(),
        "k": draw(HEADS, d, tokens, dtype=dtype, scale=d**-0.5),
        "v": draw(HEADS, tokens, d, dtype=dtype),
        "o": empty(2, n, channels, dtype=dtype),
    }
    sizes = {"height": height, "width": width, "channels": channels, "n_tokens": tokens, "batch": 2}
    call = attend_positions_call("x", "query", "tokens", "k", "v", "o", tokens_stride=2 * channels, **sizes)
    run(Launch((call,)), t)
    check(t["o"], positions_reference, t["x"], t["query"], given, t["k"], t["v"], (height, width))


def test_an_image_does_not_depend_on_its_place_in_the_batch(draw):  # noqa: F811
    t = token_inputs(draw, torch.float16, 3, 15, 64, 36, 64)
    together = gather(t, 15, 64)
    for index in range(3):
        alone = gather(t | {"x": t["x"][index : index + 1].contiguous()}, 15, 64)
        assert torch.equal(together[index], alone[0])
    assert torch.equal(together, gather(t, 15, 64))


@pytest.mark.parametrize("positions", [*range(1, 200), 255, 256, 257, 1024, 4096, 65536])
def test_no_part_is_empty(positions):
    splits, rows = token_splits(positions)
    assert (splits - 1) * rows < positions <= splits * rows
