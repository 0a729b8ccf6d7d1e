"""/v1/chat/completions: what is asked, and what is answered."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from wicore_backend.gateway.openai.fields import BookkeepingFields, SamplingFields, few_parts, refused
from wicore_backend.gateway.openai.messages import Message
from wicore_backend.gateway.openai.usage import CompletionUsage


class ChatRequest(SamplingFields, BookkeepingFields):
    """The body of a request for a chat completion."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True), few_parts]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """The older name of the same."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=64)] | None = None
    """Wicore's: how many answers are made, of which the `n` likeliest are given."""
    response_format: dict[str, Any] | None = None
    """`{"type": "text"}`, `{"type": "json_object"}` or `{"type": "json_schema", "json_schema": {...}}`."""
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    modalities: refused("answers are text", ["text"]) = None  # type: ignore[valid-type]
    audio: refused("answers are text") = None  # type: ignore[valid-type]
    prediction: refused("predicted outputs are not used") = None  # type: ignore[valid-type]
    reasoning_effort: refused("the model does not reason apart from its answer", "none") = None  # type: ignore[valid-type]
    verbosity: refused("the model has no such setting; ask in words", "medium") = None  # type: ignore[valid-type]
    web_search_options: refused("there is no web search") = None  # type: ignore[valid-type]
    functions: refused("deprecated; use tools") = None  # type: ignore[valid-type]
    function_call: refused("deprecated; use tool_choice") = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are the same; give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs = true")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError(f"best_of is {self.best_of}, less than n = {self.n or 1}; it is the larger of the two")
        if self.best_of is not None and self.stream and self.best_of > (self.n or 1):
            raise ValueError("best_of is chosen when all answers have ended; it does not go with stream = true")
        return self

    @property
    def answers(self) -> int:
        """How many are given."""
        return self.n or 1


FinishReason = Literal["stop", "length", "tool_calls"]


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    content: list[TokenLogprob] | None
    refusal: None = None


class CalledFunction(BaseModel):
    name: str
    arguments: str


class AnsweredToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[AnsweredToolCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: CompletionUsage
    system_fingerprint: str | None
    service_tier: Literal["default"] = "default"


class ChunkDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: ChunkDelta
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(BaseModel):
    """One event of a stream. The stream ends with `data: [DONE]`, or with an event that is an error."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: CompletionUsage | None = None
    system_fingerprint: str | None
