"""A production line: cameras in, one verdict a part out, in time, whatever happens around it.

    capture (a thread a camera) -> parts (the contract) -> workers (the detector) -> verdicts -> outputs

`parts.py` decides; here are the threads and the clock. Every thread takes `lock` around `parts`.
"""

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import inf
from os import PathLike
from time import monotonic
from typing import Any
from uuid import uuid4

from ..cameras.sources import open_source
from ..credentials import without_credentials
from ..errors import InputError, OutputError
from ..frame import Frame
from ..outputs.delivery import Callback, OutputQueue
from ..verdict import NO_VERDICT, REJECT, Origin, Record, Status, Verdict
from .capture import Camera, Capture
from .clock import keep_deadlines, stopped_by_signals, trigger_periodically
from .parts import QUEUE_FRAMES, Part, Parts
from .side_by_side import side_by_side
from .snapshot import CameraState, Counts, Snapshot
from .workers import Workers

log = logging.getLogger(__name__)

LOOK_S = 0.05  # a signal's handler only sets stop_asked; this often it is looked at
TICK_S = 0.25  # idle threads look around this often
MARGIN_S = 0.002  # a safe verdict is given this long before its deadline, to be there in time
STOP_S = 0.4  # for threads, and as long again for outputs
DRAIN_S = 10.0  # for outputs where the sources have ended by themselves
WORKERS = 2  # one prepares a frame and judges a map while the other has the engine
UNFETCHED = 100  # verdicts of triggered parts that a `for` loop may be behind; frames are held back before


