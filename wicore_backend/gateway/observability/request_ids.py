"""The name of a request, in every log on its way."""

from __future__ import annotations

import re
import uuid

_SANE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,99}")


def request_id(offered: str | None) -> str:
    """The id that the client has given in `x-request-id`, if it is short and plain; else a new one."""
    if offered is not None and _SANE.fullmatch(offered):
        return offered
    return uuid.uuid4().hex
