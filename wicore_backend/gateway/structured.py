"""OpenAI's `response_format` as options of the wire."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wicore_backend.gateway.errors import InvalidRequestError, UnsupportedError
from wicore_backend.gateway.functions import checked_depth, checked_fields, checked_name

_PARAM = "response_format"


def wire_options(response_format: dict[str, Any] | None) -> dict[str, Any]:
    """What constrains the answer: nothing, or a `grammar`.

    An answer is valid by the schema whether `strict` is asked for or not.

    Raises
    ------
    InvalidRequestError
        If it is not of OpenAI's form. What the schema says, the engine judges.
    """
    if response_format is None:
        return {}
    match response_format.get("type"):
        case "text":
            checked_fields(response_format, _PARAM, known=("type",))
            return {}
        case "json_object":
            checked_fields(response_format, _PARAM, known=("type",))
            return {"grammar": {"json_object": True}}
        case "json_schema":
            checked_fields(response_format, _PARAM, known=("type", "json_schema"))
            return {"grammar": {"json_schema": _schema(response_format.get("json_schema"))}}
        case None:
            raise InvalidRequestError(f"{_PARAM} has no type", param=f"{_PARAM}.type")
        case other:
            raise UnsupportedError(
                f"{_PARAM}.type is {str(other)[:80]!r}; there are: text, json_object, json_schema",
                param=f"{_PARAM}.type",
            )


def content_schema(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """The JSON Schema of what `wire_options` has constrained an answer to; None if it may be any text."""
    grammar = options.get("grammar")
    if grammar is None:
        return None
    schema: dict[str, Any] = grammar.get("json_schema", {"type": "object"})
    return schema


def _schema(given: Any) -> dict[str, Any]:
    param = f"{_PARAM}.json_schema"
    fields = checked_fields(given, param, known=("name", "description", "schema", "strict"))
    checked_name(fields.get("name"), f"{param}.name")
    schema = fields.get("schema")
    if not isinstance(schema, dict):
        raise InvalidRequestError(f"{param}.schema is missing, or is no object", param=f"{param}.schema")
    return checked_depth(schema, f"{param}.schema")
