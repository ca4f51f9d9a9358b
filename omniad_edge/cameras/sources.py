"""`open_source`: everything that a line reads frames from, each by one address."""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit, urlunsplit

import numpy as np

from ..credentials import without_credentials
from ..errors import InputError
from ..frame import Source
from ..image import is_image
from .array_source import ArraySource
from .camera_process import CameraProcess
from .folder_source import FolderSource, WatchedFolder
from .video_file import VideoFile

FORMS = """\
  webcam:0, 0 or v4l2:///dev/video0   USB camera; ?width=1280&height=720&fps=30&fourcc=YUYV
  rtsp://host/path, rtsps://...       network camera, always its newest frame; ?transport=tcp|udp
  gige://, usb3://                    GenICam camera, the only one there is, or its serial, name or address:
                                      gige://Basler-22334455?trigger=Software|Line1&exposure_us=800&Gain=2
                                      with any of the camera's features by name
  csi://0                             camera of a Jetson; ?width=1920&height=1080&fps=30
                                      &crop=left,top,width,height&scale=640x480&flip=0..7
  gst:videotestsrc ! ...              GStreamer pipeline without its sink
  video.mp4, file:///path/video.mp4   video file
  parts/, folder:///path              image folder, or one image; ?watch=1 waits for new files, for ever;
                                      &existing=0 passes over those that are there already
  and from Python any iterable of (H, W, 3) uint8 BGR arrays
Cameras take ?timeout_s=5, after how many seconds of silence they count as lost (0: never, they may be silent),
and ?buffer=1, how many frames wait for the reader (8 where each is inspected); a pipeline takes both before its
elements: gst:timeout_s=0 buffer=2 v4l2src"""

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")  # two letters at least: C:\ is a drive
FEATURE = re.compile(r"[A-Z][A-Za-z0-9_]*")  # as GenICam names them
TIMEOUT_S = 5.0  # default silence after which a camera counts as lost
START_S = 5.0  # for a camera's process to start, on top
GENICAM_OPEN_S = 20.0  # its description is read from the camera, over its network
IN_ORDER = 8  # and of one that is triggered, each of whose frames is a part

Parse = Callable[[str], object]


def open_source(source: str | int | Path | Iterable[np.ndarray] | Source) -> Source:
    """The source of an address, not opened yet: call its `open`, or give it to `Detector.stream`.

    source: one of FORMS, or a Source, which is returned as it is.
    Raises InputError, with all forms, for an address that cannot be meant; what it leads to is seen by `open`.
    """
    if isinstance(source, int) and not isinstance(source, bool):
        return _webcam(f"webcam:{source}", f"{source}", "")
    if isinstance(source, str):
        return _from_address(source.strip())
    if isinstance(source, os.PathLike):
        return _from_path(Path(source))
    if hasattr(source, "software_trigger"):
        return source
    if isinstance(source, np.ndarray) and source.ndim == 3:
        return ArraySource([source])  # one picture, not its rows
    if isinstance(source, list | tuple) and any(isinstance(each, str | os.PathLike) for each in source):
        raise InputError(
            f"source: expected one address or a list of pictures, got a {type(source).__name__} of addresses; "
            "several cameras go by name: {'top': 'webcam:0', 'side': 'webcam:1'}"
        )
    if isinstance(source, Iterable):
        return ArraySource(source)
    raise _wrong(source, "got " + type(source).__name__)


def _from_address(address: str) -> Source:
    if not address:
        raise _wrong(address, "the address is empty")
    scheme = SCHEME.match(address)
    if scheme is None:
        return _webcam(address, address, "") if address.isdecimal() else _from_path(Path(address))
    kind = scheme[1].lower()
    if kind == "gst":
        return _pipeline(address, address[len("gst:") :])
    try:
        parts = urlsplit(address)
        place = unquote(parts.netloc + parts.path)
    except ValueError as exc:
        raise _wrong(address, str(exc)) from exc
    if kind == "webcam":
        return _webcam(address, place, parts.query)
    if kind == "v4l2":
        return _webcam(address, place, parts.query, is_path=True)
    if kind in ("rtsp", "rtsps"):
        return _stream(address, parts)
    if kind in ("gige", "usb3"):
        return _genicam(address, kind, place, parts.query)
    if kind == "csi":
        return _csi(address, place, parts.query)
    if kind == "file":
        _options(address, parts.query, {})
        return _from_path(_local(address, place))
    if kind == "folder":
        return _folder(address, _local(address, place), parts.query)
    if os.path.exists(address):
        return _from_path(Path(address))  # a name with a colon
    raise _wrong(address, f"there is no scheme {scheme[1]}:")


