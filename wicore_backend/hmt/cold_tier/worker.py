"""What both directions have in common: a thread that does what it is sent, and keeps its trays busy."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import inf
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

import torch

from wicore_backend.hmt.cold_tier.batches import Batch
from wicore_backend.hmt.cold_tier.books import ColdBooks
from wicore_backend.hmt.cold_tier.pace import Pace
from wicore_backend.hmt.cold_tier.records import record_name
from wicore_backend.hmt.cold_tier.requests import Finished
from wicore_backend.hmt.cold_tier.staging import Stage, Tray, laid_out
from wicore_backend.hmt.cold_tier.threads import compute_alone
from wicore_backend.hmt.host_tier import SlotBlock
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.nvme import NvmeStore, Outcome

_log = logging.getLogger(__name__)

MOST_BLOCKS = 64
"""In a batch: Python spends 20 to 30 us on a record, during which the loop thread may have to wait for the GIL."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Desk:
    """What a worker works with; the trays are its own.

    Attributes
    ----------
    trays
        Batches that can be under way at once.
    enough
        Bytes of records with which a batch is complete: trays that have room for the largest have room for many small.
    report
        Called with the blocks that have ended.
    """

    store: NvmeStore
    books: ColdBooks
    stages: Mapping[LayerGroup, Stage]
    trays: Sequence[Tray]
    enough: int
    report: Callable[[Sequence[Finished]], None]


B = TypeVar("B", bound=Batch)


class Worker(ABC, Generic[B]):
    """A thread that does what it is sent, one after the other, and keeps its trays busy.

    Parameters
    ----------
    most_blocks
        In a batch.
    """

    def __init__(self, name: str, desk: Desk, *, most_blocks: int) -> None:
        self.pace = Pace()
        self._enough = desk.enough
        self._store = desk.store
        self._books = desk.books
        self._stages = desk.stages
        self._report = desk.report
        self._free = list(desk.trays)
        self._most_blocks = most_blocks
        self._under_way: set[B] = set()
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._stopping = False
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, call: Callable[[], None]) -> None:
        """Have `call` called on the thread. Safe on any thread."""
        self._inbox.put(call)

    def stop(self) -> None:
        """End the thread once nothing waits and nothing is under way."""
        self.post(partial(setattr, self, "_stopping", True))

    def abandon(self) -> None:
        """End what waits, and what is under way, without waiting for the disk."""
        self._abandoned = True
        self.post(lambda: None)

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end; whether it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    @abstractmethod
    def _waiting(self) -> bool:
        """Whether anything waits for a tray."""

    @abstractmethod
    def _pump(self) -> None:
        """End what has no use any more, and start what can be started."""

    def _patience(self) -> float:
        """Seconds after which `_pump` is due even if nothing is sent."""
        return inf

    @torch.inference_mode()  # Slots and trays may have been made under it, and are not to be written otherwise.
    def _run(self) -> None:
        compute_alone()
        while not (self._stopping and not self._waiting and not self._under_way):
            patience = self._patience()
            with suppress(Empty):
                call = self._inbox.get(timeout=None if patience == inf else max(0.0, patience))
                self._guarded(call)
            self._guarded(self._pump)

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:
            _log.exception("cold_tier_bug")

    def _take(self, queue: deque[SlotBlock], tray: Tray, batch_of: Callable[..., B]) -> B:
        """Take from the queue what goes on a tray: a batch, which is under way from now on."""
        started = time.monotonic()
        blocks = self._fill(queue, tray)
        outcomes = [Outcome.FAILED] * len(blocks)
        batch = batch_of(blocks=blocks, tray=tray, started=started, first=not self._under_way, outcomes=outcomes)
        self._under_way.add(batch)
        return batch

    def _do(self, batch: B, step: Callable[[], None]) -> None:
        """Do a batch's next step. If that fails, which is a bug, the batch ends: nobody waits for its blocks."""
        try:
            step()
        except Exception:
            _log.exception("cold_tier_bug")
            if batch in self._under_way:
                self._over(batch)

    def _lay_out(self, batch: B, *, in_slots: bool = True) -> None:
        staged = [(self._stages[block.group], block.slot) for block in batch.blocks]
        batch.parts, batch.views = laid_out(batch.tray, staged, in_slots=in_slots)
        batch.names = [record_name(block.key) for block in batch.blocks]

    def _over(self, batch: B) -> None:
        """A batch has ended as its outcomes say."""
        self._under_way.remove(batch)
        self._free.append(batch.tray)
        self._end_batch(batch)

    @abstractmethod
    def _end_batch(self, batch: B) -> None:
        """Settle and report the blocks of a batch, whatever happens."""

    def _settled(self, settle: Callable[[], None], outcome: Outcome) -> Outcome:
        """Have a block's outcome taken into the books; if that fails, which is a bug, the block is lost."""
        try:
            settle()
        except Exception:
            _log.exception("cold_tier_bug")
            return Outcome.FAILED
        return outcome

    def _fill(self, queue: deque[SlotBlock], tray: Tray) -> list[SlotBlock]:
        """Take from the queue what goes on a tray; by group, else in order, since policies make something of that."""
        size = 0
        taken: list[SlotBlock] = []
        while queue and size < self._enough and len(taken) < self._most_blocks:
            size += self._stages[queue[0].group].codec.encoded_bytes
            if size > tray.size:
                break
            taken.append(queue.popleft())
        return sorted(taken, key=lambda block: block.group)

    def _cut(self) -> None:
        """End all that is under way without waiting for the disk."""
        for batch in self._under_way:
            if batch.ticket is not None:
                batch.ticket.cancel()

    def _measure(self, batch: B) -> None:
        size = sum(self._stages[block.group].block_bytes for block in batch.blocks)
        self.pace.add(started=batch.started, size=size, first=batch.first, now=time.monotonic())
