"""The log of a line: JSON a line, no credentials, nothing repeated without end, nothing lost uncounted."""

import io
import json
import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from line_stand_in import status, verdict

from omniad_edge.line import log as line_log
from omniad_edge.line.log import BURST, MAX_MESSAGES, REPEAT_S, LineHandler, StatusLog, human_line, json_line

logger = logging.getLogger("omniad_edge.test")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def handler():
    """The only one of the loggers of this package."""
    handler, package = LineHandler(), logging.getLogger("omniad_edge")
    package.addHandler(handler)
    package.propagate = False
    package.setLevel(logging.INFO)
    yield handler
    package.setLevel(logging.NOTSET)
    package.propagate = True
    package.removeHandler(handler)
    handler.close()


@pytest.fixture
def clock(monkeypatch):
    """Stands still unless a test moves `clock.now_s`."""
    clock = SimpleNamespace(now_s=1000.0)
    monkeypatch.setattr(line_log, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    return clock


@pytest.fixture
def stderr(capsys):
    """Gives the entries so far."""
    lines = []

    def read():
        lines.extend(capsys.readouterr().err.splitlines())
        return [json.loads(line) for line in lines]

    return read


def messages(stderr):
    return [entry["message"] for entry in stderr()]


def test_one_json_object_a_line(handler, stderr):
    logger.info("line %s\nstarted", "three", extra={"fields": {"parts": 3}})
    entry = stderr()[0]
    assert len(stderr()) == 1
    assert entry.pop("time").endswith("+00:00")
    assert entry == {
        "level": "info",
        "logger": "omniad_edge.test",
        "message": "line three\nstarted",
        "thread": "MainThread",
        "parts": 3,
    }


def test_words_in_a_terminal(handler, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    logger.warning("camera lost: \x1b[2Jgone")
    assert sys.stderr.getvalue()[8:] == " WARNING camera lost:  [2Jgone\n"


def test_an_exception_comes_with_its_traceback(handler, stderr):
    try:
        raise OSError("cannot open rtsp://admin:hunter2@10.0.0.7/live")
    except OSError:
        logger.exception("engine")
    assert "OSError: cannot open rtsp://***@10.0.0.7/live" in stderr()[0]["error"]
    assert "test_line_log.py" in stderr()[0]["error"]


secrets = st.from_regex(r"\AZq[A-Za-z0-9!$%^*+._~-]{4,12}\Z")
places = (
    "rtsp://admin:{}@10.0.0.7:554/live",
    "https://{}@host.example/hook",
    "https://host.example/hook?line=3&access_token={}&x=1",
    "mqtts://user:{}@broker:8883",
    "http://h/?password={}",
)


@given(secrets, st.sampled_from(places))
@settings(max_examples=100)
def test_no_credentials_in_message_argument_field_or_error(secret, place):
    url = place.format(secret)
    try:
        raise OSError(url)
    except OSError:
        error = sys.exc_info()
    fields = {"fields": {"url": url, "tried": [url, {"at": url}], "path": Secretive(url)}}
    for message, arguments in ((f"opening {url}", ()), ("opening %s (%s)", (url, Secretive(url))), ("%d", (url,))):
        record = logger.makeRecord("n", logging.INFO, "f", 1, message, arguments, error, extra=fields)
        for form in (json_line, human_line):
            line = form(record, line_log.text_of(record))
            assert secret not in line
            assert "***" in line


class Secretive:
    def __init__(self, url):
        self.url = url

    def __str__(self):
        return f"source at {self.url}"

    __repr__ = __str__


def test_levels_of_status_records(handler, stderr):
    levels = {
        "line started": "info",
        "camera runs": "info",
        "camera back": "info",
        "camera well": "info",
        "camera lost": "warning",
        "output dropped": "warning",
        "something new": "warning",
        "engine failed": "error",
        "output error": "error",
    }
    log = StatusLog()
    log.open()
    log.write([status(event, "top", "why") for event in levels])
    log.close()
    assert {entry["event"]: entry["level"] for entry in stderr()} == levels
    entry = stderr()[0]
    assert (entry["message"], entry["who"], entry["line"]) == ("line started: top: why", "top", "line3")
    assert not log.wants(verdict())


def test_repeats_are_held_back_and_counted(handler, clock, stderr):
    for n in range(BURST + 7):
        logger.info("frame %d is late", n)
    assert messages(stderr) == [f"frame {n} is late" for n in range(BURST)]
    clock.now_s += REPEAT_S
    logger.info("frame 99 is late")
    assert messages(stderr)[BURST:] == [f"7 more times: frame {BURST + 6} is late", "frame 99 is late"]
    assert stderr()[BURST]["held_back"] == 7


def test_another_message_brings_the_count_of_one_that_ended(handler, clock, stderr):
    for _ in range(BURST + 1):
        logger.info("late")
    clock.now_s += REPEAT_S
    logger.info("quiet now")
    assert messages(stderr)[BURST:] == ["1 more time: late", "quiet now"]


def test_different_messages_are_not_held_back(handler, clock, stderr):
    cameras = "top", "side", "left", "right", "front", "back"
    for _ in range(BURST):
        StatusLog().write([status("camera lost", name) for name in cameras])
        logger.info("camera lost")
        logger.warning("camera lost")
    assert len(stderr()) == BURST * 8


def test_status_of_one_camera_repeats_whatever_its_detail(handler, clock, stderr):
    StatusLog().write([status("camera lost", "top", f"reason {'x' * n}") for n in range(BURST + 2)])
    assert len(stderr()) == BURST
    handler.flush()
    assert messages(stderr)[-1].startswith("2 more times: camera lost: top: reason")
    handler.flush()
    assert len(stderr()) == BURST + 1


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 2 * REPEAT_S / BURST)), max_size=80))
@settings(deadline=None, max_examples=60)
def test_every_message_is_written_or_counted(sent):
    now_s, lines = 0.0, io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(line_log, "time", SimpleNamespace(monotonic=lambda: now_s))
        patch.setattr(sys, "stderr", lines)
        handler = LineHandler()
        for text, pause_s in sent:
            now_s += pause_s
            handler.handle(logger.makeRecord("n", logging.INFO, "f", 1, text, (), None))
        handler.close()
    entries = [json.loads(line) for line in lines.getvalue().splitlines()]
    for text in "abc":
        told = sum(entry.get("held_back", 1) for entry in entries if entry["message"].endswith(text))
        assert told == sum(each == text for each, _ in sent)


