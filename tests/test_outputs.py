"""Outputs behind their queue: nothing waits for them, nothing is lost uncounted."""

import json
import threading
from itertools import islice
from time import monotonic

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import (
    Events,
    Scripted,
    check,
    make_late,
    make_status,
    make_verdict,
    of_every_kind,
    started,
    wait_until,
)

from omniad_edge.errors import InputError, OutputError
from omniad_edge.outputs import delivery
from omniad_edge.outputs.delivery import (
    Callback,
    Output,
    OutputQueue,
    OutputStatus,
    backoff,
    image_bytes,
    without_images,
)
from omniad_edge.outputs.record_text import json_text
from omniad_edge.sizes import age_s, size_bytes


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def quick(monkeypatch):
    """Retries and reports at once."""
    monkeypatch.setattr(delivery, "RETRY_S", (0.001, 0.002))
    monkeypatch.setattr(delivery, "TICK_S", 0.005)


def drained(queue: OutputQueue) -> OutputStatus:
    wait_until(lambda: queue.status().waiting == 0)
    return queue.status()


def settled(status: OutputStatus) -> int:
    return status.written + status.failed + status.dropped


# ---- the queue


def test_records_arrive_in_order_and_in_batches(events):
    output = Scripted()
    output.gate.clear()
    queue = started(output, events)
    queue.put(make_status(0))
    assert output.entered.wait(20)
    for number in range(1, 251):
        queue.put(make_status(number))
    assert queue.status() == OutputStatus("scripted", waiting=251, written=0, failed=0, dropped=0)
    output.gate.set()
    queue.close(20)
    assert output.written == list(range(251))
    assert [len(call) for call in output.calls] == [1, 100, 100, 50]
    assert output.closed.is_set() and events.seen == []
    assert queue.status() == OutputStatus("scripted", waiting=0, written=251, failed=0, dropped=0)


def test_a_failed_batch_is_retried_whole_and_reported_once(events, quick):
    output = Scripted(["later"] * 7)
    queue = started(output, events)
    queue.put(make_status(1))
    events.wait("output back")
    queue.put(make_status(2))
    queue.close(20)
    assert output.calls == [[1]] * 8 + [[2]]
    assert events.seen == [
        ("output failed", "scripted", "the server is away"),
        ("output back", "scripted", ""),
    ]
    assert queue.status() == OutputStatus("scripted", waiting=0, written=2, failed=0, dropped=0)


def test_pauses_double_up_to_five_seconds():
    assert list(islice(backoff(), 8)) == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


@pytest.mark.parametrize("error", [OutputError("full"), ConnectionError("reset"), ZeroDivisionError("by zero")])
def test_an_output_that_cannot_be_opened_is_tried_again(error, events, quick):
    output = Scripted()
    left = [error] * 3

    def open_later():
        if left:
            raise left.pop()

    output.open = open_later
    queue = started(output, events)
    queue.put(make_status(1))
    assert drained(queue).written == 1
    events.wait("output back")
    queue.close(20)
    assert events.names() == ["output failed", "output back"] and str(error) in events.seen[0][2]


def test_what_the_output_raises_fails_its_call_and_the_next_is_tried(events, quick):
    output = Scripted(["broken", "ok", "broken"], batch=1)
    queue = started(output, events)
    for number in range(4):
        queue.put(make_status(number))
    queue.close(20)
    assert (output.failed, output.written) == ([0, 2], [1, 3])
    assert queue.status() == OutputStatus("scripted", waiting=0, written=2, failed=2, dropped=0)
    # The second came too soon to be news.
    assert events.seen == [("output error", "scripted", "1 record: ZeroDivisionError: division by zero")]


