"""The way up: records are fetched, and decoded into slots."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from math import inf

from torch import Tensor

from wicore_backend.hmt.cold_tier.batches import RestoreBatch, RestoreJob
from wicore_backend.hmt.cold_tier.decoders import Decoders
from wicore_backend.hmt.cold_tier.requests import Finished, Restore
from wicore_backend.hmt.cold_tier.staging import Part, Tray
from wicore_backend.hmt.cold_tier.worker import MOST_BLOCKS, Desk, Worker
from wicore_backend.hmt.host_tier import SlotBlock
from wicore_backend.hmt.nvme import Outcome, Ticket

_log = logging.getLogger(__name__)

_QUIET_S = 0.05
"""After the last store, before the disk is measured: others may follow at once."""

_MOST_MEASURED = 2 * MOST_BLOCKS
"""Blocks that the disk is measured by."""


class RestoreWorker(Worker[RestoreBatch]):
    """Fetches records and has them decoded into slots.

    A batch is the worker's, but while it is decoded, between `_landed` and `_decoded`.

    With nothing to do it measures, at first and then every `measure_s`: it restores a few held records to nowhere, as
    many as keep all of the store's threads reading, since a disk may give one of them but a part of its speed. So there
    is a pace before anybody has to rely on it, and a disk that was slow is found to be well again.
    While the disk is written to it would look slower than it is: the first measurement waits for the end of that, and
    others for `measure_s` more at most.

    Parameters
    ----------
    stores_until
        Until when the disk was last written to; inf while it is.
    """

    _queue: deque[RestoreJob]

    def __init__(self, desk: Desk, decoders: Decoders, *, measure_s: float, stores_until: Callable[[], float]) -> None:
        super().__init__("cold-restore", desk, most_blocks=MOST_BLOCKS)
        self._decoders = decoders
        self._queue = deque()
        self._stores_until = stores_until
        self._measure_s = measure_s
        self._measured_at = -inf

    def restore(self, restore: Restore, blocks: Sequence[SlotBlock], after: Callable[[], None] | None) -> None:
        """Bring up the restore's pinned blocks, once `after` has returned. Safe on any thread."""
        self.post(partial(self._begin, RestoreJob(deque(blocks), restore.deadline, restore), after))

    def cancel(self, restore: Restore) -> None:
        """See to a restore that is cancelled now. Safe on any thread."""
        self.post(partial(self._cancel, restore))

    def wake(self) -> None:
        """There may be something to measure with."""
        self.post(lambda: None)

    @property
    def _waiting(self) -> bool:
        return bool(self._queue)

    def _patience(self) -> float:
        if self._queue:
            return min(job.deadline for job in self._queue) - time.monotonic()
        return inf if self._under_way or not self._books.newest(1) else self._measure_due - time.monotonic()

    @property
    def _measure_due(self) -> float:
        due = max(self._measured_at, self.pace.measured_at or -inf) + self._measure_s
        quiet = self._stores_until() + _QUIET_S
        return quiet if due == -inf else max(due, min(quiet, due + self._measure_s))

    def _begin(self, job: RestoreJob, after: Callable[[], None] | None) -> None:
        try:
            if after is not None:
                after()
        except Exception:
            _log.exception("cold_tier_restore_not_ready")
            self._end(job, [(block, Outcome.FAILED) for block in job.waiting])
        else:
            self._queue.append(job)

    def _cancel(self, restore: Restore) -> None:
        for batch in self._under_way:
            if batch.job.restore is restore and batch.ticket is not None:
                batch.ticket.cancel()

    def _pump(self) -> None:
        self._drop_useless()
        now = time.monotonic()
        idle = not self._queue and not self._under_way and not self._stopping
        if idle and self._measure_due <= now and (some := self._sample()):
            self._measured_at = now
            self._queue.append(RestoreJob(some, inf, None))
        while self._queue and self._free:
            job = self._queue[0]
            self._start(job, self._free.pop())
            if not job.waiting:
                self._queue.popleft()

    def _sample(self) -> deque[SlotBlock]:
        """Held blocks to measure the disk by."""
        missing = self._store.config.read_threads * self._enough
        sample: deque[SlotBlock] = deque()
        for group, name in self._books.newest(_MOST_MEASURED):
            if missing <= 0:
                break
            missing -= self._stages[group].codec.encoded_bytes
            sample.append(SlotBlock(group, name, slot=0))
        return sample

    def _drop_useless(self) -> None:
        now = time.monotonic()
        for job in list(self._queue):
            why = (
                Outcome.CLOSED if self._abandoned
                else Outcome.CANCELLED if job.cancelled or (job.restore is None and self._stopping)
                else Outcome.LATE if job.deadline <= now
                else None
            )  # fmt: skip
            if why is not None:
                self._queue.remove(job)
                self._end(job, [(block, why) for block in job.waiting])
        if self._abandoned:
            self._cut()

    def _start(self, job: RestoreJob, tray: Tray) -> None:
        batch = self._take(job.waiting, tray, partial(RestoreBatch, job=job))
        self._do(batch, lambda: self._fetch(batch))

    def _fetch(self, batch: RestoreBatch) -> None:
        self._lay_out(batch, in_slots=batch.job.restore is not None)
        deadline = batch.job.deadline
        batch.ticket = self._store.fetch(
            batch.names,
            batch.views,
            deadline_s=None if deadline == inf else max(0.0, deadline - batch.started),
            done=lambda ticket: self.post(partial(self._do, batch, partial(self._landed, batch, ticket))),
        )

    def _landed(self, batch: RestoreBatch, ticket: Ticket) -> None:
        outcomes = [outcome or Outcome.FAILED for outcome in ticket.outcomes]
        encoded = [part for part in batch.parts if not part.stage.as_it_is]
        if encoded and Outcome.DONE in outcomes:
            self._decoders.submit(
                lambda staging: _decode(batch, encoded, outcomes, staging),
                lambda: self.post(partial(self._do, batch, partial(self._decoded, batch))),
            )
        else:
            batch.outcomes = _unless_cancelled(batch, outcomes)
            self._decoded(batch)

    def _decoded(self, batch: RestoreBatch) -> None:
        if self._teaches(batch):
            self._measure(batch)
        self._over(batch)

    def _end_batch(self, batch: RestoreBatch) -> None:
        self._end(batch.job, list(zip(batch.blocks, batch.outcomes, strict=True)))

    def _teaches(self, batch: RestoreBatch) -> bool:
        """Whether the time that the batch took says something of the disk: not if the store gave up at once."""
        if not {Outcome.DONE, Outcome.CORRUPT, Outcome.LATE}.issuperset(batch.outcomes):
            return False
        deadline = min(batch.job.deadline, batch.started + self._store.config.read_deadline_s)
        return Outcome.LATE not in batch.outcomes or time.monotonic() >= deadline

    def _end(self, job: RestoreJob, ends: Sequence[tuple[SlotBlock, Outcome]]) -> None:
        if job.restore is None:
            for block, outcome in ends:
                self._settled(partial(self._books.look, block.key), outcome)
            return
        finished = []
        for block, outcome in ends:
            settled = self._settled(partial(self._books.unpin, block.key, outcome), outcome)
            finished.append(Finished(block, settled, job.restore))
        self._report(finished)


def _decode(batch: RestoreBatch, parts: Sequence[Part], outcomes: Sequence[Outcome], staging: Tensor) -> None:
    """Decode those records of a batch that are right; on a thread of the decoders'."""
    ends = _unless_cancelled(batch, outcomes)
    for part in parts:
        whole = range(part.first, part.first + len(part.records))
        for right, run in groupby(whole, key=lambda index: ends[index] is Outcome.DONE):
            indices = list(run)
            if not right:
                continue
            records = part.records[indices[0] - part.first : indices[-1] + 1 - part.first]
            try:
                if batch.job.restore is None:
                    part.stage.decode_to_nowhere(records, staging)
                else:
                    part.stage.decode(records, [batch.blocks[index].slot for index in indices], staging)
            except Exception:
                _log.exception("cold_tier_decode_failed")
                ends[indices[0] : indices[-1] + 1] = [Outcome.FAILED] * len(indices)
    batch.outcomes = ends


def _unless_cancelled(batch: RestoreBatch, outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [Outcome.CANCELLED] * len(outcomes) if batch.job.cancelled else list(outcomes)
