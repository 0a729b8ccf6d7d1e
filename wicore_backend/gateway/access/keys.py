"""API keys: how they look, what is kept of them, and what they allow.

A key is `wk_ID_SECRET`: the id is public, names the key in logs and metrics, and finds its record without trying all of
them; the secret is 256 random bits. Only `SHA-256(salt + secret)` is kept. One fast hash suffices because nobody can
try 2^256 secrets, however fast: slow hashes (scrypt, argon2) protect what people choose, and would let anyone who
sends wrong keys burn the server's CPU. The salt keeps equal secrets, and tables made elsewhere, from being of use.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from wicore_backend.settings import Settings

_KEY = re.compile(r"wk_([0-9a-f]{12})_([0-9a-f]{64})")


class ServiceClass(StrEnum):
    """What the wire's `priority` takes."""

    REALTIME = "realtime"
    INTERACTIVE = "interactive"
    BATCH = "batch"


class KeyLimits(Settings):
    """How much may be asked for with one key, or by all keys of a tenant together. None is no limit."""

    requests_per_minute: Annotated[float, Field(gt=0, le=1e9)] | None = None

    tokens_per_minute: Annotated[float, Field(gt=0, le=1e12)] | None = None
    """Prompt and answer together."""

    burst_seconds: Annotated[float, Field(gt=0, le=3600)] = 1.2
    """An idle caller saves up what the rate gives in so long, and may then have it at once: 1.2 s is 2% of a minute, by
    which no minute exceeds its limit. At least one request fits."""

    concurrent_requests: Annotated[int, Field(ge=1)] | None = None
    """Requests and WebSockets open at a time, in each copy of the gateway."""


class KeyRecord(Settings):
    """What the keys' file holds of one key."""

    salt: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

    tenant: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.:@/+-]*$")]
    """Tenants share no cached prefix, and get equal service."""

    models: Annotated[tuple[str, ...], Field(strict=False)] | None = None
    """Those that it may use; None is all."""

    service_class: Annotated[ServiceClass, Field(strict=False)] = ServiceClass.INTERACTIVE
    """The best class that its requests run in; they may ask for a lower one."""

    limits: KeyLimits = KeyLimits()

    admin: bool = False
    """It opens the admin endpoints, and nothing else."""

    note: Annotated[str, Field(max_length=200)] = ""
    """For people: whose it is, what for."""

    created: str = ""
    """ISO 8601, UTC."""

    def matches(self, secret: str) -> bool:
        """Whether the key's secret is this one, in the same time for any that is not."""
        return hmac.compare_digest(_digest(self.salt, secret), self.sha256)


@dataclass(frozen=True, slots=True)
class PresentedKey:
    """A well-formed key, as a client sent it: nothing is known of it yet."""

    id: str
    secret: str

    @classmethod
    def parse(cls, text: str) -> PresentedKey | None:
        """The parts of a key; None for what has not the form of one."""
        match = _KEY.fullmatch(text)
        return cls(*match.groups()) if match else None

    def __repr__(self) -> str:
        return f"PresentedKey(id={self.id!r})"

    def __str__(self) -> str:
        return f"wk_{self.id}_{self.secret}"


def new_key(record: Mapping[str, Any]) -> tuple[PresentedKey, KeyRecord]:
    """A fresh key, and what is to be kept of it.

    Parameters
    ----------
    record
        The fields of its `KeyRecord` beside salt and hash.

    Raises
    ------
    InvalidArgumentError
        If one of them is wrong.
    """
    key = PresentedKey(id=secrets.token_hex(6), secret=secrets.token_hex(32))
    salt = secrets.token_hex(16)
    return key, KeyRecord(salt=salt, sha256=_digest(salt, key.secret), **record)


def _digest(salt: str, secret: str) -> str:
    return hashlib.sha256(bytes.fromhex(salt) + secret.encode()).hexdigest()