def test_a_full_queue_drops_the_oldest_and_counts(events, quick):
    output = Scripted()
    output.gate.clear()
    queue = started(output, events, capacity=3)
    queue.put(make_status(0))
    assert output.entered.wait(20)
    for number in range(1, 9):
        queue.put(make_status(number))
    assert queue.status() == OutputStatus("scripted", waiting=4, written=0, failed=0, dropped=5)
    first = events.wait("output dropped")
    for number in range(9, 12):  # too soon to be news, but for the end of the line
        queue.put(make_status(number))
    output.gate.set()
    queue.close(20)
    assert output.written == [0, 9, 10, 11]
    assert queue.status() == OutputStatus("scripted", waiting=0, written=4, failed=0, dropped=8)
    said = [int(detail.split()[0]) for event, _, detail in events.seen if event == "output dropped"]
    assert sum(said) == 8 and len(said) == 2 and first.endswith("did not take them in time")


def test_pictures_that_wait_are_bounded_in_bytes(events, monkeypatch):
    verdict = make_verdict()
    monkeypatch.setattr(delivery, "IMAGE_BYTES", 3 * image_bytes(verdict))
    output = Scripted()
    output.gate.clear()
    queue = started(output, events)
    queue.put(make_status(0))
    assert output.entered.wait(20)
    for number in range(1, 6):
        queue.put(make_verdict(number))
    assert queue.status().waiting == 4
    output.gate.set()
    drained(queue)
    for number in range(6, 9):
        queue.put(make_verdict(number))
        drained(queue)
    assert queue._waiting_bytes == 0
    queue.close(20)
    assert output.written == [0, 3, 4, 5, 6, 7, 8] and queue.status().dropped == 2


def test_an_output_of_text_holds_no_pictures(events):
    kept = []

    class Text(Scripted):
        images = False

        def write(self, records):
            kept.extend(records)

    queue = started(Text(), events)
    for record in of_every_kind():
        queue.put(record)
    queue.close(20)
    assert [image_bytes(record) for record in kept] == [0] * 5
    assert [record.to_dict() for record in kept] == [record.to_dict() for record in of_every_kind()]
    assert image_bytes(make_verdict(1, views=2)) == 2 * (24 * 32 * 3 + 12 * 16 * 5)
    assert image_bytes(make_late()) == image_bytes(make_verdict(1))
    assert without_images(make_status(1)) == make_status(1)


def test_only_wanted_records_are_counted(events):
    output = Scripted()
    output.kinds = ("verdict", "late")
    queue = started(output, events)
    for record in of_every_kind():
        queue.put(record)
    queue.close(20)
    assert output.written == [1, 2, 3, 4] and queue.status().written == 4


def test_an_output_needs_no_base_class(events):
    class Mine:
        name, kinds = "mine", {"status"}

        def __init__(self):
            self.got = []

        def open(self):
            self.got.append("open")

        def write(self, records):
            self.got += [record.origin.number for record in records]

        def close(self):
            self.got.append("close")

    mine = Mine()
    queue = started(mine, events)
    queue.put(make_verdict(1))
    queue.put(make_status(2))
    queue.close(20)
    assert mine.got == ["open", 2, "close"] and queue.status() == OutputStatus("mine", 0, 1, 0, 0)


def test_wants_that_raises_costs_the_record_and_not_the_line(events, quick):
    output = Scripted()
    output.wants = lambda record: 1 / 0
    queue = started(output, events)
    queue.put(make_status(1))
    queue.put(make_status(2))
    assert queue.status().failed == 2
    assert events.wait("output error") == "1 record: ZeroDivisionError: division by zero"
    queue.close(20)


def test_closing_drains_within_its_time_and_drops_the_rest(events, quick):
    output = Scripted(iter(lambda: "later", None))  # for ever
    queue = started(output, events)
    for number in range(5):
        queue.put(make_status(number))
    began = monotonic()
    queue.close(0.1)
    assert monotonic() - began < 1
    assert queue.status() == OutputStatus("scripted", waiting=0, written=0, failed=0, dropped=5)
    assert output.closed.is_set()
    assert events.names() == ["output failed", "output dropped"] and events.seen[1][2].startswith("5 records")
    queue.close(0.1)
    queue.put(make_status(9))
    assert queue.status().dropped == 6 and len(events.seen) == 2


