"""Sequences some of whose blocks have left the device, as the shorter sequences that attention sees."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from wicore_backend.attention.base import PackedStep
from wicore_backend.hmt.layout import LayerGroup


@dataclass(frozen=True, slots=True, eq=False)
class ClosedUp:
    """A step for the global group alone, without the blocks that have left.

    Keys are stored with their positions rotated in, so that attention needs no more than their order: each sequence is
    as it would be if the blocks that have left had never been.
    """

    step: PackedStep
    """Positions, limits and the group's block table are those of the shorter sequences; all else is as it was."""
    held: NDArray[np.bool_]
    """[B, N], which of the sequences' blocks are there; False past their ends."""

    def spread(self, sequence: int, mass: NDArray[np.float32]) -> NDArray[np.float32]:
        """`mass` of the blocks that the shorter sequence sees, with 0 for those between them that have left."""
        places = self.held[sequence].nonzero()[0][: len(mass)]
        spread = np.zeros(places[-1] + 1, np.float32)
        spread[places] = mass
        return spread


def close_up(step: PackedStep, block_size: int) -> ClosedUp | None:
    """The step without the global blocks that have left; None if none has.

    Raises
    ------
    ValueError
        If a block that the step writes has left.
    """
    table = step.block_tables[LayerGroup.GLOBAL]
    if table.all():
        return None
    starts = step.query_lens.cumsum() - step.query_lens
    first, last = (step.positions[rows] // block_size for rows in (starts, starts + step.query_lens - 1))
    nth = np.arange(table.shape[1])
    used = nth <= last[:, None]
    held = used & (table != 0)
    gone = used & ~held
    if not gone.any():
        return None
    if wrong := np.argwhere(gone & (nth >= first[:, None])).tolist():
        sequence, block = wrong[0]
        raise ValueError(f"block {block} of sequence {sequence} is written in this step, so its table cannot say 0")
    order = np.argsort(~held, axis=1, kind="stable")[:, : held.sum(1).max()]
    moved = np.repeat(gone.sum(1, dtype=np.int32) * np.int32(block_size), step.query_lens)
    shorter = replace(
        step,
        positions=step.positions - moved,
        attend_limits=step.attend_limits - moved,
        block_tables={LayerGroup.GLOBAL: np.take_along_axis(np.where(held, table, 0), order, axis=1)},
    )
    return ClosedUp(shorter, held)
