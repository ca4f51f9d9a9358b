"""Facts about the machine and the software that a measurement is worth nothing without."""

import os
import subprocess
from datetime import datetime, timezone
from pathlib import Path

from omniad_edge.doctor import machine_facts
from omniad_edge.jetson import Jetson
from omniad_edge.versions import versions

JETSON = Jetson()
ROOT = Path(__file__).resolve().parents[1]


def facts() -> dict:
    """Date, commit, CPU, memory, system and versions; JSON-safe. What cannot be known is "unknown" or absent.

    jetson: of such a board its model, release, power mode and whether its clocks are fixed; else None.
    """
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        **machine_facts(),
        "jetson": JETSON.facts() if JETSON else None,
        "versions": {name: value for name, value in versions().items() if name != "python"},
    }


def commit() -> str:
    """The checkout's commit, with "+ changes" if files differ from it."""
    head, changes = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain")
    return f"{head} + changes" if head and changes else head or "unknown"


def git(*command: str) -> str:
    try:
        done = subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def load_average() -> float | None:
    """Processes that wanted a CPU, mean of the last minute; None where the system does not count them."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def jetson_state() -> dict | None:
    """Clocks, temperatures and power now; None where this is no Jetson."""
    return JETSON.state() if JETSON else None
