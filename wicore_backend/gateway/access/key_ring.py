"""The keys that are valid now: the file's, as it last made sense."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from wicore_backend.errors import InvalidArgumentError
from wicore_backend.gateway.access.key_file import KeySet, read_keys
from wicore_backend.gateway.access.keys import KeyLimits, KeyRecord, PresentedKey
from wicore_backend.observability.logfmt import logfmt

_log = logging.getLogger(__name__)

_CHECK_EVERY_S = 1.0
"""How long a change of the file may go unnoticed: one `stat` a second costs nothing."""

_NOBODY = KeyRecord(salt="0" * 32, sha256="0" * 64, tenant="nobody")
"""What a key with an unknown id is compared with, so that its refusal takes as long as that of a wrong secret."""


class ReloadListener(Protocol):
    """Is told how readings of the file went."""

    def keys_reloaded(self, *, keys: int, ok: bool) -> None:
        """`keys` are valid now; the file was `ok`, or the keys before it stay."""


@dataclass(frozen=True, slots=True)
class FileState:
    """How the file looks from outside: what differs when it has changed."""

    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: Path) -> FileState | None:
        """None if there is no such file."""
        try:
            stat = os.stat(path)
        except OSError:
            return None
        return cls(stat.st_ino, stat.st_size, stat.st_mtime_ns)


@dataclass(slots=True)
class KeyRing:
    """The valid keys, of which a file is the source.

    The file is looked at when a key is asked for, at most once a second. A file that has become unreadable or wrong
    changes nothing: the keys before it stay valid, and log and metric say so until it is right again. At start-up it
    must be right.

    Raises
    ------
    InvalidArgumentError
        If the file is wrong at start-up.
    """

    path: Path
    clock: Callable[[], float] = time.monotonic
    listener: ReloadListener | None = None
    problem: str = field(init=False, default="")
    """Why the file as it stands is not in force; empty if it is."""
    _keys: KeySet = field(init=False)
    _seen: FileState | None = field(init=False)
    _next_look: float = field(init=False)

    def __post_init__(self) -> None:
        self._seen = FileState.of(self.path)
        self._keys = read_keys(self.path)
        self._next_look = self.clock() + _CHECK_EVERY_S
        self._tell(ok=True)

    @property
    def keys(self) -> KeySet:
        """What is in force."""
        return self._keys

    def find(self, presented: PresentedKey) -> KeyRecord | None:
        """The record of a valid key."""
        record = self.named(presented.id)
        return record if (record or _NOBODY).matches(presented.secret) else None

    def named(self, key_id: str) -> KeyRecord | None:
        """The record of the key with this id, if there still is one."""
        if (now := self.clock()) >= self._next_look:
            self._next_look = now + _CHECK_EVERY_S
            if FileState.of(self.path) != self._seen:
                self.reload()
        return self._keys.keys.get(key_id)

    def reload(self) -> None:
        """Read the file now."""
        self._seen = FileState.of(self.path)
        try:
            self._keys = read_keys(self.path)
        except InvalidArgumentError as error:
            self.problem = str(error)
            _log.error(logfmt("keys_not_reloaded", problem=self.problem, keys_in_force=len(self._keys.keys)))
        else:
            self.problem = ""
            _log.info(logfmt("keys_reloaded", file=self.path, keys=len(self._keys.keys)))
        self._tell(ok=not self.problem)

    def limits_of_key(self, key_id: str) -> KeyLimits:
        """What the file allows the key; a key that has been revoked meanwhile has no limits left to count."""
        record = self._keys.keys.get(key_id)
        return record.limits if record else KeyLimits()

    def limits_of_tenant(self, tenant: str) -> KeyLimits:
        """What the file allows all keys of the tenant together."""
        record = self._keys.tenants.get(tenant)
        return record.limits if record else KeyLimits()

    def _tell(self, *, ok: bool) -> None:
        if self.listener:
            self.listener.keys_reloaded(keys=len(self._keys.keys), ok=ok)
