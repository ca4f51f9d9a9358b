"""A production line: cameras in, one verdict a part out, in time, whatever happens around it.

    capture (a thread a camera) -> parts (the contract) -> workers (the detector) -> verdicts -> outputs

`parts.py` decides; here are the threads and the clock. Every thread takes `lock` around `parts`.
"""

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from time import monotonic
from typing import Any
from uuid import uuid4

from .capture import Capture
from .errors import InputError, OutputError
from .frame import Frame
from .outputs import Callback, OutputQueue
from .parts import Part, Parts, View
from .result import Result
from .snapshot import CameraState, Counts, Snapshot
from .sources import open_source
from .verdict import NO_VERDICT, REJECT, Late, Origin, Record, Status, Verdict
from .workers import Workers

TICK_S = 0.25  # idle threads look around this often
MARGIN_S = 0.002  # a safe verdict is given this long before its deadline, to be there in time
STOP_S = 0.4  # for threads, and as long again for outputs
DRAIN_S = 10.0  # for outputs where the sources have ended by themselves
WORKERS = 2  # one prepares a frame and judges a map while the other has the engine
UNFETCHED = 1000  # verdicts of triggered parts that a `for` loop may be behind; ...
UNFETCHED_FRAMES = 2  # ... with policy "every" it holds the cameras back instead


