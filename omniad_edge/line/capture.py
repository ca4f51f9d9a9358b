"""One camera's thread: connect, read frame by frame, connect anew with growing pauses when it is lost."""

from time import monotonic
from typing import TYPE_CHECKING

from ..cameras.camera_faults import FaultDetector
from ..credentials import without_credentials
from ..errors import CameraError, InputError
from ..frame import EndOfSource, Frame, Source
from .parts import Part

if TYPE_CHECKING:
    from .line import Line

READ_S = 0.25  # a camera that gives nothing is asked again after this long, and a stop is noticed
UNFETCHED_FRAMES = 2  # that the loop over the verdicts may be behind, before policy "every" holds the camera back
BACK_OFF_S = (0.25, 5.0)  # between attempts to reach a lost camera: doubled from the first to the second


class Camera:
    """What a line knows of one source. state and fault as in `snapshot.CameraState`."""

    def __init__(self) -> None:
        self.state, self.fault, self.reconnects = "connecting", "", 0


class Capture:
    """Gives a line the frames of one source, until it ends or the line stops.

    Raises InputError from `run` for a source that can never work. A file that breaks off ends alone: the error is
    the line's once the other sources have ended and all that was read has its verdict.
    """

    def __init__(self, line: "Line", source: Source) -> None:
        self.line, self.source = line, source
        # Frames that would come unasked are read all the time, so that none is old; others when a part wants one.
        self.pause_s = BACK_OFF_S[0]
        self.on_demand = not line.parts.each_frame and (source.software_trigger or not source.live)
        self.asked_s: float | None = None  # when the software trigger was sent whose frame is still to come

    def run(self) -> None:
        line, source = self.line, self.source
        while not line.stopping:
            try:
                line.rest()  # opening may take long, and the other cameras go on
                source.open()
                self.state_is("running")
                self.read_all()
            except EndOfSource:
                self.state_is("ended")
                return
            except CameraError as exc:
                if not line.stopping:
                    self.state_is("lost", str(exc))
                    if not source.live:  # opened anew it would begin again, and break off at the same place
                        line.error = line.error or exc
                        self.state_is("ended")
                        return
                    source.close()  # or a trigger still on its way would reach the camera when it is back
                    line.pause(self.pause_s)
                    self.pause_s = min(2 * self.pause_s, BACK_OFF_S[1])
            finally:
                source.close()

    def read_all(self) -> None:
        line, faults, expected = self.line, FaultDetector(self.source.live), None
        self.asked_s: float | None = None
        while not line.stopping:
            line.beat()
            try:
                frame, part = self.read_on_demand() if self.on_demand else (self.read(), None)
            except InputError as exc:  # one broken file; the next read goes on behind it
                self.spoil(str(exc))
                self.asked_s = None
                expected = None if expected is None else expected + 1  # its gap has been told
                continue
            if frame is not None:
                gap = 0 if expected is None or not self.source.live else max(0, frame.sequence - expected)
                line.take(frame, faults.check(frame), gap, part)
                expected = frame.sequence + 1
                self.pause_s = BACK_OFF_S[0]

    def read(self) -> Frame | None:
        line = self.line
        with line.lock:
            while self.held_back() and not line.stopping:
                line.room.wait(READ_S)
                line.beat()
        return None if line.stopping else self.source.read(READ_S)

    def read_on_demand(self) -> tuple[Frame | None, Part | None]:
        """Wait for a part that wants a frame. -> the frame for it; or one that came unasked, for nobody.

        One trigger at a time, and its frame before the next: so a frame cannot come to the wrong part.
        """
        line, source = self.line, self.source
        with line.lock:
            part = line.parts.wanting(source.name, monotonic())
            if part is None:
                line.part_opened.wait(READ_S)
                return None, None
        if source.software_trigger and self.asked_s is None:
            self.asked_s = monotonic()
            source.trigger()
        while part.open and not part.reason and not line.stopping:
            line.beat()
            if (frame := source.read(READ_S)) is not None:
                if self.asked_s is not None and frame.captured_s < self.asked_s:
                    return frame, None  # as cameras give some when they start
                self.asked_s = None
                return frame, part
        if line.stopping or not source.software_trigger:
            return None, None
        raise CameraError(
            f"{source.name}: a trigger gave no frame in time; connecting anew, lest it comes for another part"
        )

    def held_back(self) -> bool:
        """Whether the next frame has to wait; the line's lock is held."""
        parts, unfetched = self.line.parts, self.line.fetched or ()
        every = parts.each_frame and parts.policy == "every"
        # Files and films come as fast as they are asked for; read far ahead they would only grow old.
        ahead = not self.source.live and parts.queued(self.source.name) >= self.line.engine_batch
        return (every and (ahead or len(unfetched) >= UNFETCHED_FRAMES)) or parts.full(self.source.name)

    def spoil(self, detail: str) -> None:
        """A file cannot be read: its part gets a verdict all the same."""
        line, source = self.line, self.source.name
        with line.lock:
            if line.state != "running":
                return
            part_id = f"{source}-unreadable-{line.parts.captured[source] + 1}"
            reason = f"unreadable frame: {without_credentials(detail)}"
            line.parts.spoil(source, reason, part_id, line.product, monotonic())
            line.tell("frame unreadable", source, detail)
            line.deliver()

    def state_is(self, state: str, detail: str = "") -> None:
        """The camera's state; parts that want a frame from one that is gone are decided."""
        line, source = self.line, self.source.name
        with line.lock:
            camera = line.cameras[source]
            event = f"camera {state}"
            if state == "running":
                camera.reconnects += camera.state == "lost"
                event = "camera back" if camera.state == "lost" else "camera runs"
            else:
                line.parts.lose_camera(source, f"camera {state}: {source}")
                line.deliver()
            if camera.state != state:
                line.tell(event, source, detail)
            camera.state, camera.fault = state, ""
            line.changed.notify_all()
            line.fetchable.notify_all()
