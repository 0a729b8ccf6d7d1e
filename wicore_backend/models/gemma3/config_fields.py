"""Typed reading of a checkpoint's JSON settings, with errors that name file, key, value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wicore_backend.errors import CheckpointError

LARGEST_INTEGER = 2**31 - 1
"""What kernels count with."""


class ConfigFields:
    """One JSON object of a checkpoint's file. A key whose value is null counts as missing."""

    def __init__(self, path: Path, values: Mapping[str, Any], *, prefix: str = "") -> None:
        self._path = path
        self._values = values
        self._prefix = prefix

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def sections(self) -> tuple[ConfigFields, ...]:
        """The nested objects, all of whose values are such."""
        return tuple(self.section(key) for key in self._values)

    def error(self, key: str, allowed: str) -> CheckpointError:
        """The error for a value that cannot be used, to be raised by the caller."""
        seen = repr(self._values[key]) if key in self._values else "missing"
        seen = seen if len(seen) <= 80 else f"{seen[:77]}..."
        return CheckpointError(f"{self._path}: {self._prefix}{key} is {seen}; it must be {allowed}")

    def section(self, key: str) -> ConfigFields:
        """A nested object, empty if it is missing."""
        values = self._values[key] if key in self else {}
        if not isinstance(values, dict):
            raise self.error(key, "an object")
        return ConfigFields(self._path, values, prefix=f"{self._prefix}{key}.")

    def only(self, keys: tuple[str, ...]) -> None:
        """Refuse keys other than `keys`."""
        for key in self._values:
            if key not in keys:
                raise self.error(key, f"absent; the keys here are {' and '.join(keys)}")

    def integer(self, key: str, *, default: int | None = None, minimum: int = 1, maximum: int = LARGEST_INTEGER) -> int:
        """An integer from `minimum` to `maximum`; without a default the key is required."""
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise self.error(key, f"an integer from {minimum:,} to {maximum:,}")
        return value

    def positive(self, key: str, *, default: float | None = None) -> float:
        """A positive, finite number; without a default the key is required."""
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self.error(key, "a positive number")
        return float(value)

    def optional_positive(self, key: str) -> float | None:
        """A positive number, or None where the key is missing."""
        return self.positive(key) if key in self else None

    def boolean(self, key: str, *, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def choice(self, key: str, allowed: tuple[str, ...], *, default: str | None = None) -> str:
        """One of `allowed`; without a default the key is required."""
        value = self._value(key, default)
        if not isinstance(value, str) or value not in allowed:
            raise self.error(key, " or ".join(map(repr, allowed)))
        return value

    def choices(self, key: str, allowed: tuple[str, ...]) -> list[str]:
        """A list, each entry one of `allowed`."""
        values = self._values[key]
        if not isinstance(values, list) or not all(isinstance(v, str) and v in allowed for v in values):
            raise self.error(key, f"a list of {' and '.join(map(repr, allowed))}")
        return values

    def token_ids(self, key: str) -> tuple[int, ...]:
        """A token id or a list of them."""
        value = self._values[key]
        ids = value if isinstance(value, list) else [value]
        if not ids or not all(
            isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= LARGEST_INTEGER for i in ids
        ):
            raise self.error(key, f"a token id or a list of token ids, each from 0 to {LARGEST_INTEGER:,}")
        return tuple(ids)

    def _value(self, key: str, default: Any) -> Any:
        return self._values[key] if key in self else default
