"""What the cold tier tells about itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.nvme import NvmeStatistics, Outcome


@dataclass(slots=True)
class ColdCounts:
    """One group's blocks since the opening.

    Attributes
    ----------
    spills, restores
        Blocks asked for, by outcome. Of spills, `DONE` were stored and `HELD` needed no work; of restores, all but
        `DONE` are misses, and the outcome is the reason.
    evicted
        Deleted to make room.
    lost
        Gone without being asked to: damaged, unreadable, or their files deleted.
    unasked
        Blocks that `spill` left to the caller because enough were under way.
    """

    spills: Counter[Outcome] = field(default_factory=Counter)
    restores: Counter[Outcome] = field(default_factory=Counter)
    evicted: int = 0
    lost: int = 0
    unasked: int = 0

    @property
    def refused(self) -> int:
        """Blocks that could have been stored and were not, for whatever reason."""
        kept = self.spills[Outcome.DONE] + self.spills[Outcome.HELD]
        return self.spills.total() - kept + self.unasked


@dataclass(frozen=True, slots=True)
class ColdStatistics:
    """Counts since the opening, gauges of the moment.

    Attributes
    ----------
    held
        Blocks that can be restored.
    capacity
        Records that fit, if the groups had equally many: an estimate.
    spilled_bytes, restored_bytes
        Of blocks in their slots, before encoding and after decoding, that were `DONE`.
    spill_seconds, restore_seconds
        In which something was under way. The tier's own measurements count too.
    spill_bytes_per_second, restore_bytes_per_second
        As measured lately; None before the first.
    restore_latency_s
        What a restore takes apart from its bytes.
    store
        What the store under it says, its troubles with the disk among it.
    """

    groups: Mapping[LayerGroup, ColdCounts]
    held: Mapping[LayerGroup, int]
    capacity: int
    spilling_bytes: int
    restoring_bytes: int
    spilled_bytes: int
    restored_bytes: int
    spill_seconds: float
    restore_seconds: float
    spill_bytes_per_second: float | None
    restore_bytes_per_second: float | None
    restore_latency_s: float | None
    store: NvmeStatistics
