"""`usage` of an answer."""

from __future__ import annotations

from pydantic import BaseModel

from wicore_backend.gateway.backend import Usage
from wicore_backend.gateway.generation import Generation


class PromptTokensDetails(BaseModel):
    cached_tokens: int = 0
    """Of the prompt, those that were not computed again."""
    audio_tokens: int = 0


class CompletionTokensDetails(BaseModel):
    reasoning_tokens: int = 0
    audio_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class CompletionUsage(BaseModel):
    """What an answer took, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails = CompletionTokensDetails()


def completion_usage(*usages: Usage) -> CompletionUsage:
    """The sum of what the engine says of each request."""
    prompt = sum(usage.prompt_tokens for usage in usages)
    completion = sum(usage.completion_tokens for usage in usages)
    return CompletionUsage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(usage.cached_tokens for usage in usages)),
    )


def usage_json(*usages: Usage) -> bytes:
    """The same, encoded."""
    return completion_usage(*usages).model_dump_json().encode()


def usage_so_far(generation: Generation) -> bytes:
    """What is known of a running answer: its tokens. The prompt's are known at the end."""
    if generation.usage is not None:
        return usage_json(generation.usage)
    return b'{"prompt_tokens":0,"completion_tokens":%d,"total_tokens":%d}' % (generation.tokens, generation.tokens)
