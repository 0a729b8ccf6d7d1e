"""/v1/completions: what is asked, and what is answered."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from wicore_backend.gateway.openai.fields import BookkeepingFields, SamplingFields, refused
from wicore_backend.gateway.openai.usage import CompletionUsage

MOST_PROMPTS = 64
MOST_ANSWERS = 128

Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(min_length=1, max_length=2**20, fail_fast=True)]
Text = Annotated[str, Field(min_length=1)]


class CompletionRequest(SamplingFields, BookkeepingFields):
    """The body of a request for text completions: the model goes on where the prompt ends, without a chat template."""

    prompt: (
        Text
        | Tokens
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
    )
    """A text, token ids, or several of either."""
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    """0 goes with `echo`."""
    best_of: Annotated[int, Field(ge=1, le=64)] | None = None
    echo: bool | None = None
    """The prompt before the answer, and with `logprobs` those of its tokens."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: refused("the model was not trained to fill in the middle", "") = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _fits_together(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens = 0 asks for nothing; it goes with echo = true")
        if self.max_tokens == 0 and self.stream:
            raise ValueError("max_tokens = 0 does not go with stream = true")
        if self.echo and any(isinstance(prompt, list) for prompt in self.prompts):
            raise ValueError("echo goes with prompts that are texts, not token ids")
        if self.echo and self.stream and self.logprobs is not None:
            raise ValueError("echo with logprobs does not go with stream = true")
        if self.best_of is not None and self.best_of < self.answers:
            raise ValueError(f"best_of is {self.best_of}, less than n = {self.answers}; it is the larger of the two")
        if self.best_of is not None and self.stream and self.best_of > self.answers:
            raise ValueError("best_of is chosen when all answers have ended; it does not go with stream = true")
        if len(self.prompts) * self.answers > MOST_ANSWERS:
            raise ValueError(
                f"{len(self.prompts)} prompts with n = {self.answers} are more than {MOST_ANSWERS} answers"
            )
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several, as a list."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt

    @property
    def answers(self) -> int:
        """For each prompt."""
        return self.n or 1


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    """Prompts in their order, the answers of each together."""
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(BaseModel):
    """The answers, or with `stream` what one event adds to one of them."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: CompletionUsage | None = None
    system_fingerprint: str | None
