"""What llguidance says is wrong with a grammar, for people."""

from __future__ import annotations

import re

_LONGEST = 400
_STATE = re.compile(r"<(state|non-verbose/)>.*", re.DOTALL)


def reason_of(error: str) -> str:
    """llguidance's message on one line, without its parser's state and, if it quotes a long grammar, its middle."""
    said = " ".join(_STATE.sub("", error).split())
    return said if len(said) <= _LONGEST else f"{said[: _LONGEST // 2]} ... {said[-_LONGEST // 2 :]}"
