"""Sizes and ages as people write them: "10GB", "30d"."""

import re

from .errors import InputError

BYTES = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


def size_bytes(text: str) -> int:
    """ "500MB", "1.5 GB" -> bytes, at least one. Raises InputError."""
    return max(1, round(_amount(text, BYTES, "a size", "10GB")))


def age_s(text: str) -> float:
    """ "12h", "30d" -> seconds, above 0. Raises InputError."""
    return _amount(text, SECONDS, "an age", "30d")


def _amount(text: str, units: dict[str, int], what: str, example: str) -> float:
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?) *([A-Za-z]+)", text.strip()) if isinstance(text, str) else None
    factor = {unit.lower(): value for unit, value in units.items()}.get(match[2].lower()) if match else None
    if factor is None or float(match[1]) == 0:
        raise InputError(
            f"expected {what} above 0 such as {example!r}, with one of the units {', '.join(units)}; got {text!r}"
        )
    return float(match[1]) * factor
