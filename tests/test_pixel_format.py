"""Every pixel format: pictures of known colours are coded by hand and must come back."""

import subprocess

import numpy as np
import pytest
from cameras import ARAVIS, PYTHON, skip_without

from omniad_edge.cameras.pixel_format import BAYER, CODES, UNPACK, to_bgr
from omniad_edge.errors import CameraError, InputError

COLOURS = [(30, 100, 200), (220, 20, 90)]  # BGR of the left and the right half
HEIGHT, WIDTH = 10, 16
CHANNEL = {"B": 0, "G": 1, "R": 2}
TILES = {"RG": ("RG", "GB"), "GR": ("GR", "BG"), "GB": ("GB", "RG"), "BG": ("BG", "GR")}  # by rows


def two_colours() -> np.ndarray:
    """(HEIGHT, WIDTH, 3) uint8 BGR"""
    picture = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    picture[:, : WIDTH // 2], picture[:, WIDTH // 2 :] = COLOURS
    return picture


def mosaic(picture: np.ndarray, tile: tuple[str, str]) -> np.ndarray:
    rows, columns = np.indices(picture.shape[:2])
    channel = np.array([[CHANNEL[c] for c in row] for row in tile])[rows % 2, columns % 2]
    return np.take_along_axis(picture, channel[..., None], axis=2)[..., 0]


def coded(high: np.ndarray, depth: str) -> np.ndarray:
    """8-bit values -> the bytes of deeper ones, whose added low bits are all set."""
    bits = int(depth.rstrip("pPacked"))
    values = (high.ravel().astype(int) << (bits - 8)) | ((1 << (bits - 8)) - 1)
    if bits == 8:
        return values.astype(np.uint8)
    if depth.isdecimal():
        return values.astype("<u2").view(np.uint8)
    if depth.endswith("p"):
        stream = (values[:, None] >> np.arange(bits) & 1).astype(np.uint8)
        return np.packbits(stream.ravel(), bitorder="little")
    values = np.append(values, np.zeros(len(values) % 2, int))
    low = values & ((1 << (bits - 8)) - 1)
    first, second = values[::2] >> (bits - 8), values[1::2] >> (bits - 8)
    return np.stack([first, low[::2] | low[1::2] << 4, second], axis=1).astype(np.uint8).ravel()


@pytest.mark.parametrize("depth", UNPACK)
@pytest.mark.parametrize("tile", TILES)
def test_bayer(tile, depth):
    picture = two_colours()
    came = to_bgr(coded(mosaic(picture, TILES[tile]), depth), f"Bayer{tile}{depth}", WIDTH, HEIGHT)
    assert came.dtype == np.uint8 and came.shape == picture.shape
    away = np.abs(np.arange(WIDTH) - WIDTH // 2 + 0.5) > 2  # from the edge, where neighbours are mixed
    np.testing.assert_array_equal(came[:, away], picture[:, away])


@pytest.mark.parametrize("depth", UNPACK)
@pytest.mark.parametrize(("width", "height"), [(16, 16), (5, 3), (7, 1), (1, 1)])
def test_mono(depth, width, height):
    gray = np.arange(width * height, dtype=np.uint8).reshape(height, width)
    came = to_bgr(coded(gray, depth), f"Mono{depth}", width, height)
    np.testing.assert_array_equal(came, np.repeat(gray[..., None], 3, axis=2))


@pytest.mark.parametrize(
    ("name", "channels"),
    [("BGR8", [0, 1, 2]), ("RGB8", [2, 1, 0]), ("BGRa8", [0, 1, 2, 0]), ("RGBa8", [2, 1, 0, 0])],
)
def test_interleaved(name, channels):
    picture = two_colours()
    np.testing.assert_array_equal(to_bgr(picture[..., channels].ravel(), name, WIDTH, HEIGHT), picture)


def yuv(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """BT.601, limited range: Y 16..235, U and V 16..240."""
    b, g, r = np.moveaxis(picture / 255, 2, 0)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    u, v = (b - y) / 1.772, (r - y) / 1.402
    return tuple(np.rint(plane).astype(np.uint8) for plane in (16 + 219 * y, 128 + 224 * u, 128 + 224 * v))


@pytest.mark.parametrize("name", ["YUV422_8", "YUV422_8_UYVY", "NV12", "I420"])
def test_yuv(name):
    picture = two_colours()
    y, u, v = yuv(picture)
    chroma = np.stack([u, v], axis=2)
    half = chroma[::2, ::2]
    data = {
        "YUV422_8": np.stack([y, np.where(np.arange(WIDTH) % 2, v, u)], axis=2),
        "YUV422_8_UYVY": np.stack([np.where(np.arange(WIDTH) % 2, v, u), y], axis=2),
        "NV12": np.concatenate([y.ravel(), half.ravel()]),
        "I420": np.concatenate([y.ravel(), half[..., 0].ravel(), half[..., 1].ravel()]),
    }[name]
    came = to_bgr(data.ravel(), name, WIDTH, HEIGHT)
    assert np.abs(came.astype(int) - picture).max() <= 2  # three roundings of 1/219 or 1/224, times up to 2.02


def test_what_follows_the_image_is_ignored():
    data = np.append(np.full(12, 7, np.uint8), np.full(99, 200, np.uint8))
    np.testing.assert_array_equal(to_bgr(data, "0x01080001", 4, 3), np.full((3, 4, 3), 7))


def test_too_few_bytes():
    with pytest.raises(CameraError, match="expected 18 bytes of Mono12Packed 4 x 3; got 17"):
        to_bgr(np.zeros(17, np.uint8), "Mono12Packed", 4, 3)


@pytest.mark.parametrize("name", ["Mono14", "Bayer8", "0x02300019", "", "Coord3D_ABC32f"])
def test_unknown_format(name):
    with pytest.raises(InputError, match=f"got {name}; choose one of these .*PixelFormat=Mono8"):
        to_bgr(np.zeros(99, np.uint8), name, 4, 3)


def test_every_code_is_of_a_format_that_can_be_converted():
    for code, name in CODES.items():
        width, height = 4, 4
        data = np.zeros(width * height * (code >> 16 & 0xFF) // 8, np.uint8)
        assert to_bgr(data, f"0x{code:08X}", width, height).shape == (height, width, 3), name
    assert len(set(CODES.values())) == len(CODES) == len(UNPACK) * (1 + len(BAYER)) + 6


@skip_without(ARAVIS)
def test_codes_are_those_of_aravis():
    script = """
import gi
gi.require_version("Aravis", "0.8")
from gi.repository import Aravis
for name in dir(Aravis):
    if name.startswith("PIXEL_FORMAT_"):
        print(name[13:], getattr(Aravis, name))
"""
    done = subprocess.run([PYTHON, "-c", script], capture_output=True, text=True, check=True)
    theirs = {name.replace("_", ""): int(code) for name, code in map(str.split, done.stdout.splitlines())}
    theirs |= {"YUV4228": theirs["YUV422YUYVPACKED"], "YUV4228UYVY": theirs["YUV422PACKED"]}
    theirs |= {"RGB8": theirs["RGB8PACKED"], "BGR8": theirs["BGR8PACKED"]}
    theirs |= {"RGBA8": theirs["RGBA8PACKED"], "BGRA8": theirs["BGRA8PACKED"]}
    ours = {name.replace("_", "").upper(): code for code, name in CODES.items()}
    both = ours.keys() & theirs.keys()
    assert len(both) > 30
    assert {name: ours[name] for name in both} == {name: theirs[name] for name in both}
