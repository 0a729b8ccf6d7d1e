"""Logits to tokens. Each row depends on its own sequence alone, so a batch gives what single requests would."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wicore_backend.engine.grammar.progress import GrammarProgress, allowed_tokens
from wicore_backend.engine.sampling_params import SamplingParams
from wicore_backend.executor.upload import to_device

_DRAWN_AT_ONCE = 32
"""Rows, since to sort them takes much more memory than they have."""
_DRAWING_BYTES = 36
"""For each of their logits: a copy under the temperature, what is sorted with its places, and what sorting takes."""


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What choosing one sequence's next token depends on, beside its logits."""

    params: SamplingParams
    seed: int
    place: int
    """Which token of the answer is to be chosen, counted from 0."""
    prompt: Rows[int] = ()
    answer: Rows[int] = ()
    """Tokens so far; needed, like the prompt's, only where a penalty looks at them."""
    grammar: GrammarProgress | None = None
    held_back: frozenset[int] = frozenset()
    """Tokens that are not to be chosen yet, unless the grammar allows no other."""

    @property
    def penalised(self) -> bool:
        """Whether a penalty looks at the tokens so far."""
        params = self.params
        return bool(params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty)

    @property
    def reshaped(self) -> bool:
        """Whether its logits are others than the model's before the temperature."""
        return bool(self.penalised or self.params.logit_bias or self.grammar or self.held_back)


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """Next tokens, and what tells whether they were chosen among numbers; both are on the device.

    Attributes
    ----------
    tokens
        int64 [R], always tokens of the vocabulary, so that a step may begin with them before anybody has read them.
    peaks
        float32 [R], the greatest of each row's logits: not finite if any of them is NaN or infinitely great.
    """

    tokens: Tensor
    peaks: Tensor


def sampling_bytes(*, rows: int, vocab: int) -> int:
    """Memory that `sample` takes for so many rows, their logits aside."""
    # Those under penalties and a grammar are copied, and so are, of some rows, those that are drawn.
    return vocab * (rows * 2 * torch.float32.itemsize + min(rows, _DRAWN_AT_ONCE) * _DRAWING_BYTES)


def sample(logits: Tensor, rows: Rows[SamplingRow]) -> Sampled:
    """The next token of each row of `logits` float32 [R, V].

    The order of operations is that of `SamplingParams`. The device is not waited for.
    """
    if any(r.reshaped for r in rows):
        logits = _reshape(logits.clone(), rows)
    drawn = [row for row, r in enumerate(rows) if r.params.temperature > 0]
    if len(drawn) == len(rows):
        return _draw_in_parts(logits, rows)
    peaks, tokens = logits.max(-1)  # In one pass, as argmax takes.
    if drawn:
        places = to_device(np.array(drawn, np.int64), logits.device)
        chosen = _draw_in_parts(logits.index_select(0, places), [rows[row] for row in drawn])
        tokens.index_copy_(0, places, chosen.tokens)
    return Sampled(tokens, peaks)


def _reshape(logits: Tensor, rows: Rows[SamplingRow]) -> Tensor:
    """What comes before the temperature, in place and in its order."""
    for own_logits, row in zip(logits, rows, strict=True):
        if row.penalised:
            _penalise(own_logits, row)
    biases = [
        (place * logits.shape[1] + token, bias)
        for place, row in enumerate(rows)
        if row.params.logit_bias or row.held_back
        for token, bias in (row.params.logit_bias | dict.fromkeys(_held_back(row), -np.inf)).items()
    ]
    if biases:
        places, values = zip(*biases, strict=True)
        flat = to_device(np.array(places, np.int64), logits.device)
        logits.view(-1).index_add_(0, flat, to_device(np.array(values, np.float32), logits.device))
    answers = {place: row.grammar for place, row in enumerate(rows) if row.grammar is not None}
    if answers:
        allowed = allowed_tokens(answers, len(rows), logits.shape[1])
        for place in answers:
            if rows[place].held_back:
                _hold_back(allowed[place], rows[place].held_back)
        logits += _unless_set(to_device(allowed, logits.device), logits.shape[1])
    return logits


def _held_back(row: SamplingRow) -> frozenset[int]:
    """What cannot be chosen, whatever else can: a grammar decides for itself."""
    return row.held_back if row.grammar is None else frozenset()


