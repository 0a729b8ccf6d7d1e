"""From a step's logits to each caller's next token. On the loop's thread.

Choosing leaves work to the device and returns; telling waits for it. Between the two the loop may have begun the next
step, which takes the tokens from where the device has them: `Sequence.ahead` says where.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from wicore_backend.engine.computation import ReadPromptLogprobs
from wicore_backend.engine.ledger import RequestLedger
from wicore_backend.engine.logprobs import ReadLogprobs, logprobs_of
from wicore_backend.engine.request import Sequence, TokenLogprob
from wicore_backend.engine.sampler import Sampled, sample
from wicore_backend.errors import EngineError
from wicore_backend.executor.upload import rows_of, to_host

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """Next tokens that have been, or are being, chosen.

    Attributes
    ----------
    tokens
        int64 [R], on the device, a token for each of `sequences`.
    read
        Waits for the device, though not for what it was given later, and gives the tokens; None where the model's
        logits are not numbers, so that none can be chosen.
    wanted, logprobs
        The rows whose log-probabilities are asked for, and what waits for these and gives them.
    after
        Of sequences of which more had been guessed, the places in `tokens` of what comes after each guessed token.
    """

    sequences: Rows[Sequence]
    tokens: Tensor
    read: Callable[[], list[int | None]]
    wanted: Rows[int] = ()
    logprobs: ReadLogprobs = list
    after: Mapping[Sequence, range] = field(default_factory=dict)


class Emitter:
    """Chooses tokens and tells them; what goes wrong with one sequence ends its request alone.

    Parameters
    ----------
    advance
        Called with a sequence for each of its guessed tokens that turns out right.
    """

    def __init__(self, ledger: RequestLedger, advance: Callable[[Sequence], None]) -> None:
        self._ledger = ledger
        self._advance = advance

    def choose(
        self, rows: Mapping[Sequence, int], logits: Tensor, after: Mapping[Sequence, range] | None = None
    ) -> Choice | None:
        """Have each sequence's next token chosen from its row of `logits` [N, V], which are good until the next step.

        A sequence for which that fails ends, and is left out; None if there is no other.

        Parameters
        ----------
        after
            Rows that tell, of a sequence of which more had been guessed, what comes after each guessed token.
        """
        try:
            choice = self._choose(rows, logits, after or {})
        except Exception:
            _log.exception("choosing %d tokens failed; trying one by one", len(rows))
            choices = self._choose_one_by_one(rows, logits)
            if not choices:
                return None
            choice = _together(choices)
        for row, sequence in enumerate(choice.sequences):
            sequence.ahead = row
        return choice

    def tell(self, choice: Choice, guesses: Mapping[Sequence, tuple[int, ...]] | None = None) -> dict[Sequence, int]:
        """Tell the callers what was chosen, and end the answers that end with it. Returns how many tokens of each.

        Parameters
        ----------
        guesses
            What had been guessed of some.
        """
        for sequence in choice.sequences:
            sequence.ahead = None
        try:
            tokens = choice.read()
        except Exception as fault:
            _log.exception("the device failed to choose %d tokens", len(choice.sequences))
            self._fail(choice.sequences, fault)
            return {}
        logprobs = self._logprobs(choice)
        now = time.monotonic()
        told = {}
        for row, sequence in enumerate(choice.sequences):
            chosen = [tokens[row], *(tokens[place] for place in choice.after.get(sequence, ()))]
            told[sequence] = self._tell(sequence, chosen, (guesses or {}).get(sequence, ()), logprobs.get(row), now)
        return told

    def take_prompt_logprobs(self, logprobs: Mapping[Sequence, ReadPromptLogprobs]) -> None:
        """Take the log-probabilities of prompts, which are told with the next token. It waits for the device."""
        for sequence, read in logprobs.items():
            if sequence in self._ledger:
                try:
                    self._ledger.owner(sequence)[1].take_prompt_logprobs(read())
                except Exception as fault:
                    _log.exception("the log-probabilities of a prompt failed")
                    self._ledger.fail(sequence, fault)

    def _tell(
        self,
        sequence: Sequence,
        chosen: Rows[int | None],
        guessed: Rows[int],
        logprob: TokenLogprob | None,
        now: float,
    ) -> int:
        """Tell the first of the tokens `chosen`, and each further one before which the `guessed` token was right."""
        for told, token in enumerate(chosen):
            if sequence not in self._ledger:  # It was cancelled, or another answer of the same request has failed.
                return told
            if token is None:
                self._ledger.fail(sequence, _no_numbers(sequence))
                return told
            job, generation = self._ledger.owner(sequence)
            try:
                job.push(generation, token, logprob, now)
            except Exception as fault:
                _log.exception("taking a token of request %s failed", job.request.id)
                self._ledger.fail(sequence, fault)
                return told
            self._ledger.count_token()
            if generation.reason is not None:
                self._ledger.end_answer(job, sequence)
                return told + 1
            # The last one chosen is not computed yet, also if more had been guessed: choosing may have been cut short.
            if told + 1 == len(chosen) or token != guessed[told]:
                return told + 1
            self._advance(sequence)
        return len(chosen)

    def _choose(self, rows: Mapping[Sequence, int], logits: Tensor, after: Mapping[Sequence, range]) -> Choice:
        sequences, places = list(rows), list(rows.values())
        generations = [self._ledger.owner(sequence)[1] for sequence in sequences]
        sampling = [generation.sampling_row for generation in generations]
        where: dict[Sequence, range] = {}
        for sequence, own in list(zip(sequences, sampling, strict=True)):
            if further := after.get(sequence):
                where[sequence] = range(len(places), len(places) + len(further))
                places += further
                sampling += [replace(own, place=own.place + n) for n in range(1, 1 + len(further))]
        if places != list(range(len(logits))):
            logits = rows_of(logits, places)
        sampled = sample(logits, sampling)
        tokens = sampled.tokens
        choice = Choice(sequences, tokens, _reading(sampled), after=where)
        tops = {row: g.logprobs for row, g in enumerate(generations) if g.logprobs is not None}
        if not tops:
            return choice
        wanted = list(tops)
        logprobs = logprobs_of(rows_of(logits, wanted), rows_of(tokens, wanted), list(tops.values()))
        return replace(choice, wanted=wanted, logprobs=logprobs)

    def _choose_one_by_one(self, rows: Mapping[Sequence, int], logits: Tensor) -> list[Choice]:
        choices = []
        for sequence, row in rows.items():
            if sequence not in self._ledger:  # It has ended with another answer of its request.
                continue
            try:
                choices.append(self._choose({sequence: row}, logits, {}))
            except Exception as fault:
                self._ledger.fail(sequence, fault)
        return [choice for choice in choices if choice.sequences[0] in self._ledger]

    def _logprobs(self, choice: Choice) -> dict[int, TokenLogprob]:
        """Of the rows for which they are asked."""
        try:
            return dict(zip(choice.wanted, choice.logprobs(), strict=True))
        except Exception as fault:
            _log.exception("the log-probabilities of %d tokens failed", len(choice.wanted))
            asked = (choice.sequences[row] for row in choice.wanted)
            self._fail([sequence for sequence in asked if sequence in self._ledger], fault)
            return {}

    def _fail(self, sequences: Iterable[Sequence], fault: Exception) -> None:
        for sequence in sequences:
            self._ledger.fail(sequence, fault)


def _together(choices: Rows[Choice]) -> Choice:
    """The choices of one sequence each as one."""
    return Choice(
        [choice.sequences[0] for choice in choices],
        torch.cat([choice.tokens for choice in choices]),
        lambda: [token for choice in choices for token in choice.read()],
        [row for row, choice in enumerate(choices) if choice.wanted],
        lambda: [logprob for choice in choices for logprob in choice.logprobs()],
    )


def _reading(sampled: Sampled) -> Callable[[], list[int | None]]:
    """A call that gives the tokens once they are there; None for those that were not chosen among numbers."""
    on_host = to_host(sampled.tokens, sampled.peaks)

    def read() -> list[int | None]:
        tokens, peaks = on_host()
        chosen = np.isfinite(peaks)
        values: list[int] = tokens.tolist()
        return list(values) if chosen.all() else [v if good else None for v, good in zip(values, chosen, strict=True)]

    return read


def _no_numbers(sequence: Sequence) -> EngineError:
    return EngineError(
        f"the model's logits are not numbers (NaN or infinite) at token {sequence.answered + 1} of the answer; if all "
        "requests end so, the checkpoint's weights are damaged: compare its files with their checksums and fetch them "
        "again; if only some do, a value was too great for the model's dtype: set dtype to 'bfloat16' or 'float32'"
    )
