"""OpenAI's tools: their definitions to the model, its calls back out of its text.

The engine's grammar lets the model write text or calls, and arguments only as the schemas of the tools have them: what
`plan` asks for and what `ToolCallParser` reads is one form, that of `call_format`.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wicore_backend.gateway.call_format import (
    CALL_TAILS,
    CLOSING,
    SEPARATOR,
    TEXT_TAILS,
    TRIGGER,
    call_opening,
    call_text,
    declaration,
    result_text,
)
from wicore_backend.gateway.call_parser import CallArguments, CallStart, TextDelta, ToolCallParser
from wicore_backend.gateway.errors import InvalidRequestError
from wicore_backend.gateway.functions import Function, checked_fields, read_functions

__all__ = ["CallArguments", "CallStart", "TextDelta", "ToolCallParser", "ToolPlan", "plan", "render_messages"]


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """How tools are told to the model, and what constrains its answer.

    Attributes
    ----------
    functions
        Those that it may call, at least one.
    required
        It must call one.
    parallel
        It may call several.
    content
        The JSON Schema of an answer that is no call; None for text.
    """

    functions: tuple[Function, ...]
    required: bool
    parallel: bool
    content: dict[str, Any] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """For the wire."""
        text = not self.required and self.content is None
        tags = [
            {"begin": call_opening(function.name), "json_schema": function.parameters, "end": CLOSING}
            for function in self.functions
        ]
        form = {
            "trigger": TRIGGER,
            "tags": tags,
            "text": text,
            "many": self.parallel,
            "separator": SEPARATOR,
            "tails": list(TEXT_TAILS if text else CALL_TAILS),
        }
        if self.content is not None and not self.required:
            form["otherwise"] = self.content
        return {"grammar": {"tags": form}}

    @property
    def declaration(self) -> str:
        """What the model is told."""
        declared = [function.declaration for function in self.functions]
        return declaration(declared, required=self.required, parallel=self.parallel)

    def parser(self) -> ToolCallParser:
        """Reads one answer."""
        return ToolCallParser(function.name for function in self.functions)


def plan(
    tools: list[dict[str, Any]] | None,
    tool_choice: str | dict[str, Any] | None,
    parallel_tool_calls: bool,
    content: dict[str, Any] | None = None,
) -> ToolPlan | None:
    """What is done about a request's tools; None if it calls none.

    Parameters
    ----------
    content
        As for ToolPlan.

    Raises
    ------
    InvalidRequestError
        For tools that are no functions, and a choice that is none of them.
    """
    if not tools:
        if tool_choice not in (None, "none", "auto"):
            raise InvalidRequestError("tool_choice goes with tools, of which there are none", param="tool_choice")
        return None
    functions = read_functions(tools)
    allowed, required = _chosen(tool_choice, functions)
    return ToolPlan(allowed, required, parallel_tool_calls, content) if allowed else None


def _chosen(choice: str | dict[str, Any] | None, functions: tuple[Function, ...]) -> tuple[tuple[Function, ...], bool]:
    """The functions that may be called, and whether one must be."""
    match choice:
        case None | "auto":
            return functions, False
        case "required":
            return functions, True
        case "none":
            return (), False
        case {"type": "function", **rest}:
            checked_fields(rest, "tool_choice", known=("function",))
            return (_named(rest.get("function"), functions, "tool_choice.function"),), True
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required" as mode, "tools": [*tools]}}:
            place = "tool_choice.allowed_tools.tools"
            named = [
                _named(tool.get("function") if isinstance(tool, Mapping) else tool, functions, f"{place}[{i}].function")
                for i, tool in enumerate(tools)
            ]
            return tuple({function.name: function for function in named}.values()), mode == "required"
    raise InvalidRequestError(
        f'tool_choice is {reprlib.repr(choice)}; it takes none, auto, required, {{"type": "function", "function": '
        '{"name": ...}} or {"type": "allowed_tools", "allowed_tools": {"mode": ..., "tools": [...]}}',
        param="tool_choice",
    )


def _named(given: Any, functions: tuple[Function, ...], place: str) -> Function:
    name = checked_fields(given, place, known=("name",)).get("name")
    for function in functions:
        if function.name == name:
            return function
    raise InvalidRequestError(
        f"{place}.name is {reprlib.repr(name)}, which tools does not declare", param=f"{place}.name"
    )


def render_messages(messages: list[dict[str, Any]], plan: ToolPlan | None) -> list[dict[str, Any]]:
    """A conversation in the roles of the model's template.

    The tools are declared in the system's words. An assistant's calls are its text, as it has written them. The
    results of calls are a user's turn. Turns alternate: what one side says in several messages is one turn of its.
    The template has a place for the system's words before the conversation only; later ones are said in a user's turn.

    Parameters
    ----------
    messages
        In OpenAI's form, `content` a text, or for a user a list of parts, or for an assistant that calls None.
    plan
        None if the model is to call nothing.

    Raises
    ------
    InvalidRequestError
        For a result of no call, or an assistant that says nothing.
    """
    rendered: list[dict[str, Any]] = []
    called: dict[str, str] = {}
    after_result = False
    for i, message in enumerate(messages):
        place = f"messages[{i}]"
        match message["role"]:
            case "assistant":
                _say(rendered, "assistant", _said(message, place))
                called |= {call["id"]: call["function"]["name"] for call in message.get("tool_calls") or ()}
            case "tool":
                _say(rendered, "user", _result(message, called, place), between="\n" if after_result else "\n\n")
            case "system" if not rendered:
                rendered.append(message)
            case _:
                _say(rendered, "user", message["content"])
        after_result = message["role"] == "tool"
    if plan is not None:
        _declare(rendered, plan.declaration)
    return rendered


def _said(message: Mapping[str, Any], place: str) -> str:
    calls = [call_text(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls") or ()]
    content = message.get("content")
    if content is None and not calls:
        raise InvalidRequestError(f"{place} has neither content nor tool_calls", param=f"{place}.content")
    return "\n".join([*([content] if content else []), *calls])


def _result(message: Mapping[str, Any], called: Mapping[str, str], place: str) -> str:
    call_id = message["tool_call_id"]
    if call_id not in called:
        raise InvalidRequestError(
            f"{place}.tool_call_id is {reprlib.repr(call_id)}, which no call of the assistant's before it has",
            param=f"{place}.tool_call_id",
        )
    return result_text(called[call_id], message["content"])


def _say(rendered: list[dict[str, Any]], role: str, content: str | list[dict[str, Any]], between: str = "\n\n") -> None:
    """Put it into the last turn if that is the same side's, else begin one."""
    if rendered and rendered[-1]["role"] == role:
        rendered[-1] = {"role": role, "content": _joined(rendered[-1]["content"], content, between)}
    else:
        rendered.append({"role": role, "content": content})


def _joined(
    first: str | list[dict[str, Any]], second: str | list[dict[str, Any]], between: str
) -> str | list[dict[str, Any]]:
    """Texts stay one text; parts stay parts, of which texts that meet become one."""
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}{between}{second}"
    parts, more = _parts(first), _parts(second)
    if parts and more and parts[-1]["type"] == more[0]["type"] == "text":
        meeting = {"type": "text", "text": f"{parts[-1]['text']}{between}{more[0]['text']}"}
        return [*parts[:-1], meeting, *more[1:]]
    return [*parts, *more]


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _declare(rendered: list[dict[str, Any]], declared: str) -> None:
    if rendered and rendered[0]["role"] == "system":
        rendered[0] = {"role": "system", "content": f"{rendered[0]['content']}\n\n{declared}"}
    else:
        rendered.insert(0, {"role": "system", "content": declared})