class Line:
    """detector: what inspects, usually a Detector: called with a list of frames and a product
    source:   where frames come from (see `open_source`), or several by name: {"top": ..., "side": ...}
    product:  whose threshold applies; may be changed while the line runs, for the parts that come then
    trigger:  "frame": every frame is a part (also for a camera with a trigger line); "call": `trigger()` announces
              parts; a number: seconds between parts; or an object with `start(trigger)` and `stop()`
    policy:   where every frame is a part: "every" inspects each and holds the camera back when it is behind;
              "latest" drops, and counts, the frame that waits when a newer one comes
    deadline_ms: from the trigger, or the frame's arrival, to the verdict, which then is `on_timeout`: "reject" or
              "no_verdict"; a result that comes later is recorded as late. Needed with triggers
    views:    frames of every source for one triggered part; rule: "any" rejects a part if one of them is
              defective, "all" if every one is
    on_error: an exception of the engine, a callback or an output's code is reported and counted; "stop" also stops
              the line, all open parts with the safe verdict
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
        if deadline_ms is not None and not deadline_ms > 0:
            raise InputError(f"deadline_ms: expected a number above 0, got {deadline_ms!r}")
        each_frame = trigger == "frame"
        seconds = isinstance(trigger, int | float) and trigger > 0
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
        sources = source if isinstance(source, Mapping) else {None: source}
        self.sources = {}
        for given, what in sources.items():
            opened = open_source(what)
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
        self.keeper_idle = True

    @property
    def product(self) -> str | None:
        return self._product

    @product.setter
    def product(self, product: str | None) -> None:
        known = getattr(self.detector, "products", ())
        if product is not None and known and product not in known:
            raise InputError(f"product: expected one of {', '.join(known)}; got {product!r}")
        self._product = product

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

        Raises InputError for a source that can never work, and the error that stopped the line (on_error="stop").
        """
        with self.signals():
            self.start()
            while not self.finished():
                with self.changed:
                    self.changed.wait(TICK_S / 5)  # a signal's handler only sets stop_asked
            self.close()
        if self.error is not None:
            raise self.error
        return self.snapshot().counts

    def __iter__(self) -> Iterator[Verdict]:
        """Each verdict, while the line runs; leaving the loop stops it. With policy "every" it sets the pace."""
        self.fetched = deque()
        try:
            with self.signals():
                self.start()
                while True:
                    with self.lock:
                        while not self.fetched and not self.finished():
                            self.fetchable.wait(TICK_S / 5)
                        if not self.fetched:
                            break
                        verdict = self.fetched.popleft()
                        self.room.notify_all()
                    yield verdict
        finally:
            self.close()
        if self.error is not None:
            raise self.error

    def trigger(self, part_id: str | None = None, product: str | None = None) -> str:
        """Announce a part: exactly one verdict will carry its id, within the deadline. Returns at once.

        part_id: any text; None numbers them. product: None for the line's. -> the part's id.
        Raises InputError if parts are not announced on this line, or it does not run.
        """
        if self.parts.each_frame:
            raise InputError("trigger: every frame is a part on this line; make it with trigger='call'")
        with self.lock:
            if self.state != "running":
                raise InputError(f"trigger: this line is {self.state}; a part now would get no verdict")
            now_s = monotonic()
            part_id = str(part_id) if part_id is not None else str(self.parts.triggers + 1)
            self.parts.trigger(part_id, product or self.product, now_s, self.deadline_of(now_s))
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

    def start(self) -> None:
        if self.threads:
            raise InputError("this line was started before; make a new one")
        workers = Workers(self, self.detector, self.deadline_ms)
        for output in self.outputs:
            output.start()
        self.state, self.started_s = "running", monotonic()
        with self.lock:
            self.tell(
                "line started", "", f"{', '.join(self.sources)}; up to {workers.batch} frames an engine call"
            )
        jobs = [("deadlines", self.keep_deadlines)]
        jobs += [(f"worker {index}", partial(workers.run, keeps_warm=index == 0)) for index in range(WORKERS)]
        jobs += [(f"camera {name}", Capture(self, source).run) for name, source in self.sources.items()]
        if isinstance(self.period, int | float):
            jobs.append(("trigger", self.trigger_periodically))
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
        except Exception as exc:
            self.fail(exc)
        finally:
            with self.lock:
                self.beats.pop(name, None)
                self.changed.notify_all()

    def fail(self, error: Exception) -> None:
        self.error = self.error or error
        self.stop()

    def finished(self) -> bool:
        """Whether there is nothing left to do, or a stop was asked for."""
        ended = all(camera.state == "ended" for camera in self.cameras.values())
        return self.stop_asked or self.stopping or (ended and not self.parts.open_parts)

    def close(self) -> None:
        """Stop: open parts get a safe verdict, outputs what time is left to write. Within a second."""
        asked = self.stop_asked or not self.threads or self.error is not None
        with self.lock:
            if self.stopping:
                return
            self.stopping = True
            for condition in (self.frame_waits, self.room, self.part_opened, self.fetchable, self.changed):
                condition.notify_all()
        if hasattr(self.period, "stop"):
            self.period.stop()
        for source in self.sources.values():
            source.close()
        end = monotonic() + STOP_S
        for thread in self.threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, end - monotonic()))
        with self.lock:
            self.state = "stopped"
            self.parts.close("line stopped")
            self.deliver()
            self.beats.clear()
            self.tell(
                "line stopped", "", "" if self.error is None else f"{type(self.error).__name__}: {self.error}"
            )
        end = monotonic() + (STOP_S if asked else DRAIN_S)
        for output in self.outputs:
            output.close(max(0.0, end - monotonic()))

    @contextmanager
    def signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM stop the line; only a program's main thread can be asked that way."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, lambda *_: self.stop()) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # ---- what capturing threads say (see `capture.py`)

    def take(self, frame: Frame, fault: str, gap: int) -> None:
        """A frame, what makes it unfit, and how many the camera lost before it."""
        source, camera, first = frame.source, self.cameras[frame.source], frame.sequence - gap
        with self.lock:
            if fault != camera.fault:
                camera.fault = fault
                self.tell("camera fault" if fault else "camera well", source, fault)
            lost = [f"{source}-{number}" for number in range(first, frame.sequence)]
            self.parts.lose(source, lost, self.product, frame.captured_s)
            part_id = frame.item or f"{source}-{frame.sequence}"
            self.parts.capture(frame, fault, self.product, self.deadline_of(frame.captured_s), part_id)
            self.deliver()
            self.frame_waits.notify()
            if self.keeper_idle and self.deadline_ms is not None:
                self.part_opened.notify_all()

    def spoil(self, source: str, detail: str) -> None:
        """A file of this source cannot be read: its part gets a verdict all the same."""
        with self.lock:
            part_id = f"{source}-unreadable-{self.parts.lost_frames[source] + 1}"
            self.parts.spoil(source, f"unreadable frame: {detail}", part_id, self.product, monotonic())
            self.tell("frame unreadable", source, detail)
            self.deliver()

    def camera_is(self, source: str, state: str, detail: str = "") -> None:
        """Its state has changed; parts that want a frame from one that is gone are decided."""
        with self.lock:
            camera = self.cameras[source]
            if state == "running":
                camera.reconnects += camera.state == "lost"
                event = "camera back" if camera.state == "lost" else "camera runs"
            else:
                event = f"camera {state}"
                self.parts.lose_camera(source, f"camera {state}: {source}")
                self.deliver()
            if camera.state != state:
                self.tell(event, source, detail)
            camera.state, camera.fault = state, ""
            for condition in (self.changed, self.fetchable):
                condition.notify_all()

    def held_back(self, source: str) -> bool:
        """Whether this source has to wait with its next frame; the lock is held."""
        behind = (
            self.fetched is not None and self.parts.policy == "every" and len(self.fetched) >= UNFETCHED_FRAMES
        )
        return self.parts.full(source) or (self.parts.each_frame and behind)

    def pause(self, seconds: float) -> None:
        """Wait, unless the line stops."""
        end = monotonic() + seconds
        while not self.stopping and monotonic() < end:
            self.beat()
            with self.lock:
                self.changed.wait(min(TICK_S, max(0.0, end - monotonic())))

    # ---- what workers say (see `workers.py`)

    def finish(self, views: list[View], results: Sequence[Result]) -> None:
        """What the detector found on these frames."""
        with self.lock:
            for view, result in zip(views, results, strict=True):
                if not self.parts.finish(view, result):
                    part, now_s = view.part, monotonic()
                    due_s = part.triggered_s if part.deadline_s is None else part.deadline_s
                    self.put(Late(self.origin(), part.part_id, 1e3 * (now_s - due_s), result, view.frame))
            self.deliver()

    def engine_failed(self, view: View, error: Exception) -> None:
        with self.lock:
            self.parts.fail(view, f"engine failed: {error}")
            self.tell("engine failed", "", f"{type(error).__name__}: {error}")
            self.deliver()
        if self.on_error == "stop":
            self.fail(error)

    # ---- the clock

    def keep_deadlines(self) -> None:
        while not self.stopping:
            with self.lock:
                self.beat()
                self.parts.expire(monotonic())
                self.deliver()
                due_s = self.parts.next_deadline_s()
                # Deadlines come in the order of triggers: no new part's is before `due_s`.
                self.keeper_idle = due_s is None
                self.part_opened.wait(TICK_S if due_s is None else min(TICK_S, max(0.0, due_s - monotonic())))

    def trigger_periodically(self) -> None:
        next_s = monotonic()
        while not self.stopping:
            next_s += self.period
            self.pause(next_s - monotonic())
            if not self.stopping:
                self.trigger()

    # ---- what is said; the lock is held

    def deadline_of(self, triggered_s: float) -> float | None:
        if self.deadline_ms is None:
            return None
        return triggered_s + self.deadline_ms / 1e3 - min(MARGIN_S, self.deadline_ms / 1e4)

    def deliver(self) -> None:
        """Give the verdicts that are due, in order."""
        while self.parts.decided:
            verdict = verdict_on(self.parts.decided.popleft(), self.origin(), monotonic())
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
        self.put(Status(self.origin(), event, who, detail))

    def output_event(self, event: str, who: str, detail: str) -> None:
        with self.lock:
            self.tell(event, who, detail)
        if self.on_error == "stop" and event == "output error":
            self.fail(OutputError(f"{who}: {detail}"))

    def beat(self) -> None:
        self.beats[threading.current_thread().name] = monotonic()


def verdict_on(part: Part, origin: Origin, now_s: float) -> Verdict:
    """part: gives up its views; their cycle with it would keep pictures until the garbage collector comes."""
    views, part.views = part.views, []
    results = tuple(view.result for view in views if view.fate == "inspected")
    frames = tuple(view.frame for view in views)
    return Verdict(
        origin=origin,
        part_id=part.part_id,
        decision=part.decision,
        reason=part.reason,
        product=results[0].product if results else part.product or "",
        product_assumed=results[0].product_assumed if results else part.product is None,
        latency_ms=1e3 * (now_s - part.triggered_s),
        age_ms=1e3 * (now_s - min(frame.captured_s for frame in frames)) if frames else None,
        results=results,
        frames=frames,
    )


class Camera:
    """What the line knows of one source."""

    def __init__(self) -> None:
        self.state, self.fault, self.reconnects = "connecting", "", 0


def check_choice(what: str, given: object, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise InputError(f"{what}: expected {' or '.join(map(repr, choices))}; got {given!r}")
