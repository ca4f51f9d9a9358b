"""GigE Vision and USB3 Vision cameras through Aravis, in a process of its own (see camera_child.py)."""

import contextlib
import difflib
import math
import threading
import time

INSTALL = "sudo apt install gir1.2-aravis-0.8 python3-gi"
INTERFACES = ("Fake", "USB3Vision", "GigEVision")
BUFFERS = 8
POLL_US = 50_000
STATE_PERIOD_S = 1.0  # exposure and temperature are asked for no oftener: each costs a round trip to the camera
LAST_16_BIT_ID = 65535


def run(
    channel, interface: str, camera_id: str, trigger: str, exposure_us: float | None, features: dict[str, str]
) -> None:
    """interface: "GigEVision" or "USB3Vision"; camera_id: as Aravis names cameras, "" for the only one.

    trigger: "off", "Software" or an input such as "Line1"; features: name -> value, set in this order.
    """
    try:
        import gi

        gi.require_version("Aravis", "0.8")
        from gi.repository import Aravis, GLib
    except (ImportError, ValueError) as exc:
        raise channel.failure("missing", f"Aravis' Python interface ({exc})", INSTALL) from exc
    for name in INTERFACES:
        (Aravis.enable_interface if name == interface else Aravis.disable_interface)(name)
    camera = connect(channel, Aravis, GLib, camera_id)
    if interface == "GigEVision" and not camera.get_device().is_controller():
        raise channel.failure("camera", "another program controls it, or did until it was killed some seconds ago")
    try:
        configure(channel, Aravis, camera, trigger, exposure_us, features)
    except GLib.Error as exc:
        raise channel.failure("camera", f"cannot be set up: {exc.message}") from exc
    lost = threading.Event()
    camera.get_device().connect("control-lost", lambda device: lost.set())
    stream = create_stream(channel, Aravis, camera)
    talking = threading.Lock()

    def send_trigger() -> None:
        with talking:
            camera.software_trigger()

    camera.start_acquisition()
    channel.on_trigger = send_trigger
    channel.opened()
    send_frames(channel, Aravis, stream, lost, CameraState(camera, talking))
    camera.stop_acquisition()
    if interface == "GigEVision":
        camera.get_device().leave_control()  # else the camera refuses others for the seconds of its heartbeat


def connect(channel, Aravis, GLib, camera_id: str):
    Aravis.update_device_list()
    found = [Aravis.get_device_id(index) for index in range(Aravis.get_n_devices())]
    if not camera_id:
        if len(found) > 1:
            raise channel.failure("input", f"expected the name of one camera; there are {', '.join(found)}")
        if not found:
            raise channel.failure(
                "camera", "there is no camera; check its cable, its power and its network address"
            )
        camera_id = found[0]
    try:
        return Aravis.Camera.new(camera_id)
    except GLib.Error as exc:
        raise channel.failure(
            "camera", f"cannot be opened: {exc.message}; the cameras there: {', '.join(found) or 'none'}"
        ) from exc


def create_stream(channel, Aravis, camera):
    stream = camera.create_stream(None, None)
    if stream is None:
        raise channel.failure("camera", "gives no stream; is another program using it?")
    payload = camera.get_payload()
    for _ in range(BUFFERS):
        stream.push_buffer(Aravis.Buffer.new_allocate(payload))
    return stream


def configure(channel, Aravis, camera, trigger: str, exposure_us: float | None, features: dict[str, str]) -> None:
    device = camera.get_device()
    # A camera whose program was killed still sends, to where nobody listens, and takes no new size.
    with contextlib.suppress(gi_error()):
        camera.stop_acquisition()
    device.set_range_check_policy(Aravis.RangeCheckPolicy.ENABLE)
    camera.set_acquisition_mode(Aravis.AcquisitionMode.CONTINUOUS)
    camera.clear_triggers()
    for name, value in features.items():
        set_feature(channel, Aravis, device, name, value)
    try:
        if exposure_us is not None:
            if camera.is_exposure_auto_available():
                camera.set_exposure_time_auto(Aravis.Auto.OFF)
            camera.set_exposure_time(exposure_us)
        if trigger != "off":
            camera.set_trigger(trigger)
    except gi_error() as exc:
        inputs = ", ".join(camera.dup_available_trigger_sources())
        raise channel.failure("input", f"{exc.message}; this camera can be triggered by {inputs}") from exc


