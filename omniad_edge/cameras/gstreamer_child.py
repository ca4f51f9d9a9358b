"""A GStreamer pipeline, in a process of its own (see camera_child.py)."""

import time

INSTALL = (
    "sudo apt install python3-gi gir1.2-gstreamer-1.0 gir1.2-gst-plugins-base-1.0 gstreamer1.0-plugins-base "
    "gstreamer1.0-plugins-good gstreamer1.0-plugins-bad gstreamer1.0-libav"
)

NAMES = {  # GStreamer's name: (name in pixel_format.py, for each plane bytes per row / width, height / rows)
    "BGR": ("BGR8", [(3, 1)]),
    "BGRx": ("BGRa8", [(4, 1)]),
    "RGB": ("RGB8", [(3, 1)]),
    "GRAY8": ("Mono8", [(1, 1)]),
    "GRAY16_LE": ("Mono16", [(2, 1)]),
    "NV12": ("NV12", [(1, 1), (1, 2)]),
    "I420": ("I420", [(1, 1), (0.5, 2), (0.5, 2)]),
}

# YUV only of the kind that pixel_format.py takes it for; videoconvert makes BGR of any other.
ACCEPTED = (
    "video/x-raw, format=(string){ BGR, BGRx, RGB, GRAY8, GRAY16_LE }; "
    "video/x-raw, format=(string){ NV12, I420 }, colorimetry=(string)bt601, "
    "width=(int)[ 2, 32768, 2 ], height=(int)[ 2, 32768, 2 ]"
)

POLL_NS = 50_000_000


def run(channel, pipeline: str, timeout_s: float) -> None:
    """pipeline: elements up to the camera's picture, without a sink; timeout_s: for it to start."""
    try:
        import gi

        for name in ("Gst", "GstApp", "GstVideo"):
            gi.require_version(name, "1.0")
        from gi.repository import GLib, Gst, GstApp, GstVideo  # noqa: F401 (GstApp gives appsink its methods)
    except (ImportError, ValueError) as exc:
        raise channel.failure("missing", f"GStreamer's Python interface ({exc})", INSTALL) from exc
    Gst.init(None)
    text = f"{pipeline} ! videoconvert ! appsink name=omniad_sink sync=false max-buffers=4 drop=true"
    try:
        running = Gst.parse_launch_full(text, None, Gst.ParseFlags.FATAL_ERRORS)
    except GLib.Error as exc:
        kind, advice = "input", "check it with gst-launch-1.0"
        if exc.matches(Gst.ParseError.quark(), Gst.ParseError.NO_SUCH_ELEMENT):
            kind, advice = "camera", f"is its plug-in installed? {INSTALL}"
        raise channel.failure(kind, f"the pipeline cannot be built: {exc.message}; {advice}") from exc
    sink = running.get_by_name("omniad_sink")
    sink.set_property("caps", Gst.Caps.from_string(ACCEPTED))
    try:
        start(channel, Gst, running, timeout_s)
        channel.opened()
        send_frames(channel, Gst, GstVideo, running.get_bus(), sink)
    finally:
        running.set_state(Gst.State.NULL)


def start(channel, Gst, running, timeout_s: float) -> None:
    running.set_state(Gst.State.PLAYING)
    deadline = time.monotonic() + timeout_s
    while running.get_state(POLL_NS)[0] == Gst.StateChangeReturn.ASYNC:
        check_bus(channel, Gst, running.get_bus())
        if time.monotonic() > deadline:
            raise channel.failure("camera", f"the pipeline gave no picture within {timeout_s:g} s")
    check_bus(channel, Gst, running.get_bus())


def check_bus(channel, Gst, bus) -> None:
    """The end is told only after the last frame was taken from the sink."""
    message = bus.pop_filtered(Gst.MessageType.ERROR | Gst.MessageType.EOS)
    if message is None:
        return
    if message.type == Gst.MessageType.EOS:
        raise channel.failure("camera", "the pipeline came to its end")
    error, details = message.parse_error()
    raise channel.failure("camera", f"{message.src.get_name()}: {error.message} ({details})")


def send_frames(channel, Gst, GstVideo, bus, sink) -> None:
    sequence = -1
    while not channel.stopping.is_set():
        sample = sink.try_pull_sample(POLL_NS)
        captured_s = time.monotonic()
        if sample is None:
            check_bus(channel, Gst, bus)
            continue
        buffer = sample.get_buffer()
        # Where the camera's driver numbers its frames, GStreamer hands the number on as the offset.
        numbered = buffer.offset != Gst.BUFFER_OFFSET_NONE and buffer.offset > sequence
        sequence = buffer.offset if numbered else sequence + 1
        info = GstVideo.VideoInfo.new_from_caps(sample.get_caps())
        pixel_format, pixels = without_padding(GstVideo, buffer, info)
        channel.frame(pixels, sequence, captured_s, info.width, info.height, pixel_format)


def without_padding(GstVideo, buffer, info) -> tuple[str, bytes]:
    """GStreamer fills rows up to multiples of four bytes, and drivers as they like."""
    pixel_format, planes = NAMES[info.finfo.name]
    layout = GstVideo.buffer_get_video_meta(buffer) or info
    data = buffer.extract_dup(0, buffer.get_size())
    rows, packed = [], True
    end = 0
    for plane, (bytes_per_pixel, row_height) in enumerate(planes):
        size, stride, offset = int(info.width * bytes_per_pixel), layout.stride[plane], layout.offset[plane]
        count = info.height // row_height
        packed = packed and stride == size and offset == end
        end = offset + count * stride
        rows.append((offset, stride, size, count))
    if packed:
        return pixel_format, data
    view = memoryview(data)
    return pixel_format, b"".join(
        view[offset + row * stride : offset + row * stride + size]
        for offset, stride, size, count in rows
        for row in range(count)
    )
