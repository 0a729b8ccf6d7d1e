"""OpenAI's `response_format` as options of the wire."""

from __future__ import annotations

from typing import Any

from wicore_backend.gateway.errors import InvalidRequestError, UnsupportedError


def wire_options(response_format: dict[str, Any] | None) -> dict[str, Any]:
    """What constrains the answer. Raises InvalidRequestError."""
    if response_format is None or response_format == {"type": "text"}:
        return {}
    if "type" not in response_format:
        raise InvalidRequestError("response_format has no type", param="response_format.type")
    raise UnsupportedError("this server gives text only", param="response_format.type")
