import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from omniad_edge.errors import InputError
from omniad_edge.image import IMAGE_SUFFIXES, check_frame, list_images, natural_order, read_image, read_mask

RED = (0, 0, 255)  # BGR

# What a viewer does with each EXIF orientation, on the stored rows and columns.
VIEWED = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


def red_image(mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", (30, 20), (255, 0, 0)).convert(mode)


def photo(rng: np.random.Generator, height: int = 60, width: int = 80) -> np.ndarray:
    return cv2.GaussianBlur(rng.integers(0, 256, (height, width, 3), dtype=np.uint8), (5, 5), 0)


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
@pytest.mark.parametrize("upper", [False, True])
def test_every_suffix_is_read_as_bgr(tmp_path, suffix, upper):
    path = tmp_path / f"part{suffix.upper() if upper else suffix}"
    red_image().save(path)
    image = read_image(str(path))
    assert image.shape == (20, 30, 3) and image.dtype == np.uint8 and image.flags.c_contiguous
    assert np.abs(image.astype(int) - RED).max() <= 2  # JPEG and WebP lose a little


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("rgba.png", "RGBA"),
        ("palette.png", "P"),
        ("cmyk.jpg", "CMYK"),
        ("cmyk.tif", "CMYK"),
        ("rgba.tif", "RGBA"),
        ("rgba.webp", "RGBA"),
    ],
)
def test_red_is_red_in_every_colour_mode(tmp_path, name, mode):
    red_image(mode).save(tmp_path / name)
    assert np.abs(read_image(tmp_path / name).astype(int) - RED).max() <= 3


def test_alpha_is_dropped_not_blended(tmp_path):
    red = red_image("RGBA")
    red.putalpha(0)
    red.save(tmp_path / "rgba.png")
    red_image("P").save(tmp_path / "palette.png", transparency=bytes([0] * 256))
    red_image().save(tmp_path / "key.png", transparency=(255, 0, 0))
    for path in tmp_path.iterdir():
        assert (read_image(path) == RED).all(), path.name


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_grayscale_is_replicated(tmp_path, mode):
    gray = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert(mode)
    gray.save(tmp_path / "gray.png")
    expected = np.array([[0, 255], [255, 0]])[:, :, None].repeat(3, axis=2)
    assert (read_image(tmp_path / "gray.png") == expected).all()


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_gray_is_scaled_by_the_full_range(tmp_path, suffix):
    values = np.array([[0, 255, 256, 4095, 0x8034, 65535]], np.uint16)
    cv2.imwrite(str(tmp_path / f"gray{suffix}"), values)
    image = read_image(tmp_path / f"gray{suffix}")
    assert image[0, :, 0].tolist() == [0, 0, 1, 15, 128, 255]
    assert (image == image[..., :1]).all()


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [3, 4])
def test_16_bit_colour_is_scaled_by_the_full_range(tmp_path, suffix, channels):
    values = np.zeros((4, 5, channels), np.uint16)
    values[..., :3] = 0x1000, 0x8034, 0xFFFF
    cv2.imwrite(str(tmp_path / f"colour{suffix}"), values)
    assert (read_image(tmp_path / f"colour{suffix}") == (0x10, 0x80, 0xFF)).all()


@pytest.mark.parametrize("orientation", VIEWED)
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    stored = np.zeros((32, 48, 3), np.uint8)  # RGB; blocks of 16, which JPEG keeps
    stored[:16, :16] = 255, 0, 0
    stored[:16, 16:] = 0, 255, 0
    stored[16:, :16] = 0, 0, 255
    exif = Image.Exif()
    exif[274] = orientation
    lossless = {".jpg": {"quality": 100, "subsampling": 0}, ".webp": {"lossless": True}}
    Image.fromarray(stored).save(tmp_path / f"a{suffix}", exif=exif, **lossless.get(suffix, {}))
    expected = VIEWED[orientation](stored)[..., ::-1].astype(int)
    image = read_image(tmp_path / f"a{suffix}")
    assert image.shape == expected.shape
    assert np.abs(image - expected).max() <= 2


