"""Log lines that programs can read: `event name=value name=value`, one line whatever the values hold."""

from __future__ import annotations

import json
import re

_PLAIN = re.compile(r"[\w.,:#/+@-]+", re.ASCII)


def logfmt(event: str, **fields: object) -> str:
    """`event` and its fields in order, None left out.

    Floats have three decimals. A text that is more than a word is quoted as JSON, so that a client's request id cannot
    break the line or make up a field.
    """
    return " ".join([event, *(f"{name}={_value(value)}" for name, value in fields.items() if value is not None)])


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
