"""What a running line logs: one JSON object a line on stderr, or words in a terminal, without any credentials.

    start_log()                     # once, in a program that runs a line; a library leaves logging alone
    line.add(StatusLog())           # what happens to cameras, outputs and the line

A message that repeats itself is written five times in 10 s, then counted; the count is written with the next
message that comes after these 10 s, or at the end.
"""

import json
import logging
import re
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone

from ..credentials import without_credentials
from ..outputs.delivery import Output
from ..verdict import Record, Status

BURST, REPEAT_S = 5, 10.0
MAX_MESSAGES = 1000  # told apart at a time, in memory
GOOD_NEWS = ("started", "stopped", "connecting", "runs", "ended", "back", "well")  # last words of an event
BAD_NEWS = ("failed", "error")

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # words may come from a device: they move no cursor
status_logger = logging.getLogger("omniad_edge.line.line")


def start_log(level: int | str = logging.INFO) -> "LineHandler":
    """Log everything of at least `level` to stderr, also Python's warnings; replaces an earlier call's set-up."""
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, LineHandler)]:
        root.removeHandler(handler)
        handler.close()
    handler = LineHandler()
    root.addHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(True)
    return handler


class StatusLog(Output):
    """Logs the status records of a line."""

    name = "log"
    kinds = ("status",)
    images = False

    def write(self, records: list[Record]) -> None:
        for record in records:
            log_status(record)


def log_status(status: Status) -> None:
    """At INFO what is well, at ERROR what failed, at WARNING all else."""
    last_word = status.event.rsplit(" ", 1)[-1]
    level = logging.INFO if last_word in GOOD_NEWS else logging.ERROR if last_word in BAD_NEWS else logging.WARNING
    fields = {"line": status.origin.line, "event": status.event, "who": status.who, "detail": status.detail}
    text = ": ".join(filter(None, (status.event, status.who, status.detail)))
    status_logger.log(level, "%s", text, extra={"fields": fields, "repeats": f"{status.event}: {status.who}"})


@dataclass
class Repeats:
    """Of one message since `since_s`: `written`, then `held_back`; `last` is the newest of these."""

    since_s: float
    written: int = 0
    held_back: int = 0
    last: logging.LogRecord | None = None


class LineHandler(logging.Handler):
    """Writes to what sys.stderr is at the time: JSON lines, or for people if that is a terminal.

    A record's `fields`, a dict, join its JSON object. Two records are the same message if their `repeats` are, or
    else their texts but for the numbers in them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._repeats: dict[tuple, Repeats] = {}
        self._next_look_s = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        now_s = time.monotonic()
        if now_s >= self._next_look_s or len(self._repeats) >= MAX_MESSAGES:
            self._forget(now_s)
        text = text_of(record)
        name = getattr(record, "repeats", None) or re.sub(r"\d+", "#", text)
        repeats = self._repeats.setdefault((record.name, record.levelno, name), Repeats(now_s))
        if now_s - repeats.since_s >= REPEAT_S:
            self._tell_held_back(repeats)
            repeats.since_s, repeats.written = now_s, 0
        if repeats.written < BURST:
            repeats.written += 1
            self._write(record, text)
        else:
            repeats.held_back += 1
            # Without the error, whose frames would keep pictures in memory; it was written before.
            repeats.last = logging.makeLogRecord(record.__dict__ | {"exc_info": None})

    def flush(self) -> None:
        """Write how many were held back so far; at exit, logging calls it."""
        with self.lock:
            for repeats in self._repeats.values():
                self._tell_held_back(repeats)

    def close(self) -> None:
        self.flush()
        super().close()

    def _forget(self, now_s: float) -> None:
        for name, repeats in list(self._repeats.items()):
            if now_s - repeats.since_s >= REPEAT_S or len(self._repeats) >= MAX_MESSAGES:
                self._tell_held_back(repeats)
                del self._repeats[name]
        self._next_look_s = now_s + REPEAT_S

    def _tell_held_back(self, repeats: Repeats) -> None:
        if repeats.held_back:
            times = f"{repeats.held_back} more time{'s' * (repeats.held_back > 1)}"
            self._write(repeats.last, f"{times}: {text_of(repeats.last)}", repeats.held_back)
            repeats.held_back = 0

    def _write(self, record: logging.LogRecord, text: str, held_back: int = 0) -> None:
        stream = sys.stderr
        form = human_line if stream.isatty() else json_line
        # Without stderr there is nowhere to complain, and no reason to stop the line.
        with suppress(OSError, ValueError):
            stream.write(form(record, text, held_back) + "\n")
            stream.flush()


def text_of(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError, KeyError):  # the arguments do not fit; logging would print them as they are
        return f"{record.msg} {record.args}"


def json_line(record: logging.LogRecord, text: str, held_back: int = 0) -> str:
    """time, level, logger, message and thread; `fields`, held_back and error where there are any."""
    entry = {
        "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
        "level": record.levelname.lower(),
        "logger": record.name,
        "message": without_credentials(text),
        "thread": record.threadName,
    }
    entry |= shown(getattr(record, "fields", {}))
    if held_back:
        entry["held_back"] = held_back
    if traceback := traceback_of(record):
        entry["error"] = traceback
    return json.dumps(entry, ensure_ascii=False)


def human_line(record: logging.LogRecord, text: str, held_back: int = 0) -> str:
    clock = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
    line = f"{clock} {record.levelname:<7} {without_credentials(text)}"
    if traceback := traceback_of(record):
        line += f"\n{traceback}"
    return CONTROL.sub(" ", line)


def shown(value: object) -> object:
    if isinstance(value, dict):
        return {name: shown(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [shown(each) for each in value]
    return value if isinstance(value, int | float | None) else without_credentials(value)


def traceback_of(record: logging.LogRecord) -> str:
    if not record.exc_info or record.exc_info[0] is None:
        return ""
    return without_credentials(logging.Formatter().formatException(record.exc_info))
