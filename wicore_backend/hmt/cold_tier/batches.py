"""Blocks that share a tray, on their way down or up, and what a restore has waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from wicore_backend.hmt.cold_tier.requests import Restore
from wicore_backend.hmt.cold_tier.staging import Part, Tray
from wicore_backend.hmt.host_tier import SlotBlock
from wicore_backend.hmt.nvme import Outcome, Ticket


@dataclass(eq=False, kw_only=True)
class Batch:
    """Blocks that share a tray, in the order of their records; where slots are records, the tray's size alone.

    Attributes
    ----------
    first
        Whether nothing was under way before it.
    outcomes
        Of each block, as far as that is known.
    parts
        What is encoded into the tray, or decoded from it.
    views
        Each record, in the tray or in its slot.
    """

    blocks: Sequence[SlotBlock]
    tray: Tray
    started: float
    first: bool
    outcomes: list[Outcome]
    parts: Sequence[Part] = ()
    views: Sequence[memoryview] = ()
    names: Sequence[bytes] = ()
    ticket: Ticket | None = None


@dataclass(eq=False, kw_only=True)
class SpillBatch(Batch):
    """Blocks on their way down.

    Attributes
    ----------
    moving
        Which of its records the ticket under way is about.
    """

    moving: Sequence[int] = ()


@dataclass(eq=False, kw_only=True)
class RestoreBatch(Batch):
    """Blocks on their way up, for one job."""

    job: RestoreJob


@dataclass(eq=False)
class RestoreJob:
    """What a restore has waiting. Without a handle it is a measurement, and ends in no slot."""

    waiting: deque[SlotBlock]
    deadline: float
    restore: Restore | None

    @property
    def cancelled(self) -> bool:
        return self.restore is not None and self.restore.cancelled
