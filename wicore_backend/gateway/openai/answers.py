"""Deltas of the engine as parts of an answer: text, calls of tools, log-probabilities, the reason of the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from wicore_backend.gateway.backend import Delta
from wicore_backend.gateway.openai.logprobs import chat_logprobs
from wicore_backend.gateway.tools import CallArguments, CallStart, TextDelta, ToolCallParser


class AnswerPart(NamedTuple):
    """What a chunk says of one answer, in OpenAI's form."""

    delta: dict[str, Any]
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None


class AnswerReader:
    """Reads one answer as it comes.

    Parameters
    ----------
    parser
        Finds calls of tools in the text; None if there can be none.
    logprobs
        Whether the answer's log-probabilities are told.
    """

    def __init__(self, parser: ToolCallParser | None, *, logprobs: bool) -> None:
        self._parser = parser
        self.tells_logprobs = logprobs
        self.plain = parser is None and not logprobs
        """Whether a delta that is not the last is its text and nothing else."""

    def read(self, delta: Delta) -> Iterator[AnswerPart]:
        """What a delta adds."""
        logprobs = chat_logprobs(delta.logprobs) if self.tells_logprobs and delta.logprobs is not None else None
        for content in self._contents(delta):
            yield AnswerPart(content, logprobs)
            logprobs = None
        if logprobs is not None and logprobs["content"]:
            yield AnswerPart({}, logprobs)
        if delta.finish_reason is not None:
            called = self._parser is not None and self._parser.called and delta.finish_reason == "stop"
            yield AnswerPart({}, None, "tool_calls" if called else delta.finish_reason)

    def _contents(self, delta: Delta) -> Iterator[dict[str, Any]]:
        if self._parser is None:
            if delta.text:
                yield {"content": delta.text}
            return
        found = list(self._parser.feed(delta.text))
        if delta.finish_reason is not None:
            found += self._parser.finish()
        for item in found:
            match item:
                case TextDelta(text):
                    yield {"content": text}
                case CallStart(index, call_id, name):
                    function = {"name": name, "arguments": ""}
                    yield {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}
                case CallArguments(index, text):
                    yield {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


class Answer:
    """A whole answer, summed up from its parts."""

    def __init__(self, index: int, reader: AnswerReader) -> None:
        self.index = index
        self._reader = reader
        self._texts: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self.tool_calls: list[dict[str, Any]] = []
        self.finish_reason: str | None = None

    def add(self, delta: Delta) -> None:
        """Add what a delta brings."""
        for part in self._reader.read(delta):
            if "content" in part.delta:
                self._texts.append(part.delta["content"])
            for call in part.delta.get("tool_calls", ()):
                self._add_call(call)
            if part.logprobs is not None:
                self._logprobs += part.logprobs["content"]
            self.finish_reason = part.finish_reason or self.finish_reason

    def _add_call(self, call: dict[str, Any]) -> None:
        if "id" in call:
            self.tool_calls.append({name: value for name, value in call.items() if name != "index"})
        else:
            self.tool_calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]

    @property
    def content(self) -> str | None:
        """Its text; None if it calls tools and says nothing."""
        text = "".join(self._texts)
        return None if self.tool_calls and not text else text

    @property
    def logprobs(self) -> dict[str, Any] | None:
        """Of its tokens, if they are told."""
        return {"content": self._logprobs, "refusal": None} if self._reader.tells_logprobs else None
