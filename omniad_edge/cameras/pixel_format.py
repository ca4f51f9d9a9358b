"""Every pixel format cameras send -> (H, W, 3) uint8 BGR. The only place that knows how their bytes lie.

Names and codes are those of GenICam's pixel format naming convention (PFNC), with NV12 and I420 beside them.
Deeper pixels keep their high 8 bits. YUV is BT.601 with the limited range, as OpenCV converts it.
"""

from collections.abc import Callable

import cv2
import numpy as np

from ..errors import CameraError, InputError

Unpack = Callable[[np.ndarray, int], np.ndarray]  # bytes, number of pixels -> (pixels,) uint8

BAYER = {  # PFNC names the first two pixels of the first row; OpenCV's short names are shifted, its long ones not
    "BayerRG": cv2.COLOR_BayerRGGB2BGR,
    "BayerGR": cv2.COLOR_BayerGRBG2BGR,
    "BayerGB": cv2.COLOR_BayerGBRG2BGR,
    "BayerBG": cv2.COLOR_BayerBGGR2BGR,
}

INTERLEAVED = {  # name: (bytes per pixel, conversion)
    "RGB8": (3, cv2.COLOR_RGB2BGR),
    "RGBa8": (4, cv2.COLOR_RGBA2BGR),
    "BGRa8": (4, cv2.COLOR_BGRA2BGR),
    "YUV422_8": (2, cv2.COLOR_YUV2BGR_YUYV),
    "YUV422_8_UYVY": (2, cv2.COLOR_YUV2BGR_UYVY),
}

HALF_CHROMA = {"NV12": cv2.COLOR_YUV2BGR_NV12, "I420": cv2.COLOR_YUV2BGR_I420}

CODES = {
    **{0x01080001: "Mono8", 0x01100003: "Mono10", 0x01100005: "Mono12", 0x01100007: "Mono16"},
    **{0x010C0004: "Mono10Packed", 0x010C0006: "Mono12Packed", 0x010A0046: "Mono10p", 0x010C0047: "Mono12p"},
    **{0x01080008: "BayerGR8", 0x01080009: "BayerRG8", 0x0108000A: "BayerGB8", 0x0108000B: "BayerBG8"},
    **{0x0110000C: "BayerGR10", 0x0110000D: "BayerRG10", 0x0110000E: "BayerGB10", 0x0110000F: "BayerBG10"},
    **{0x01100010: "BayerGR12", 0x01100011: "BayerRG12", 0x01100012: "BayerGB12", 0x01100013: "BayerBG12"},
    **{0x0110002E: "BayerGR16", 0x0110002F: "BayerRG16", 0x01100030: "BayerGB16", 0x01100031: "BayerBG16"},
    **{0x010A0056: "BayerGR10p", 0x010A0058: "BayerRG10p", 0x010A0054: "BayerGB10p", 0x010A0052: "BayerBG10p"},
    **{0x010C0057: "BayerGR12p", 0x010C0059: "BayerRG12p", 0x010C0055: "BayerGB12p", 0x010C0053: "BayerBG12p"},
    **{0x010C0026: "BayerGR10Packed", 0x010C0027: "BayerRG10Packed"},
    **{0x010C0028: "BayerGB10Packed", 0x010C0029: "BayerBG10Packed"},
    **{0x010C002A: "BayerGR12Packed", 0x010C002B: "BayerRG12Packed"},
    **{0x010C002C: "BayerGB12Packed", 0x010C002D: "BayerBG12Packed"},
    **{0x02180014: "RGB8", 0x02180015: "BGR8", 0x02200016: "RGBa8", 0x02200017: "BGRa8"},
    **{0x02100032: "YUV422_8", 0x0210001F: "YUV422_8_UYVY"},
}


