"""What the command lines of the benchmarks have in common: numbers, the JSON file, exit codes."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from omniad_edge.errors import OmniADError
from omniad_edge.files import atomic_write
from omniad_edge.progress import say


def make_parser(description: str) -> argparse.ArgumentParser:
    """One that shows a module's docstring as it stands."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def positive(text: str) -> int:
    return at_least(1, text)


def natural(text: str) -> int:
    return at_least(0, text)


def at_least(least: int, text: str) -> int:
    if int(text) < least:
        raise argparse.ArgumentTypeError(f"expected at least {least}; got {text}")
    return int(text)


def write_json(path: Path | None, report: dict) -> None:
    """Nothing without a path."""
    if path:
        with atomic_write(path) as part:
            part.write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")


def exit_code(name: str, work: Callable[[], bool | None]) -> int:
    """0; 1 if `work` returns False or fails in a way that it foresaw, which is then told on stderr."""
    try:
        return 1 if work() is False else 0
    except (OmniADError, OSError) as exc:
        say(f"{name}: {exc}")
        return 1
