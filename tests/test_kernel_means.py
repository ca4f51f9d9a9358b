"""sums and means against float64; interpreted on the CPU, compiled on a GPU."""

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

from guarded import empty, guarded, unharmed  # noqa: E402

from omniad_edge.kernels.jit import run  # noqa: E402
from omniad_edge.kernels.means import PART, means_call, parts_of, sums_call  # noqa: E402
from omniad_edge.kernels.plan import Launch  # noqa: E402

DTYPES = (torch.float16, torch.float32)


def features(rng, batch, positions, channels, dtype):
    """Like a ResNet's: 0 or positive."""
    return torch.tensor(rng.normal(size=(batch, positions, channels))).clamp(min=0).to(dtype)


def embedding(maps):
    """What both calls make of features (N, positions, channels); what is around their results stays as it was."""
    batch, sizes = len(maps[0]), [x.shape[1:] for x in maps]
    parts = [empty(batch, parts_of(positions), channels) for positions, channels in sizes]
    for x, made in zip(maps, parts, strict=True):
        run(Launch((sums_call("x", "parts", *x.shape[1:], batch),)), {"x": guarded(x), "parts": made})
    mean = empty(batch, sum(channels for _, channels in sizes))
    names = ("p0", "p1", "p2")
    run(Launch((means_call(names, "mean", sizes, batch),)), dict(zip(names, parts, strict=True)) | {"mean": mean})
    assert all(unharmed(y) for y in (*parts, mean))
    return mean.cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        ((1, 32), (1, 32), (1, 64)),
        ((63, 64), (64, 32), (65, 96)),
        ((PART - 1, 64), (PART, 64), (PART + 1, 32)),
        ((64 * 64, 64), (32 * 32, 128), (16 * 16, 256)),
        ((35, 256), (12, 512), (3, 1024)),
        pytest.param(((256 * 256, 64), (128 * 128, 128), (64 * 64, 256)), marks=pytest.mark.slow),
    ],
    ids=lambda sizes: "-".join(f"{positions}x{channels}" for positions, channels in sizes),
)
def test_means_are_as_exact_as_torch(rng, dtype, sizes):
    maps = [features(rng, 2, *size, dtype) for size in sizes]
    made = embedding(maps)
    truth = torch.cat([x.double().mean(1) for x in maps], dim=1)
    plain = torch.cat([x.float().mean(1) for x in maps], dim=1)
    error, base = ((y.double() - truth).abs().max() for y in (made, plain))
    assert error <= 2 * base + torch.finfo(torch.float32).eps * truth.abs().max(), (error, base)


def test_an_image_s_means_do_not_depend_on_the_batch(rng):
    maps = [features(rng, 3, *size, torch.float16) for size in ((600, 64), (70, 32), (5, 96))]
    whole = embedding(maps)
    for image in range(3):
        assert torch.equal(embedding([x[image : image + 1] for x in maps])[0], whole[image])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter's NumPy
def test_what_is_broken_stays_in_its_channel(rng):
    maps = [features(rng, 1, *size, torch.float16) for size in ((600, 64), (70, 32), (5, 96))]
    maps[0][0, 550, 3] = maps[2][0, 2, 40] = float("nan")
    assert embedding(maps)[0].isnan().nonzero().flatten().tolist() == [3, 64 + 32 + 40]
