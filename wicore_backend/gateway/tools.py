"""OpenAI's tools: their definitions to the model, its calls back out of its text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from wicore_backend.gateway.errors import UnsupportedError


class TextDelta(NamedTuple):
    text: str


class CallStart(NamedTuple):
    index: int
    id: str
    name: str


class CallArguments(NamedTuple):
    index: int
    text: str


class ToolCallParser(Protocol):
    """Reads one answer."""

    called: bool

    def feed(self, text: str) -> list[TextDelta | CallStart | CallArguments]: ...

    def finish(self) -> list[TextDelta | CallStart | CallArguments]: ...


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """How tools are told to the model, and what constrains its answer."""

    options: dict[str, Any] = field(default_factory=dict)

    def parser(self) -> ToolCallParser | None:
        return None


def plan(
    tools: list[dict[str, Any]] | None, tool_choice: str | dict[str, Any] | None, parallel_tool_calls: bool
) -> ToolPlan | None:
    if tools:
        raise UnsupportedError("this server calls no tools", param="tools")
    if tool_choice not in (None, "none", "auto") or not parallel_tool_calls:
        raise UnsupportedError("this server calls no tools", param="tool_choice")
    return None


def render_messages(messages: list[dict[str, Any]], _plan: ToolPlan | None) -> list[dict[str, Any]]:
    if any("tool_calls" in message or message["role"] == "tool" for message in messages):
        raise UnsupportedError("this server calls no tools", param="messages")
    return messages
