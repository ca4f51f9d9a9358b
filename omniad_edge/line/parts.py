"""The contract of a line, without threads or clocks: one trigger, one verdict, every frame accounted for.

Frames and times go in; decided parts come out of `decided`, in the order of their triggers. Whoever calls holds
one lock around all of it.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..frame import Frame
from ..result import Result
from ..verdict import ACCEPT, NO_VERDICT, REJECT, Origin, Verdict, combine
from .snapshot import Counts

MAX_OPEN_PARTS = 1000  # with triggers that nobody answers; each further one is decided at once
QUEUE_FRAMES = 8  # of one camera, taken but not inspected; then, with `every`, it is held back
OPEN_FRAMES = 32  # of one camera, without a verdict: more only pile up behind one that the engine hangs on


@dataclass(eq=False)
class Part:
    """needed: frames still wanted, by source; reason: why it is not simply the network's decision."""

    part_id: str
    product: str | None
    triggered_s: float
    deadline_s: float | None
    needed: dict[str, int]
    views: list["View"] = field(default_factory=list)
    reason: str = ""
    open: bool = True
    decision: str = ""

    @property
    def complete(self) -> bool:
        seen = not any(self.needed.values()) and all(view.result is not None for view in self.views)
        return bool(self.reason) or seen

    def verdict(self, origin: Origin, now_s: float) -> Verdict:
        """Once: the views go with it, as their cycle with the part would keep pictures in memory."""
        views, self.views = self.views, []
        results = tuple(view.result for view in views if view.fate == "inspected")
        frames = tuple(view.frame for view in views)
        return Verdict(
            origin=origin,
            part_id=self.part_id,
            decision=self.decision,
            reason=self.reason,
            product=results[0].product if results else self.product or "",
            product_assumed=results[0].product_assumed if results else self.product is None,
            latency_ms=1e3 * (now_s - self.triggered_s),
            age_ms=1e3 * (now_s - min(frame.captured_s for frame in frames)) if frames else None,
            results=results,
            frames=frames,
        )


@dataclass(eq=False)
class View:
    """A frame taken for a part. fate: "waiting", "inspected", "dropped", "late" or "failed"."""

    part: Part
    frame: Frame
    fate: str = "waiting"
    result: Result | None = None


