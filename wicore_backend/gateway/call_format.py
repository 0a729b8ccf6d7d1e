"""How calls of tools stand in a Gemma-3 conversation.

Gemma has no tokens and no role for tools. Its documentation ("Function calling with Gemma", the JSON form) has them
declared in the prompt, and called by an answer that is

    {"name": function name, "parameters": dictionary of argument name and its value}

Several calls are a line each. What they gave goes back in a user's turn, between ```tool_output and ```.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

TRIGGER = '{"name": "'
"""With what every call begins."""

CLOSING = "}"
SEPARATOR = "\n"

TEXT_TAILS = ("\n```", "\n```\n", "\n")
"""What may stand after the calls where text came before them, and opened a fence."""

CALL_TAILS = ("\n",)

_INTRODUCTION = """\
You have access to functions. If you decide to invoke any of the function(s), you MUST put it in the format of
{"name": function name, "parameters": dictionary of argument name and its value}
"""
_NO_TEXT = "You SHOULD NOT include any other text in the response if you call a function"
_SEVERAL = "To invoke several functions, put each on a line of its own."
_ONE_ONLY = "Invoke at most one function in a response."
_REQUIRED = "You MUST invoke a function in this response."


def call_opening(name: str) -> str:
    """A call's text before its arguments."""
    return f'{{"name": {json.dumps(name)}, "parameters": '


def call_text(name: str, arguments: str) -> str:
    """A call; `arguments` are JSON."""
    return f"{call_opening(name)}{arguments}{CLOSING}"


def declaration(functions: Sequence[dict[str, Any]], *, required: bool, parallel: bool) -> str:
    """What the model is told of its functions and of how to call them."""
    rules = [_NO_TEXT, _SEVERAL if parallel else _ONE_ONLY, *([_REQUIRED] if required else [])]
    listed = json.dumps(functions, ensure_ascii=False, indent=1)
    return f"{_INTRODUCTION}\n{chr(10).join(rules)}\n{listed}"


def result_text(name: str, content: str) -> str:
    """What a call of the function `name` gave."""
    return f"```tool_output\n{json.dumps({'name': name, 'content': content}, ensure_ascii=False)}\n```"
