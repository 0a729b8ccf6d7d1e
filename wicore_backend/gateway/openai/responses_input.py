"""A request for a response as a request for a chat completion."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from wicore_backend.gateway.error_handlers import invalid_request
from wicore_backend.gateway.errors import InvalidRequestError
from wicore_backend.gateway.openai.chat_schema import ChatRequest
from wicore_backend.gateway.openai.fields import BookkeepingFields, WicoreFields
from wicore_backend.gateway.openai.responses_schema import (
    FunctionCall,
    FunctionCallOutput,
    InputImage,
    InputMessage,
    Item,
    ResponsesRequest,
)

_SAME = (
    *WicoreFields.model_fields,
    *BookkeepingFields.model_fields,
    "model",
    "temperature",
    "top_p",
    "stream",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
)


def chat_request(body: ResponsesRequest) -> ChatRequest:
    """The same wish in the terms of chat completions.

    Raises
    ------
    InvalidRequestError
        If there is none.
    """
    fields: dict[str, Any] = {name: getattr(body, name) for name in _SAME if getattr(body, name) is not None}
    logprobs = body.top_logprobs is not None or bool(body.include)
    fields |= {
        "messages": _messages(body),
        "max_completion_tokens": body.max_output_tokens,
        "logprobs": logprobs or None,
        "top_logprobs": body.top_logprobs if logprobs else None,
    }
    if body.text is not None and body.text.format is not None:
        fields["response_format"] = _response_format(body.text.format)
    if body.tools is not None:
        fields["tools"] = [_tool(tool, i) for i, tool in enumerate(body.tools)]
    if isinstance(body.tool_choice, dict):
        fields["tool_choice"] = _tool_choice(body.tool_choice)
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise invalid_request(error.errors(include_url=False), fields) from None


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for item in body.input:
        if isinstance(item, FunctionCall) and messages and messages[-1]["role"] == "assistant":
            messages[-1].setdefault("tool_calls", []).append(_call(item))  # What it said and called in one turn.
        else:
            messages.append(_message(item))
    return messages


def _message(item: Item) -> dict[str, Any]:
    match item:
        case FunctionCall():
            return {"role": "assistant", "content": None, "tool_calls": [_call(item)]}
        case FunctionCallOutput():
            output = item.output if isinstance(item.output, str) else "\n".join(part.text for part in item.output)
            return {"role": "tool", "tool_call_id": item.call_id, "content": output}
        case InputMessage():
            if isinstance(item.content, str):
                return {"role": item.role, "content": item.content}
            return {"role": item.role, "content": [_part(part) for part in item.content]}


def _part(part: Any) -> dict[str, Any]:
    if isinstance(part, InputImage):
        return {"type": "image_url", "image_url": {"url": part.image_url}}
    return {"type": "text", "text": part.text}


def _call(item: FunctionCall) -> dict[str, Any]:
    return {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}


def _response_format(text_format: dict[str, Any]) -> dict[str, Any]:
    if text_format.get("type") != "json_schema":
        return text_format
    return {"type": "json_schema", "json_schema": {name: v for name, v in text_format.items() if name != "type"}}


def _tool(tool: dict[str, Any], place: int) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise InvalidRequestError(
            f"a tool of type {ascii(tool.get('type'))[:40]} is not supported; there is: function",
            param=f"tools[{place}].type",
            code="unsupported_parameter",
        )
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _tool_choice(choice: dict[str, Any]) -> dict[str, Any]:
    if choice.get("type") != "function":
        return choice
    return {"type": "function", "function": {name: value for name, value in choice.items() if name != "type"}}
