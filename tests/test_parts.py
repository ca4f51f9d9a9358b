"""The contract on generated schedules: one verdict a part, in order and in time; every frame in one count."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import make_result, of_another_product

from omniad_edge.frame import Frame
from omniad_edge.line.parts import MAX_OPEN_PARTS, OPEN_FRAMES, QUEUE_FRAMES, Parts
from omniad_edge.verdict import ACCEPT, NO_VERDICT, REJECT

IMAGE = np.zeros((1, 1, 3), np.uint8)
GOOD, BAD = make_result(0.2), make_result(0.8)


def frame(source="a", sequence=0, at=0.0) -> Frame:
    return Frame(IMAGE, sequence, at, source)


def decided(parts: Parts) -> list[tuple[str, str, str]]:
    made = [(p.part_id, p.decision, p.reason) for p in parts.decided]
    parts.decided.clear()
    return made


def inspect_all(parts: Parts, result=GOOD) -> None:
    while views := parts.next_views(4):
        for view in views:
            parts.finish(view, result)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("frame"), st.sampled_from("ab"), st.sampled_from(["", "", "", "black frame"])),
        st.tuples(st.just("trigger")),
        st.tuples(st.just("take"), st.integers(1, 4)),
        st.tuples(st.just("finish"), st.integers(0, 7), st.booleans()),
        st.tuples(st.just("fail"), st.integers(0, 7)),
        st.tuples(st.just("lose"), st.sampled_from("ab"), st.integers(0, 3)),
        st.tuples(st.just("camera"), st.sampled_from("ab")),
        st.tuples(st.just("wait"), st.floats(0, 0.2)),
    ),
    max_size=60,
)


@given(steps, st.booleans(), st.sampled_from(["every", "latest"]), st.integers(1, 3), st.sampled_from([None, 0.1]))
@settings(max_examples=400, deadline=None)
def test_any_schedule(steps, each_frame, policy, views, deadline_s):
    parts = Parts(("a", "b"), each_frame, policy, 1 if each_frame else views)
    now, sequence, triggers, taken, given_ids = 0.0, 0, 0, [], []

    def due():
        return None if deadline_s is None else now + deadline_s

    for step, *args in steps:
        now += 0.001
        if step == "frame" and not parts.full(args[0]):
            sequence += 1
            parts.capture(frame(args[0], sequence, now), args[1], None, due(), f"f{sequence}")
        elif step == "trigger" and not each_frame:
            triggers += 1
            parts.trigger(f"t{triggers}", None, now, due())
        elif step == "take":
            taken += parts.next_views(args[0])
        elif step == "finish" and taken:
            view = taken.pop(args[0] % len(taken))
            in_time = parts.finish(view, BAD if args[1] else GOOD)
            assert in_time == (view.fate in ("waiting", "inspected"))
        elif step == "fail" and taken:
            parts.fail(taken.pop(args[0] % len(taken)), "engine failed")
        elif step == "lose":
            sequence += args[1]
            parts.lose(args[0], range(sequence - args[1], sequence), None, now)
        elif step == "camera":
            parts.lose_camera(args[0], "camera lost")
        elif step == "wait":
            now += args[0]
            parts.expire(now)
            assert all(
                p.reason or p.deadline_s is None or p.deadline_s > now
                for lane in parts.lanes.values()
                for p in lane
            )
        for source in "ab":
            counts = parts.counts(source)
            fates = (counts.inspected, counts.dropped, counts.late, counts.failed, counts.waiting)
            assert counts.captured == sum(fates) and min(fates) >= 0
            assert parts.queued(source) <= QUEUE_FRAMES
        given_ids += [part_id for part_id, _, _ in decided(parts)]
        assert parts.triggers == sum(parts.decisions.values()) + parts.open_parts
        assert sum(parts.decisions.values()) == len(given_ids)
    parts.close("line stopped")
    given_ids += [part_id for part_id, _, _ in decided(parts)]
    assert parts.open_parts == 0 and not any(parts.counts(s).waiting for s in "ab")
    assert len(given_ids) == len(set(given_ids)) == parts.triggers == sum(parts.decisions.values())
    if not each_frame:
        assert given_ids == [f"t{n}" for n in range(1, triggers + 1)]


def test_a_part_of_several_views_and_cameras():
    parts = Parts(("a", "b"), each_frame=False, views=2)
    parts.trigger("1", None, 1.0, 2.0)
    parts.capture(frame("a", at=0.9), "", None, None)  # from before the trigger: nobody's
    for source in "abab":
        parts.capture(frame(source, at=1.1), "", None, None)
    parts.capture(frame("a", at=1.2), "", None, None)  # a third view: nobody's
    inspect_all(parts)
    assert decided(parts) == [("1", ACCEPT, "")]
    assert parts.counts("a").dropped == 2 and parts.counts("a").inspected == parts.counts("b").inspected == 2


@pytest.mark.parametrize("rule, decision", [("any", REJECT), ("all", ACCEPT)])
def test_the_rule_for_several_views(rule, decision):
    parts = Parts(("a",), each_frame=False, views=2, rule=rule)
    parts.trigger("1", None, 0.0, 1.0)
    parts.capture(frame(at=0.1), "", None, None)
    parts.capture(frame(at=0.2), "", None, None)
    first, second = parts.next_views(2)
    parts.finish(second, BAD)
    assert not parts.decided
    parts.finish(first, GOOD)
    assert decided(parts) == [("1", decision, "")]


def test_verdicts_come_in_the_order_of_triggers():
    parts = Parts(("a",))
    for n in range(3):
        parts.capture(frame(sequence=n), "", None, None, str(n))
    one, two, three = parts.next_views(3)
    parts.finish(three, GOOD)
    parts.fail(two, "engine failed")
    assert not parts.decided
    parts.finish(one, BAD)
    assert decided(parts) == [("0", REJECT, ""), ("1", REJECT, "engine failed"), ("2", ACCEPT, "")]


def test_a_result_after_the_deadline_is_late_and_no_second_verdict():
    parts = Parts(("a",), safe=NO_VERDICT)
    parts.capture(frame(), "", None, 0.05, "1")
    (view,) = parts.next_views(1)
    parts.expire(0.05)
    assert decided(parts) == [("1", NO_VERDICT, "deadline: not inspected in time")]
    assert not parts.finish(view, GOOD) and not parts.decided
    assert parts.counts("a").late == 1


def test_expired_frames_are_not_inspected():
    """Else an overloaded line would be late for ever."""
    parts = Parts(("a",))
    parts.capture(frame(), "", None, 0.05, "1")
    parts.expire(0.06)
    assert parts.next_views(8) == [] and not parts.waiting


@pytest.mark.parametrize("rule, decision", [("any", REJECT), ("all", NO_VERDICT)])
def test_a_defect_found_in_time_counts_without_the_other_frames(rule, decision):
    parts = Parts(("top", "side"), each_frame=False, rule=rule, safe=NO_VERDICT)
    parts.trigger("1", None, 0.0, 0.05)
    parts.capture(frame("top", at=0.01), "", None, None)
    inspect_all(parts, BAD)
    parts.expire(0.05)
    (part,) = parts.decided
    assert (part.decision, part.reason) == (decision, "deadline: no frame from side")
    assert [view.fate for view in part.views] == ["inspected"]


def test_a_frame_is_for_the_part_it_was_taken_for_and_no_other():
    parts = Parts(("a",), each_frame=False)
    first = parts.trigger("1", None, 0.0, 0.05)
    parts.trigger("2", None, 0.01, 9.0)
    parts.expire(0.05)
    parts.capture(frame(at=0.06), "", None, None, part=first)
    assert parts.counts("a").dropped == 1 and not parts.waiting


def test_a_missing_frame_is_named():
    parts = Parts(("top", "side"), each_frame=False)
    parts.trigger("1", None, 0.0, 0.05)
    parts.capture(frame("top", at=0.01), "", None, None)
    parts.expire(0.05)
    assert decided(parts) == [("1", REJECT, "deadline: no frame from side")]


def test_a_lost_camera_decides_the_parts_that_want_it():
    parts = Parts(("top", "side"), each_frame=False)
    parts.trigger("1", None, 0.0, 9.0)
    parts.capture(frame("top", at=0.01), "", None, None)
    parts.trigger("2", None, 0.02, 9.0)
    parts.lose_camera("top", "camera lost: top")
    assert decided(parts) == []  # part 1 has its frame of it and is still open, part 2 waits for its turn
    parts.capture(frame("side", at=0.03), "", None, None)
    inspect_all(parts)
    assert decided(parts) == [("1", ACCEPT, ""), ("2", REJECT, "camera lost: top")]


def test_a_fault_is_never_scored():
    parts = Parts(("a",))
    parts.capture(frame(), "black frame", None, None, "1")
    assert decided(parts) == [("1", REJECT, "camera fault: black frame")]
    assert not parts.next_views(1) and parts.counts("a").failed == 1


def test_latest_replaces_what_waits_but_not_what_is_inspected():
    parts = Parts(("a", "b"), policy="latest")
    parts.capture(frame("a", 0), "", None, None, "a0")
    (busy,) = parts.next_views(1)
    for n in (1, 2, 3):
        parts.capture(frame("a", n), "", None, None, f"a{n}")
    parts.capture(frame("b", 0), "", None, None, "b0")
    parts.finish(busy, GOOD)
    inspect_all(parts)
    assert [part_id for part_id, _, _ in decided(parts)] == ["a0", "a3", "b0"]
    assert parts.counts("a").dropped == 2 and parts.triggers == 3


def test_every_holds_the_camera_back():
    parts = Parts(("a", "b"))
    for n in range(QUEUE_FRAMES):
        assert not parts.full("a")
        parts.capture(frame("a", n), "", None, None, str(n))
    assert parts.full("a") and not parts.full("b")
    parts.next_views(1)
    assert not parts.full("a")


@pytest.mark.parametrize("policy", ["every", "latest"])
def test_a_hanging_inspection_bounds_what_piles_up_behind_it(policy):
    parts = Parts(("a",), policy=policy)
    parts.capture(frame("a", 0), "", None, None, "0")
    parts.next_views(1)  # and never finished
    for n in range(1, 100):
        if not parts.full("a"):
            parts.capture(frame("a", n), "", None, None, str(n))
            inspect_all(parts)
    assert parts.open_parts == OPEN_FRAMES and not parts.decided
    assert parts.counts("a").dropped == (0 if policy == "every" else 100 - OPEN_FRAMES)


def test_frames_the_camera_lost_are_parts_without_a_frame():
    parts = Parts(("a",))
    parts.lose("a", range(1, 3), None, 0.0)
    reason = "frame lost by the camera or on its way here"
    assert decided(parts) == [("a-1", REJECT, reason), ("a-2", REJECT, reason)]
    assert parts.counts("a").captured == 0 and parts.lost_frames["a"] == 2
    parts.lose("a", range(10**9), None, 0.0)  # a counter set anew
    assert len(decided(parts)) == MAX_OPEN_PARTS


def test_triggers_that_nobody_answers_are_bounded():
    parts = Parts(("a",), each_frame=False)
    for n in range(MAX_OPEN_PARTS + 5):
        parts.trigger(str(n), None, 0.0, 1e9)
    assert parts.open_parts <= MAX_OPEN_PARTS + 5 and not parts.decided  # the first is open: the order is kept
    parts.expire(1e9)
    assert len(parts.decided) == MAX_OPEN_PARTS + 5
    assert {p.reason for p in parts.decided} == {
        "deadline: no frame from a",
        f"overload: {MAX_OPEN_PARTS} parts are open",
    }


def test_a_batch_is_of_one_product():
    parts = Parts(("a",))
    for n, product in enumerate(["x", "x", "y", "x"]):
        parts.capture(frame(sequence=n), "", product, None, str(n))
    assert [[view.part.part_id for view in parts.next_views(8)] for _ in range(3)] == [["0", "1"], ["2"], ["3"]]


def test_a_part_of_another_product_is_rejected_with_the_reason():
    parts = Parts(("a",))
    for sequence in range(3):
        parts.capture(frame(sequence=sequence), "", "gear", None, f"a-{sequence}")
    for result, (view,) in zip(
        (GOOD, of_another_product(), of_another_product("cap")),
        (parts.next_views(1) for _ in range(3)),
        strict=True,
    ):
        parts.finish(view, result)
    assert decided(parts) == [
        ("a-0", ACCEPT, ""),
        ("a-1", REJECT, "unknown product"),
        ("a-2", REJECT, "wrong product: shows cap, expected gear"),
    ]
    assert parts.counts("a").inspected == 3 and parts.decisions[REJECT] == 2
