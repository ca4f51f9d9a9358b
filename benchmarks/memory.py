"""Memory of this process. Imports nothing of ours: peers are measured with it in their own environment."""

import re
from pathlib import Path

STATUS = Path("/proc/self/status")
KEYS = (("resident_mib", "VmRSS"), ("peak_mib", "VmHWM"))


def memory_mib() -> dict[str, float | None]:
    """Resident now, and at its peak; None where there is no /proc.

    Not getrusage's peak: that one begins with the parent's, from before this program was loaded.
    """
    status = STATUS.read_text() if STATUS.exists() else ""
    found = {name: re.search(rf"^{key}:\s*(\d+) kB$", status, re.MULTILINE) for name, key in KEYS}
    return {name: round(int(match[1]) / 1024, 1) if match else None for name, match in found.items()}
