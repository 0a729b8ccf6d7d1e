"""Settings of access control."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from wicore_backend.settings import Settings

Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)]


class AccessSettings(Settings):
    """Who may use the gateway."""

    keys_file: str | None = None
    """Made by `python -m wicore_backend.gateway keys add`, and read again when it changes. Without one everybody may do
    everything but administer, and the gateway listens on a loopback address only."""

    open_to_network: bool = False
    """Listen on other addresses than loopback, although there is no keys file."""

    hosts: Names | None = None
    """Names by which clients may call the server, as in the header Host; None is any if there are keys, and loopback
    names if there are none: else a web page could have its own name point here, and read what it likes (DNS
    rebinding)."""