def test_closing_interrupts_a_long_pause(events, monkeypatch):
    monkeypatch.setattr(delivery, "RETRY_S", (3600.0, 3600.0))
    output = Scripted(["later"])
    queue = started(output, events)
    queue.put(make_status(1))
    events.wait("output failed")
    queue.close(20)
    assert output.written == [1] and queue.status().written == 1


def test_closing_never_waits_for_a_write_that_hangs(events):
    output = Scripted(batch=1)
    output.gate.clear()
    queue = started(output, events)
    for number in range(3):
        queue.put(make_status(number))
    assert output.entered.wait(20)
    began = monotonic()
    queue.close(0.05)
    assert monotonic() - began < 1
    assert queue.status() == OutputStatus("scripted", waiting=0, written=0, failed=0, dropped=3)
    output.gate.set()
    assert output.closed.wait(20)  # the one that hung ends after all; it is not counted twice
    assert queue.status().dropped == 3 and queue.status().written == 0 and output.written == [0]


def test_a_write_that_hangs_is_reported_and_its_end_too(events, quick, monkeypatch):
    monkeypatch.setattr(delivery, "HANGING_S", 0.02)
    output = Scripted()
    output.gate.clear()
    queue = started(output, events)
    queue.put(make_status(1))
    assert "no return from a call for 0.02 s" in events.wait("output failed")
    output.gate.set()
    events.wait("output back")
    queue.close(20)
    assert events.names() == ["output failed", "output back"]


def test_an_on_event_that_raises_or_hangs_stops_nothing(quick, capsys):
    hang = threading.Event()

    def on_event(event, who, detail):
        if event == "output failed":
            raise RuntimeError("listener broken")
        hang.wait(20)

    output = Scripted(["later"])
    queue = started(output, on_event)
    queue.put(make_status(1))
    wait_until(lambda: output.written == [1])
    queue.put(make_status(2))
    wait_until(lambda: output.written == [1, 2])
    began = monotonic()
    queue.close(0.1)
    assert monotonic() - began < 1
    hang.set()
    assert "listener broken" in capsys.readouterr().err


def test_put_does_not_wait_for_the_output(events):
    output = Scripted()
    output.gate.clear()
    queue = started(output, events)
    records = [make_verdict(number) for number in range(500)]
    began = monotonic()
    for record in records:
        queue.put(record)
    took_s = monotonic() - began
    output.gate.set()
    queue.close(20)
    assert took_s / 500 < 0.001, took_s


def test_capacity_is_checked():
    with pytest.raises(InputError, match="at least 1 record, got 0"):
        OutputQueue(Scripted(), Events(), capacity=0)


def test_what_is_put_before_the_start_waits_for_it(events):
    output = Scripted()
    queue = OutputQueue(output, events, capacity=2)
    for number in range(3):
        queue.put(make_status(number))
    assert queue.status() == OutputStatus("scripted", waiting=2, written=0, failed=0, dropped=1)
    queue.start()
    queue.close(20)
    assert output.written == [1, 2]
    unused = OutputQueue(Scripted(), events)
    unused.put(make_status(0))
    unused.close(20)
    assert unused.status() == OutputStatus("scripted", waiting=0, written=0, failed=0, dropped=1)


def test_an_error_is_reported_in_the_middle_of_failures(events, quick):
    """So that a line that is to stop at errors does."""
    output = Scripted(["later", "later", "broken"])
    queue = started(output, events)
    queue.put(make_status(1))
    events.wait("output error")
    queue.put(make_status(2))
    queue.close(20)
    assert events.names() == ["output failed", "output error", "output back"]


DOINGS = st.lists(st.sampled_from(["ok", "later", "broken"]), max_size=40)
STEPS = st.lists(st.sampled_from(["put", "put", "put", "hang", "go", "look"]), max_size=60)