@pytest.mark.parametrize("orientation", VIEWED)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("compression", [None, "tiff_deflate"])
def test_exif_orientation_of_gray_tiff(tmp_path, orientation, dtype, compression):
    stored = (np.arange(6).reshape(2, 3) * 40 * (257 if dtype == np.uint16 else 1)).astype(dtype)
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(stored).save(tmp_path / "a.tif", exif=exif, compression=compression)
    expected = VIEWED[orientation](np.arange(6).reshape(2, 3) * 40)
    assert (read_image(tmp_path / "a.tif")[..., 0] == expected).all()


def test_an_unknown_orientation_is_none(tmp_path):
    exif = Image.Exif()
    exif[274] = 9
    red_image().save(tmp_path / "a.png", exif=exif)
    assert read_image(tmp_path / "a.png").shape == (20, 30, 3)


def test_names_need_not_be_ascii_nor_tell_the_format(tmp_path):
    path = tmp_path / "Größe 検査 №1.png"
    red_image().save(path, format="JPEG", quality=95)
    assert np.abs(read_image(path).astype(int) - RED).max() <= 2


def test_links_are_followed(tmp_path):
    red_image().save(tmp_path / "a.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    assert (read_image(tmp_path / "link.png") == RED).all()


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.tif", "raw.tif", "a.webp"])
def test_a_truncated_file_is_refused_never_half_an_image(tmp_path, rng, name):
    path = tmp_path / name
    if name == "raw.tif":
        Image.fromarray(photo(rng)).save(path)
    else:
        cv2.imwrite(str(path), photo(rng))
    content, whole = path.read_bytes(), read_image(path)
    for part in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98):
        path.write_bytes(content[: int(len(content) * part)])
        with pytest.raises(InputError, match=r"truncated|damaged"):
            read_image(path)
    for missing in range(1, 40):  # near the end: an error, or nothing that matters is missing
        path.write_bytes(content[:-missing])
        try:
            image = read_image(path)
        except InputError as exc:
            assert name in str(exc)
        else:
            assert (image == whole).all()


def test_altered_png_is_refused(tmp_path, rng):
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), photo(rng))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.png"):
        read_image(path)


def test_no_random_bytes_give_anything_but_inputerror(tmp_path, rng):
    path = tmp_path / "a.tif"
    for suffix in (".png", ".jpg", ".tif", ".bmp", ".webp"):
        cv2.imwrite(str(tmp_path / f"b{suffix}"), photo(rng, 16, 16))
        content = np.frombuffer((tmp_path / f"b{suffix}").read_bytes(), np.uint8)
        for _ in range(60):
            damaged = content.copy()
            where = rng.integers(0, min(len(content), 200), 6)
            damaged[where] = rng.integers(0, 256, 6)
            path.write_bytes(damaged.tobytes())
            try:
                image = read_image(path)
            except InputError as exc:
                assert str(path) in str(exc)
            else:
                assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"not an image\n", "not a PNG"),
        (b"GIF89a" + bytes(60), "not a PNG"),
        (bytes(4096), "not a PNG"),
    ],
)
def test_what_is_no_image_is_refused(tmp_path, content, reason):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=reason) as error:
        read_image(path)
    assert str(path) in str(error.value)


def test_a_missing_file_a_dangling_link_and_a_folder_are_refused(tmp_path):
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    for name in ("gone.png", "link.png"):
        with pytest.raises(InputError, match=f"{name}: .*no such file"):
            read_image(tmp_path / name)
    with pytest.raises(InputError, match="this is a folder"):
        read_image(tmp_path)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_a_known_range_are_refused(tmp_path, dtype):
    Image.fromarray(np.ones((4, 5), dtype)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match="32-bit pixels have no known range"):
        read_image(tmp_path / "a.tif")