class Parts:
    """sources:     names of the cameras
    each_frame: every frame is a part of its own; else parts are triggered and need `views` frames of every source
    policy:     "every": whoever captures waits while `full(source)`; "latest": a newer frame replaces one that
                waits, which is dropped and gets no verdict. Of triggered parts no frame is ever replaced.
    safe:       decision of a part that the network did not decide, "reject" or "no_verdict"; with rule "any" it is
                "reject" all the same if a defect was found in one of its frames
    """

    def __init__(
        self,
        sources: Sequence[str],
        each_frame: bool = True,
        policy: str = "every",
        views: int = 1,
        rule: str = "any",
        safe: str = REJECT,
    ) -> None:
        self.sources, self.each_frame, self.policy = tuple(sources), each_frame, policy
        self.views, self.rule, self.safe = views, rule, safe
        self.fates = {source: Counter() for source in sources}
        self.captured = Counter()
        self.lost_frames = Counter()
        self.triggers = 0
        self.decisions = dict.fromkeys((ACCEPT, REJECT, NO_VERDICT), 0)
        lanes = sources if each_frame else ("",)
        self.lanes: dict[str, deque[Part]] = {lane: deque() for lane in lanes}
        self.waiting: deque[View] = deque()
        self.decided: deque[Part] = deque()

    # ---- what happens

    def trigger(self, part_id: str, product: str | None, now_s: float, deadline_s: float | None) -> Part:
        """Announce a part; of it `views` frames of every source are wanted."""
        part = Part(part_id, product, now_s, deadline_s, dict.fromkeys(self.sources, self.views))
        self.announce("", part)
        return part

    def capture(
        self,
        frame: Frame,
        fault: str,
        product: str | None,
        deadline_s: float | None,
        part_id: str = "",
        part: Part | None = None,
    ) -> None:
        """A frame has arrived.

        fault: what makes it unfit to be inspected, in words, else empty
        part:  the one it was taken for, and no other; None where frames come by themselves
        """
        source = frame.source
        self.captured[source] += 1
        if part is not None:
            part = part if part.needed[source] and not part.reason else None
        elif self.each_frame:
            if self.policy == "latest":
                self.replace_waiting(source)
            if self.policy == "every" or len(self.lanes[source]) < OPEN_FRAMES:
                part = Part(part_id, product, frame.captured_s, deadline_s, {source: 1})
                self.announce(source, part)
        else:
            part = self.wanting(source, frame.captured_s)
        if part is None or not part.open:
            self.fates[source]["dropped"] += 1
            return
        view = View(part, frame)
        part.views.append(view)
        part.needed[source] -= 1
        self.fates[source]["waiting"] += 1
        if fault:
            self.fail(view, f"camera fault: {fault}")
        elif self.queued(source) >= QUEUE_FRAMES and not self.each_frame:
            self.fail(view, f"overload: {QUEUE_FRAMES} frames wait to be inspected")
        else:
            self.waiting.append(view)

    def lose(self, source: str, numbers: range, product: str | None, now_s: float) -> None:
        """The camera's numbering shows that frames never arrived; where every frame is a part, each was one.

        Of a jump too large to be true, such as a counter that was set anew, the last MAX_OPEN_PARTS get a verdict.
        """
        self.lost_frames[source] += len(numbers)
        if self.each_frame and self.policy == "every":
            for number in numbers[-MAX_OPEN_PARTS:]:
                part_id, reason = f"{source}-{number}", "frame lost by the camera or on its way here"
                self.announce(source, Part(part_id, product, now_s, None, {source: 1}, reason=reason))

    def spoil(self, source: str, reason: str, part_id: str, product: str | None, now_s: float) -> None:
        """Something came that cannot be read as a frame: its part is decided."""
        self.captured[source] += 1
        self.fates[source]["failed"] += 1
        if self.each_frame:
            self.announce(source, Part(part_id, product, now_s, None, {source: 1}, reason=reason))
        elif part := self.wanting(source, now_s):
            self.settle(part, reason)

    def lose_camera(self, source: str, reason: str) -> None:
        """Parts that still want its frames are decided."""
        for part in [p for lane in self.lanes.values() for p in lane if p.needed.get(source)]:
            self.settle(part, reason)

    def finish(self, view: View, result: Result) -> bool:
        """-> False if its part's verdict was given before."""
        if view.fate != "waiting":
            return False
        view.result = result
        if view.part.complete:
            self.flush()
        return True

    def fail(self, view: View, reason: str) -> None:
        """This frame cannot be inspected."""
        if view.fate == "waiting":
            self.move(view, "failed")
            self.settle(view.part, reason)

    def expire(self, now_s: float) -> None:
        """Decide the parts whose deadline has come."""
        for lane in self.lanes.values():
            for part in [p for p in lane if p.deadline_s is not None and p.deadline_s <= now_s]:
                missing = [source for source, n in part.needed.items() if n]
                what = f"no frame from {', '.join(missing)}" if missing else "not inspected in time"
                self.settle(part, f"deadline: {what}")

    def close(self, reason: str) -> None:
        """Decide all that is open."""
        for part in [p for lane in self.lanes.values() for p in lane]:
            self.settle(part, reason)

    # ---- what to do next

    def full(self, source: str) -> bool:
        """Whether `source` should hold its next frame back."""
        if self.policy != "every" or not self.each_frame:
            return False
        return self.queued(source) >= QUEUE_FRAMES or len(self.lanes[source]) >= OPEN_FRAMES

    def wanting(self, source: str, captured_s: float) -> Part | None:
        """The first part that a frame of this source and time belongs to."""
        for part in self.lanes[""]:
            if part.needed[source] and not part.reason and part.triggered_s <= captured_s:
                return part
        return None

    def next_views(self, limit: int) -> list[View]:
        """Up to `limit` waiting frames of one product, oldest first."""
        views: list[View] = []
        while self.waiting and len(views) < limit:
            if views and self.waiting[0].part.product != views[0].part.product:
                break
            views.append(self.waiting.popleft())
        return views

    def next_deadline_s(self) -> float | None:
        heads = [lane[0].deadline_s for lane in self.lanes.values() if lane]
        return min((deadline for deadline in heads if deadline is not None), default=None)

    # ---- how it stands

    @property
    def open_parts(self) -> int:
        return sum(map(len, self.lanes.values()))

    def counts(self, source: str) -> Counts:
        return Counts(self.captured[source], **{fate: n for fate, n in self.fates[source].items() if n})

    # ---- inside

    def announce(self, lane: str, part: Part) -> None:
        self.triggers += 1
        self.lanes[lane].append(part)
        if len(self.lanes[lane]) > MAX_OPEN_PARTS:
            self.settle(part, f"overload: {MAX_OPEN_PARTS} parts are open")
        elif part.reason:
            self.flush()

    def queued(self, source: str) -> int:
        return sum(view.frame.source == source for view in self.waiting)

    def replace_waiting(self, source: str) -> None:
        """Forget the frames of this source that no worker has taken, and their parts with them."""
        for view in [v for v in self.waiting if v.frame.source == source]:
            self.move(view, "dropped")
            self.waiting.remove(view)
            self.lanes[source].remove(view.part)
            self.triggers -= 1

    def move(self, view: View, fate: str) -> None:
        self.fates[view.frame.source][view.fate] -= 1
        self.fates[view.frame.source][fate] += 1
        view.fate = fate

    def settle(self, part: Part, reason: str) -> None:
        """Decided without the network, unless that was done before. It is given in its turn all the same."""
        if part.reason or not part.open:
            return
        part.reason = reason
        for view in part.views:
            if view.fate == "waiting":
                self.move(view, "late" if view.result is None else "inspected")
            if view in self.waiting:
                self.waiting.remove(view)  # behind an engine that hangs they would pile up
        self.flush()

    def flush(self) -> None:
        """Decide complete parts as far as no older one of their lane is open."""
        for lane in self.lanes.values():
            while lane and lane[0].complete:
                part = lane.popleft()
                part.open = False
                found = combine(tuple(view.result for view in part.views if view.result), self.rule)
                if part.reason:
                    # One defect in hand is enough for "any"; whatever is missing could not make the part good.
                    part.decision = REJECT if found == REJECT and self.rule == "any" else self.safe
                else:
                    part.decision = found
                    part.reason = next((v.result.product_fault for v in part.views if v.result.product_fault), "")
                    for view in part.views:
                        self.move(view, "inspected")
                self.decisions[part.decision] += 1
                self.decided.append(part)
