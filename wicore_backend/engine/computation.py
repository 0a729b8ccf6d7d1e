"""Runs a step through the model and gets what it can out of one that fails."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wicore_backend.engine.plan import Chunk, StepPlan
from wicore_backend.engine.request import Sequence, TokenLogprob
from wicore_backend.engine.runner import ModelRunner, StepOutput
from wicore_backend.engine.sampler import logprobs_of

_log = logging.getLogger(__name__)

_LOGPROB_ROWS = 256
"""Rows of a prompt's logits computed at once: at a vocabulary of 262,208 these are 268 MB in float32."""


class StepFailedError(Exception):
    """Nothing of a step could be computed."""


@dataclass(slots=True)
class Computed:
    """What a step gave.

    Attributes
    ----------
    plan
        What of the step was computed.
    logits
        float32 [R, V], a row for each sequence in `ready`: those whose next token they tell.
    prompt_logprobs
        Of the chunks' prompts, where asked for.
    mass
        The attention masses [blocks] that were measured: see `Attention.mass`.
    failed
        Sequences whose part fails, whatever is tried.
    retried
        Whether the step failed at first.
    """

    plan: StepPlan
    ready: list[Sequence]
    logits: Tensor | None
    prompt_logprobs: dict[Sequence, list[TokenLogprob | None]]
    mass: dict[Sequence, NDArray[np.float32]] = field(default_factory=dict)
    failed: dict[Sequence, Exception] = field(default_factory=dict)
    retried: bool = False


def compute(runner: ModelRunner, plan: StepPlan) -> Computed:
    """Compute a step. A failure is tried again once as a whole, then sequence by sequence to find whose fault it is.

    Computing a step twice does no harm: it writes the same keys to the same places.

    Raises
    ------
    StepFailedError
        If nothing of it can be computed.
    """
    try:
        return _compute(runner, plan)
    except Exception:
        _log.exception("a step of %d decodes and %d chunks failed; trying again", len(plan.decodes), len(plan.chunks))
    try:
        computed = _compute(runner, plan)
    except Exception as error:
        computed = _one_by_one(runner, plan, error)
    computed.retried = True
    return computed


def _compute(runner: ModelRunner, plan: StepPlan) -> Computed:
    output = runner.run(plan)
    offsets = output.offsets[len(plan.decodes) :]
    # Rows of sequences that are complete so far; the other chunks are the first parts of long prompts.
    ready = [*plan.decodes, *(c.sequence for c in plan.chunks if c.completes)]
    rows = [
        *range(len(plan.decodes)),
        *(end - 1 for chunk, end in zip(plan.chunks, offsets[1:], strict=True) if chunk.completes),
    ]
    prompt_logprobs = {
        chunk.sequence: list(_prompt_logprobs(chunk, offset, output))
        for chunk, offset in zip(plan.chunks, offsets, strict=False)
        if chunk.sequence.request.params.prompt_logprobs is not None
    }
    logits = output.logits(rows) if rows else None
    # Last, since it waits for the device; and here, where what fails can be tried again.
    mass = {_sequence(plan, row): measured for row, measured in output.mass().items()}
    return Computed(plan, ready, logits, prompt_logprobs, mass)


def _sequence(plan: StepPlan, number: int) -> Sequence:
    """Of the step's decodes and chunks, counted through."""
    decodes = len(plan.decodes)
    return plan.decodes[number] if number < decodes else plan.chunks[number - decodes].sequence


def _one_by_one(runner: ModelRunner, plan: StepPlan, error: Exception) -> Computed:
    parts = [StepPlan([s], [], plan.shape) for s in plan.decodes] + [StepPlan([], [c], plan.shape) for c in plan.chunks]
    done: list[Computed] = []
    failed: dict[Sequence, Exception] = {}
    for part in parts:
        try:
            done.append(_compute(runner, part))
        except Exception as fault:
            failed[part.decodes[0] if part.decodes else part.chunks[0].sequence] = fault
    if not done:
        raise StepFailedError(str(error)) from error
    logits = [d.logits for d in done if d.logits is not None]
    return Computed(
        StepPlan([s for d in done for s in d.plan.decodes], [c for d in done for c in d.plan.chunks], plan.shape),
        [s for d in done for s in d.ready],
        torch.cat(logits) if logits else None,
        {s: logprobs for d in done for s, logprobs in d.prompt_logprobs.items()},
        {s: mass for d in done for s, mass in d.mass.items()},
        failed,
    )


def _prompt_logprobs(chunk: Chunk, offset: int, output: StepOutput) -> Iterator[TokenLogprob | None]:
    """Log-probabilities of the prompt's tokens that follow the chunk's, and None for the prompt's first."""
    prompt = chunk.sequence.request.prompt.token_ids
    following = prompt[chunk.start + 1 : chunk.end + 1].tolist()
    if chunk.start == 0:
        yield None
    top = chunk.sequence.request.params.prompt_logprobs or 0
    for first in range(0, len(following), _LOGPROB_ROWS):
        tokens = following[first : first + _LOGPROB_ROWS]
        rows = range(offset + first, offset + first + len(tokens))
        yield from logprobs_of(output.logits(rows), tokens, [top] * len(tokens))
