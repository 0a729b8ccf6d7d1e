"""Random JSON Schemas: of all that llguidance knows, some that it does not, and some that nothing satisfies."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

NAMES = st.sampled_from(["a", "b", "name", "größe", "x y", 'q"uote', "line\nbreak", "\\", "", "日本", "__proto__"])
PATTERNS = [
    "^[a-z]+$",
    "^[A-Z][0-9]{2,4}$",
    "^(red|green|blue)$",
    "a",
    "^x?y*$",
    "[0-9]",
    r"^\w{1,3}$",
    r"^\d+\.\d+$",
    "^.{2,5}$",
]
FORMATS = [
    "date",
    "time",
    "date-time",
    "duration",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "uuid",
    "uri",
    "regex",
    "nobody-knows",
]
UNSUPPORTED = [
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

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-1000, 1000),
    st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 4)),
    NAMES,
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=6
)


@st.composite
def strings(draw: st.DrawFn) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    match draw(st.integers(0, 4)):
        case 0:
            schema["pattern"] = draw(st.sampled_from(PATTERNS))
        case 1:
            schema["format"] = draw(st.sampled_from(FORMATS))
        case 2 | 3:
            schema |= _range(draw, "minLength", "maxLength", st.integers(0, 8))
    return schema


@st.composite
def numbers(draw: st.DrawFn) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": draw(st.sampled_from(["integer", "number"]))}
    limits = st.integers(-500, 500) | st.floats(-100, 100, allow_nan=False).map(lambda x: round(x, 2))
    schema |= _range(
        draw, *draw(st.sampled_from([("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")])), limits
    )
    if draw(st.integers(0, 4)) == 0:
        schema["multipleOf"] = draw(st.sampled_from([1, 2, 3, 7, 10, 0.5, 0.25]))
    return schema


def _range(draw: st.DrawFn, least: str, most: str, limits: st.SearchStrategy[Any]) -> dict[str, Any]:
    low, high = sorted(draw(st.tuples(limits, limits)))
    given = draw(st.sampled_from([(least,), (most,), (least, most), ()]))
    return {name: low if name == least else high for name in given}


@st.composite
def arrays(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "array"} | _range(draw, "minItems", "maxItems", st.integers(0, 4))
    if draw(st.booleans()):
        schema["items"] = draw(inner)
    if draw(st.integers(0, 3)) == 0:
        schema["prefixItems"] = draw(st.lists(inner, min_size=1, max_size=3))
    return schema


@st.composite
def objects(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> dict[str, Any]:
    properties = draw(st.dictionaries(NAMES, inner, max_size=4))
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    required = draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []
    if required:
        schema["required"] = required
    match draw(st.integers(0, 5)):
        case 0 | 1 | 2:
            schema["additionalProperties"] = False
        case 3:
            schema["additionalProperties"] = draw(inner)
        case 4:
            schema["patternProperties"] = {draw(st.sampled_from(["^k_", "[0-9]$"])): draw(inner)}
    if draw(st.integers(0, 5)) == 0:
        schema |= _range(draw, "minProperties", "maxProperties", st.integers(0, 4))
    return schema


@st.composite
def combined(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> dict[str, Any]:
    keyword = draw(st.sampled_from(["anyOf", "oneOf", "allOf"]))
    return {keyword: draw(st.lists(inner, min_size=1, max_size=3))}


leaves = st.one_of(
    strings(),
    numbers(),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {}, True]),
    st.builds(lambda options: {"enum": options}, st.lists(values, min_size=1, max_size=4)),
    st.builds(lambda value: {"const": value}, values),
    st.builds(
        lambda types: {"type": types},
        st.lists(st.sampled_from(["string", "integer", "null", "array"]), min_size=1, unique=True),
    ),
)
nested = st.recursive(leaves, lambda inner: objects(inner) | arrays(inner) | combined(inner), max_leaves=8)


@st.composite
def schemas(draw: st.DrawFn) -> dict[str, Any] | bool:
    """A schema of about 1 to 40 keywords; one in eight is recursive, one in ten has something unsupported."""
    schema: Any = draw(nested)
    kind = draw(st.integers(0, 39))
    if kind < 5:
        link = {
            "type": "object",
            "properties": {"value": schema, "next": {"anyOf": [{"$ref": "#/$defs/link"}, {"type": "null"}]}},
        }
        return {"$ref": "#/$defs/link", "$defs": {"link": link | {"required": ["next"], "additionalProperties": False}}}
    if kind < 9:
        return {
            "type": "object",
            "properties": {"a": draw(st.sampled_from(UNSUPPORTED)), "b": schema},
            "required": ["a"],
        }
    return schema


def random_schemas(count: int, *, seed_: int) -> list[Any]:
    """So many different ones; the same for the same seed."""
    found: dict[str, Any] = {}

    @seed(seed_)
    @settings(
        max_examples=2 * count,
        database=None,
        phases=[Phase.generate],
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(schemas())
    def collect(schema: Any) -> None:
        found.setdefault(json.dumps(schema, sort_keys=True), schema)

    collect()
    return list(found.values())[-count:]
