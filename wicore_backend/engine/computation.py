"""Runs a step through the model and gets what it can out of one that fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wicore_backend.engine.logprobs import logprobs_of
from wicore_backend.engine.plan import Chunk, StepPlan
from wicore_backend.engine.request import Sequence, TokenLogprob
from wicore_backend.engine.runner import ModelRunner, StepOutput
from wicore_backend.executor.upload import to_device

Masses = Callable[[], Mapping[int, NDArray[np.float32]]]
ReadPromptLogprobs = Callable[[], list[TokenLogprob | None]]

_log = logging.getLogger(__name__)

LOGPROB_ROWS = 128
"""Rows of a prompt's logits computed at once: at a vocabulary of 262,208 these are 134 MB in float32."""


class StepFailedError(Exception):
    """Nothing of a step could be computed."""


@dataclass(slots=True)
class Computed:
    """What a step gave.

    Attributes
    ----------
    plan
        What of the step was computed.
    ready
        The sequences whose next token the logits tell, each with the row that tells it.
    after
        Of those for which more was guessed, the rows that tell what comes after each guessed token.
    logits
        float32 [R, V].
    prompt_logprobs
        Give those of the chunks' prompts, where asked for. They wait for the device.
    mass
        Gives the attention masses [blocks] that were measured: see `Attention.mass`. It waits for the device.
    done, over
        Waits until the device is done with it; and whether it is.
    failed
        Sequences whose part fails, whatever is tried.
    retried
        Whether the step failed at first.
    """

    plan: StepPlan
    ready: dict[Sequence, int]
    logits: Tensor | None
    prompt_logprobs: dict[Sequence, ReadPromptLogprobs]
    after: dict[Sequence, range] = field(default_factory=dict)
    mass: Callable[[], dict[Sequence, NDArray[np.float32]]] = dict
    done: Callable[[], None] = lambda: None
    over: Callable[[], bool] = lambda: True
    failed: dict[Sequence, Exception] = field(default_factory=dict)
    retried: bool = False

    def leave_out(self, gone: Callable[[Sequence], bool]) -> None:
        """Drop what was computed for sequences whose requests have ended meanwhile."""
        self.failed = {s: fault for s, fault in self.failed.items() if not gone(s)}
        self.prompt_logprobs = {s: logprobs for s, logprobs in self.prompt_logprobs.items() if not gone(s)}
        self.ready = {s: row for s, row in self.ready.items() if not gone(s)}
        self.after = {s: rows for s, rows in self.after.items() if not gone(s)}
        decodes = [s for s in self.plan.decodes if not gone(s)]
        chunks = [c for c in self.plan.chunks if not gone(c.sequence)]
        self.plan = replace(self.plan, decodes=decodes, chunks=chunks)


def compute(runner: ModelRunner, plan: StepPlan, ahead: Tensor | None = None) -> Computed:
    """Compute a step; `ahead` as for `ModelRunner.run`.

    A failure is tried again once as a whole, then sequence by sequence, without guesses, to find whose fault it is.
    Computing a step twice does no harm: it writes the same keys to the same places.

    Raises
    ------
    StepFailedError
        If nothing of it can be computed.
    """
    try:
        return _compute(runner, plan, ahead)
    except Exception:
        _log.exception("a step of %d decodes and %d chunks failed; trying again", len(plan.decodes), len(plan.chunks))
    try:
        computed = _compute(runner, plan, ahead)
    except Exception as error:
        computed = _one_by_one(runner, plan, ahead, error)
    computed.retried = True
    return computed


def _compute(runner: ModelRunner, plan: StepPlan, ahead: Tensor | None) -> Computed:
    output = runner.run(plan, ahead)
    offsets = output.offsets[len(plan.decodes) :]
    # Rows of sequences that are complete so far; the other chunks are the first parts of long prompts.
    ready = [*plan.decodes, *(c.sequence for c in plan.chunks if c.completes)]
    rows = [
        *output.offsets[: len(plan.decodes)],
        *(end - 1 for chunk, end in zip(plan.chunks, offsets[1:], strict=True) if chunk.completes),
    ]
    after = {}
    for sequence, first in zip(plan.decodes, output.offsets, strict=False):
        if guessed := len(plan.guesses.get(sequence, ())):
            after[sequence] = range(len(rows), len(rows) + guessed)
            rows += range(first + 1, first + 1 + guessed)
    prompt_logprobs = {
        chunk.sequence: _prompt_logprobs(chunk, offset, output)
        for chunk, offset in zip(plan.chunks, offsets, strict=False)
        if chunk.sequence.request.params.prompt_logprobs is not None
    }
    logits = output.logits(rows) if rows else None
    own_rows = {sequence: row for row, sequence in enumerate(ready)}
    masses = partial(_by_sequence, plan, output.mass)
    return Computed(plan, own_rows, logits, prompt_logprobs, after, masses, output.done, output.over)


def _by_sequence(plan: StepPlan, mass: Masses) -> dict[Sequence, NDArray[np.float32]]:
    return {_sequence(plan, number): measured for number, measured in mass().items()}


def _sequence(plan: StepPlan, number: int) -> Sequence:
    """Of the step's decodes and chunks, counted through."""
    decodes = len(plan.decodes)
    return plan.decodes[number] if number < decodes else plan.chunks[number - decodes].sequence


def _one_by_one(runner: ModelRunner, plan: StepPlan, ahead: Tensor | None, error: Exception) -> Computed:
    parts = [StepPlan([s], [], plan.shape) for s in plan.decodes] + [StepPlan([], [c], plan.shape) for c in plan.chunks]
    done: list[Computed] = []
    failed: dict[Sequence, Exception] = {}
    for part in parts:
        try:
            computed = _compute(runner, part, ahead)
            if computed.logits is not None:
                computed.logits = computed.logits.clone()  # They may be where the next part's will be.
            done.append(computed)
        except Exception as fault:
            failed[part.decodes[0] if part.decodes else part.chunks[0].sequence] = fault
    if not done:
        raise StepFailedError(str(error)) from error
    logits = [d.logits for d in done if d.logits is not None]
    return Computed(
        StepPlan([s for d in done for s in d.plan.decodes], [c for d in done for c in d.plan.chunks], plan.shape),
        {s: row for row, s in enumerate(s for d in done for s in d.ready)},
        torch.cat(logits) if logits else None,
        {s: logprobs for d in done for s, logprobs in d.prompt_logprobs.items()},
        {},
        lambda: {s: mass for d in done for s, mass in d.mass().items()},
        done[-1].done,
        done[-1].over,
        failed,
    )


def _prompt_logprobs(chunk: Chunk, offset: int, output: StepOutput) -> ReadPromptLogprobs:
    """Log-probabilities of the prompt's tokens that follow the chunk's, and None for the prompt's first."""
    following = chunk.sequence.request.prompt.token_ids[chunk.start + 1 : chunk.end + 1]
    top = chunk.sequence.request.params.prompt_logprobs or 0
    parts = []
    for first in range(0, len(following), LOGPROB_ROWS):
        tokens = to_device(following[first : first + LOGPROB_ROWS].astype(np.int64), output.hidden.device)
        rows = range(offset + first, offset + first + len(tokens))
        parts.append(logprobs_of(output.logits(rows), tokens, [top] * len(tokens)))

    def read() -> list[TokenLogprob | None]:
        of_first: list[TokenLogprob | None] = [None] if chunk.start == 0 else []
        return of_first + [logprob for part in parts for logprob in part()]

    return read
