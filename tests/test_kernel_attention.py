"""The attention kernels against float64, allowed twice the error of plain torch in the same dtype."""

from dataclasses import replace

import pytest
import torch
from guarded import empty, guarded, unharmed

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
from omniad_edge.kernels.fold import KeyValue, Query
from omniad_edge.kernels.jit import run
from omniad_edge.kernels.network import TorchOps
from omniad_edge.kernels.plan import Launch

DTYPES = [torch.float16, torch.float32]
PARTS = ("part_max", "part_sum", "part_o", "part_v")
# height, width, channels, tokens: one position, the smallest map, odd ones, a tile less, one more, several parts
SIZES = [(1, 1, 64, 1), (2, 3, 256, 16), (3, 5, 128, 36), (4, 4, 64, 64), (1, 17, 64, 100), (7, 19, 64, 16)]
STAGES = [
    *((2, 3, 1024, 16), (8, 8, 512, 64), (16, 16, 256, 64)),
    *((32, 32, 128, 64), (64, 64, 64, 64), (8, 8, 1024, 100)),
]
all_sizes = pytest.mark.parametrize(
    "height, width, channels, tokens", [*SIZES, *(pytest.param(*s, marks=pytest.mark.slow) for s in STAGES)]
)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def launch(calls, inputs: dict, outputs: dict) -> dict:
    """outputs: name -> (shape, dtype) of what the calls write, all of it and nothing around it."""
    made = {name: empty(*shape, dtype=dtype) for name, (shape, dtype) in outputs.items()}
    tensors = {name: guarded(value) for name, value in inputs.items()} | made
    for call in calls:
        run(Launch((call,)), tensors)
    for name, value in made.items():
        assert unharmed(value) and value.isfinite().all(), name
    return {name: value.cpu() for name, value in made.items()}


def check(kernel: torch.Tensor, truth: torch.Tensor, plain: torch.Tensor) -> None:
    allowed = 2 * (plain.double() - truth).abs().max() + torch.finfo(kernel.dtype).eps * truth.abs().max()
    error = (kernel.double() - truth).abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}, largest value {truth.abs().max():.3g}"


def doubles(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.double() for t in tensors]


# ---- learnable queries


def gather_inputs(draw, dtype, positions, channels, tokens, c_out, batch=1, mean=0.0, pe=0.02) -> dict:
    """x has the mean, and so has V, of sign and size that differ from channel to channel."""
    d, scale = channels // HEADS, channels**-0.5
    return {
        "x": draw(batch, positions, channels, dtype=dtype, mean=mean),
        "q": draw(HEADS, tokens, d, dtype=dtype, scale=2 * d**-0.5),
        "key": draw(channels, channels, dtype=dtype, scale=scale),
        "value": draw(channels, channels, dtype=dtype, scale=scale),
        "weight": draw(c_out, channels, dtype=dtype, scale=scale),
        "pe": draw(HEADS, tokens, scale=pe),
        "bias": draw(tokens, c_out),
    }


def gather(inputs: dict, y_dtype=torch.float32, silu=False) -> dict:
    """Both kernels -> parts and y."""
    (batch, positions, channels), tokens = inputs["x"].shape, inputs["q"].shape[1]
    c_out = len(inputs["weight"])
    sizes = {"positions": positions, "channels": channels, "tokens": tokens, "batch": batch}
    calls = (
        attend_tokens_call("x", "q", "key", "value", PARTS, **sizes),
        merge_tokens_call(PARTS, "weight", "pe", "bias", "y", c_out=c_out, silu=silu, **sizes),
    )
    shapes = part_shapes(positions, channels, tokens)
    parts = {name: ((batch, *s), torch.float32) for name, s in zip(PARTS, shapes, strict=True)}
    return launch(calls, inputs, parts | {"y": ((batch, tokens, c_out), y_dtype)})


def in_order(inputs: dict) -> tuple[torch.Tensor, ...]:
    return tuple(inputs[name] for name in ("x", "q", "key", "value", "weight", "pe", "bias"))


@all_sizes
@both_dtypes
def test_tokens_gather(draw, dtype, height, width, channels, tokens):
    inputs = gather_inputs(draw, dtype, height * width, channels, tokens, channels)
    y = gather(inputs)["y"]
    truth = tokens_reference(*doubles(*in_order(inputs)))
    check(y, truth, tokens_reference(*in_order(inputs), exact=torch.float32))


