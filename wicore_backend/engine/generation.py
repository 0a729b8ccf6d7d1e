"""One request's answer as it grows: its text, its end and its times."""

from __future__ import annotations

import logging
from collections.abc import Callable

from wicore_backend.engine.detokenizer import Detokenizer
from wicore_backend.engine.request import (
    Event,
    FinishedEvent,
    FinishReason,
    Sequence,
    TokenLogprob,
    TokensEvent,
    Usage,
)
from wicore_backend.engine.sampler import SamplingRow
from wicore_backend.errors import WicoreError

_log = logging.getLogger(__name__)


class Generation:
    """What the engine knows of a live request beyond the scheduler's accounting.

    Parameters
    ----------
    stop_tokens
        Tokens that end the answer: the model's own, unless ignored, and the request's.
    seed
        The request's own, or one drawn for it.
    """

    def __init__(
        self,
        sequence: Sequence,
        *,
        token_bytes: Callable[[int], bytes],
        stop_tokens: frozenset[int],
        seed: int,
    ) -> None:
        self.sequence = sequence
        self.request = sequence.request
        self.prompt_logprobs: list[TokenLogprob | None] = []
        self.started: float | None = None
        self.first_token: float | None = None
        self._detokenizer = Detokenizer(token_bytes, self.request.params.stop)
        self._stop_tokens = stop_tokens
        self._seed = seed

    @property
    def sampling_row(self) -> SamplingRow:
        """What the sampler needs for the next token."""
        tokens, prompt_len = self.sequence.tokens, self.sequence.prompt_len
        params = self.request.params
        place = len(tokens) - prompt_len
        if params.repetition_penalty == 1 and not params.presence_penalty and not params.frequency_penalty:
            return SamplingRow(params, self._seed, place)
        return SamplingRow(params, self._seed, place, tokens[:prompt_len], tokens[prompt_len:])

    def start(self, now: float) -> None:
        """Note the request's first step."""
        if self.started is None:
            self.started = now

    def push(self, token: int, logprob: TokenLogprob | None, now: float) -> FinishReason | None:
        """Take the next token, tell the caller, and say why the answer ends if it does."""
        first = self.first_token is None
        if first:
            self.first_token = now
        self.sequence.tokens.append(token)
        reason: FinishReason | None = None
        text = ""
        if token in self._stop_tokens:
            reason = FinishReason.STOP
        else:
            text = self._detokenizer.push(token)
            if self._detokenizer.stopped_by is not None:
                reason = FinishReason.STOP
            elif len(self.sequence.tokens) >= self.sequence.max_tokens:
                reason = FinishReason.LENGTH
        if reason is not None:
            text += self._detokenizer.finish()
        self._tell(
            TokensEvent(
                token_ids=(token,),
                text=text,
                logprobs=None if logprob is None else (logprob,),
                prompt_logprobs=tuple(self.prompt_logprobs) if first and self.prompt_logprobs else None,
            )
        )
        return reason

    def finish(self, reason: FinishReason, now: float, error: WicoreError | None = None) -> FinishedEvent:
        """Tell the caller that this is the end, after what text was still held back."""
        if text := self._detokenizer.finish():
            self._tell(TokensEvent((), text))
        event = FinishedEvent(reason, self._usage(now), error)
        self._tell(event)
        return event

    def _tell(self, event: Event) -> None:
        try:
            self.request.sink(event)
        except Exception:
            # One caller's fault must not touch the others' requests.
            _log.exception("the sink of request %s failed; its event is lost", self.request.id)

    def _usage(self, now: float) -> Usage:
        arrival = self.request.arrival
        return Usage(
            prompt_tokens=self.sequence.prompt_len,
            completion_tokens=len(self.sequence.tokens) - self.sequence.prompt_len,
            queue_s=None if self.started is None else self.started - arrival,
            ttft_s=None if self.first_token is None else self.first_token - arrival,
            total_s=now - arrival,
        )
