"""How much attention each block of a running sequence gets, as far as its decode steps have told."""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import NDArray

Masses = NDArray[np.float32]
Mask = NDArray[np.bool_]


class AttentionMass:
    """Moving average of the attention mass [blocks] of one sequence, which grows with it.

    A block's average starts with the first measurement that it is part of, and each counts 1 - `weight` times as much
    as the one after it. Every call is a few vector operations over the blocks.

    Parameters
    ----------
    weight
        Of a new measurement against all before it, above 0 and up to 1.
    """

    def __init__(self, *, weight: float = 0.1) -> None:
        if not 0 < weight <= 1:
            raise ValueError(f"weight = {weight}: give it above 0 and up to 1")
        self._weight = np.float32(weight)
        self._sums: Masses = np.zeros(0, np.float32)
        self._weights: Masses = np.zeros(0, np.float32)
        """Of what has been added to the sums: less than 1 for blocks that are young, 0 for those never measured."""

    def __len__(self) -> int:
        """Blocks up to the last one measured."""
        return len(self._sums)

    def copy(self) -> Self:
        """What another sequence starts with that goes on from the same tokens."""
        copy = type(self)(weight=float(self._weight))
        copy._sums, copy._weights = self._sums.copy(), self._weights.copy()
        return copy

    def fold(self, mass: Masses, held: Mask | None = None) -> None:
        """Take in a measurement.

        Parameters
        ----------
        mass
            float32 [N], as `Attention.mass` gives it. N may be more than ever before, or less.
        held
            bool [N], the blocks that were visible to it; None is all. The average of the others stays as it is.
        """
        if grown := max(0, len(mass) - len(self._sums)):
            self._sums = np.pad(self._sums, (0, grown))
            self._weights = np.pad(self._weights, (0, grown))
        step = self._weight if held is None else np.where(held, self._weight, np.float32(0))
        sums, weights = self._sums[: len(mass)], self._weights[: len(mass)]
        sums += step * (mass - sums)
        weights += step * (1 - weights)

    def average(self) -> Masses:
        """float32 [blocks]: the share of attention that each block gets; 0 for a block never measured."""
        average: Masses = self._sums / np.maximum(self._weights, np.finfo(np.float32).tiny)
        return average

    def relative(self, count: int | None = None) -> Masses:
        """float32 [blocks]: a block's average over that of the mean block, so that sequences can be compared.

        Parameters
        ----------
        count
            Of the first so many blocks alone; None is all.
        """
        average = self.average()[:count]
        total = average.sum()
        return average * (len(average) / total) if total else average

    def scores(self, *, spread: float = 0.5) -> Masses:
        """float32 [blocks]: what a block is worth, its average or more.

        Parameters
        ----------
        spread
            A block counts for at least this much of what its neighbours have (0 to 1): what attention found in a block
            may go on in the next, which nobody looks at before the answer has come that far.
        """
        average = self.average()
        scores = average.copy()
        np.maximum(scores[1:], spread * average[:-1], out=scores[1:])
        np.maximum(scores[:-1], spread * average[1:], out=scores[:-1])
        return scores
