"""The way down: slots are encoded and stored."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import inf

from wicore_backend.hmt.cold_tier.batches import SpillBatch
from wicore_backend.hmt.cold_tier.requests import Finished
from wicore_backend.hmt.cold_tier.staging import Tray, staging_for
from wicore_backend.hmt.cold_tier.worker import MOST_BLOCKS, Desk, Worker
from wicore_backend.hmt.host_tier import SlotBlock
from wicore_backend.hmt.nvme import Outcome, Ticket

_log = logging.getLogger(__name__)

_REST_S = 100e-6
"""For each block of a batch, before the next batch is begun. Small blocks cost more Python than anything else: while
they are spilled, the steps of a loop thread on two cores take 5 times as long without a rest, and 2.5 times with it, at
3/4 of the speed. With large blocks it does not show."""
_LISTEN_REST = 10
"""Times as long as a part of what the policy hears took, before it hears the next. All of it is Python: a prompt of
130,000 tokens that comes back is heard for 40 ms, in which the loop's thread, that has its copies made, waits for the
interpreter whenever it lets go of it."""


class SpillWorker(Worker[SpillBatch]):
    """Encodes slots and stores them. Of a batch that does not fit the disk, it has victims deleted and asks again."""

    _queue: deque[SlotBlock]

    def __init__(self, desk: Desk) -> None:
        most = max(1, desk.store.config.store_limit // len(desk.trays))  # All batches together, so that none is BUSY.
        super().__init__("cold-spill", desk, most_blocks=min(MOST_BLOCKS, most))
        self._queue = deque()
        self._staging = staging_for(desk.stages.values())
        self._resting_until = -inf
        self._ended_at = -inf
        self._listen_at = inf

    @property
    def stores_until(self) -> float:
        """Until when the disk was last written to; inf while it is. Safe on any thread."""
        return inf if self._queue or self._under_way else self._ended_at

    def spill(self, blocks: Sequence[SlotBlock], after: Callable[[], None] | None) -> None:
        """Queue blocks whose bytes are there once `after` has returned. Safe on any thread."""
        self.post(partial(self._begin, blocks, after))

    def listen(self) -> None:
        """There is something for the policy to hear. Safe on any thread."""
        self.post(self._hear)

    def _hear(self) -> None:
        if self._listen_at == inf:
            self._listen()

    def _listen(self) -> None:
        began = time.monotonic()
        more = self._books.listen() and not self._stopping
        now = time.monotonic()
        self._listen_at = now + _LISTEN_REST * (now - began) if more else inf

    @property
    def _waiting(self) -> bool:
        return bool(self._queue)

    def _patience(self) -> float:
        until = self._resting_until if self._queue and self._free else inf
        return min(until, self._listen_at) - time.monotonic()

    def _begin(self, blocks: Sequence[SlotBlock], after: Callable[[], None] | None) -> None:
        try:
            if after is not None:
                after()
        except Exception:
            _log.exception("cold_tier_spill_not_ready")
            self._end((block, Outcome.FAILED) for block in blocks)
        else:
            self._queue.extend(blocks)

    def _pump(self) -> None:
        if self._abandoned:
            self._end((block, Outcome.CLOSED) for block in self._queue)
            self._queue.clear()
            self._cut()
        if self._listen_at <= time.monotonic():
            self._listen()
        while self._queue and self._free and (self._stopping or self._resting_until <= time.monotonic()):
            self._start(self._free.pop())

    def _start(self, tray: Tray) -> None:
        batch = self._take(self._queue, tray, SpillBatch)
        self._do(batch, lambda: self._encode(batch))
        self._resting_until = time.monotonic() + _REST_S * len(batch.blocks)

    def _encode(self, batch: SpillBatch) -> None:
        self._lay_out(batch)
        for part in batch.parts:
            slots = [block.slot for block in batch.blocks[part.first : part.first + len(part.records)]]
            part.stage.encode(slots, part.records, self._staging)
        self._store_records(batch, range(len(batch.blocks)))

    def _store_records(self, batch: SpillBatch, indices: Sequence[int]) -> None:
        batch.moving = indices
        batch.ticket = self._store.store_all(
            [batch.names[index] for index in indices],
            [batch.views[index] for index in indices],
            done=lambda ticket: self.post(partial(self._do, batch, partial(self._landed, batch, ticket))),
        )

    def _landed(self, batch: SpillBatch, ticket: Ticket) -> None:
        for index, outcome in zip(batch.moving, ticket.outcomes, strict=True):
            batch.outcomes[index] = outcome or Outcome.FAILED
        full = [index for index in batch.moving if batch.outcomes[index] is Outcome.FULL]
        if full and self._books.make_room(batch.blocks[index].key for index in full):
            self._store_records(batch, full)
        else:
            if set(batch.outcomes) == {Outcome.DONE}:
                self._measure(batch)
            self._over(batch)

    def _end_batch(self, batch: SpillBatch) -> None:
        self._ended_at = time.monotonic()
        self._end(zip(batch.blocks, batch.outcomes, strict=True))

    def _end(self, ends: Iterable[tuple[SlotBlock, Outcome]]) -> None:
        finished = []
        for block, outcome in ends:
            settled = self._settled(partial(self._books.stored, block.key, outcome), outcome)
            finished.append(Finished(block, settled, None))
        self._report(finished)
