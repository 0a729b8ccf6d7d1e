"""From a step's logits to each caller's next token. On the loop's thread.

Choosing leaves work to the device and returns; telling waits for it. Between the two the loop may have begun the next
step, which takes the tokens from where the device has them: `Sequence.ahead` says where.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from wicore_backend.engine.generation import Generation
from wicore_backend.engine.ledger import RequestLedger
from wicore_backend.engine.request import Sequence, TokenLogprob
from wicore_backend.engine.sampler import logprobs_of, sample

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """Next tokens that have been, or are being, chosen.

    Attributes
    ----------
    tokens
        int64 [R], on the device, a token for each of `sequences`.
    read
        Waits for the device, though not for what it was given later, and gives the tokens.
    logits
        float32 [W, V] of the sequences in `wanted`, unchanged: their log-probabilities are asked for.
    """

    sequences: Rows[Sequence]
    tokens: Tensor
    read: Callable[[], list[int]]
    wanted: Rows[int]
    logits: Tensor


class Emitter:
    """Chooses tokens and tells them; what goes wrong with one sequence ends its request alone."""

    def __init__(self, ledger: RequestLedger) -> None:
        self._ledger = ledger

    def choose(self, sequences: Rows[Sequence], logits: Tensor) -> Choice | None:
        """Have each sequence's next token chosen from its row of `logits` [R, V], which may be overwritten.

        A sequence for which that fails ends, and is left out; None if there is no other.
        """
        generations = [self._ledger.owner(sequence)[1] for sequence in sequences]
        wanted = [row for row, generation in enumerate(generations) if generation.logprobs is not None]
        unchanged = logits[wanted]  # A copy: sampling writes penalties into its logits.
        try:
            tokens = sample(logits, [generation.sampling_row for generation in generations])
        except Exception:
            _log.exception("sampling %d tokens failed; trying one by one", len(sequences))
            sampled = self._sample_one_by_one(sequences, generations, logits)
            if not sampled:
                return None
            places = {row: place for place, row in enumerate(sampled)}
            unchanged = unchanged[[i for i, row in enumerate(wanted) if row in places]]
            wanted = [places[row] for row in wanted if row in places]
            sequences, tokens = [sequences[row] for row in sampled], torch.cat(list(sampled.values()))
        for row, sequence in enumerate(sequences):
            sequence.ahead = row
        return Choice(sequences, tokens, _reading(tokens), wanted, unchanged)

    def tell(self, choice: Choice) -> None:
        """Tell the callers what was chosen, and end the answers that end with it."""
        for sequence in choice.sequences:
            sequence.ahead = None
        try:
            tokens = choice.read()
        except Exception as fault:
            _log.exception("the device failed to choose %d tokens", len(choice.sequences))
            self._fail(choice.sequences, fault)
            return
        logprobs = self._logprobs(choice, tokens)
        now = time.monotonic()
        for row, (sequence, token) in enumerate(zip(choice.sequences, tokens, strict=True)):
            if sequence not in self._ledger:  # It was cancelled, or another answer of the same request has failed.
                continue
            job, generation = self._ledger.owner(sequence)
            try:
                job.push(generation, token, logprobs.get(row), now)
            except Exception as fault:
                _log.exception("taking a token of request %s failed", job.request.id)
                self._ledger.fail(sequence, fault)
                continue
            if generation.reason is not None:
                self._ledger.end_answer(job, sequence)

    def _sample_one_by_one(
        self, sequences: Rows[Sequence], generations: Rows[Generation], logits: Tensor
    ) -> dict[int, Tensor]:
        """int64 [1] for each row that can be sampled."""
        sampled = {}
        for row, (sequence, generation) in enumerate(zip(sequences, generations, strict=True)):
            try:
                sampled[row] = sample(logits[row : row + 1].clone(), [generation.sampling_row])
            except Exception as fault:
                self._ledger.fail(sequence, fault)
        return {row: token for row, token in sampled.items() if sequences[row] in self._ledger}

    def _logprobs(self, choice: Choice, tokens: Rows[int]) -> dict[int, TokenLogprob]:
        """Of the rows for which they are asked."""
        asked = [row for row in choice.wanted if choice.sequences[row] in self._ledger]
        if not asked:
            return {}
        rows = [i for i, row in enumerate(choice.wanted) if row in asked]
        tops = [self._ledger.owner(choice.sequences[row])[1].logprobs or 0 for row in asked]
        try:
            found = logprobs_of(choice.logits[rows], [tokens[row] for row in asked], tops)
        except Exception as fault:
            _log.exception("the log-probabilities of %d tokens failed", len(asked))
            self._fail([choice.sequences[row] for row in asked], fault)
            return {}
        return dict(zip(asked, found, strict=True))

    def _fail(self, sequences: Iterable[Sequence], fault: Exception) -> None:
        for sequence in sequences:
            self._ledger.fail(sequence, fault)


def _reading(tokens: Tensor) -> Callable[[], list[int]]:
    """A call that gives int64 `tokens` once they are there.

    On CUDA they are copied at once: a copy that is asked for later waits for all that the device was given meanwhile.
    """
    if not tokens.is_cuda:
        return tokens.tolist
    copy = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    copy.copy_(tokens, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()

    def read() -> list[int]:
        copied.synchronize()
        there: list[int] = copy.tolist()
        return there

    return read
