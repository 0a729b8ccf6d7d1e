"""Bounded KV, which is LOSSY: a decoding sequence keeps part of its global blocks, and attends to no others.

1. A prompt is computed exactly, with all its blocks on the device. The bound holds from the first decode on, when the
   attention of the prompt's end has told what matters: chosen before the question is there, half of the answers are
   lost (docs/benchmarks/attention-signal.md).
2. The first blocks stay, which many models use as a sink, the recent ones, and between them those that attention fell
   on most. The choice is made again whenever a block is full.
3. A block that leaves is released. One of the prompt stays in the prefix cache, on the device while nobody needs the
   room and then in host memory, and comes back when its score, frozen since it left, is high enough. What no tier of
   these two has any more is gone for good, as is each block computed after the first one left.
4. For such a block is not what its name would say: its keys come from tokens that did not see all before them. So it
   gets no name, and nobody else ever finds it.
5. A sequence that gives way to others starts again from its tokens, all computed exactly, and is bounded anew. So its
   answer may go on differently than it would have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from wicore_backend.errors import InvalidArgumentError
from wicore_backend.hmt.attention_mass import AttentionMass, Mask

Scores: TypeAlias = Callable[[AttentionMass, int], NDArray[np.float32]]
"""float32 [N], at least 0, for the first N blocks of a sequence: the higher, the rather a block is kept."""


def by_mass(mass: AttentionMass, count: int) -> NDArray[np.float32]:
    """Attention mass, as `AttentionMass.scores` spreads it; 0 for blocks never measured."""
    scores = np.zeros(count, np.float32)
    known = mass.scores()[:count]
    scores[: len(known)] = known
    return scores


@dataclass(slots=True)
class BoundCounts:
    """What happened since the start, in global blocks."""

    left: int = 0
    returned: int = 0
    lost: int = 0
    """Wanted back, or left, without being in the device tier or the host tier under a name."""


@dataclass(frozen=True, slots=True)
class KVBudget:
    """How many global blocks a decoding sequence may have, and which. Lossy: see the module's docstring.

    Attributes
    ----------
    blocks
        At most, the one that is being written included.
    first, recent
        Of the sequence's beginning and end, which stay whatever their score.
    loyalty
        How many times higher than the score of a block that is there that of one that has left must be.
    scores
        What a block is worth.
    """

    blocks: int
    first: int = 4
    recent: int = 8
    loyalty: float = 1.5
    scores: Scores = by_mass

    @classmethod
    def of(cls, tokens: int, block_size: int) -> Self:
        """The budget of `kv_budget_tokens`, rounded down to whole blocks.

        Raises
        ------
        InvalidArgumentError
            If it leaves nothing to choose.
        """
        budget = cls(tokens // block_size)
        least = budget.first + budget.recent + 1
        if budget.blocks < least:
            raise InvalidArgumentError(
                f"kv_budget_tokens = {tokens:,}: a sequence keeps its first {budget.first} blocks, its last "
                f"{budget.recent}, and some between them; give it {least * block_size:,} or more (block_size = "
                f"{block_size}), or None for exact answers"
            )
        return budget

    def choose(self, mass: AttentionMass, held: Mask, lost: Mask) -> Mask:
        """Which of a sequence's N blocks to have: bool [N], as many as the budget says, or fewer if others are lost.

        Parameters
        ----------
        held
            bool [N], those that are there, the last one being that which is written next.
        lost
            bool [N], those that cannot be had.
        """
        end = max(self.first, len(held) - self.recent)
        keep = held.copy()
        keep[self.first : end] = False
        scores = self.scores(mass, len(held))
        scores = np.where(held, self.loyalty * scores, scores)[self.first : end]
        order = np.argsort(scores, kind="stable")  # Of equal blocks the later stay.
        order = order[~lost[self.first : end][order]]
        keep[self.first + order[max(0, len(order) - (self.blocks - self.first - self.recent)) :]] = True
        return keep