def _webcam(address: str, place: str, query: str, is_path: bool = False) -> Source:
    size = {"width": _whole(1, 65535), "height": _whole(1, 65535), "fps": _whole(1, 1000)}
    options = _options(address, query, {**size, "fourcc": _fourcc, **WAITING})
    if is_path and not place.startswith("/"):
        raise _wrong(address, "expected a device such as v4l2:///dev/video0")
    device = place if is_path else _parsed(address, "camera number", _whole(0, 255), place)
    wanted = {name: options[name] for name in size if name in options}
    coding = {"fourcc": options.get("fourcc", "")}
    settings = {"device": device, "transport": "", "wanted": wanted, "timeout_s": TIMEOUT_S, **coding}
    return CameraProcess(address, "opencv", settings, **_waiting(options))


def _stream(address: str, parts: SplitResult) -> Source:
    if not parts.hostname:
        raise _wrong(address, "it names no host")
    known = {"transport": _one_of("tcp", "udp"), **WAITING}
    # The other settings are the camera's own: they go to it as they are.
    pairs = [pair for pair in parts.query.split("&") if pair]
    ours = [pair for pair in pairs if pair.split("=")[0] in known]
    options = _options(address, "&".join(ours), known)
    query = "&".join(pair for pair in pairs if pair not in ours)
    waiting = _waiting(options)
    settings = {
        "device": urlunsplit(parts._replace(query=query)),
        "transport": options.get("transport", "tcp"),
        "wanted": {},
        "timeout_s": waiting["silence_s"] or TIMEOUT_S,
    }
    return CameraProcess(address, "opencv", settings, **waiting)


def _genicam(address: str, kind: str, place: str, query: str) -> Source:
    known = {"trigger": _word, "exposure_us": _number(1, 1e9), **WAITING}
    options = _options(address, query, known, others=FEATURE)
    trigger = options.get("trigger", "off")
    trigger = {"off": "off", "software": "Software"}.get(trigger.lower(), trigger)
    settings = {
        "interface": {"gige": "GigEVision", "usb3": "USB3Vision"}[kind],
        "camera_id": place.rstrip("/"),
        "trigger": trigger,
        "exposure_us": options.get("exposure_us"),
        "features": {name: value for name, value in options.items() if name not in known},
    }
    defaults = {} if trigger == "off" else {"timeout_s": 0.0, "buffer": IN_ORDER}
    waiting = {**_waiting({**defaults, **options}), "open_s": GENICAM_OPEN_S}
    return CameraProcess(address, "aravis", settings, software_trigger=trigger == "Software", **waiting)


def _csi(address: str, place: str, query: str) -> Source:
    known = {
        **{"width": _whole(1, 65535), "height": _whole(1, 65535), "fps": _whole(1, 1000), "flip": _whole(0, 7)},
        **{"crop": _numbers("left,top,width,height", ",", 4), "scale": _numbers("WIDTHxHEIGHT", "x", 2)},
    }
    options = _options(address, query, {**known, **WAITING})
    sensor = _parsed(address, "camera number", _whole(0, 15), place)
    pipeline = csi_pipeline(sensor, **{name: options[name] for name in known if name in options})
    waiting = _waiting(options)
    return CameraProcess(address, "gstreamer", {"pipeline": pipeline, "timeout_s": TIMEOUT_S}, **waiting)


def csi_pipeline(
    sensor: int,
    width: int = 1920,
    height: int = 1080,
    fps: int = 30,
    crop: tuple[int, ...] = (),
    scale: tuple[int, ...] = (),
    flip: int = 0,
) -> str:
    """Elements for a Jetson's camera: cropped, scaled and turned by its hardware, before the CPU sees a pixel.

    width, height: in pixels, of a mode that the sensor has; crop: left, top, width, height within it
    scale: width, height that come out, by default those of the crop; flip: nvvidconv's flip-method
    Raises InputError for a crop that is not within the picture.
    """
    left, top, crop_width, crop_height = crop or (0, 0, width, height)
    if crop and (left + crop_width > width or top + crop_height > height or 0 in crop[2:]):
        raise InputError(f"crop: expected left,top,width,height within {width} x {height} pixels; got {crop}")
    out_width, out_height = scale or (crop_width, crop_height)
    if not scale and flip % 2:  # the odd ones turn by 90 degrees
        out_width, out_height = out_height, out_width
    cropped = f" left={left} top={top} right={left + crop_width} bottom={top + crop_height}" if crop else ""
    return (
        f"nvarguscamerasrc sensor-id={sensor} ! "
        f"video/x-raw(memory:NVMM),format=NV12,width={width},height={height},framerate={fps}/1 ! "
        f"nvvidconv{cropped} flip-method={flip} ! video/x-raw,format=BGRx,width={out_width},height={out_height}"
    )


