"""Values out of a JSON schema, most of them right, some wrong in one place."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4),
    max_leaves=20,
)


def values(schema: dict[str, Any], document: dict[str, Any], *, depth: int = 0) -> st.SearchStrategy[Any]:
    """Of a schema of an OpenAPI document: right ones, and, one time in twelve, anything in their place."""
    return st.integers(0, 11).flatmap(lambda draw: _right(schema, document, depth) if draw else ANYTHING)


def _right(schema: dict[str, Any], document: dict[str, Any], depth: int) -> st.SearchStrategy[Any]:
    if "$ref" in schema:
        part: Any = document
        for name in schema["$ref"].removeprefix("#/").split("/"):
            part = part[name]
        return _right(part, document, depth)
    for several in ("anyOf", "oneOf"):
        if several in schema:
            # Deep down the simplest, since schemas may be recursive.
            choices = schema[several] if depth < 5 else schema[several][-1:]
            return st.sampled_from(choices).flatmap(lambda choice: values(choice, document, depth=depth + 1))
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    match schema.get("type"):
        case "object" if "properties" in schema:
            return _objects(schema, document, depth)
        case "object":
            return st.dictionaries(st.text(max_size=8), ANYTHING if depth < 5 else st.none(), max_size=3)
        case "array":
            items = values(schema.get("items", {}), document, depth=depth + 1)
            return st.lists(items, min_size=min(3, schema.get("minItems", 0)), max_size=3)
        case "string":
            return st.text(min_size=min(64, schema.get("minLength", 0)), max_size=min(64, schema.get("maxLength", 64)))
        case "integer" | "number" as kind:
            low, high = schema.get("minimum", -5), schema.get("maximum", 300)
            if kind == "integer":
                return st.integers(int(low), int(min(high, low + 300)))
            return st.floats(low, min(high, low + 300), allow_nan=False)
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
        case _:
            return ANYTHING


def _objects(schema: dict[str, Any], document: dict[str, Any], depth: int) -> st.SearchStrategy[Any]:
    required = schema.get("required", [])
    parts = schema["properties"]
    optional = sorted(parts.keys() - set(required)) if depth < 8 else []

    @st.composite
    def build(draw: st.DrawFn) -> dict[str, Any]:
        chosen = draw(st.lists(st.sampled_from(optional), max_size=4, unique=True)) if optional else []
        return {name: draw(values(parts[name], document, depth=depth + 1)) for name in [*required, *chosen]}

    return build()
