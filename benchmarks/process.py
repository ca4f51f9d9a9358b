"""What a method costs in a process of its own: memory, and the time of its calls, asked for from outside.

Imports nothing of ours: peers are measured with it in their own environment.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, sleep

STATUS = Path("/proc/self/status")
KEYS = (("resident_mib", "VmRSS"), ("peak_mib", "VmHWM"))
SETTLE_S = 0.02  # threads of the process before spin on for some ms; see cpu.py


def memory_mib() -> dict[str, float | None]:
    """Resident now, and at its peak; None where there is no /proc.

    Not getrusage's peak: that one begins with the parent's, from before this program was loaded.
    """
    status = STATUS.read_text() if STATUS.exists() else ""
    found = {name: re.search(rf"^{key}:\s*(\d+) kB$", status, re.MULTILINE) for name, key in KEYS}
    return {name: round(int(match[1]) / 1024, 1) if match else None for name, match in found.items()}


def serve(call: Callable[[], object]) -> None:
    """Answer each line on stdin with the ms of one call, after an untimed one, and the peak memory so far."""
    for _ in sys.stdin:
        sleep(SETTLE_S)
        call()
        start = perf_counter()
        call()
        elapsed_ms = 1e3 * (perf_counter() - start)
        print(json.dumps({"ms": round(elapsed_ms, 3), "peak_mib": memory_mib()["peak_mib"]}), flush=True)
