"""Schemas that llguidance takes and does not keep: made exact where that can be, else refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from wicore_backend.errors import InvalidArgumentError

_DEEPEST = 64
"""Of schemas in schemas. llguidance's own bound, of the JSON as such, is 128."""

_ONE = ("additionalProperties", "items", "additionalItems", "not", "contains", "propertyNames", "if", "then", "else")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")

_YEAR = r"(000[1-9]|00[1-9][0-9]|0[1-9][0-9][0-9]|[1-9][0-9][0-9][0-9])"
_LEAP_YEAR = r"([0-9][0-9](0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
_LONG = r"(01|03|05|07|08|10|12)-(0[1-9]|[12][0-9]|3[01])"
_SHORT = r"(04|06|09|11)-(0[1-9]|[12][0-9]|30)"
_FEBRUARY = r"02-(0[1-9]|1[0-9]|2[0-8])"
_DATE = rf"({_YEAR}-({_LONG}|{_SHORT}|{_FEBRUARY})|{_LEAP_YEAR}-02-29)"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"

_EXACT = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}
"""In place of formats: llguidance's have a 29th of February in every year, a year 0, and leap seconds at any time."""


def exact_json_schema(schema: Any) -> Any:
    """A copy by which llguidance makes nothing but what is valid by `schema`.

    Raises
    ------
    InvalidArgumentError
        If there is none, or it is no JSON. It names the keyword, its place and what to do.
    """
    _check(schema)
    try:
        exact = json.loads(json.dumps(schema, allow_nan=False))
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidArgumentError(f"grammar: the schema cannot be written as JSON: {error}") from None
    for _, part in list(_parts(exact, "", 0)):
        pattern, others = _EXACT.get(str(part.get("format"))), part.get("allOf", [])
        if pattern is not None and isinstance(others, list):
            del part["format"]
            part["allOf"] = [*others, {"pattern": pattern}]
    return exact


def _check(schema: Any) -> None:
    """Refuse what an answer could break although llguidance compiles it.

    Properties that `properties` does not name are written as they come, and the same one may come twice, which a reader
    takes for one: a count of them from below cannot be promised, unless the named ones reach it.
    """
    for place, part in _parts(schema, "", 0):
        least, required = part.get("minProperties"), part.get("required")
        named = len(set(map(str, required))) if isinstance(required, list) else 0
        if isinstance(least, int | float) and least > max(1, named):
            raise InvalidArgumentError(
                f"grammar: minProperties = {least} at {place or 'the top'} cannot be kept: a property may come twice; "
                "name as many under required, or drop it"
            )


def _parts(schema: Any, place: str, depth: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The schemas in a schema, itself first, each with where it stands."""
    if not isinstance(schema, dict):
        return
    if depth > _DEEPEST:
        raise InvalidArgumentError(f"grammar: the schema is more than {_DEEPEST} deep at {place[:200]}; flatten it")
    yield place, schema
    for key, value in schema.items():
        if key in _LISTS and isinstance(value, list):
            for i, part in enumerate(value):
                yield from _parts(part, f"{place}/{key}/{i}", depth + 1)
        elif key in _NAMED and isinstance(value, dict):
            for name, part in value.items():
                yield from _parts(part, f"{place}/{key}/{name}", depth + 1)
        elif key in _ONE:
            yield from _parts(value, f"{place}/{key}", depth + 1)