def to_bgr(data: np.ndarray, pixel_format: str, width: int, height: int) -> np.ndarray:
    """One image as a camera sent it -> (height, width, 3) uint8 BGR.

    data:         (bytes,) uint8, rows without padding; what follows the image, as chunks do, is ignored
    pixel_format: a name such as "BayerRG12p", or a PFNC code in hexadecimal such as "0x01080001"
    Raises InputError for a format that cannot be converted, CameraError for too few bytes.
    """
    name = CODES.get(int(pixel_format, 16), pixel_format) if pixel_format.startswith("0x") else pixel_format
    if name == "BGR8":
        return _image(data, 3 * width * height, name, width, height).reshape(height, width, 3)
    if name in INTERLEAVED:
        depth, conversion = INTERLEAVED[name]
        image = _image(data, depth * width * height, name, width, height)
        return cv2.cvtColor(image.reshape(height, width, depth), conversion)
    if name in HALF_CHROMA:
        image = _image(data, 3 * width * height // 2, name, width, height)
        return cv2.cvtColor(image.reshape(height * 3 // 2, width), HALF_CHROMA[name])
    colour, depth = (name[:7], name[7:]) if name[:7] in BAYER else (name[:4], name[4:])
    if depth not in UNPACK or (colour not in BAYER and colour != "Mono"):
        raise InputError(
            f"pixel format: expected {_names()}; got {pixel_format}; choose one of these in the camera, "
            "in its address for example as ?PixelFormat=Mono8"
        )
    bits, unpack = UNPACK[depth]
    packed = _image(data, -(-width * height * bits // 8), name, width, height)
    pixels = unpack(packed, width * height).reshape(height, width)
    return cv2.cvtColor(pixels, BAYER.get(colour, cv2.COLOR_GRAY2BGR))


def _image(data: np.ndarray, size: int, name: str, width: int, height: int) -> np.ndarray:
    if len(data) < size:
        raise CameraError(f"frame: expected {size} bytes of {name} {width} x {height}; got {len(data)}")
    return data[:size]


def _high_bits(shift: int) -> Unpack:
    """Pixels in 16 bits each, little-endian."""
    return lambda data, count: (data.view("<u2") >> shift).astype(np.uint8)


def _unpack_10p(data: np.ndarray, count: int) -> np.ndarray:
    """Four pixels in five bytes, lowest bits first."""
    b0, b1, b2, b3, b4 = _groups(data, 5).T
    return _together(b0 >> 2 | b1 << 6, b1 >> 4 | b2 << 4, b2 >> 6 | b3 << 2, b4)[:count]


def _unpack_12p(data: np.ndarray, count: int) -> np.ndarray:
    """Two pixels in three bytes, lowest bits first."""
    b0, b1, b2 = _groups(data, 3).T
    return _together(b0 >> 4 | b1 << 4, b2)[:count]


def _unpack_gige(data: np.ndarray, count: int) -> np.ndarray:
    """Two pixels in three bytes as GigE Vision 1 packs them: high byte, both low parts, high byte."""
    b0, _, b2 = _groups(data, 3).T
    return _together(b0, b2)[:count]


def _groups(data: np.ndarray, size: int) -> np.ndarray:
    """(bytes,) -> (groups, size); an incomplete last group is filled with zeros."""
    return np.append(data, np.zeros(-len(data) % size, np.uint8)).reshape(-1, size)


def _together(*pixels: np.ndarray) -> np.ndarray:
    return np.stack(pixels, axis=1).ravel()


UNPACK: dict[str, tuple[int, Unpack]] = {  # what follows Mono or BayerRG: (bits per pixel, how to unpack)
    "8": (8, lambda data, count: data),
    "10": (16, _high_bits(2)),
    "12": (16, _high_bits(4)),
    "16": (16, _high_bits(8)),
    "10p": (10, _unpack_10p),
    "12p": (12, _unpack_12p),
    "10Packed": (12, _unpack_gige),
    "12Packed": (12, _unpack_gige),
}


def _names() -> str:
    return f"Mono or {', '.join(BAYER)} with {', '.join(UNPACK)}; BGR8, {', '.join(INTERLEAVED)}, NV12 or I420"
