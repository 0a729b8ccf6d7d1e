"""A request on its way through the engine: what was asked, how far it is, and what its caller is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from wicore_backend.engine.sampling_params import SamplingParams
from wicore_backend.errors import WicoreError
from wicore_backend.hmt.blocks import SequenceBlocks
from wicore_backend.processor.prompt import Prompt


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    """The model's own end, a stop token or a stop string."""
    LENGTH = "length"
    """max_tokens, or the end of the context."""
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a token, and those of the most likely alternatives at its place, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request took. Times are in seconds; None where the request ended before."""

    prompt_tokens: int
    completion_tokens: int
    queue_s: float | None
    ttft_s: float | None
    total_s: float

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for an answer of less than two."""
        if self.ttft_s is None or self.completion_tokens < 2:
            return None
        return (self.total_s - self.ttft_s) / (self.completion_tokens - 1)


@dataclass(frozen=True, slots=True)
class TokensEvent:
    """Tokens of the answer. `text` is what they add to it, and lags behind the tokens while a character, or what
    may be a stop string, is incomplete."""

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    """With the first tokens, if asked for: one for each token of the prompt, None for the first."""


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """The one last event of every request. `error` is there unless the answer is whole (stop, length)."""

    reason: FinishReason
    usage: Usage
    error: WicoreError | None = None


Event = TokensEvent | FinishedEvent
Sink = Callable[[Event], None]
"""Takes a request's events on the engine's thread, so it must be quick and must not raise."""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """What was asked. `arrival` and `deadline` are readings of the engine's clock, in seconds."""

    id: str
    prompt: Prompt
    params: SamplingParams
    sink: Sink
    arrival: float
    priority: int = 0
    """Smaller comes first; requests of equal priority come in order of arrival."""
    deadline: float | None = None

    @property
    def order(self) -> tuple[int, float]:
        """Place in the queue."""
        return (self.priority, self.arrival)


@dataclass(eq=False, slots=True)
class Sequence:
    """A request's tokens and its memory.

    It is *waiting* while `blocks` is None and *running* while it has some. Of `tokens` (prompt and answer), the first
    `computed` have their keys in the cache; a running sequence with one token left to compute is *decoding*, with
    more it is *prefilling*.
    """

    request: Request
    max_tokens: int
    """Prompt and answer together."""
    tokens: list[int] = field(init=False)
    computed: int = 0
    blocks: SequenceBlocks | None = None

    def __post_init__(self) -> None:
        self.tokens = self.request.prompt.token_ids.tolist()

    @property
    def uncomputed(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def running_blocks(self) -> SequenceBlocks:
        """The blocks of a running sequence."""
        assert self.blocks is not None, f"request {self.request.id} is waiting"
        return self.blocks

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt)

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.prompt_len :]
