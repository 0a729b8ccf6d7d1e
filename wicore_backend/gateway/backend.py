"""What the routes need of a server of models, and the words for it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request, in the terms of the wire.

    Attributes
    ----------
    id
        Names it in all logs.
    model
        As Triton names it.
    prompt
        Text (see `raw`), chat messages `{"role", "content"}`, or token ids.
    images
        Encoded pictures, in the order of the places `{"type": "image"}` in the messages.
    raw
        Take a text as it is, without the chat template.
    options
        Sampling and serving options by their names on the wire. What is left out is the server's default.
    stream
        Deltas as they come, instead of everything at the end.
    metadata
        Headers of the call: trace context.
    """

    id: str
    model: str
    prompt: str | list[dict[str, Any]] | list[int]
    images: tuple[bytes, ...] = ()
    raw: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    stream: bool = True
    metadata: tuple[tuple[str, str], ...] = ()

    @property
    def answers(self) -> int:
        """How many answers it asks for."""
        return int(self.options.get("n", 1))


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request took, by the engine's clock; a time is None where the request ended before."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    queue_ms: float | None = None
    ttft_ms: float | None = None
    total_ms: float | None = None


class Delta(NamedTuple):
    """What one response adds to one answer. Each answer has exactly one delta with a `finish_reason`, and the last
    delta of a request, and only that, has `usage`.

    `logprobs` are the wire's: {"tokens": [entry], "prompt": [entry or None]}, an entry being {"token_id", "token",
    "logprob", "top": [...]}.
    """

    index: int  # type: ignore[assignment] # a field is what it is here, not tuple's method
    text: str
    token_ids: tuple[int, ...]
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None
    """`stop` or `length`. Anything else is an ApiError."""
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the server's repository."""

    name: str
    version: str
    ready: bool
    reason: str = ""
    """Why it is not ready."""


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether requests are taken, and if not why."""

    ready: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """What the server says of itself."""

    server: str
    """Name and version."""
    models: tuple[Model, ...]
    statistics: Mapping[str, Mapping[str, float]]
    """By model: what Triton counted since it was loaded."""
    metrics: str
    """Its Prometheus page, as text; empty if there is none to be had."""


class Backend(Protocol):
    """A server of models. All of it raises ApiError."""

    async def start(self) -> None:
        """Called in the event loop before anything else."""

    async def close(self) -> None:
        """Called when nothing is under way any more."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """The answer as it grows. Closing the generator before its end, or cancelling the task that waits for it,
        cancels the request."""

    def end_requests(self) -> None:
        """End what is under way, each with an UnavailableError."""

    async def readiness(self) -> Readiness:
        """Never raises: a server that is gone is not ready."""

    async def status(self) -> BackendStatus: ...

    async def metrics(self) -> str:
        """Its Prometheus page, as text; empty if there is none to be had. Never raises."""

    async def fingerprint(self) -> str | None:
        """Changes when the server, its models or their configuration do; for `system_fingerprint`. None while that is
        not known. Never raises."""
