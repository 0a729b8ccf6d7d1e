"""The base of everything that is set from outside: strict, frozen, and clear about what is wrong."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from wicore_backend.errors import InvalidArgumentError


def parse_json(text: str | bytes, name: str) -> Any:
    """The value that `text` holds as JSON.

    Raises
    ------
    InvalidArgumentError
        If it is not JSON, or nested so deeply that Python's parser gives up; it begins with `name`.
    """
    try:
        return json.loads(text)
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

    @classmethod
    def _explain(cls, error: ValidationError) -> str:
        problems = []
        for problem in error.errors(include_url=False):
            name = ".".join(str(part) for part in problem["loc"]) or cls.__name__
            if problem["type"] == "extra_forbidden":
                problems.append(f"{name!r} is not a setting; there are: {', '.join(sorted(cls.model_fields))}")
            elif problem["loc"]:
                seen = repr(problem["input"])
                seen = seen if len(seen) <= 80 else f"{seen[:77]}..."
                problems.append(f"{name} = {seen}: {problem['msg'].removeprefix('Value error, ')}")
            else:
                problems.append(problem["msg"].removeprefix("Value error, "))
        return "; ".join(problems)
