"""Schemas that llguidance takes and cannot keep: found before it sees them, and refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from wicore_backend.errors import InvalidArgumentError

_DEEPEST = 64
"""Of schemas in schemas. llguidance's own bound, of the JSON as such, is 128."""

_ONE = ("additionalProperties", "items", "additionalItems", "not", "contains", "propertyNames", "if", "then", "else")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def check_json_schema(schema: Any) -> None:
    """Refuse what an answer could break although llguidance compiles it.

    Properties that `properties` does not name are written as they come, and the same one may come twice, which a reader
    takes for one: a count of them from below cannot be promised, unless the named ones reach it.

    Raises
    ------
    InvalidArgumentError
        It names the keyword, its place and what to do.
    """
    for place, part in _parts(schema, "", 0):
        least, required = part.get("minProperties"), part.get("required")
        named = len(set(map(str, required))) if isinstance(required, list) else 0
        if isinstance(least, int | float) and least > max(1, named):
            raise InvalidArgumentError(
                f"grammar: minProperties = {least} at {place or 'the top'} cannot be kept: a property may come twice; "
                "name as many under required, or drop it"
            )


def _parts(schema: Any, place: str, depth: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The schemas in a schema, itself first, each with where it stands."""
    if not isinstance(schema, Mapping):
        return
    if depth > _DEEPEST:
        raise InvalidArgumentError(f"grammar: the schema is more than {_DEEPEST} deep at {place[:200]}; flatten it")
    yield place, schema
    for key, value in schema.items():
        if key in _LISTS and isinstance(value, list):
            for i, part in enumerate(value):
                yield from _parts(part, f"{place}/{key}/{i}", depth + 1)
        elif key in _NAMED and isinstance(value, Mapping):
            for name, part in value.items():
                yield from _parts(part, f"{place}/{key}/{name}", depth + 1)
        elif key in _ONE:
            yield from _parts(value, f"{place}/{key}", depth + 1)