@both_dtypes
def test_tokens_gather_behind_a_silu_in_the_storage_dtype(draw, dtype):
    inputs = gather_inputs(draw, dtype, 15, 64, 16, 64)
    y = gather(inputs, y_dtype=dtype, silu=True)["y"]
    truth = torch.nn.functional.silu(tokens_reference(*doubles(*in_order(inputs))))
    plain = torch.nn.functional.silu(tokens_reference(*in_order(inputs), exact=torch.float32)).to(dtype)
    check(y, truth, plain)


@pytest.mark.parametrize("positions", [1700, pytest.param(4096, marks=pytest.mark.slow)])
@both_dtypes
def test_the_sum_of_values_may_be_a_hundred_times_the_softmax_part(draw, dtype, positions):
    inputs = gather_inputs(draw, dtype, positions, 64, 16, 64, mean=1.0)
    inputs["pe"] = torch.full_like(inputs["pe"], 0.1)
    inputs["bias"].zero_()
    truth = tokens_reference(*doubles(*in_order(inputs)))
    softmax_part = tokens_reference(*doubles(*in_order(inputs | {"pe": torch.zeros_like(inputs["pe"])})))
    assert (truth - softmax_part).abs().max() > 100 * softmax_part.abs().max()
    y = gather(inputs)["y"]
    check(y, truth, tokens_reference(*in_order(inputs), exact=torch.float32))
    if dtype == torch.float16:  # the check would not let that term pass in fp16
        with pytest.raises(AssertionError, match="allowed"):
            check(
                tokens_reference(*in_order(inputs)).float(),
                truth,
                tokens_reference(*in_order(inputs), exact=torch.float32),
            )


@both_dtypes
def test_parts_are_those_of_their_positions(draw, dtype):
    inputs = gather_inputs(draw, dtype, 9 * 17, 64, 16, 64, batch=2, mean=0.5)
    made = gather(inputs)
    splits, rows = token_splits(9 * 17)
    assert splits > 1 and 9 * 17 % rows  # several, and the last one not full
    x, q, key, value = doubles(*(inputs[name] for name in ("x", "q", "key", "value")))
    heads = (2, 9 * 17, HEADS, -1)
    k, v = ((x @ w.T).reshape(heads).transpose(1, 2) for w in (key, value))
    logits = q @ k.transpose(2, 3)
    tolerance = 8 * torch.finfo(dtype).eps
    for split in range(splits):
        of = slice(split * rows, (split + 1) * rows)
        largest = logits[..., of].amax(-1)
        p = (logits[..., of] - largest[..., None]).exp()
        scale = (made["part_max"][:, split].double() - largest).exp()
        expected = {"part_sum": p.sum(-1) / scale, "part_o": p @ v[..., of, :] / scale[..., None]}
        expected |= {"part_max": largest}
        for name, value_ in expected.items():
            error = (made[name][:, split].double() - value_).abs().max()
            assert error <= tolerance * value_.abs().max() + tolerance, (name, split, error)
        # From the accumulators in fp32, whatever the storage dtype: a sum of `rows` values.
        of_v, size = v[..., of, :].sum(2), v[..., of, :].abs().sum(2)
        error = (made["part_v"][:, split].double() - of_v).abs()
        assert (error <= 32 * torch.finfo(torch.float32).eps * size).all(), (split, error.max())


def test_no_part_is_empty():
    for height, width in [(h, w) for h in range(1, 66, 3) for w in range(1, 130, 7)]:
        splits, rows = token_splits(height * width)
        assert (splits - 1) * rows < height * width <= splits * rows, (height, width)
    assert [token_splits(n * n) for n in (64, 32, 16)] == [(16, 256), (8, 128), (4, 64)]


# ---- learnable keys and values


def ask_inputs(draw, dtype, height, width, channels, n_tokens, batch=1) -> dict:
    """tokens have 2 C columns, of which the second half is for someone else: NaN."""
    d = channels // HEADS
    given = draw(batch, n_tokens, 2 * channels, dtype=dtype).float()
    given[:, :, channels:] = float("nan")
    return {
        "x": draw(batch, height * width, channels, dtype=dtype),
        "query": draw(channels, channels, dtype=dtype, scale=channels**-0.5),
        "tokens": given,
        "k": draw(HEADS, d, n_tokens, dtype=dtype, scale=2 * d**-0.5),
        "v": draw(HEADS, n_tokens, d, dtype=dtype),
    }


