"""/v1/responses: what is asked, and what is answered. Stateless: the whole conversation comes with each request."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from wicore_backend.gateway.openai.fields import MOST_PARTS, Body, BookkeepingFields, WicoreFields, few_parts, refused


class InputText(Body):
    """Text to the model."""

    type: Literal["input_text"]
    text: str


class OutputText(Body):
    """Text of the model's, as an answer has it."""

    type: Literal["output_text"]
    text: str
    annotations: refused("there are no annotations", []) = None  # type: ignore[valid-type]
    logprobs: list[Any] | None = None
    """Of an answer that is sent back; they say nothing to the model."""


class InputImage(Body):
    """A picture: a data: URL, or an http(s) one where the server allows that."""

    type: Literal["input_image"]
    image_url: str
    detail: refused("pictures have one resolution, the model's", "auto", "high") = None  # type: ignore[valid-type]
    file_id: refused("there are no files; send image_url") = None  # type: ignore[valid-type]


Part = Annotated[InputText | OutputText | InputImage, Field(discriminator="type")]
Parts = Annotated[list[Part], Field(max_length=MOST_PARTS, fail_fast=True)]


class InputMessage(Body):
    """A turn of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Parts
    id: str | None = None
    status: str | None = None
    phase: str | None = None
    """These three are of an answer that is sent back; they say nothing to the model."""


class FunctionCall(Body):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class FunctionCallOutput(Body):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | Annotated[list[InputText], Field(max_length=MOST_PARTS, fail_fast=True)]
    id: str | None = None
    status: str | None = None


def _kind(item: Any) -> str | None:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return kind if isinstance(kind, str) else None


Item = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")],
    Discriminator(
        _kind,
        custom_error_type="unknown_item",
        custom_error_message="Input should be an object whose type is message, function_call or function_call_output",
    ),
]


class TextOptions(Body):
    """What form the answer has."""

    format: dict[str, Any] | None = None
    """`{"type": "text"}`, `{"type": "json_object"}` or `{"type": "json_schema", "name", "schema"}`."""
    verbosity: refused("the model has no such setting; ask in words", "medium") = None  # type: ignore[valid-type]


class ResponsesRequest(WicoreFields, BookkeepingFields):
    """The body of a request for a response."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    input: Annotated[
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Item], Field(min_length=1, max_length=4096, fail_fast=True)],
        few_parts,
    ]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: Annotated[list[Literal["message.output_text.logprobs"]], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: refused("the usage comes with the last event", {}) = None  # type: ignore[valid-type]
    text: TextOptions | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    truncation: refused("prompts are never cut", "disabled") = None  # type: ignore[valid-type]
    background: refused("answers are not kept", False) = None  # type: ignore[valid-type]
    previous_response_id: refused("answers are not kept; send the conversation") = None  # type: ignore[valid-type]
    conversation: refused("conversations are not kept; send it whole") = None  # type: ignore[valid-type]
    prompt: refused("there are no stored prompts") = None  # type: ignore[valid-type]
    reasoning: refused("the model does not reason apart from its answer", {}) = None  # type: ignore[valid-type]
    max_tool_calls: refused("there are no tools that the server calls") = None  # type: ignore[valid-type]
    context_management: refused("prompts are never cut", []) = None  # type: ignore[valid-type]


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseObject(BaseModel):
    """The answer. `output` has one message, or calls of functions, or both."""

    id: str
    object: Literal["response"] = "response"
    created_at: float
    completed_at: float | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: dict[str, Any] | None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool
    previous_response_id: None = None
    store: Literal[False] = False
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int | None
    top_p: float | None
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None
    user: str | None
