"""One answer on its way: admitted, numbered, timed, recorded; and cancelled when its client leaves."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from starlette.requests import HTTPConnection

from wicore_backend.gateway.backend import Backend, Delta, GenerationRequest, Usage
from wicore_backend.gateway.caller import Caller
from wicore_backend.gateway.errors import ApiError, InternalError, UnavailableError

_log = logging.getLogger(__name__)

_LAST_WORDS_S = 2.0
"""For clients to take the error that ends their streams."""

Outcome = Literal["completed", "cancelled", "failed", "refused"]


@dataclass(slots=True, eq=False)
class Generation:
    """One request and what is known of its progress. Hooks may change `metadata` while they admit it.

    Attributes
    ----------
    endpoint
        Its path: `/v1/chat/completions`, ...
    model
        As the client named it.
    metadata
        Headers of the call to Triton.
    began, first_token_at, ended
        Readings of `time.perf_counter`.
    tokens
        That have come, of all answers.
    outcome
        `refused` if nothing came of it but an error before the first token.
    """

    connection: HTTPConnection
    caller: Caller
    endpoint: str
    model: str
    request: GenerationRequest
    metadata: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)
    first_token_at: float | None = None
    ended: float | None = None
    tokens: int = 0
    usage: Usage | None = None
    outcome: Outcome | None = None
    error: ApiError | None = None

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token, as seen here."""
        return None if self.first_token_at is None else self.first_token_at - self.began


class GenerationHook(Protocol):
    """Learns of every answer. What it raises in `admit` goes to the client; the others must not raise."""

    async def admit(self, generation: Generation) -> None:
        """Before the request is sent to Triton. Raise ApiError to refuse it (429, ...)."""

    def first_token(self, generation: Generation) -> None:
        """Its first token has come."""

    def finished(self, generation: Generation) -> None:
        """It is over, in whatever way, exactly once for each that was admitted by this hook. Quick, and not a
        coroutine, since it runs when a task is being cancelled, too."""


class Generations:
    """All answers under way. Lives in `app.state.generations`.

    It is *open*, then *draining*: new requests are refused while running ones end.
    """

    def __init__(self, backend: Backend, hooks: Sequence[GenerationHook]) -> None:
        self._backend = backend
        self._hooks = hooks
        self._running: set[Generation] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    @property
    def running(self) -> int:
        """How many there are."""
        return len(self._running)

    async def run(self, generation: Generation) -> AsyncGenerator[Delta, None]:
        """The answer as it grows. Closing the generator, or cancelling who waits for it, cancels the request.

        Raises
        ------
        ApiError
            From a hook, from the backend, or because the gateway is shutting down.
        """
        if self.draining:
            raise UnavailableError("the gateway is shutting down; try again", code="draining")
        self._running.add(generation)
        self._idle.clear()
        admitted: list[GenerationHook] = []
        try:
            for hook in self._hooks:
                await hook.admit(generation)
                admitted.append(hook)
            request = replace(generation.request, metadata=tuple(generation.metadata.items()))
            async with aclosing(self._backend.generate(request)) as deltas:
                async for delta in deltas:
                    if delta.token_ids:
                        generation.tokens += len(delta.token_ids)
                        if generation.first_token_at is None:
                            generation.first_token_at = time.perf_counter()
                            for hook in admitted:
                                hook.first_token(generation)
                    if delta.usage is not None:
                        generation.usage = delta.usage
                        generation.outcome = "completed"
                    yield delta
        except ApiError as error:
            generation.error = error
            raise
        except (asyncio.CancelledError, GeneratorExit):
            generation.outcome = generation.outcome or "cancelled"
            raise
        except Exception as error:
            _log.exception("request %s failed in the gateway", generation.request.id)
            generation.error = InternalError()
            raise generation.error from error
        finally:
            generation.ended = time.perf_counter()
            if generation.outcome is None:
                generation.outcome = "refused" if generation.first_token_at is None else "failed"
            for hook in admitted:
                hook.finished(generation)
            self._running.discard(generation)
            if not self._running:
                self._idle.set()

    async def drain(self, seconds: float) -> None:
        """Refuse new requests, and return when the running ones have ended: by themselves, or after some time with an
        error that says so."""
        self.draining = True
        for patience in (seconds, _LAST_WORDS_S):
            try:
                async with asyncio.timeout(patience):
                    await self._idle.wait()
                    return
            except TimeoutError:
                self._backend.end_requests()


def request_id(connection: HTTPConnection) -> str:
    """The name of a request in all logs: what the access log calls the connection, where that has one request."""
    name: str | None = getattr(connection.state, "request_id", None)
    if name is None:
        return uuid.uuid4().hex
    return name if connection.scope["type"] == "http" else f"{name}-{uuid.uuid4().hex[:8]}"
