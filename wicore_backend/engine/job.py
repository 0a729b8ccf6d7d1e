"""A live request: its answers, and what its caller is told of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Rows
from dataclasses import replace

from wicore_backend.engine.generation import Generation
from wicore_backend.engine.request import (
    Event,
    FinishedEvent,
    FinishReason,
    Request,
    TokenLogprob,
    TokensEvent,
    Usage,
)
from wicore_backend.errors import WicoreError

_log = logging.getLogger(__name__)


class Job:
    """A request from its submission to its last event, with one generation for each answer that is made.

    Answers are told token by token, unless only the best of them are wanted: then all at once, at the end.
    """

    def __init__(self, request: Request, generations: Rows[Generation]) -> None:
        self.request = request
        self.generations = generations
        self.started: float | None = None
        self.first_token: float | None = None
        self._held_back: list[list[TokensEvent]] = [[] for _ in generations]

    @property
    def done(self) -> bool:
        """Whether every answer has come to its own end."""
        return all(generation.reason is not None for generation in self.generations)

    def start(self, now: float) -> bool:
        """Note the request's first step; True if this is it."""
        if self.started is not None:
            return False
        self.started = now
        return True

    def push(self, generation: Generation, token: int, logprob: TokenLogprob | None, now: float) -> None:
        """Take an answer's next token and tell the caller."""
        if self.first_token is None:
            self.first_token = now
        event = generation.push(token, logprob)
        if self._chooses:
            self._held_back[event.index].append(event)
        else:
            self._tell(event)

    def finish(self, reason: FinishReason, now: float, error: WicoreError | None = None) -> FinishedEvent:
        """Tell the caller that this is the end, after what was still held back."""
        for generation in self.generations:
            if text := generation.rest():
                index = generation.sequence.index
                self._held_back[index].append(TokensEvent((), text, index))
        for index, generation in enumerate(self._best()):
            for event in self._held_back[generation.sequence.index]:
                self._tell(replace(event, index=index) if self._chooses else event)
        last = FinishedEvent(reason, self._usage(now), error)
        self._tell(last)
        return last

    @property
    def _chooses(self) -> bool:
        return len(self.generations) > self.request.params.n

    def _best(self) -> Rows[Generation]:
        """The answers that the caller gets: all, or the likeliest a token."""
        if not self._chooses:
            return self.generations

        def likelihood(generation: Generation) -> float:
            return generation.cumulative_logprob / max(1, generation.sequence.answered)

        return sorted(self.generations, key=likelihood, reverse=True)[: self.request.params.n]

    def _tell(self, event: Event) -> None:
        try:
            self.request.sink(event)
        except Exception:
            # One caller's fault must not touch the others' requests.
            _log.exception("the sink of request %s failed; its event is lost", self.request.id)

    def _usage(self, now: float) -> Usage:
        arrival, first = self.request.arrival, self.generations[0].sequence
        return Usage(
            prompt_tokens=len(self.request.prompt),
            completion_tokens=sum(g.sequence.answered for g in self.generations),
            cached_tokens=first.cached_tokens,
            queue_s=None if self.started is None else self.started - arrival,
            ttft_s=None if self.first_token is None else self.first_token - arrival,
            total_s=now - arrival,
            restore_s=max(g.sequence.restore_seconds(now) for g in self.generations),
        )