def png(width: int, height: int) -> bytes:
    """A PNG whose header claims this size, with hardly any data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def test_a_decompression_bomb_is_refused_before_it_takes_memory(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(60000, 60000))
    script = (
        "import resource, sys\n"
        "from omniad_edge.errors import InputError\n"
        "from omniad_edge.image import read_image\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: read_image(sys.argv[1])\n"
        "except InputError as exc: print(exc)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    message, grown_kib = done.stdout.splitlines()
    assert str(path) in message and "3600000000 pixels" in message
    assert int(grown_kib) < 50_000


def test_nothing_is_written_to_stderr(tmp_path, rng):
    cv2.imwrite(str(tmp_path / "a.png"), photo(rng))
    cv2.imwrite(str(tmp_path / "a.jpg"), photo(rng))
    for name in ("a.png", "a.jpg"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / f"half_{name}").write_bytes(content[: len(content) // 2])
    exif = Image.Exif()
    exif[274] = 6
    exif[305] = "software whose name is cut off"
    corrupt = exif.tobytes()[:-10]
    red_image().save(tmp_path / "exif.jpg", exif=corrupt)
    red_image("P").save(tmp_path / "palette.png", transparency=bytes([0] * 256))
    script = (
        "import sys\n"
        "from omniad_edge.errors import InputError\n"
        "from omniad_edge.image import list_images, read_image\n"
        "for path in list_images(sys.argv[1]):\n"
        "    try: print(path.name, read_image(path).shape)\n"
        "    except InputError: print(path.name, 'refused')"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "a.jpg (60, 80, 3)",
        "a.png (60, 80, 3)",
        "exif.jpg (30, 20, 3)",
        "half_a.jpg refused",
        "half_a.png refused",
        "palette.png (20, 30, 3)",
    ]


def test_real_images_equal_pillow(data_dir):
    for path in (list_images(data_dir / "screw")[:2], list_images(data_dir / "magnetic_tile")[:2]):
        for file in path:
            expected = np.asarray(Image.open(file).convert("RGB"))
            assert (read_image(file)[..., ::-1] == expected).all()


@pytest.mark.parametrize("value", [1, 127, 255])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA"])
def test_any_value_above_0_is_defect(tmp_path, value, mode):
    mask = np.zeros((6, 8), np.uint8)
    mask[2:4, 3:7] = value
    Image.fromarray(mask).convert(mode).save(tmp_path / "m.png")
    read = read_mask(tmp_path / "m.png", 6, 8)
    assert read.dtype == bool and (read == (mask > 0)).all()


def test_16_bit_and_bilevel_masks(tmp_path):
    mask = np.zeros((6, 8), np.uint16)
    mask[1:3, 1:5] = 1  # lost if it were brought to 8 bits first
    cv2.imwrite(str(tmp_path / "m.png"), mask)
    assert (read_mask(tmp_path / "m.png", 6, 8) == (mask > 0)).all()
    Image.fromarray(mask > 0).save(tmp_path / "b.png")
    assert (read_mask(tmp_path / "b.png", 6, 8) == (mask > 0)).all()


def test_mask_is_resized_to_the_nearest_pixel(tmp_path, rng):
    mask = rng.random((30, 40)) > 0.5
    Image.fromarray(mask).save(tmp_path / "m.png")
    rows = ((np.arange(8) + 0.5) * 30 / 8).astype(int)
    columns = ((np.arange(16) + 0.5) * 40 / 16).astype(int)
    assert (read_mask(tmp_path / "m.png", 8, 16) == mask[rows][:, columns]).all()


def test_a_broken_mask_is_refused(tmp_path):
    (tmp_path / "m.png").write_text("no")
    with pytest.raises(InputError, match=r"m\.png"):
        read_mask(tmp_path / "m.png", 8, 8)


def test_good_frames_pass():
    frame = np.zeros((40, 60, 3), np.uint8)
    for good in (
        frame,
        frame[::2, ::3],
        frame[:1, :1],
        np.asfortranarray(frame),
        np.zeros((3, 3, 3), np.uint8),
    ):
        check_frame(good)


@pytest.mark.parametrize(
    ("frame", "came", "advice"),
    [
        (None, "NoneType", "camera gave no frame"),
        ([[1, 2, 3]], "list", "NumPy array"),
        ("part.png", "str", "read_image"),
        (Path("part.png"), ".*Path", "read_image"),
        (Image.new("RGB", (4, 5)), "Image", "np.asarray"),
        (np.zeros((4, 5), np.uint8), r"uint8 \(4, 5\)", "COLOR_GRAY2BGR"),
        (np.zeros((4, 5, 1), np.uint8), r"uint8 \(4, 5, 1\)", "COLOR_GRAY2BGR"),
        (np.zeros((4, 5, 4), np.uint8), r"uint8 \(4, 5, 4\)", "COLOR_BGRA2BGR"),
        (np.zeros((3, 4, 5), np.uint8), r"uint8 \(3, 4, 5\)", "transpose"),
        (np.zeros((1, 4, 5, 3), np.uint8), r"uint8 \(1, 4, 5, 3\)", "one by one"),
        (np.zeros((0, 5, 3), np.uint8), r"uint8 \(0, 5, 3\)", "empty"),
        (np.zeros((4, 0, 3), np.uint8), r"uint8 \(4, 0, 3\)", "empty"),
        (np.zeros((), np.uint8), r"uint8 \(\)", "three axes"),
        (np.zeros((4, 5, 2), np.uint8), r"uint8 \(4, 5, 2\)", "3 channels"),
        (np.zeros((4, 5, 3), np.float32), r"float32 \(4, 5, 3\)", "255"),
        (np.full((4, 5, 3), np.nan), r"float64 \(4, 5, 3\)", "NaN"),
        (np.zeros((4, 5, 3), np.uint16), r"uint16 \(4, 5, 3\)", ">> 8"),
        (np.zeros((4, 5, 3), bool), r"bool \(4, 5, 3\)", "astype"),
        (np.full((4, 5, 3), None), r"object \(4, 5, 3\)", "astype"),
        (np.zeros((3, 4, 5), np.float32), r"float32 \(3, 4, 5\)", r"transpose.*255"),
    ],
)
def test_bad_frames_are_refused_with_advice(frame, came, advice):
    with pytest.raises(InputError, match=rf"expected a uint8 BGR array .*got {came}.*: .*{advice}"):
        check_frame(frame)


def test_the_advice_for_frames_works():
    frames = (
        cv2.cvtColor(np.zeros((4, 5), np.uint8), cv2.COLOR_GRAY2BGR),
        cv2.cvtColor(np.zeros((4, 5, 4), np.uint8), cv2.COLOR_BGRA2BGR),
        np.zeros((3, 4, 5), np.uint8).transpose(1, 2, 0),
        (np.zeros((4, 5, 3), np.uint16) >> 8).astype(np.uint8),
        np.asarray(Image.new("RGB", (4, 5)).convert("RGB"))[..., ::-1],
    )
    for frame in frames:
        check_frame(frame)


def test_a_folder_is_listed_recursively_in_natural_order(tmp_path):
    names = ["img2.png", "img10.PNG", "IMG1.jpg", "b/1.tif", "b/c d/ü.webp", "a.jpeg"]
    others = ["Thumbs.db", "notes.txt", ".hidden.png", "._img2.png", ".cache/x.png", "png"]
    for name in names + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    listed = [path.relative_to(tmp_path).as_posix() for path in list_images(str(tmp_path))]
    assert listed == ["IMG1.jpg", "a.jpeg", "b/1.tif", "b/c d/ü.webp", "img2.png", "img10.PNG"]


def test_a_file_is_itself(tmp_path):
    (tmp_path / "frame.raw").touch()
    assert list_images(tmp_path / "frame.raw") == [tmp_path / "frame.raw"]


def test_links_are_listed_and_circles_end(tmp_path):
    folder = tmp_path / "line"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.png").touch()
    (folder / "far").symlink_to(tmp_path / "elsewhere")
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "gone.png").symlink_to(tmp_path / "nothing")
    assert list_images(folder) == [folder / "far" / "1.png", folder / "gone.png"]


def test_nothing_to_list_is_an_error(tmp_path):
    (tmp_path / "Thumbs.db").touch()
    with pytest.raises(InputError, match="no image in this folder"):
        list_images(tmp_path)
    with pytest.raises(InputError, match="no such file or folder"):
        list_images(tmp_path / "gone")


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InputError, match=r"cannot be listed.*Permission denied"):
        list_images(tmp_path)


def test_natural_order_tells_every_two_names_apart():
    names = ["a1", "a01", "a001", "a", "a1b", "A1", "1", "01", "a10", "a9"]
    assert len({str(natural_order(name)) for name in names}) == len(names)
    reversed_names = names[::-1]
    assert sorted(names, key=natural_order) == sorted(reversed_names, key=natural_order)
    assert natural_order("a9") < natural_order("a10")