def test_memory_is_bounded_and_counts_are_told(handler, clock, stderr):
    for _ in range(BURST + 3):
        logger.info("first")
    for n in range(2 * MAX_MESSAGES):
        logger.info("message %s", chr(0x4E00 + n))
    assert len(handler._repeats) <= MAX_MESSAGES
    assert "3 more times: first" in messages(stderr)


def test_a_closed_stderr_does_not_stop_the_line(handler, monkeypatch):
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(
        sys, "stderr", SimpleNamespace(isatty=lambda: False, write=stream.write, flush=stream.flush)
    )
    logger.error("nobody reads this")


def test_a_program_that_ends_tells_what_it_held_back():
    program = (
        "import logging, warnings; from omniad_edge.line.log import start_log\n"
        "start_log(); start_log('WARNING')\n"
        "logging.getLogger('a').info('unseen')\n"
        "for n in range(9): logging.getLogger('a').error('lost http://u:p%d@h/', n)\n"
        "warnings.warn('old')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    entries = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == 0
    assert [e["message"] for e in entries[:5]] == ["lost http://***@h/"] * 5
    assert "old" in entries[5]["message"]
    assert (entries[6]["held_back"], entries[6]["message"]) == (4, "4 more times: lost http://***@h/")
    assert len(entries) == 7
