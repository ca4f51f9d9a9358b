"""Image files and camera frames: what comes in, and in words why something cannot.

Files are decoded by Pillow, not by OpenCV: OpenCV gives half an image for a truncated file and lets the
codecs write to stderr.
"""

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from .cuda_array import DeviceArray, check_device_frame, device_array, is_on_gpu
from .errors import InputError

# (rows, columns, 3) uint8 BGR: a NumPy array or, for the backends on a GPU, also an array there.
FrameArray = Any

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")

# Only these decoders are tried: others of Pillow's start programs (EPS) or are not meant for photographs.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")

UPRIGHT = {  # EXIF orientation: what brings the stored rows and columns into the position meant for viewing
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# "Corrupt EXIF data" and the like: it is harmless, or the decoding fails and says so.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")


def read_image(path: str | Path) -> np.ndarray:
    """Decode an image file: (H, W, 3) uint8 BGR, as OpenCV has it.

    Grayscale is replicated, 16 bits become 8 by the full range (65535 -> 255, whatever the brightest
    pixel), alpha is dropped, the EXIF orientation is applied. Of several pages the first is read.
    Raises InputError naming the file: missing, empty, not an image, truncated or damaged, 32-bit pixels,
    or more pixels claimed than Pillow's limit against decompression bombs (178 million).
    """
    pixels = _decode(Path(path))
    if pixels.ndim == 2:
        # The high byte, which is also what Pillow keeps of 16-bit colour.
        return cv2.cvtColor((pixels >> 8).astype(np.uint8), cv2.COLOR_GRAY2BGR)
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)


