"""The keys of a line's TOML file, by table: what each takes, and what is said where something else is written."""

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple

from ..address import trusted
from ..engine import BACKENDS, PRECISIONS
from ..errors import InputError
from ..outputs.mqtt import topic_levels
from ..sizes import age_s, size_bytes
from .line import check_choice


class Kind(NamedTuple):
    """What a key takes. check: raises InputError for a value that makes no sense; path: relative to the file."""

    types: tuple[type, ...]
    words: str
    check: Callable[[Any], object] | None = None
    path: bool = False


def check_near_miss(value: float | bool) -> None:
    if value is True:
        raise InputError("expected a number above 0 to 1, or false for none; got true")


TEXT = Kind((str,), "text")
PATH = Kind((str,), "a path", path=True)
WHOLE = Kind((int,), "a whole number")
NUMBER = Kind((int, float), "a number")
TABLE = Kind((dict,), "a table")
ADDRESS = Kind((str, dict), "an address, or a table with its url")
KEEP = Kind((str,), "text such as '10GB'", size_bytes)
TABLES: dict[str, dict[str, Kind]] = {
    "": {
        "bundle": PATH,
        "name": TEXT,
        "product": TEXT,
        "source": Kind((str, int, dict), "an address, or a table of names and addresses"),
        "trigger": TEXT,
        "policy": TEXT,
        "deadline_ms": NUMBER,
        "on_timeout": TEXT,
        "views": WHOLE,
        "rule": TEXT,
        "on_error": TEXT,
        "backend": Kind((str,), "text", lambda name: check_choice("backend", name, ("auto", *BACKENDS))),
        "precision": Kind((str,), "text", lambda name: check_choice("precision", name, ("auto", *PRECISIONS))),
        "threads": WHOLE,
        "ca_file": Kind((str,), "a path", trusted, path=True),
        "outputs": TABLE,
        "health": TABLE,
    },
    "outputs": {
        "json_lines": PATH,
        "mqtt": ADDRESS,
        "webhook": ADDRESS,
        "rejects": Kind((str, dict), "a folder, or a table with it"),
        "spool": PATH,
    },
    "outputs.mqtt": {"url": TEXT, "topic": Kind((str,), "text", topic_levels), "keep": KEEP},
    "outputs.webhook": {"url": TEXT, "timeout_s": NUMBER, "keep": KEEP},
    "outputs.rejects": {
        "folder": PATH,
        "keep": KEEP,
        "max_age": Kind((str,), "text such as '30d'", age_s),
        "near_miss": Kind((int, float, bool), "a number, or false", check_near_miss),
    },
    "health": {"host": TEXT, "port": WHOLE},
}


def unknown(where: str, name: str) -> str:
    """What is wrong with this name in that table."""
    kinds = TABLES[where]
    for other, others in TABLES.items():
        if name in others:
            return f"unknown here; {move_to(other)}"
    if close := difflib.get_close_matches(name, kinds, 1):
        return f"unknown; did you mean {close[0]}?"
    return f"unknown; expected one of {', '.join(kinds)}"


def move_to(table: str) -> str:
    return f"write it in [{table}]" if table else "write it before the first [table]"


def in_words(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    return f"the text {value!r}" if isinstance(value, str) else str(value).lower()
