"""USB cameras and network streams through OpenCV, in a process of their own (see camera_child.py).

Of their own, because OpenCV takes the transport of a stream from the environment, cannot be interrupted while it
reads, and takes its process down with it if a decoder crashes.
"""

import os
import sys
import time


def run(
    channel, device: int | str, transport: str, wanted: dict[str, int], timeout_s: float, fourcc: str = ""
) -> None:
    """device: camera number, its path, or the address of a stream; transport: of a stream, "tcp" or "udp".

    wanted: width, height (pixels) and fps of a USB camera; fourcc: its coding, "" leaves it to the driver
    """
    if transport:
        # Both flags against lag: no frames held back by the demuxer, none by the decoder's threads.
        options = f"rtsp_transport;{transport}|fflags;nobuffer|flags;low_delay"
        os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = options
        os.environ["OPENCV_LOG_LEVEL"] = "ERROR"  # FFmpeg's own lines say why; OpenCV's warning hides them
    import cv2

    if transport:
        capture = open_stream(cv2, device, timeout_s)
    else:
        capture = open_webcam(cv2, channel, device, wanted, fourcc)
    if not capture.isOpened():
        raise channel.failure("camera", "cannot be opened")
    channel.opened()
    sequence = 0
    while not channel.stopping.is_set():
        if not capture.grab():
            raise channel.failure("camera", "lost: it ended, or no frame came in time")
        captured_s = time.monotonic()
        decoded, image = capture.retrieve()
        if decoded:
            height, width = image.shape[:2]
            pixel_format = "BGR8" if image.ndim == 3 else "Mono8"
            channel.frame(image.data, sequence, captured_s, width, height, pixel_format)
        sequence += 1  # a frame that cannot be decoded leaves a gap
    capture.release()


def open_stream(cv2, address: str, timeout_s: float):
    timeout_ms = round(1000 * timeout_s)
    limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, timeout_ms, cv2.CAP_PROP_READ_TIMEOUT_MSEC, timeout_ms]
    # One thread: with more, each holds a frame back.
    return cv2.VideoCapture(address, cv2.CAP_FFMPEG, [*limits, cv2.CAP_PROP_N_THREADS, 1])


def open_webcam(cv2, channel, device: int | str, wanted: dict[str, int], fourcc: str):
    capture = cv2.VideoCapture(device, cv2.CAP_V4L2 if sys.platform == "linux" else cv2.CAP_ANY)
    if not capture.isOpened():
        return capture
    names = {
        "width": cv2.CAP_PROP_FRAME_WIDTH,
        "height": cv2.CAP_PROP_FRAME_HEIGHT,
        "fps": cv2.CAP_PROP_FPS,
    }
    if fourcc:
        capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter_fourcc(*fourcc))
    for name, value in wanted.items():
        capture.set(names[name], value)
    came = {name: round(capture.get(names[name])) for name in wanted}
    if came != wanted:
        raise channel.failure(
            "input",
            f"expected {wanted}; the camera gives {came}; `v4l2-ctl --list-formats-ext` lists what it can; "
            "many give large frames only as JPEG: &fourcc=MJPG",
        )
    return capture