@settings(max_examples=60, deadline=None)
@given(DOINGS, STEPS, st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_every_record_is_somewhere_at_every_moment(doings, steps, capacity, batch, hangs_at_the_end):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delivery, "RETRY_S", (0.0001, 0.0002))
        patch.setattr(delivery, "GRACE_S", 0.01)
        output = Scripted(doings, batch)
        queue = started(output, Events(), capacity)
        put = 0
        for step in steps:
            if step == "put":
                queue.put(make_status(put))
                put += 1
            elif step in ("hang", "go"):
                (output.gate.clear if step == "hang" else output.gate.set)()
            status = queue.status()
            assert settled(status) + status.waiting == put
            assert status.waiting <= capacity + batch
        if not hangs_at_the_end:
            output.gate.set()
        queue.close(0.001 if hangs_at_the_end else 20)
        output.gate.set()
        assert output.closed.wait(20)
        status = queue.status()
        assert settled(status) == put and status.waiting == 0
        assert output.written == sorted(set(output.written))  # in order, none twice
        if not hangs_at_the_end:
            assert (status.written, status.failed) == (len(output.written), len(output.failed))


def test_counters_agree_with_puts_from_several_threads(events, quick):
    output = Scripted(["ok", "later", "broken"] * 200, batch=3)
    queue = started(output, events, capacity=10)
    threads = [threading.Thread(target=lambda: [queue.put(make_status(i)) for i in range(300)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    queue.close(20)
    status = queue.status()
    assert settled(status) == 1200 and status.waiting == 0
    assert (status.written, status.failed) == (len(output.written), len(output.failed))


# ---- functions as outputs


def test_a_function_gets_every_verdict_with_its_pictures(events):
    got = []
    queue = started(Callback(got.append), events)
    records = of_every_kind()
    for record in records:
        queue.put(record)
    queue.close(20)
    assert got == records[:3] and got[0].frames[0].image.shape == (24, 32, 3)


def test_a_function_that_raises_costs_that_verdict_only(events):
    got = []

    def pick(verdict):
        if verdict.part_id == "A2":
            raise SystemExit("no more")
        got.append(verdict.part_id)

    queue = started(Callback(pick), events)
    for number in range(1, 5):
        queue.put(make_verdict(number))
    queue.close(20)
    assert got == ["A1", "A3", "A4"]
    assert queue.status() == OutputStatus("pick", waiting=0, written=3, failed=1, dropped=0)
    assert events.seen == [("output error", "pick", "1 record: SystemExit: no more")]


def test_a_callback_needs_a_function():
    with pytest.raises(InputError, match="a function of one verdict or an Output, got 3"):
        Callback(3)


# ---- records as text


def test_every_record_is_one_line_of_json_after_the_schema():
    for record in of_every_kind():
        text = json_text(record)
        assert text.isascii() and "\n" not in text and check(json.loads(text)) == record.to_dict()


@given(st.floats(), st.text(st.characters(exclude_categories=())))
def test_any_number_and_any_text_come_out_as_valid_json(number, text):
    verdict = make_verdict(1, part_id=text, age_ms=number)
    record = json.loads(json_text(verdict).encode("ascii"), parse_constant=lambda name: 1 / 0)
    assert check(record)["part_id"] == text and (record["age_ms"] == number or record["age_ms"] is None)


# ---- sizes and ages


def test_sizes_and_ages():
    assert [size_bytes(t) for t in ("10GB", "1.5 MB", "2kb", "0.0001kB")] == [10**10, 1_500_000, 2000, 1]
    assert [age_s(t) for t in ("30d", "12h", "5 min", "90s")] == [2_592_000, 43_200, 300, 90]


@pytest.mark.parametrize(
    "text", ["", "10", "GB", "-1GB", "0GB", "1e3MB", "10 GB free", "10XB", "1.GB", "nanMB", 5]
)
def test_nonsense_is_refused_with_an_example(text):
    with pytest.raises(InputError, match="such as '10GB', with one of the units kB, MB, GB, TB; got"):
        size_bytes(text)
    with pytest.raises(InputError, match="such as '30d', with one of the units s, min, h, d; got"):
        age_s(text)


def test_the_base_class_wants_every_kind():
    assert all(Output.wants(Scripted(), record) for record in of_every_kind())