class Line:
    """Inspects what its cameras see and gives exactly one verdict a part.

    detector: what inspects, usually a Detector: called with a list of frames and a product
    source:   where frames come from (see `open_source`), or several by name: {"top": ..., "side": ...}
    product:  what the parts are, and whose threshold applies; may be changed while the line runs, for the parts
              that come then
    trigger:  "frame": every frame is a part, right for a camera with a trigger line, too; "call": `trigger()`
              announces parts; a number: seconds between parts; or an object with `start(trigger)` and `stop()`,
              such as MqttTrigger. Announced parts take frames of cameras that are triggered by software, or the
              first frame that arrives after the announcement
    policy:   where every frame is a part: "every" inspects each and holds the camera back when it is behind;
              "latest" drops, and counts, the frame that waits when a newer one comes
    deadline_ms: from the trigger, or the frame's arrival, to the verdict, which then is `on_timeout`: "reject" or
              "no_verdict"; a result that comes later is recorded as late. Needed with triggers. A defect that was
              found in time in one of several frames rejects the part all the same (rule "any")
    views:    frames of every source for one triggered part; rule: "any" rejects a part if one of them is
              defective, "all" if every one is
    on_error: an exception of the engine, a callback or an output's code is reported and counted; "stop" also stops
              the line, all open parts with the safe verdict; so does an engine that is lost for good
    Raises InputError for what does not fit together.
    """

    def __init__(
        self,
        detector: Callable,
        source: Any,
        product: str | None = None,
        *,
        trigger: Any = "frame",
        policy: str = "every",
        deadline_ms: float | None = None,
        on_timeout: str = REJECT,
        views: int = 1,
        rule: str = "any",
        on_error: str = "continue",
        name: str = "line",
    ) -> None:
        check_choice("policy", policy, ("every", "latest"))
        check_choice("on_timeout", on_timeout, (REJECT, NO_VERDICT))
        check_choice("rule", rule, ("any", "all"))
        check_choice("on_error", on_error, ("continue", "stop"))
        if isinstance(detector, str | PathLike):
            raise InputError(f"detector: expected a Detector, such as Detector('line3.omniad'); got {detector!r}")
        if deadline_ms is not None and not is_positive(deadline_ms):
            raise InputError(f"deadline_ms: expected a number above 0, got {deadline_ms!r}")
        each_frame = trigger == "frame"
        seconds = is_positive(trigger)
        if not (each_frame or trigger == "call" or seconds or hasattr(trigger, "start")):
            raise InputError(f"trigger: expected 'frame', 'call', seconds or an MqttTrigger; got {trigger!r}")
        if type(views) is not int or views < 1:
            raise InputError(f"views: expected a whole number from 1 on, got {views!r}")
        if not each_frame and deadline_ms is None:
            raise InputError("deadline_ms: needed with a trigger, so that a lost frame cannot leave a part open")
        if each_frame and views != 1:
            raise InputError(f"views: {views} frames make a part only with a trigger, got trigger='frame'")
        self.detector, self.deadline_ms, self.on_error, self.name = detector, deadline_ms, on_error, name
        self.product = product
        self.period = trigger if not isinstance(trigger, str) else None
        if getattr(trigger, "on_event", self) is None:
            trigger.on_event = self.output_event
        sources = source if isinstance(source, Mapping) else {None: source}
        self.sources = {}
        for given, what in sources.items():
            opened = open_source(what)
            if each_frame and policy == "every" and getattr(opened, "buffer", 0) is None:
                opened.buffer = (
                    QUEUE_FRAMES  # so that a short delay costs no frame, where nothing else was asked for
                )
            opened.name = given or opened.name
            self.sources[opened.name] = opened
            if each_frame and opened.software_trigger:
                raise InputError(f"{opened.name}: waits for a software trigger; give the line trigger='call'")
        self.parts = Parts(tuple(self.sources), each_frame, policy, views, rule, on_timeout)
        self.outputs: list[OutputQueue] = []
        self.run_id = uuid4().hex[:12]
        self.records = 0
        self.lock = threading.Lock()
        self.frame_waits, self.room, self.part_opened, self.fetchable, self.changed = (
            threading.Condition(self.lock) for _ in range(5)
        )
        self.cameras = {name: Camera() for name in self.sources}
        self.fetched: deque[Verdict] | None = None
        self.state, self.started_s = "starting", monotonic()
        self.stopping, self.stop_asked, self.error = False, False, None
        self.threads: list[threading.Thread] = []
        self.beats: dict[str, float] = {}
        self.engine_batch = 1
        self.next_due_s = inf  # the deadline that is being waited for

    @property
    def product(self) -> str | None:
        return self._product

    @product.setter
    def product(self, product: str | None) -> None:
        self._product = self.known(product)

    def known(self, product: str | None) -> str | None:
        products = getattr(self.detector, "products", ())
        if product is not None and products and product not in products:
            raise InputError(f"product: expected one of {', '.join(products)}; got {product!r}")
        return product

    # ---- use

    def add(self, *outputs: Any) -> "Line":
        """Outputs, or functions that are called with each verdict, in a thread of their own."""
        if self.threads:
            raise InputError("add: this line is running; add outputs before")
        for output in outputs:
            output = output if hasattr(output, "write") else Callback(output)
            if hasattr(output, "attach"):
                output.attach(self)
            self.outputs.append(OutputQueue(output, self.output_event))
        return self

    def run(self) -> Counts:
        """Inspect until the sources end, `stop` is called, or SIGINT or SIGTERM comes. -> the frames' fates.

        Logs a warning for each output that lost records.
        Raises InputError for a source that can never work, the error that stopped the line (see on_error), and at
        the end CameraError for a film that broke off.
        """
        self.check_new()
        with stopped_by_signals(self):
            try:
                self.start()
                while not self.finished():
                    with self.changed:
                        self.changed.wait(LOOK_S)
            finally:
                self.close()
        if self.error is not None:
            raise self.error
        return self.snapshot().counts

    def __iter__(self) -> Iterator[Verdict]:
        """Each verdict, while the line runs; leaving the loop stops it. With policy "every" it sets the pace."""
        self.check_new()
        self.fetched = deque()
        with stopped_by_signals(self):
            try:
                self.start()
                while (verdict := self.fetch()) is not None:
                    yield verdict
                self.close()
                yield from self.fetched  # what the stop decided
            finally:
                self.close()
        if self.error is not None:
            raise self.error

    def fetch(self) -> Verdict | None:
        """The next verdict for the loop; None when the line has come to its end."""
        with self.lock:
            while not self.stop_asked and not self.fetched:
                if self.finished():
                    return None
                self.fetchable.wait(LOOK_S)
            if self.stop_asked:
                return None
            self.room.notify_all()
            return self.fetched.popleft()

    def trigger(self, part_id: str | None = None, product: str | None = None) -> str:
        """Announce a part: exactly one verdict will carry its id, within the deadline. Returns at once.

        part_id: any text; None numbers them. product: None for the line's. -> the part's id.
        Raises InputError if parts are not announced on this line, it does not run, or has no such product.
        """
        if self.parts.each_frame:
            raise InputError("trigger: every frame is a part on this line; make it with trigger='call'")
        product = self.known(product) or self.product
        with self.lock:
            if self.state != "running":
                raise InputError(f"trigger: this line is {self.state}; a part now would get no verdict")
            now_s = monotonic()
            part_id = str(part_id) if part_id is not None else str(self.parts.triggers + 1)
            self.parts.trigger(part_id, product, now_s, self.deadline_of(now_s))
            for name, camera in self.cameras.items():
                if camera.state != "running":
                    self.parts.lose_camera(name, f"camera {camera.state}: {name}")
            self.deliver()
            self.part_opened.notify_all()
        return part_id

    def stop(self) -> None:
        """Ask the line to stop, from any thread or callback; `run` returns within a second."""
        self.stop_asked = True

    def snapshot(self) -> Snapshot:
        with self.lock:
            cameras = tuple(
                CameraState(
                    name, c.state, c.fault, c.reconnects, self.parts.lost_frames[name], self.parts.counts(name)
                )
                for name, c in self.cameras.items()
            )
            return Snapshot(
                line=self.name,
                product=self.product,
                uptime_s=monotonic() - self.started_s,
                state=self.state,
                counts=sum((camera.counts for camera in cameras), Counts()),
                triggers=self.parts.triggers,
                decisions=dict(self.parts.decisions),
                open_parts=self.parts.open_parts,
                cameras=cameras,
                outputs=tuple(output.status() for output in self.outputs),
                last_progress_s=min(self.beats.values(), default=monotonic()),
            )

    # ---- start and end

    def check_new(self) -> None:
        if self.state != "starting" or self.threads:
            raise InputError("this line was started before; make a new one")

    def start(self) -> None:
        workers = Workers(self, self.detector, self.deadline_ms)
        # The engine may hang from the start.
        raised = side_by_side([workers.measure], inf, lambda: self.stop_asked)
        if raised:
            raise raised[0]
        self.engine_batch = workers.batch
        for output in self.outputs:
            output.start()
        self.state, self.started_s = "running", monotonic()
        with self.lock:
            self.tell("line started", "", f"{', '.join(self.sources)}; engine calls of up to {workers.batch}")
        jobs = [("deadlines", partial(keep_deadlines, self))]
        jobs += [(f"worker {index}", partial(workers.run, keeps_warm=index == 0)) for index in range(WORKERS)]
        jobs += [(f"camera {name}", Capture(self, source).run) for name, source in self.sources.items()]
        if isinstance(self.period, int | float):
            jobs.append(("trigger", partial(trigger_periodically, self, self.period)))
        for name, job in jobs:
            self.threads.append(threading.Thread(target=self.guarded, args=(name, job), name=name, daemon=True))
        for thread in self.threads:
            thread.start()
        if hasattr(self.period, "start"):
            self.period.start(self.trigger)

    def guarded(self, name: str, job: Callable[[], None]) -> None:
        """A thread's whole life: an error of ours stops the line in the safe state, never only the thread."""
        try:
            job()
        except BaseException as exc:
            self.fail(exc)
        finally:
            with self.lock:
                self.beats.pop(name, None)
                self.changed.notify_all()

    def fail(self, error: BaseException) -> None:
        self.error = self.error or error
        self.stop()

    def finished(self) -> bool:
        """Whether there is nothing left to do, or a stop was asked for."""
        ended = all(camera.state == "ended" for camera in self.cameras.values())
        return self.stop_asked or self.stopping or (ended and not self.parts.open_parts)

    def close(self) -> None:
        """Stop: open parts get a safe verdict, outputs what time is left to write. Within a second.

        Where the sources have ended by themselves the outputs have DRAIN_S, unless a stop is asked for meanwhile.
        """
        with self.lock:
            if self.stopping:
                return
            self.stopping = True
            for condition in (self.frame_waits, self.room, self.part_opened, self.fetchable, self.changed):
                condition.notify_all()
        ends = [self.period.stop] if hasattr(self.period, "stop") else []
        ends += [source.close for source in self.sources.values()]
        ends += [thread.join for thread in self.threads if thread is not threading.current_thread()]
        raised = side_by_side(ends, STOP_S)
        with self.lock:
            self.state = "stopped"
            self.parts.close("line stopped")
            self.deliver()
            self.beats.clear()
            for error in raised:
                self.tell("close failed", "", repr(error))
            self.tell("line stopped", "", repr(self.error) if self.error else "")
        time_s = STOP_S if self.stop_asked else DRAIN_S
        side_by_side(
            [partial(output.close, time_s) for output in self.outputs],
            time_s + STOP_S / 4,
            lambda: time_s == DRAIN_S and self.stop_asked,
        )
        for output in self.snapshot().outputs:
            if output.lost:
                counts = f"{output.written} written, {output.failed} failed, {output.dropped} dropped"
                log.warning("%s lost records: %s; look at its disk, server or code", output.name, counts)

    # ---- for the threads of `capture.py`, `workers.py` and `clock.py`

    def take(self, frame: Frame, fault: str, gap: int, part: Part | None = None) -> None:
        """A frame, what makes it unfit, how many the camera lost before it, and the part it was asked for."""
        source, camera = frame.source, self.cameras[frame.source]
        due_s = self.deadline_of(frame.captured_s)
        with self.lock:
            if self.state != "running":
                return
            if fault != camera.fault:
                camera.fault = fault
                self.tell("camera fault" if fault else "camera well", source, fault)
            self.parts.lose(source, range(frame.sequence - gap, frame.sequence), self.product, frame.captured_s)
            part_id = frame.item or f"{source}-{frame.sequence}"
            self.parts.capture(frame, fault, self.product, due_s, part_id, part)
            self.deliver()
            self.frame_waits.notify()
            if due_s is not None and due_s < self.next_due_s:
                self.part_opened.notify_all()

    def pause(self, seconds: float) -> None:
        """Wait, unless the line stops."""
        end = monotonic() + seconds
        while not self.stopping and monotonic() < end:
            self.beat()
            with self.lock:
                self.changed.wait(min(TICK_S, max(0.0, end - monotonic())))

    def beat(self) -> None:
        """This thread is alive and not in a call that may take long."""
        self.beats[threading.current_thread().name] = monotonic()

    def rest(self) -> None:
        """This thread may be silent for a while."""
        self.beats.pop(threading.current_thread().name, None)

    # ---- what is said; the lock is held

    def deadline_of(self, triggered_s: float) -> float | None:
        if self.deadline_ms is None:
            return None
        return triggered_s + self.deadline_ms / 1e3 - min(MARGIN_S, self.deadline_ms / 1e4)

    def deliver(self) -> None:
        """Give the verdicts that are due, in order."""
        while self.parts.decided:
            verdict = self.parts.decided.popleft().verdict(self.origin(), monotonic())
            self.put(verdict)
            if self.fetched is not None:
                self.fetched.append(verdict)
                if len(self.fetched) > UNFETCHED:
                    lost = self.fetched.popleft()
                    self.tell("verdict not fetched", "", f"part {lost.part_id}: the loop is too slow")
                self.fetchable.notify_all()

    def origin(self) -> Origin:
        self.records += 1
        return Origin(self.name, self.run_id, self.records)

    def put(self, record: Record) -> None:
        for output in self.outputs:
            output.put(record)

    def tell(self, event: str, who: str, detail: str) -> None:
        self.put(Status(self.origin(), event, who, without_credentials(detail)))

    def output_event(self, event: str, who: str, detail: str) -> None:
        with self.lock:
            if self.state != "stopped":  # the outputs close: each would only count it as one that it dropped
                self.tell(event, who, detail)
        if self.on_error == "stop" and event == "output error":
            self.fail(OutputError(f"{who}: {detail}"))


def check_choice(what: str, given: object, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise InputError(f"{what}: expected {' or '.join(map(repr, choices))}; got {given!r}")


def is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