def set_feature(channel, Aravis, device, name: str, value: str) -> None:
    node = device.get_feature(name)
    if node is None:
        names = all_features(Aravis, device, "Root")
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names[:10]
        raise channel.failure("input", f"this camera has no feature {name}; it has for example {', '.join(near)}")
    kinds = [
        (Aravis.GcBoolean, device.set_boolean_feature_value, to_bool),
        (Aravis.GcEnumeration, device.set_string_feature_value, str),
        (Aravis.GcInteger, device.set_integer_feature_value, lambda text: int(text, 0)),
        (Aravis.GcFloat, device.set_float_feature_value, float),
        (Aravis.GcString, device.set_string_feature_value, str),
    ]
    if isinstance(node, Aravis.GcCommand):
        device.execute_command(name)
        return
    try:
        set_value, convert = next((put, convert) for kind, put, convert in kinds if isinstance(node, kind))
        set_value(name, convert(value))
    except (ValueError, OverflowError, StopIteration, gi_error()) as exc:
        choices = ""
        if isinstance(node, Aravis.GcEnumeration):
            choices = (
                f"; expected one of {', '.join(device.dup_available_enumeration_feature_values_as_strings(name))}"
            )
        raise channel.failure(
            "input", f"{name}={value} is not possible: {getattr(exc, 'message', exc)}{choices}"
        ) from exc


def gi_error() -> type[Exception]:
    from gi.repository import GLib

    return GLib.Error


def to_bool(text: str) -> bool:
    values = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}
    if text.lower() not in values:
        raise ValueError(f"expected true or false; got {text}")
    return values[text.lower()]


def all_features(Aravis, device, name: str) -> list[str]:
    node = device.get_feature(name)
    if not isinstance(node, Aravis.GcCategory):
        return [name]
    return [feature for child in node.get_features() for feature in all_features(Aravis, device, child)]


class CameraState:
    """Exposure (microseconds) and temperature (degrees C) of a camera, NaN where it does not tell them."""

    def __init__(self, camera, talking: threading.Lock) -> None:
        self.talking, self.device = talking, camera.get_device()
        self.ask = {"exposure_us": camera.get_exposure_time}
        if self.device.get_feature("DeviceTemperature"):
            self.ask["temperature_c"] = lambda: self.device.get_float_feature_value("DeviceTemperature")
        self.values, self.asked_s = {}, -math.inf

    def get(self) -> dict[str, float]:
        now = time.monotonic()
        # Not while a trigger is being sent: the camera answers one question at a time.
        if now - self.asked_s > STATE_PERIOD_S and self.talking.acquire(blocking=False):
            self.asked_s = now
            try:
                for name in list(self.ask):
                    try:
                        self.values[name] = self.ask[name]()
                    except gi_error():
                        self.values.pop(name, None)
                        del self.ask[name]
            finally:
                self.talking.release()
        return self.values


def send_frames(channel, Aravis, stream, lost: threading.Event, state: CameraState) -> None:
    sequence = None
    while not channel.stopping.is_set():
        buffer = stream.timeout_pop_buffer(POLL_US)
        captured_s = time.monotonic()
        if buffer is not None:
            # A frame with missing packets is lost: its number is passed over.
            if buffer.get_status() == Aravis.BufferStatus.SUCCESS:
                sequence = unwrap(buffer.get_frame_id(), sequence)
                pixels = without_padding(buffer)
                size = buffer.get_image_width(), buffer.get_image_height()
                code = f"0x{buffer.get_image_pixel_format():08X}"
                channel.frame(pixels, sequence, captured_s, *size, code, **state.get())
            stream.push_buffer(buffer)
        elif lost.is_set():
            raise channel.failure("camera", "lost: it no longer answers; check its cable and its power")


def unwrap(frame_id: int, last: int | None) -> int:
    """The camera's frame number, going on where a 16-bit one starts again (after 65535 comes 1)."""
    if last is None or frame_id > last:
        return frame_id
    if frame_id <= LAST_16_BIT_ID:
        step = (frame_id - last) % LAST_16_BIT_ID
        if 0 < step <= LAST_16_BIT_ID // 2:
            return last + step
    return last + 1  # the camera began to count anew


def without_padding(buffer) -> bytes | memoryview:
    """The image's rows alone; GenICam's code has the bits of a pixel in its third byte."""
    width, height = buffer.get_image_width(), buffer.get_image_height()
    row = width * (buffer.get_image_pixel_format() >> 16 & 0xFF) // 8
    # Aravis before 0.8.23 does not tell the padding.
    padding = buffer.get_image_padding()[0] if hasattr(buffer, "get_image_padding") else 0
    data = memoryview(buffer.get_data())
    if not padding:
        return data
    return b"".join(data[start : start + row] for start in range(0, height * (row + padding), row + padding))