def _hold_back(allowed: NDArray[np.uint8], tokens: frozenset[int]) -> None:
    """Clear the bits of tokens in `allowed` uint8 [V / 8], if others stay."""
    kept = allowed.copy()
    for token in tokens:
        kept[token // 8] &= 0xFF ^ (1 << token % 8)
    if kept.any():
        allowed[:] = kept


def _unless_set(bits: Tensor, vocab: int) -> Tensor:
    """float32 [R, vocab]: 0 where `bits` uint8 [R, V / 8] has a one, -inf elsewhere."""
    return _bytes_to_addends(bits.device).index_select(0, bits.flatten().int()).view(len(bits), -1)[:, :vocab]


@cache
def _bytes_to_addends(device: torch.device) -> Tensor:
    """float32 [256, 8]: each byte's bits, least first, as what they add."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return to_device(np.where(bits, np.float32(0), np.float32(-np.inf)), device)


def _penalise(logits: Tensor, row: SamplingRow) -> None:
    """Of a row's `logits` [V], in place."""
    params = row.params
    if params.repetition_penalty != 1:
        seen = to_device(np.array([*row.prompt, *row.answer], np.int64), logits.device)
        values = logits.index_select(0, seen)
        penalised = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        logits.index_copy_(0, seen, penalised)  # What was seen twice is written twice, the same.
    if row.answer and (params.presence_penalty or params.frequency_penalty):
        tokens, counts = np.unique(row.answer, return_counts=True)
        drops = params.presence_penalty + params.frequency_penalty * counts
        places = to_device(tokens, logits.device)
        logits.index_add_(0, places, to_device(drops.astype(np.float32), logits.device), alpha=-1)


def _draw_in_parts(logits: Tensor, rows: Rows[SamplingRow]) -> Sampled:
    if len(rows) <= _DRAWN_AT_ONCE:
        return _draw(logits, rows)
    parts = [slice(first, first + _DRAWN_AT_ONCE) for first in range(0, len(rows), _DRAWN_AT_ONCE)]
    drawn = [_draw(logits[part], rows[part]) for part in parts]
    return Sampled(torch.cat([d.tokens for d in drawn]), torch.cat([d.peaks for d in drawn]))


def _draw(logits: Tensor, rows: Rows[SamplingRow]) -> Sampled:
    """A token of each row, drawn from its distribution.

    The likeliest token after each has raced an exponential clock of its own (Gumbel-max). Unlike a walk along the
    cumulated probabilities, the outcome does not hang on the last bits of all logits, which differ between batches.
    """
    # From the likeliest down, so that the least of temperatures takes that one: the others go to -inf, none to +inf.
    peaks = logits.amax(-1, keepdim=True)
    logits = logits - peaks
    logits /= _column([r.params.temperature for r in rows], logits).clamp_min_(torch.finfo(torch.float32).tiny)
    if any(r.params.top_k or r.params.top_p < 1 or r.params.min_p for r in rows):
        logits = logits.masked_fill(logits < _cutoffs(logits, rows), -torch.inf)
    clocks = torch.empty_like(logits)
    for clock, row in zip(clocks, rows, strict=True):
        generator = torch.Generator(logits.device).manual_seed(_mix(row.seed, row.place))
        clock.exponential_(generator=generator)
    return Sampled((logits - clocks.log_()).argmax(-1), peaks[:, 0])


def _cutoffs(logits: Tensor, rows: Rows[SamplingRow]) -> Tensor:
    """[R, 1], the least logit that top_k, top_p and min_p leave in each row of `logits` [R, V]."""
    vocab = logits.shape[1]
    ordered = logits.sort(-1, descending=True).values
    kept = _column([min(r.params.top_k or vocab, vocab) for r in rows], logits).long()
    probs = ordered.masked_fill(torch.arange(vocab, device=logits.device) >= kept, -torch.inf).softmax(-1)
    reached = (probs.cumsum(-1) - probs >= _column([r.params.top_p for r in rows], logits)).logical_not_().sum(-1, True)
    least = ordered.gather(1, torch.minimum(kept, reached) - 1)
    return torch.maximum(least, ordered[:, :1] + _column([r.params.min_p for r in rows], logits).log_())


def _column(values: list[float], like: Tensor) -> Tensor:
    return to_device(np.array(values, np.float32), like.device)[:, None]


def _mix(seed: int, place: int) -> int:
    """A seed that depends on nothing but a request's own and the place in its answer.

    Hence a request that is preempted and computed again, or runs in another batch, draws the same tokens. The mixing
    is SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
    """
    mask = 2**64 - 1
    z = (seed + (place + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)
