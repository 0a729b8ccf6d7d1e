"""How many tokens a request will take, before anyone has counted.

The exact count of a prompt takes the tokenizer, the chat template and the pictures' sizes: the work of
`wicore_preprocess`, which would be done twice for every request if limits asked it. So a request is charged what it
will probably take, going by what its tenant's requests took, and the difference is settled when the engine has said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from wicore_backend.gateway.backend import GenerationRequest, Usage

_LEARN = 0.1
"""Weight of the newest request in what is expected of the next."""

_MESSAGE_TOKENS = 6
"""What a chat template puts around a message, roughly; learning makes up for the rest."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Tokens that a request is expected to take."""

    prompt: float
    answer: float

    @property
    def total(self) -> float:
        """Both together."""
        return self.prompt + self.answer


@dataclass(slots=True)
class TokenEstimates:
    """What one tenant's requests are like. Tenants do not learn from one another: languages differ, and so may
    intentions."""

    tokens_per_byte: float = 0.3
    """English has some 4 bytes a token, Chinese less."""
    tokens_per_image: float = 260.0
    """Gemma-3: 256 soft tokens and what stands around them."""
    answer_tokens: float = 200.0

    def of(self, request: GenerationRequest) -> Estimate:
        """What `request` will take."""
        asked = request.options.get("max_tokens")
        answer = self.answer_tokens if asked is None else min(self.answer_tokens, float(asked))
        answers = max(request.answers, int(request.options.get("best_of") or 1))
        return Estimate(self._prompt(request), answer * answers)

    def learn(self, request: GenerationRequest, usage: Usage) -> None:
        """What it took."""
        answers = max(request.answers, int(request.options.get("best_of") or 1))
        self.answer_tokens += _LEARN * (usage.completion_tokens / answers - self.answer_tokens)
        if isinstance(request.prompt, list) and _are_ids(request.prompt):
            return
        size, fixed = _size(request.prompt)
        if request.images:
            per_image = (usage.prompt_tokens - fixed - size * self.tokens_per_byte) / len(request.images)
            self.tokens_per_image += _LEARN * (max(0.0, per_image) - self.tokens_per_image)
        elif size >= 32:  # Below that the template around it says nothing about the text.
            ratio = (usage.prompt_tokens - fixed) / size
            self.tokens_per_byte += _LEARN * (min(2.0, max(0.01, ratio)) - self.tokens_per_byte)

    def _prompt(self, request: GenerationRequest) -> float:
        if isinstance(request.prompt, list) and _are_ids(request.prompt):
            return float(len(request.prompt))
        size, fixed = _size(request.prompt)
        return fixed + size * self.tokens_per_byte + len(request.images) * self.tokens_per_image


def _are_ids(prompt: list[Any]) -> bool:
    return bool(prompt) and isinstance(prompt[0], int)


def _size(prompt: str | list[Any]) -> tuple[int, int]:
    """Bytes of text, and tokens around it."""
    if isinstance(prompt, str):
        return len(prompt.encode(errors="replace")), _MESSAGE_TOKENS
    return sum(map(_text_bytes, prompt)), _MESSAGE_TOKENS * len(prompt)


def _text_bytes(value: object) -> int:
    """Of all texts in a message, whatever its form: content, parts, calls of tools."""
    if isinstance(value, str):
        return len(value.encode(errors="replace"))
    if isinstance(value, dict):
        return sum(_text_bytes(part) for name, part in value.items() if name not in ("role", "type"))
    if isinstance(value, list | tuple):
        return sum(map(_text_bytes, value))
    return 0