def ask(inputs: dict, height: int, width: int) -> torch.Tensor:
    (batch, _, channels), n_tokens = inputs["x"].shape, inputs["v"].shape[1]
    sizes = {"height": height, "width": width, "channels": channels, "n_tokens": n_tokens, "batch": batch}
    call = attend_positions_call(*inputs, "o", **sizes, tokens_stride=2 * channels)
    return launch((call,), inputs, {"o": (inputs["x"].shape, inputs["x"].dtype)})["o"]


@all_sizes
@both_dtypes
def test_positions_ask(draw, dtype, height, width, channels, tokens):
    inputs = ask_inputs(draw, dtype, height, width, channels, tokens)
    o = ask(inputs, height, width)
    x, query, given, k, v = inputs.values()
    given = given[:, :, :channels].to(dtype)
    truth = positions_reference(*doubles(x, query, given, k, v), (height, width))
    check(o, truth, positions_reference(x, query, given, k, v, (height, width)))


def test_large_logits_do_not_overflow(draw):
    """Logits of hundreds, as in trained networks: exp of the largest alone is infinite."""
    inputs = ask_inputs(draw, torch.float16, 3, 5, 64, 16)
    inputs["k"] *= 100
    assert ask(inputs, 3, 5).isfinite().all()
    inputs = gather_inputs(draw, torch.float16, 15, 64, 16, 64)
    inputs["q"] *= 100
    y = gather(inputs)["y"]
    truth = tokens_reference(*doubles(*in_order(inputs)))
    check(y, truth, tokens_reference(*in_order(inputs), exact=torch.float32))


# ---- both


def test_an_image_does_not_depend_on_its_place_in_the_batch(draw):
    height, width, channels, tokens = 7, 10, 64, 16  # several parts and tiles, the last ones not full
    gathered = gather_inputs(draw, torch.float16, height * width, channels, tokens, channels, batch=3)
    asked = ask_inputs(draw, torch.float16, height, width, channels, tokens, batch=3)
    y, o = gather(gathered)["y"], ask(asked, height, width)
    assert torch.equal(gather(gathered)["y"], y) and torch.equal(ask(asked, height, width), o)
    for i in (0, 2):
        one = slice(i, i + 1)
        assert torch.equal(gather(gathered | {"x": gathered["x"][one]})["y"], y[one])
        alone = asked | {"x": asked["x"][one], "tokens": asked["tokens"][one]}
        assert torch.equal(ask(alone, height, width), o[one])


def test_references_are_the_network(draw):
    height, width, channels = 5, 6, 64
    ops = TorchOps(torch.float64)
    x = draw(2, channels, height, width, dtype=torch.float64)
    flat = x.flatten(2).transpose(1, 2)
    of = gather_inputs(draw, torch.float64, 30, 64, 36, 128, batch=2)
    of = {name: value.double() for name, value in of.items()}
    query = Query(
        q=of["q"].numpy(),
        key=of["key"].numpy(),
        value=of["value"].numpy(),
        pe=of["pe"][..., None].numpy(),
        constant=torch.zeros_like(of["q"]).numpy(),
    )
    o = ops.query_attention(query, ops.heads(x, query.key), ops.heads(x, query.value))
    expected = ops.pointwise(o, of["weight"].numpy()).flatten(2).transpose(1, 2) + of["bias"]
    torch.testing.assert_close(tokens_reference(*in_order(of | {"x": flat})), expected)

    of = ask_inputs(draw, torch.float64, 5, 6, 64, 36, batch=2)
    of = {name: value.double() for name, value in of.items()}
    keys = KeyValue(query=of["query"].numpy(), query_bias=None, k=of["k"].numpy(), v=of["v"].numpy())
    given = of["tokens"][:, :, :channels]
    part = ops.spread(given.transpose(1, 2).reshape(2, channels, 6, 6), x)
    expected = ops.key_value_attention(keys, ops.heads(x, keys.query, None, part), x)
    got = positions_reference(flat, of["query"], given, of["k"], of["v"], (height, width))
    torch.testing.assert_close(got, expected.flatten(2).transpose(1, 2))


def test_programs_are_per_image():
    sizes = {"positions": 81, "channels": 64, "tokens": 36}
    one, three = (attend_tokens_call("x", "q", "k", "v", PARTS, **sizes, batch=n) for n in (1, 3))
    assert replace(three, programs=one.programs) == one and three.programs == 3 * one.programs
