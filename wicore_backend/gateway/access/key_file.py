"""The file of keys: read whole, replaced whole.

It is JSON: `{"keys": {"ID": {...}}, "tenants": {"NAME": {"limits": {...}}}}`, made for
`keys add|list|revoke`, and edited by hand where limits change.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from wicore_backend.errors import InvalidArgumentError
from wicore_backend.gateway.access.keys import KeyLimits, KeyRecord
from wicore_backend.settings import Settings, parse_json

KeyId = Annotated[str, Field(pattern="^[0-9a-f]{12}$")]
_LARGEST = 64 * 2**20


class TenantRecord(Settings):
    """What all keys of a tenant share."""

    limits: KeyLimits = KeyLimits()


class KeySet(Settings):
    """Everything that the file says."""

    keys: dict[KeyId, KeyRecord] = Field(default_factory=dict)
    tenants: dict[str, TenantRecord] = Field(default_factory=dict)

    def with_key(self, key_id: str, record: KeyRecord) -> KeySet:
        """The same, and one more."""
        return self.model_copy(update={"keys": {**self.keys, key_id: record}})

    def without_key(self, key_id: str) -> KeySet:
        """The same without one.

        Raises
        ------
        InvalidArgumentError
            If there is no such key.
        """
        if key_id not in self.keys:
            raise InvalidArgumentError(f"there is no key {key_id!r}; `keys list` shows the ids")
        return self.model_copy(update={"keys": {i: record for i, record in self.keys.items() if i != key_id}})


def read_keys(path: Path) -> KeySet:
    """The keys in a file.

    Raises
    ------
    InvalidArgumentError
        If it cannot be read or does not hold keys; it says where.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
    except OSError as error:
        raise InvalidArgumentError(f"the keys' file {path} cannot be read: {error.strerror}") from None
    if len(content) > _LARGEST:
        raise InvalidArgumentError(f"the keys' file {path} is larger than {_LARGEST} bytes")
    values = parse_json(content, str(path))
    if not isinstance(values, Mapping):
        raise InvalidArgumentError(f'{path} must hold an object {{"keys": {{...}}}}, not {str(values)[:40]!r}')
    for name, kind in (("keys", KeyRecord), ("tenants", TenantRecord)):
        records = values.get(name)
        if isinstance(records, dict):  # One by one first, so that an error says whose it is.
            for record_id, record in records.items():
                with _named(f"{path}: {name} {record_id!r}"):
                    kind(**_fields(record))
    with _named(str(path)):
        return KeySet(**values)


def _fields(record: object) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise InvalidArgumentError(f"must be an object, not {str(record)[:40]!r}")
    return record


@contextmanager
def _named(where: str) -> Iterator[None]:
    try:
        yield
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{where}: {error}") from None


def write_keys(path: Path, keys: KeySet) -> None:
    """Replace the file at once: who reads it meanwhile sees the old one or the new one, and so does a restart after a
    crash. Only its owner may read it."""
    content = json.dumps(keys.model_dump(mode="json", exclude_defaults=True), indent=2) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Keeps other commands from changing the file at the same time, by a lock beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{path}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
