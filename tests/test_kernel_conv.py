"""conv, stem and max_pool against float64; interpreted on the CPU, compiled on a GPU."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

from guarded import empty, guarded, unharmed  # noqa: E402

from omniad_edge.kernels.conv import (  # noqa: E402
    conv_call,
    conv_reference,
    max_pool_call,
    max_pool_reference,
    pack_conv,
    pack_stem,
    stem_call,
    stem_reference,
    tile,
)
from omniad_edge.kernels.jit import run  # noqa: E402
from omniad_edge.kernels.plan import Launch  # noqa: E402

DTYPES = (torch.float16, torch.float32)

# name: height, width, c_in, c_out, kernel, stride, and what else conv_call takes
SMALL = {
    "1x1 of one position": (1, 1, 64, 64, 1, 1, {}),
    "3x3 of one position": (1, 1, 64, 64, 3, 1, {"add": True}),
    "odd, stride 2": (5, 7, 64, 64, 3, 2, {}),
    "tile - 1": (3, 5, 64, 64, 3, 1, {"add": True}),
    "tile": (4, 4, 64, 64, 3, 1, {"add": True}),
    "tile + 1": (1, 17, 128, 64, 3, 1, {"add": True}),
    "stem of 64 x 64 at stride 32": (2, 2, 128, 128, 1, 1, {"add": True, "relu_first": True}),
    "odd shortcut": (3, 3, 64, 128, 3, 1, {"x2": (5, 5, 64, 2)}),
    "odd shortcut of stride 1": (3, 2, 64, 128, 1, 1, {"x2": (3, 2, 128, 1)}),
}
REAL = {
    "bottleneck, shortcut": (8, 8, 128, 512, 1, 1, {"x2": (16, 16, 256, 2)}),
    "bottleneck, out": (8, 8, 128, 512, 1, 1, {"add": True}),
    "lateral1": (32, 32, 128, 128, 1, 1, {"add": True, "relu_first": True}),
}
SLOW = {
    "bottleneck, 3x3": (8, 8, 128, 128, 3, 1, {}),
    "bottleneck, in": (8, 8, 512, 128, 1, 1, {}),
    "fuse": (16, 16, 256, 128, 1, 1, {}),
    "lateral2": (16, 16, 256, 256, 1, 1, {"add": True, "relu_first": True}),
    "bottleneck, stride 2": (16, 16, 128, 128, 3, 2, {}),
    "layer1": (64, 64, 64, 64, 3, 1, {}),
    "layer1, add": (64, 64, 64, 64, 3, 1, {"add": True}),
    "layer2, stride 2": (64, 64, 64, 128, 3, 2, {}),
    "layer2, add": (32, 32, 128, 128, 3, 1, {"add": True}),
    "layer2, shortcut": (32, 32, 128, 128, 3, 1, {"x2": (64, 64, 64, 2)}),
    "layer3, stride 2": (32, 32, 128, 256, 3, 2, {}),
    "layer3, add": (16, 16, 256, 256, 3, 1, {"add": True}),
    "layer3, shortcut": (16, 16, 256, 256, 3, 1, {"x2": (32, 32, 128, 2)}),
    "ResNet50, in": (16, 16, 1024, 256, 1, 1, {}),
    "ResNet50, out": (16, 16, 256, 1024, 1, 1, {"x2": (32, 32, 512, 2)}),
}
SHAPES = [pytest.param(*shape, id=name) for name, shape in (SMALL | REAL).items()]
SHAPES += [pytest.param(*shape, id=name, marks=pytest.mark.slow) for name, shape in SLOW.items()]
BATCHES = [
    ("odd", (3, 7, 64, 64, 3, 1, {"add": True})),
    ("odd shortcut", (3, 3, 64, 128, 3, 1, {"x2": (5, 5, 64, 2)})),
]


def random(rng, shape, dtype, scale=1.0):
    return torch.tensor(rng.normal(0, scale, shape)).to(dtype)


def launch(call, tensors, shape, dtype):
    """y of the call, which must be written everywhere and nowhere else."""
    y = empty(*shape, dtype=dtype)
    run(Launch((call,)), {"y": y} | {name: guarded(value) for name, value in tensors.items()})
    assert unharmed(y)
    assert not y.isnan().any()
    return y.cpu()


def check(y, reference, tensors, dtype):
    """The error to float64 is at most twice that of plain torch in the same dtype, and one rounding."""
    truth = reference({name: t.double() if t.is_floating_point() else t for name, t in tensors.items()})
    plain = reference({name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()})
    error, base = ((v.double() - truth).abs().max() for v in (y, plain))
    assert error <= 2 * base + torch.finfo(dtype).eps * truth.abs().max(), (error, base)


def conv_case(rng, dtype, height, width, c_in, c_out, kernel, stride, extra, batch=1):
    """-> call, tensors, shape of y, reference of the tensors"""
    positions = -(-height // stride) * -(-width // stride)
    scale = (kernel * kernel * c_in) ** -0.5
    tensors = {
        "x": random(rng, (batch, height * width, c_in), dtype),
        "weight": random(rng, (kernel * kernel, c_in, c_out), dtype, scale),
        "bias": random(rng, (c_out,), torch.float32),
    }
    sizes, widths = {"relu_first": extra.get("relu_first", False)}, {"width": width, "stride": stride}
    if "add" in extra:
        tensors["add"] = random(rng, (batch, positions, c_out), dtype)
    if "x2" in extra:
        height2, width2, c_in2, stride2 = extra["x2"]
        tensors["x2"] = random(rng, (batch, height2 * width2, c_in2), dtype)
        tensors["weight2"] = random(rng, (c_in2, c_out), dtype, c_in2**-0.5)
        sizes |= {"height2": height2, "width2": width2, "c_in2": c_in2, "stride2": stride2}
        widths |= {"width2": width2, "stride2": stride2}
    call = conv_call(
        *("x", "weight", "bias", "y"),
        height=height,
        width=width,
        c_in=c_in,
        c_out=c_out,
        kernel=kernel,
        stride=stride,
        batch=batch,
        **{name: name for name in ("add", "x2", "weight2") if name in tensors},
        **sizes,
    )

    def reference(of):
        return conv_reference(**of, **widths, relu_first=sizes["relu_first"])

    return call, tensors, (batch, positions, c_out), reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("height", "width", "c_in", "c_out", "kernel", "stride", "extra"), SHAPES)
def test_conv_is_as_exact_as_torch(rng, dtype, height, width, c_in, c_out, kernel, stride, extra):
    case = conv_case(rng, dtype, height, width, c_in, c_out, kernel, stride, extra)
    call, tensors, shape, reference = case
    check(launch(call, tensors, shape, dtype), reference, tensors, dtype)


@pytest.mark.parametrize("name", ["tile - 1", "odd shortcut of stride 1"])
def test_conv_of_an_image_does_not_depend_on_the_batch(rng, name):
    call, tensors, y_shape, _ = conv_case(rng, torch.float16, *SMALL[name], batch=3)
    whole = launch(call, tensors, y_shape, torch.float16)
    assert torch.equal(launch(call, tensors, y_shape, torch.float16), whole)
    of_last = {n: t[2:] if n in ("x", "x2", "add") else t for n, t in tensors.items()}
    single = replace(call, programs=call.programs // 3)
    assert torch.equal(launch(single, of_last, (1, *y_shape[1:]), torch.float16), whole[2:])


def stem_case(rng, dtype, height, width, batch=1):
    weight = rng.normal(0, 147**-0.5 / 57, (64, 3, 7, 7))
    tensors = {
        "pixels": torch.tensor(rng.integers(0, 256, (batch, height, width, 3), np.uint8)),
        "weight": torch.tensor(pack_stem(weight)).to(dtype),
        "bias": random(rng, (64,), torch.float32),
        "mean": torch.tensor([123.675, 116.28, 103.53, float("nan")]),
    }
    call = stem_call("pixels", "weight", "bias", "mean", "y", height, width, 64, batch)
    return call, tensors, (batch, -(-height // 2) * -(-width // 2), 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("height", "width"),
    [
        (1, 1),
        (5, 7),
        (8, 10),
        (18, 34),
        pytest.param(64, 64, marks=pytest.mark.slow),
        pytest.param(256, 256, marks=pytest.mark.slow),
    ],
)
def test_stem_is_as_exact_as_torch(rng, dtype, height, width):
    call, tensors, shape = stem_case(rng, dtype, height, width)
    check(launch(call, tensors, shape, dtype), lambda of: stem_reference(**of), tensors, dtype)


def test_stem_of_an_image_does_not_depend_on_the_batch(rng):
    call, tensors, shape = stem_case(rng, torch.float16, 6, 10, batch=3)
    whole = launch(call, tensors, shape, torch.float16)
    assert torch.equal(launch(call, tensors, shape, torch.float16), whole)
    single, pixels = replace(call, programs=call.programs // 3), {"pixels": tensors["pixels"][2:]}
    last = launch(single, tensors | pixels, (1, *shape[1:]), torch.float16)
    assert torch.equal(last, whole[2:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("height", "width", "channels", "batch"),
    [
        (1, 1, 64, 1),
        (5, 7, 64, 2),
        (8, 8, 128, 3),
        (2, 33, 64, 1),
        pytest.param(128, 128, 64, 1, marks=pytest.mark.slow),
    ],
)
def test_max_pool_is_exact(rng, dtype, height, width, channels, batch):
    x = random(rng, (batch, height * width, channels), dtype).relu()
    truth = max_pool_reference(x, width)
    call = max_pool_call("x", "y", height, width, channels, batch)
    assert torch.equal(launch(call, {"x": x}, truth.shape, dtype), truth)


def test_packing_keeps_the_convolution(rng):
    weight, bias = rng.normal(size=(64, 64, 3, 3)), torch.zeros(64, dtype=torch.float64)
    x = torch.tensor(rng.normal(size=(1, 64, 6, 5)))
    expected = torch.nn.functional.conv2d(x, torch.tensor(weight), None, 2, 1).relu().flatten(2).transpose(1, 2)
    packed = torch.tensor(pack_conv(weight))
    assert packed.shape == (9, 64, 64)
    torch.testing.assert_close(conv_reference(x.flatten(2).transpose(1, 2), packed, bias, 5, 2), expected)

    weight = rng.normal(size=(64, 3, 7, 7))
    pixels = torch.tensor(rng.integers(0, 256, (1, 9, 8, 3), np.uint8))
    x = pixels.double().permute(0, 3, 1, 2) - 100
    expected = torch.nn.functional.conv2d(x, torch.tensor(weight), None, 2, 3).relu().flatten(2).transpose(1, 2)
    mean = torch.full((4,), 100.0, dtype=torch.float64)
    packed = torch.tensor(pack_stem(weight))
    assert packed.shape == (224, 64)
    torch.testing.assert_close(stem_reference(pixels, packed, bias, mean), expected)


def test_tiles_fill_a_large_gpu():
    """Every layer of the default network with enough work gets 128 programs at batch 1."""
    assert tile(64 * 64, 64) == (32, 64)
    assert tile(32 * 32, 128) == (32, 32)
    assert tile(16 * 16, 256) == (16, 32)
    assert tile(8 * 8, 512) == tile(8 * 8, 128) == (16, 16)


def test_channels_that_the_tiles_do_not_cover_are_refused():
    with pytest.raises(ValueError, match="multiples of 64"):
        conv_call("x", "w", "b", "y", height=8, width=8, c_in=96, c_out=64, kernel=3, stride=1, batch=1)
