"""OpenAI's declarations of functions, checked."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wicore_backend.gateway.errors import InvalidRequestError, UnsupportedError

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

_DEEPEST = 100
"""Of JSON in JSON: the engine's grammar compiler takes 128."""

_OPEN_ENDED = frozenset(("$ref", "allOf", "anyOf", "oneOf", "patternProperties", "additionalProperties", "if"))
"""Keywords beside which it is not for us to say that there are no other properties."""


@dataclass(frozen=True, slots=True)
class Function:
    """What the model can call.

    Attributes
    ----------
    parameters
        A JSON Schema by which the arguments are written: the client's, or one that takes less.
    """

    name: str
    description: str | None
    parameters: dict[str, Any]

    @property
    def declaration(self) -> dict[str, Any]:
        """What the model is told."""
        described = {} if self.description is None else {"description": self.description}
        return {"name": self.name, **described, "parameters": self.parameters}


def read_functions(tools: Sequence[Any]) -> tuple[Function, ...]:
    """The functions that `tools` declares.

    Raises
    ------
    InvalidRequestError
        For anything that is not a function by OpenAI's form, named by its place.
    """
    functions: dict[str, Function] = {}
    for i, tool in enumerate(tools):
        place = f"tools[{i}]"
        kind = tool.get("type") if isinstance(tool, Mapping) else None
        if kind != "function":
            raise UnsupportedError(f"{place}.type is {reprlib.repr(kind)}; tools are functions", param=f"{place}.type")
        function = _read_function(checked_fields(tool, place, known=("type", "function")), f"{place}.function")
        if function.name in functions:
            raise InvalidRequestError(f"{place} declares {function.name!r} again", param=f"{place}.function.name")
        functions[function.name] = function
    return tuple(functions.values())


def _read_function(tool: Mapping[str, Any], place: str) -> Function:
    fields = checked_fields(tool.get("function"), place, known=("name", "description", "parameters", "strict"))
    description, parameters = fields.get("description"), fields.get("parameters")
    if not isinstance(description, str | None):
        raise InvalidRequestError(f"{place}.description is no text", param=f"{place}.description")
    if not isinstance(parameters, dict | None) or (parameters or {}).get("type", "object") != "object":
        raise InvalidRequestError(
            f"{place}.parameters is {reprlib.repr(parameters)}; it takes the JSON Schema of an object",
            param=f"{place}.parameters",
        )
    schema = checked_depth(parameters or {}, f"{place}.parameters")
    return Function(checked_name(fields.get("name"), f"{place}.name"), description, _arguments(schema))


def _arguments(parameters: dict[str, Any]) -> dict[str, Any]:
    """The schema of a call's arguments: those that are declared, and no others unless the schema speaks of them."""
    if _OPEN_ENDED.isdisjoint(parameters):
        return {"type": "object", "properties": {}, **parameters, "additionalProperties": False}
    return {"type": "object", **parameters}


def checked_depth(schema: dict[str, Any], place: str) -> dict[str, Any]:
    """A schema that whoever writes or reads it can follow. Raises InvalidRequestError."""
    level: list[Any] = [schema]
    for _ in range(_DEEPEST):
        level = [part for value in level for part in _inside(value)]
    if level:
        raise InvalidRequestError(f"{place} is nested more than {_DEEPEST} deep; flatten it", param=place)
    return schema


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def checked_fields(value: Any, place: str, *, known: tuple[str, ...]) -> Mapping[str, Any]:
    """An object with no fields but those that are `known`. Raises InvalidRequestError."""
    if not isinstance(value, Mapping):
        raise InvalidRequestError(f"{place} is {reprlib.repr(value)}; it takes an object", param=place)
    for name in value:
        if name not in known:
            raise InvalidRequestError(
                f"{place} has the field {reprlib.repr(name)}; there are: {', '.join(known)}",
                param=f"{place}.{ascii(name)[1:-1]}"[:200],
            )
    return value


def checked_name(name: Any, place: str) -> str:
    """A name as OpenAI has them. Raises InvalidRequestError."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequestError(
            f"{place} is {reprlib.repr(name)}; it takes 1 to 64 letters, digits, _ and -", param=place
        )
    return name
