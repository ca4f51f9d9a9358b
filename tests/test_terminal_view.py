"""The view of a running line: whole at 80 columns, one row a thing, plain lines where nobody looks."""

import io
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from line_stand_in import SIDE, TOP, StandInLine, status, verdict
from rich.cells import cell_len
from rich.console import Console

from omniad_edge.errors import InputError
from omniad_edge.line import terminal_view
from omniad_edge.line.snapshot import Counts
from omniad_edge.line.terminal_view import LINE_EVERY_S, NEWEST, VERDICTS, TerminalView, percentiles


@pytest.fixture(autouse=True)
def utc(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now_s=1000.0)
    monkeypatch.setattr(terminal_view, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    return clock


def view_of(line, width=80, height=40, **options):
    view = TerminalView(Console(file=io.StringIO(), width=width, height=height, **options))
    view.attach(line)
    return view


def rows(view, width=80):
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(view.render())
    return [row.rstrip() for row in console.export_text().splitlines()]


def printed(view):
    return view._console.file.getvalue().splitlines()


def busy_view(width=80):
    cameras = (TOP, replace(SIDE, state="lost"), replace(TOP, name="rtsp-left-4", fault="out-of-focus frame"))
    view = view_of(StandInLine(cameras=cameras), width)
    view.write([verdict(n / 10, latency_ms=10.0 + n, part_id=str(n)) for n in range(8)])
    view.write(
        [verdict(decision="reject", reason="deadline: 100 ms went by", part_id="serial 00012345-99887766-A")]
    )
    view.write(
        [status(), status("output failed", "mqtt", "no broker at mqtt://u:pw@b.example.com:1883: refused\n[1]")]
    )
    return view


VIEW_80 = """\
line3  cap  running  1:02:05
parts      70: 8 rejected (11.4 %), 2 without verdict, 1 open
latency    p50 14.0 ms, p99 19.8 ms
frame age  p50 12.0 ms, p99 17.8 ms
camera       state         frames  dropped  late  failed  waiting  gaps  losses
top          running          100        4     1       2        3     4       1
side         lost              50        0     0       0        0     0       0
rtsp-left-4  out-of-focus     100        4     1       2        3     4       1
output         written  waiting  spooled  dropped  failed
results.jsonl       70        0        0        0       0
mqtt                40        5       22        2       1
last rejects  part               score   threshold  product  reason
09:12:01      serial 00012345-…  0.2000  0.5000     cap      deadline: 100 ms w…
09:12:01      7                  0.7000  0.5000     cap
09:12:01      6                  0.6000  0.5000     cap
last events
09:12:01     output failed  mqtt  no broker at mqtt://***@b.example.com:1883: r…
09:12:01     camera lost    top   no frame for 5 s
"""


def test_view_at_80_columns():
    assert rows(busy_view()) == VIEW_80.splitlines()


def test_view_at_140_columns_has_every_word():
    text = rows(busy_view(140), 140)
    assert text[12].endswith("serial 00012345-99887766-A  0.2000  0.5000     cap      deadline: 100 ms went by")
    assert text[16].endswith("no broker at mqtt://***@b.example.com:1883: refused [1]")
    assert len(text) == len(VIEW_80.splitlines()) and not any("…" in row for row in text)


words = st.text(max_size=60)


@given(st.sampled_from([80, 100, 140]), words, words, words, st.integers(0, 10**9))
@settings(deadline=None, max_examples=60)
def test_whatever_the_names_every_thing_has_one_row_that_fits(width, name, part_id, detail, count):
    camera = replace(TOP, name=name, fault="over-exposed frame", counts=Counts(count, count))
    view = view_of(StandInLine(line=name, product=part_id, cameras=(camera, camera), outputs=()), width)
    view.write([verdict(0.9, product=name, part_id=part_id), status("camera lost", name, detail)])
    text = rows(view, width)
    assert len(text) == 1 + 3 + 3 + 2 + 2
    assert max(cell_len(row) for row in text) <= width
    assert all("over-exposed" in row and f"{count:,}" in row for row in text[5:7])


def test_a_line_that_has_just_started():
    line = StandInLine(state="starting", product=None, decisions={}, cameras=(), outputs=(), uptime_s=0.2)
    text = rows(view_of(line))
    assert text[0] == "line3  product as triggered  starting  0:00:00"
    assert text[1:3] == ["parts      0: 0 rejected, 0 without verdict, 1 open", "latency    -"]


@pytest.mark.parametrize(("height", "seen"), [(24, NEWEST // 2), (50, NEWEST)])
def test_the_newest_are_seen_as_many_as_fit(height, seen):
    view = view_of(StandInLine(), height=height)
    view.write([verdict(0.9, part_id=f"part {n}") for n in range(50)])
    view.write([status("camera lost", f"camera {n}") for n in range(50)])
    text = "\n".join(rows(view))
    assert [text.count("part 4"), text.count("camera lost")] == [seen, seen]
    assert "part 49" in text and "camera 49" in text


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=50))
def test_percentiles(values_ms):
    p50, p99 = np.percentile(values_ms, [50, 99])
    assert (
        percentiles(values_ms) == f"p50 {p50:.1f} ms, p99 {p99:.1f} ms"
        or np.isclose(
            [float(word) for word in percentiles(values_ms).split() if word[0].isdigit()], [p50, p99], atol=0.1
        ).all()
    )


def test_percentiles_are_of_the_newest_verdicts():
    view = view_of(StandInLine())
    view.write([verdict(latency_ms=9000.0)] * 10 + [verdict(latency_ms=30.0)] * VERDICTS)
    assert rows(view)[2:4] == ["latency    p50 30.0 ms, p99 30.0 ms", "frame age  p50 28.0 ms, p99 28.0 ms"]


def test_plain_lines_come_at_most_every_10_s(clock):
    view = view_of(StandInLine())
    view.open()
    for _ in range(50):  # 25 s
        clock.now_s += LINE_EVERY_S / 20
        view.write([verdict(), verdict(0.9)])
    lines = printed(view)
    assert len(lines) == 2
    assert lines[0][8:] == (
        " 70 parts, 8 rejected, 2 no verdict, latency p50 20.0 ms, p99 20.0 ms, "
        "150 frames: 4 dropped, 1 late, 2 failed"
    )


def test_plain_lines_say_each_event_and_the_end(clock):
    line = StandInLine()
    view = view_of(line)
    view.open()
    view.write([status(), verdict(), status("output failed", "mqtt", "at mqtt://u:pw@b/: refused\n[red]")])
    line.change(cameras=(replace(TOP, state="lost"), replace(SIDE, fault="black frame")))
    view.close()
    view.close()
    lines = printed(view)
    assert lines[:2] == [
        "09:12:01 camera lost: top: no frame for 5 s",
        "09:12:01 output failed: mqtt: at mqtt://***@b/: refused [red]",
    ]
    assert len(lines) == 3 and lines[2].endswith(", top lost, side black frame")


def test_a_terminal_shows_the_view_and_keeps_the_last_one(capsys):
    line = StandInLine()
    view = view_of(line, force_terminal=True, _environ={"TERM": "xterm"})
    view.open()
    view.open()
    line.change(decisions={"accept": 12345})
    view.write([status("camera lost")])
    print("a result")  # for a program behind a pipe
    view.close()
    text = view._console.file.getvalue()
    assert "12,345: 0 rejected" in text and "camera lost" in text
    assert "\x1b[?25h" in text  # the cursor is back
    assert "a result" not in text and capsys.readouterr().out == "a result\n"


def test_a_terminal_that_cannot_move_its_cursor_gets_lines():
    view = view_of(StandInLine(), force_terminal=True, _environ={"TERM": "dumb"})
    view.open()
    view.write([status()])
    view.close()
    assert [line[9:20] for line in printed(view)] == ["camera lost", "70 parts, 8"]


def test_it_belongs_to_a_line():
    with pytest.raises(InputError, match=r"line\.add"):
        TerminalView().open()
