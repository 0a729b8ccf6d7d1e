"""The base of everything that is set from outside: strict, frozen, and clear about what is wrong."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from wicore_backend.errors import InvalidArgumentError


def parse_json(text: str | bytes, name: str) -> Any:
    """The value that `text` holds as JSON.

    Raises
    ------
    InvalidArgumentError
        If it is not JSON, has a name twice in one object, of which one would be ignored in silence, or is nested so
        deeply that Python's parser gives up; it begins with `name`.
    """

    def read(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise InvalidArgumentError(f"{name} has {ascii(twice)[:80]} twice in one object; leave one of them out")
        return values

    try:
        return json.loads(text, object_pairs_hook=read)
    except ValueError as error:
        raise InvalidArgumentError(f"{name} is not JSON: {error}") from None
    except RecursionError:
        raise InvalidArgumentError(f"{name} is JSON that is nested too deeply; flatten it") from None


class Settings(BaseModel):
    """A frozen set of named values. Unknown names, wrong types and values out of range are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InvalidArgumentError(self._explain(error)) from None

    # So that pydantic reads a section itself, without this __init__, and says where in the whole a problem is.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def _explain(cls, error: ValidationError) -> str:
        problems = []
        for problem in error.errors(include_url=False):
            place = problem["loc"]
            name = ".".join(map(str, place)) or cls.__name__
            said = problem["msg"].removeprefix("Value error, ")
            said = said.replace("a valid tuple", "a list").replace("Tuple", "List")
            if problem["type"] == "extra_forbidden":
                known = ", ".join(sorted(cls._section(place[:-1]).model_fields))
                problems.append(f"{name!r} is not a setting; there are: {known}")
            elif problem["type"] == "missing":
                problems.append(f"{name} is missing")
            elif place and isinstance(problem["input"], dict) and problem["type"] == "value_error":  # a whole section
                problems.append(f"{name}: {said}")
            elif place:
                seen = repr(problem["input"])
                seen = seen if len(seen) <= 80 else f"{seen[:77]}..."
                problems.append(f"{name} = {seen}: {said}")
            else:
                problems.append(said)
        return "; ".join(problems)

    @classmethod
    def _section(cls, place: tuple[int | str, ...]) -> type[Settings]:
        """The settings at a place within these; the last that there are on the way."""
        found: type[Settings] = cls
        for part in place:
            field = found.model_fields.get(str(part))
            for kind in () if field is None else (field.annotation, *get_args(field.annotation)):
                if isinstance(kind, type) and issubclass(kind, Settings):
                    found = kind
        return found
