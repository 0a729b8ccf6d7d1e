"""One answer as it grows: its text and its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from wicore_backend.engine.detokenizer import Detokenizer
from wicore_backend.engine.grammar.progress import GrammarProgress
from wicore_backend.engine.request import FinishReason, Sequence, TokenLogprob, TokensEvent
from wicore_backend.engine.sampler import SamplingRow


class Generation:
    """What the engine knows of an answer beyond the scheduler's accounting.

    Parameters
    ----------
    stop_tokens
        Tokens that end the answer: the model's own, unless ignored, and the request's.
    seed
        Of this answer's random choices.
    grammar
        What the answer keeps to, if anything, with nothing of it taken yet.
    """

    def __init__(
        self,
        sequence: Sequence,
        *,
        token_bytes: Callable[[int], bytes],
        stop_tokens: frozenset[int],
        seed: int,
        grammar: GrammarProgress | None = None,
    ) -> None:
        self.sequence = sequence
        self.params = sequence.request.params
        self.prompt_logprobs: list[TokenLogprob | None] = []
        self.cumulative_logprob = 0.0
        self.reason: FinishReason | None = None
        self._detokenizer = Detokenizer(token_bytes, self.params.stop)
        self._stop_tokens = stop_tokens
        self._seed = seed
        self._grammar = grammar

    @property
    def sampling_row(self) -> SamplingRow:
        """What the sampler needs for the next token."""
        tokens, prompt_len = self.sequence.tokens, self.sequence.prompt_len
        place = len(tokens) - prompt_len
        held_back = self._stop_tokens if place < self.params.min_tokens else frozenset()
        row = SamplingRow(self.params, self._seed, place, grammar=self._grammar, held_back=held_back)
        return replace(row, prompt=tokens[:prompt_len], answer=tokens[prompt_len:]) if row.penalised else row

    @property
    def logprobs(self) -> int | None:
        """How many alternatives the next token's log-probability is wanted with; None if it is not wanted."""
        return 0 if self.params.logprobs is None and self.params.best_of is not None else self.params.logprobs

    def push(self, token: int, logprob: TokenLogprob | None) -> TokensEvent:
        """Take the next token. `reason` says from now on why the answer ends, if it does.

        One that cannot be taken leaves the answer without it.
        """
        first = not self.sequence.answered
        text = ""
        stops = token in self._stop_tokens
        if not stops:
            text = self._detokenizer.push(token)
            stops = self._detokenizer.stopped_by is not None or self._completes(token)
        self.sequence.tokens.append(token)
        if stops:
            self.reason = FinishReason.STOP
        elif len(self.sequence.tokens) >= self.sequence.max_tokens:
            self.reason = FinishReason.LENGTH
        if self.reason is not None:
            text += self._detokenizer.finish()
        if logprob is not None:
            self.cumulative_logprob += logprob.logprob
        return TokensEvent(
            token_ids=(token,),
            text=text,
            index=self.sequence.index,
            reason=self.reason,
            logprobs=None if logprob is None or self.params.logprobs is None else (logprob,),
            prompt_logprobs=tuple(self.prompt_logprobs) if first and self.prompt_logprobs else None,
        )

    def _completes(self, token: int) -> bool:
        """Take the token into the grammar; whether it leaves nothing to follow."""
        if self._grammar is None:
            return False
        self._grammar.accept(token)
        return self._grammar.complete

    def take_prompt_logprobs(self, logprobs: list[TokenLogprob | None]) -> None:
        """Take those of the prompt's next part, or again of its first one: after a preemption it is computed anew."""
        if logprobs and logprobs[0] is None:
            self.prompt_logprobs = []
        self.prompt_logprobs += logprobs

    def rest(self) -> str:
        """Text that was still held back when the answer was broken off."""
        return self._detokenizer.finish()
