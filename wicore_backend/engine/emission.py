"""From a step's logits to each caller's next token. On the loop's thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence as Rows

from torch import Tensor

from wicore_backend.engine.generation import Generation
from wicore_backend.engine.ledger import RequestLedger
from wicore_backend.engine.request import Sequence, TokenLogprob
from wicore_backend.engine.sampler import logprobs_of, sample

_log = logging.getLogger(__name__)

Chosen = tuple[int, TokenLogprob | None]


class Emitter:
    """Chooses tokens and hands them on; what goes wrong with one sequence ends its request alone."""

    def __init__(self, ledger: RequestLedger) -> None:
        self._ledger = ledger

    def emit(self, sequences: Rows[Sequence], logits: Tensor) -> None:
        """Choose each sequence's next token from its row of `logits` [R, V] and tell its caller."""
        chosen = self._choose(sequences, logits)
        now = time.monotonic()
        for sequence, (token, logprob) in chosen.items():
            if sequence not in self._ledger:  # Another answer of the same request has failed.
                continue
            job, generation = self._ledger.owner(sequence)
            try:
                job.push(generation, token, logprob, now)
            except Exception as fault:
                _log.exception("taking a token of request %s failed", job.request.id)
                self._ledger.fail(sequence, fault)
                continue
            if generation.reason is not None:
                self._ledger.end_answer(job, sequence)

    def _choose(self, sequences: Rows[Sequence], logits: Tensor) -> dict[Sequence, Chosen]:
        """Each sequence's next token; a sequence for which that fails ends, and is left out."""
        generations = [self._ledger.owner(sequence)[1] for sequence in sequences]
        try:
            return dict(zip(sequences, _sample(generations, logits), strict=True))
        except Exception:
            _log.exception("sampling %d tokens failed; trying one by one", len(sequences))
        chosen = {}
        for row, (sequence, generation) in enumerate(zip(sequences, generations, strict=True)):
            try:
                (chosen[sequence],) = _sample([generation], logits[row : row + 1].clone())
            except Exception as fault:
                self._ledger.fail(sequence, fault)
        return chosen


def _sample(generations: Rows[Generation], logits: Tensor) -> list[Chosen]:
    """The next token of each row of `logits` [R, V], with its log-probability where it is wanted."""
    wanted = [row for row, generation in enumerate(generations) if generation.logprobs is not None]
    unchanged = logits[wanted]  # A copy: sampling writes penalties into its logits.
    tokens = sample(logits, [generation.sampling_row for generation in generations])
    logprobs: dict[int, TokenLogprob] = {}
    if wanted:
        tops = [generations[row].logprobs or 0 for row in wanted]
        logprobs = dict(zip(wanted, logprobs_of(unchanged, [tokens[row] for row in wanted], tops), strict=True))
    return [(token, logprobs.get(row)) for row, token in enumerate(tokens)]
