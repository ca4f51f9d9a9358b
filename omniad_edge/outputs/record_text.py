"""Records as text, the same for every output."""

import json
import math

from ..verdict import Record


def json_text(record: Record) -> str:
    """One line of ASCII JSON, valid for every reader: numbers JSON has not (NaN, infinity) become null."""
    fields = record.to_dict()
    try:
        return json.dumps(fields, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(fields), allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
