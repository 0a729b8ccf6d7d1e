"""Random JSON Schemas: of all that llguidance knows, some that it does not, and some that nothing satisfies."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

NAMES = ["a", "b", "name", "größe", "x y", 'q"uote', "line\nbreak", "\\", "", "日本", "__proto__"]
PATTERNS = ["^[a-z]+$", "^[A-Z][0-9]{2,4}$", "^(red|green|blue)$", "a", "^x?y*$", "[0-9]", r"^\w{1,3}$", r"^\d+\.\d+$"]
FORMATS = ["date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "regex", "none"]
UNSUPPORTED: list[dict[str, Any]] = [
    {"not": {"type": "string"}},
    {"uniqueItems": True, "type": "array"},
    {"contains": {"type": "integer"}, "type": "array"},
    {"if": {"type": "string"}, "then": {"minLength": 2}},
    {"dependentRequired": {"a": ["b"]}},
    {"propertyNames": {"pattern": "^a"}, "type": "object"},
    {"unevaluatedProperties": False},
    {"type": "object", "minProperties": 3},
    {"$ref": "https://example.com/schema.json"},
]


def random_schemas(count: int, *, seed: int) -> list[Any]:
    """So many different ones, of 1 to about 40 keywords; the same for the same seed."""
    draw = random.Random(seed)
    found: dict[str, Any] = {}
    while len(found) < count:
        schema = _schema(draw)
        found.setdefault(json.dumps(schema, sort_keys=True), schema)
    return list(found.values())


def _schema(draw: random.Random) -> Any:
    """One in eight is recursive, one in ten has something that is not supported."""
    schema = _part(draw, depth=3)
    kind = draw.randrange(40)
    if kind < 5:
        following = {"anyOf": [{"$ref": "#/$defs/link"}, {"type": "null"}]}
        link = {"type": "object", "properties": {"value": schema, "next": following}, "additionalProperties": False}
        return {"$ref": "#/$defs/link", "$defs": {"link": link | {"required": ["next"]}}}
    if kind < 9:
        return {"type": "object", "properties": {"a": draw.choice(UNSUPPORTED), "b": schema}, "required": ["a"]}
    return schema


def _part(draw: random.Random, depth: int) -> Any:
    makers: list[Callable[[random.Random, int], Any]] = [_string, _number, _any, _enum, _types]
    if depth:
        makers += [_object, _object, _array, _combination]
    return draw.choice(makers)(draw, depth - 1)


def _string(draw: random.Random, _depth: int) -> Any:
    more: list[dict[str, Any]] = [
        {},
        {"pattern": draw.choice(PATTERNS)},
        {"format": draw.choice(FORMATS)},
        _range(draw, "minLength", "maxLength", lambda: draw.randrange(9)),
    ]
    return {"type": "string"} | draw.choice(more)


def _number(draw: random.Random, _depth: int) -> Any:
    limits = draw.choice([("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")])
    at = draw.choice([lambda: draw.randint(-500, 500), lambda: round(draw.uniform(-100, 100), 2)])
    schema = {"type": draw.choice(["integer", "number"])} | _range(draw, *limits, at)
    if draw.randrange(5) == 0:
        schema["multipleOf"] = draw.choice([1, 2, 3, 7, 10, 0.5, 0.25])
    return schema


def _range(draw: random.Random, least: str, most: str, at: Callable[[], Any]) -> dict[str, Any]:
    low, high = sorted((at(), at()))
    return draw.choice([{}, {least: low}, {most: high}, {least: low, most: high}])


def _any(draw: random.Random, _depth: int) -> Any:
    return draw.choice([{"type": "boolean"}, {"type": "null"}, {}, True])


def _types(draw: random.Random, _depth: int) -> Any:
    return {"type": draw.sample(["string", "integer", "null", "array", "boolean"], draw.randint(1, 3))}


def _enum(draw: random.Random, _depth: int) -> Any:
    options = [_value(draw, 2) for _ in range(draw.randint(1, 4))]
    return draw.choice([{"enum": options}, {"const": options[0]}])


def _value(draw: random.Random, depth: int) -> Any:
    match draw.randrange(8 if depth else 5):
        case 0:
            return None
        case 1:
            return draw.random() < 0.5
        case 2:
            return draw.randint(-1000, 1000)
        case 3:
            return round(draw.uniform(-1e6, 1e6), 4)
        case 4:
            return draw.choice(NAMES)
        case 5 | 6:
            return [_value(draw, depth - 1) for _ in range(draw.randrange(4))]
        case _:
            return {name: _value(draw, depth - 1) for name in draw.sample(NAMES, draw.randrange(4))}


def _array(draw: random.Random, depth: int) -> Any:
    schema: dict[str, Any] = {"type": "array"} | _range(draw, "minItems", "maxItems", lambda: draw.randrange(5))
    if draw.random() < 0.6:
        schema["items"] = _part(draw, depth)
    if draw.random() < 0.25:
        schema["prefixItems"] = [_part(draw, depth) for _ in range(draw.randint(1, 3))]
    return schema


def _object(draw: random.Random, depth: int) -> Any:
    properties = {name: _part(draw, depth) for name in draw.sample(NAMES, draw.randrange(5))}
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if properties and draw.random() < 0.7:
        schema["required"] = draw.sample(sorted(properties), draw.randint(1, len(properties)))
    others: list[dict[str, Any]] = [
        *[{"additionalProperties": False}] * 3,
        {"additionalProperties": _part(draw, depth)},
        {"patternProperties": {draw.choice(["^k_", "[0-9]$"]): _part(draw, depth)}},
        {},
    ]
    schema |= draw.choice(others)
    if draw.random() < 0.15:
        schema |= _range(draw, "minProperties", "maxProperties", lambda: draw.randrange(5))
    return schema


def _combination(draw: random.Random, depth: int) -> Any:
    return {draw.choice(["anyOf", "oneOf", "allOf"]): [_part(draw, depth) for _ in range(draw.randint(1, 3))]}