def _pipeline(address: str, text: str) -> Source:
    words, query = text.split(), []
    while words and words[0].split("=")[0] in WAITING:
        query.append(words.pop(0))
        text = text.split(query[-1], 1)[1]
    if not text.strip():
        raise _wrong(address, "the pipeline is empty")
    waiting = _waiting(_options(address, "&".join(query), WAITING))
    settings = {"pipeline": text.strip(), "timeout_s": waiting["silence_s"] or TIMEOUT_S}
    return CameraProcess(address, "gstreamer", settings, **waiting)


def _from_path(path: Path) -> Source:
    # os.path, as pathlib raises for names that are too long.
    if os.path.isdir(path) or (os.path.isfile(path) and is_image(path)):
        return FolderSource(path)
    if os.path.isfile(path):
        return VideoFile(path)
    raise _wrong(path, "there is no such file or folder")


def _folder(address: str, path: Path, query: str) -> Source:
    options = _options(address, query, {"watch": _flag, "existing": _flag})
    if options.get("watch"):
        return WatchedFolder(path, existing=options.get("existing", True))
    if "existing" in options:
        raise _wrong(address, "existing is for watch=1")
    return _from_path(path)


def _local(address: str, place: str) -> Path:
    if urlsplit(address).netloc not in ("", "localhost") and address.lower().startswith("file:"):
        raise _wrong(address, "expected three slashes: file:///path")
    return Path(place.removeprefix("localhost"))


def _options(
    address: str, query: str, known: dict[str, Parse], others: re.Pattern | None = None
) -> dict[str, object]:
    """The settings of an address; `others`: names beyond the known ones, whose values stay text."""
    options = {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name in options:
            raise _wrong(address, f"{name} is there twice")
        if name in known:
            options[name] = _parsed(address, name, known[name], text)
        elif others and others.fullmatch(name):
            options[name] = text
        else:
            features = " or a feature of the camera" if others else ""
            raise _wrong(address, f"expected settings {', '.join(known) or 'none'}{features}; got {name}")
    return options


def _parsed(address: str, name: str, parse: Parse, text: str) -> object:
    try:
        return parse(text)
    except ValueError as exc:
        raise _wrong(address, f"{name}: expected {exc}; got {text!r}") from None


def _waiting(options: dict) -> dict:
    """What CameraProcess takes for WAITING, and how long its opening may last."""
    silence_s = options.get("timeout_s", TIMEOUT_S)
    return {
        "buffer": options.get("buffer"),
        "silence_s": silence_s,
        "open_s": (silence_s or TIMEOUT_S) + START_S,
    }


# Parsers of one setting: they raise ValueError with what they expected.


def _whole(low: int, high: int) -> Parse:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and low <= int(text) <= high):
            raise ValueError(f"a whole number from {low} to {high}")
        return int(text)

    return parse


def _number(low: float, high: float) -> Parse:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise ValueError(f"a number from {low:g} to {high:g}")
        return value

    return parse


def _numbers(form: str, between: str, count: int) -> Parse:
    def parse(text: str) -> tuple[int, ...]:
        words = text.split(between)
        if len(words) != count or not all(word.isascii() and word.isdecimal() for word in words):
            raise ValueError(f"{form} in pixels")
        return tuple(int(word) for word in words)

    return parse


def _one_of(*names: str) -> Parse:
    def parse(text: str) -> str:
        if text not in names:
            raise ValueError(" or ".join(names))
        return text

    return parse


def _flag(text: str) -> bool:
    return _one_of("1", "0")(text) == "1"


def _word(text: str) -> str:
    if not re.fullmatch(r"\w+", text):
        raise ValueError("off, Software or an input of the camera such as Line1")
    return text


def _fourcc(text: str) -> str:
    if not re.fullmatch("[A-Z0-9]{4}", text):
        raise ValueError("four capital letters or digits such as YUYV or MJPG")
    return text


WAITING: dict[str, Parse] = {"timeout_s": _number(0, 3600), "buffer": _whole(1, 64)}


def _wrong(source: object, reason: str) -> InputError:
    shown = f"{without_credentials(source)}: " if isinstance(source, str | os.PathLike) else ""
    return InputError(f"source: {shown}{without_credentials(reason)}. A source is one of\n{FORMS}")