def read_mask(path: str | Path, height: int, width: int) -> np.ndarray:
    """Decode a defect mask and bring it to the network's size: (height, width) bool.

    Any value above 0, in any colour channel, is defect. Nearest resampling, pixel centres aligned.
    Raises InputError as `read_image` does.
    """
    pixels = _decode(Path(path))
    defect = pixels > 0 if pixels.ndim == 2 else pixels.any(axis=2)
    mask = Image.fromarray(defect.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(mask).astype(bool)


def check_frame(frame: object) -> None:
    """Raise InputError unless `frame` is a uint8 NumPy array (H, W, 3), H and W at least 1 (BGR, by agreement)."""
    if not isinstance(frame, np.ndarray):
        came, advice = type(frame).__name__, _advice_type(frame)
    elif frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3 and frame.size:
        return
    else:
        came = f"{frame.dtype} {frame.shape}"
        advice = "; ".join(filter(None, (_advice_shape(frame.shape), _advice_dtype(frame))))
    raise InputError(f"frame: expected a uint8 BGR array of shape (height, width, 3); got {came}: {advice}")


def readable_frame(frame: FrameArray, device: int, stream: int) -> np.ndarray | DeviceArray:
    """A frame as the backends on a GPU read it, checked. device, stream: that will read it; see `device_array`.

    Raises InputError as `check_frame` does, and for an array on another GPU.
    """
    array = None if isinstance(frame, np.ndarray) else device_array(frame, "frame", device, stream)
    if array is None:
        check_frame(frame)
        return frame
    check_device_frame(array)
    return array


def list_images(path: str | Path) -> list[Path]:
    """The image file `path`, or all image files below the folder `path`, in natural order (2 before 10).

    A file is taken as it is; in folders, names that are hidden or have no suffix of IMAGE_SUFFIXES are
    passed over. Raises InputError if there is no such path, no image, or a folder cannot be listed.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if not path.is_dir():
        return [path]
    try:
        images = sorted(walk_images(path), key=natural_order)
    except OSError as exc:
        raise InputError(f"{path}: this folder cannot be listed: {exc}") from exc
    if not images:
        raise InputError(f"{path}: no image in this folder; expected files named *{', *'.join(IMAGE_SUFFIXES)}")
    return images


def walk_images(folder: Path) -> Iterator[Path]:
    """Every image file below a folder, through links too, in no order. Raises OSError where listing fails."""
    for entry in folder.iterdir():
        if not entry.is_dir():
            # A dangling link is an image too, so that its reader says that it is missing.
            if is_image(entry):
                yield entry
        elif not entry.name.startswith(".") and not folder.resolve().is_relative_to(entry.resolve()):
            yield from walk_images(entry)  # a link to a folder above would never end


def is_image(path: Path) -> bool:
    """By its name: not hidden, and a suffix of IMAGE_SUFFIXES in lower or upper case."""
    return not path.name.startswith(".") and path.suffix.lower() in IMAGE_SUFFIXES


def natural_order(path: str | Path) -> tuple:
    """Sort key: numbers by value, so that img2 comes before img10; unequal names never compare equal."""
    text = str(path)
    return [int(t) if i % 2 else t for i, t in enumerate(re.split("([0-9]+)", text))], text


def _decode(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB, or (H, W) integers 0..65535 if the file is 16-bit grayscale."""
    if not path.is_file():
        came = "this is a folder" if path.is_dir() else "there is no such file"
        raise InputError(f"{path}: expected an image file; {came}")
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty (0 bytes); was it copied completely?")
        # Given a path, Pillow 13 scrambles uncompressed gray TIFF that is stored on its side.
        with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
            image.load()
            upright = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
            oriented = image if upright is None else image.transpose(upright)
            # Pillow before 10.3 gives 16-bit PNG as "I".
            if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
                return np.array(oriented)
            if image.mode in ("I", "F"):
                raise InputError(f"{path}: its 32-bit pixels have no known range; save it with 8 or 16 bits")
            oriented.info.pop("transparency", None)  # Pillow would warn where it drops it
            return np.asarray(oriented.convert("RGB"))
    except InputError:
        raise
    except UnidentifiedImageError as exc:
        raise InputError(f"{path}: not a {', '.join(FORMATS)} image, or too damaged to recognise") from exc
    except Exception as exc:  # on damaged data the decoders raise anything from OSError to IndexError
        reason = str(exc) or repr(exc)
        raise InputError(f"{path}: cannot be decoded (damaged, truncated or too large): {reason}") from exc


def _advice_type(frame: object) -> str:
    if frame is None:
        return "the camera gave no frame, or cv2.imread could not read its file; check it before this call"
    if isinstance(frame, str | Path):
        return "pass read_image(path)"
    if isinstance(frame, Image.Image):
        return 'pass np.asarray(image.convert("RGB"))[..., ::-1]'
    if is_on_gpu(frame):
        return "a CPU does not take frames on the GPU; pass frame.cpu().numpy(), or frame.get() of CuPy"
    return "pass one frame as a NumPy array, as cv2.imread and cv2.VideoCapture give it"


def _advice_shape(shape: tuple[int, ...]) -> str:
    if 0 in shape:
        return "it is empty; check the camera's region of interest or the crop"
    if len(shape) == 2 or (len(shape) == 3 and shape[2] == 1):
        return "convert it with cv2.cvtColor(frame, cv2.COLOR_GRAY2BGR); raw Bayer with COLOR_Bayer..2BGR"
    if len(shape) == 3 and shape[2] == 4:
        return "drop alpha with cv2.cvtColor(frame, cv2.COLOR_BGRA2BGR)"
    if len(shape) == 3 and shape[0] == 3:
        return "channels come last: pass frame.transpose(1, 2, 0)"
    if len(shape) == 4:
        return "pass the frames of a batch one by one"
    return "" if len(shape) == 3 and shape[2] == 3 else "expected three axes, the last one of 3 channels"


def _advice_dtype(frame: np.ndarray) -> str:
    if frame.dtype == np.uint8:
        return ""
    if frame.dtype == np.uint16:
        return "bring it to 8 bits: (frame >> 8).astype(np.uint8), for a 12-bit camera >> 4"
    if np.issubdtype(frame.dtype, np.floating):
        if np.isnan(frame).any():
            return "it holds NaN; correct what computed it, then cast it to np.uint8"
        return "multiply it by 255 if its range is 0..1, then cast it: np.clip(frame, 0, 255).astype(np.uint8)"
    return "bring it to 0..255, then cast it with astype(np.uint8)"
