"""An answer as a response object and its events."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from wicore_backend.gateway.backend import Delta, Usage
from wicore_backend.gateway.errors import ApiError
from wicore_backend.gateway.openai.answers import AnswerPart
from wicore_backend.gateway.openai.chat_plan import ChatPlan
from wicore_backend.gateway.openai.responses_schema import ResponsesRequest
from wicore_backend.gateway.openai.sse import event


class ResponseWriter:
    """Writes one response: its events in order, or the whole of it when all deltas have been read.

    An output item is *open* from its `added` to its `done` event; at most one is.
    """

    def __init__(self, body: ResponsesRequest, plan: ChatPlan) -> None:
        self._body = body
        self._plan = plan
        (self._reader,) = plan.readers()
        self._name = plan.generation.request.id
        self._number = -1
        self._output: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._finish_reason: str | None = None

    def begin(self) -> Iterator[bytes]:
        """The events before the first token."""
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))

    def read(self, delta: Delta) -> Iterator[bytes]:
        """The events of a delta."""
        for part in self._reader.read(delta):
            self._finish_reason = part.finish_reason or self._finish_reason
            if part.delta.get("content") or (part.logprobs and "tool_calls" not in part.delta):
                yield from self._add_text(part)
            for call in part.delta.get("tool_calls", ()):
                yield from self._add_call(call)

    def end(self, usage: Usage) -> Iterator[bytes]:
        """The events after the last token."""
        if not self._output and self._open is None:
            yield from self._open_message()
        yield from self._close_item()
        kind = "response.incomplete" if self._finish_reason == "length" else "response.completed"
        yield self._event(kind, response=self.whole(usage))

    def whole(self, usage: Usage) -> dict[str, Any]:
        """The response, after its end."""
        if self._finish_reason == "length":
            return self._response("incomplete", usage) | {"incomplete_details": {"reason": "max_output_tokens"}}
        return self._response("completed", usage) | {"completed_at": time.time()}

    def failed(self, error: ApiError) -> bytes:
        """The last event of a response that broke."""
        return self._event("error", code=error.code, message=error.message, param=error.param)

    def _add_text(self, part: AnswerPart) -> Iterator[bytes]:
        if self._open is None or self._open["type"] != "message":
            yield from self._close_item()
            yield from self._open_message()
        assert self._open is not None
        content = self._open["content"][0]
        text = part.delta.get("content", "")
        logprobs = part.logprobs["content"] if part.logprobs else []
        content["text"] += text
        content["logprobs"] += logprobs
        yield self._event("response.output_text.delta", **self._place(), content_index=0, delta=text, logprobs=logprobs)

    def _add_call(self, call: dict[str, Any]) -> Iterator[bytes]:
        if "id" in call:
            yield from self._close_item()
            self._open = {
                "id": f"fc_{self._name}_{len(self._output)}",
                "type": "function_call",
                "status": "in_progress",
                "call_id": call["id"],
                "name": call["function"]["name"],
                "arguments": "",
            }
            yield self._event("response.output_item.added", output_index=len(self._output), item=self._open)
        assert self._open is not None
        arguments = call["function"]["arguments"]
        if arguments:
            self._open["arguments"] += arguments
            yield self._event("response.function_call_arguments.delta", **self._place(), delta=arguments)

    def _open_message(self) -> Iterator[bytes]:
        content = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._open = {
            "id": f"msg_{self._name}_{len(self._output)}",
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        yield self._event("response.output_item.added", output_index=len(self._output), item=self._open)
        yield self._event("response.content_part.added", **self._place(), content_index=0, part=content)
        self._open["content"] = [content]

    def _close_item(self) -> Iterator[bytes]:
        item = self._open
        if item is None:
            return
        place = self._place()
        if item["type"] == "message":
            content = item["content"][0]
            text, logprobs = content["text"], content["logprobs"]
            yield self._event("response.output_text.done", **place, content_index=0, text=text, logprobs=logprobs)
            yield self._event("response.content_part.done", **place, content_index=0, part=content)
        else:
            arguments, name = item["arguments"], item["name"]
            yield self._event("response.function_call_arguments.done", **place, arguments=arguments, name=name)
        item["status"] = "incomplete" if self._finish_reason == "length" else "completed"
        yield self._event("response.output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)
        self._open = None

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self._output)}

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return event({"type": kind, **fields, "sequence_number": self._number}, kind)

    def _response(self, status: str, usage: Usage | None = None) -> dict[str, Any]:
        body = self._body
        return {
            "id": f"resp_{self._name}",
            "object": "response",
            "created_at": float(self._plan.created),
            "completed_at": None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": self._output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": {"format": (body.text and body.text.format) or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_logprobs": body.top_logprobs,
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
            "user": body.user,
        }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
