"""The blocks of one open sequence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from wicore_backend.hmt.attention_mass import AttentionMass, Mask, Masses
from wicore_backend.hmt.block_pool import BlockAccountingError
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.names import BlockNames


@dataclass(eq=False, slots=True)
class SequenceBlocks:
    """What an open sequence has, and is to have.

    An entry of a table below `stop` is in one state:

    - *held*: a block that the sequence uses; the first `full` of them are complete, and named if it has names;
    - *behind*: before `first`; in the local group, no later token sees it, and it has been released;
    - *hole*: a global block that has left, for lack of attention; it may come back, unless it is *lost*.

    Attributes
    ----------
    names
        None if nothing of the sequence is to be kept.
    tables
        For each group int32 [N]: entry n is the physical block of positions n * block_size onwards, or 0 where the
        sequence has none (not reached yet, behind the local window, or a global one that has left).
    first
        For each group the first table entry that holds a block.
    stop
        Table entries in use, the same in all groups.
    full
        How many of them have been completed, and named. It stays where it is when the first one has left.
    expected
        For each group the blocks that the sequence is likely to hold at once, as it grows.
    resume_points
        Block counts at which a window end is to be kept, in order.
    mass
        Where attention has fallen, if anybody wants to know.
    holes
        Global blocks between the first and `stop` that have left.
    lost
        For a sequence of which blocks have left, bool [N]: those that cannot come back. None for an exact one.
    """

    names: BlockNames | None
    tables: Mapping[LayerGroup, NDArray[np.int32]]
    first: dict[LayerGroup, int]
    stop: int
    full: int
    expected: dict[LayerGroup, int]
    resume_points: list[int] = field(default_factory=list)
    mass: AttentionMass | None = None
    holes: int = 0
    lost: Mask | None = None

    def attended(self, mass: Masses) -> None:
        """A step has measured where attention fell: float32 [blocks], as `Attention.mass` gives it."""
        if self.mass is not None:
            self.mass.fold(mass, self.tables[LayerGroup.GLOBAL][: len(mass)] != 0 if self.holes else None)

    def held(self, group: LayerGroup) -> int:
        """How many blocks it holds."""
        return self.stop - self.first[group] - (self.holes if group is LayerGroup.GLOBAL else 0)

    def missing(self, group: LayerGroup) -> int:
        """Blocks that the sequence is likely to take on top of those that it holds."""
        missing = self.expected[group] - self.stop + self.first[group]
        if group is LayerGroup.GLOBAL:
            missing += self.holes
        return missing if missing > 0 else 0

    def check_integrity(self, group: LayerGroup) -> list[int]:
        """The blocks that are held; raises BlockAccountingError unless every entry is in one state."""
        first, table = self.first[group], self.tables[group]
        if np.any(table[:first]) or np.any(table[self.stop :]):
            raise BlockAccountingError(f"a {group} table has blocks outside {first}:{self.stop}")
        held: list[int] = table[first : self.stop][table[first : self.stop] != 0].tolist()
        if len(held) != self.held(group) or (self.holes and self.lost is None):
            raise BlockAccountingError(f"a {group} table has holes that nobody has counted")
        if not self.full <= self.stop:
            raise BlockAccountingError(f"{self.full} blocks are complete of {self.stop}")
        return held
