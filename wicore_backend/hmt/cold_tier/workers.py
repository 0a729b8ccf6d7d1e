"""The cold tier's two threads. Each owns everything that it works with, and hears of the world by what it is sent."""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import inf
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

import torch

from wicore_backend.hmt.cold_tier.books import ColdBooks
from wicore_backend.hmt.cold_tier.pace import Pace
from wicore_backend.hmt.cold_tier.records import record_name
from wicore_backend.hmt.cold_tier.requests import Finished, Restore
from wicore_backend.hmt.cold_tier.staging import Part, Stage, Tray, laid_out
from wicore_backend.hmt.host_tier import SlotBlock
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.nvme import NvmeStore, Outcome, Ticket

_log = logging.getLogger(__name__)
_MOST_BLOCKS = 64
"""In a batch: Python spends 20 to 30 us on a record, during which the loop thread may have to wait for the GIL."""


_REST_S = 100e-6
"""For each block of a batch, before the next batch is begun. Small blocks cost more Python than anything else: while
they are spilled, the steps of a loop thread on two cores take 5 times as long without a rest, and 2.5 times with it, at
3/4 of the speed. With large blocks it does not show."""

_QUIET_S = 0.05
"""After the last store, before the disk is measured: others may follow at once."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Desk:
    """What a worker works with; stages and trays are its own.

    Attributes
    ----------
    trays
        Batches that can be under way at once.
    report
        Called with the blocks that have ended.
    """

    store: NvmeStore
    books: ColdBooks
    stages: Mapping[LayerGroup, Stage]
    trays: Sequence[Tray]
    report: Callable[[Sequence[Finished]], None]


@dataclass(eq=False, kw_only=True)
class _Batch:
    """Blocks that share a tray, in the order of their records; where slots are records, the tray's size alone.

    Attributes
    ----------
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
class _SpillBatch(_Batch):
    moving: Sequence[int] = ()
    """Which of its records the ticket under way is about."""


@dataclass(eq=False, kw_only=True)
class _RestoreBatch(_Batch):
    job: _Job


@dataclass(eq=False)
class _Job:
    """What a restore has waiting. Without a handle it is a measurement, and ends in no slot."""

    waiting: deque[SlotBlock]
    deadline: float
    restore: Restore | None

    @property
    def cancelled(self) -> bool:
        return self.restore is not None and self.restore.cancelled


B = TypeVar("B", bound=_Batch)


class Worker(ABC, Generic[B]):
    """A thread that does what it is sent, one after the other, and keeps its trays busy."""

    def __init__(self, name: str, desk: Desk) -> None:
        self.pace = Pace()
        self._store = desk.store
        self._books = desk.books
        self._stages = desk.stages
        self._report = desk.report
        self._free = list(desk.trays)
        self._most_blocks = max(1, min(_MOST_BLOCKS, desk.store.config.store_limit // len(desk.trays)))
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
        _compute_alone()
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
        room = tray.size
        taken: list[SlotBlock] = []
        while queue and len(taken) < self._most_blocks:
            room -= self._stages[queue[0].group].codec.encoded_bytes
            if room < 0:
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


class SpillWorker(Worker[_SpillBatch]):
    """Encodes slots and stores them."""

    _queue: deque[SlotBlock]

    def __init__(self, desk: Desk) -> None:
        super().__init__("cold-spill", desk)
        self._queue = deque()
        self._resting_until = -inf
        self._ended_at = -inf

    @property
    def stores_until(self) -> float:
        """Until when the disk was last written to; inf while it is. Safe on any thread."""
        return inf if self._queue or self._under_way else self._ended_at

    def spill(self, blocks: Sequence[SlotBlock], after: Callable[[], None] | None) -> None:
        """Queue blocks whose bytes are there once `after` has returned. Safe on any thread."""
        self.post(partial(self._begin, blocks, after))

    def listen(self) -> None:
        """There is something for the policy to hear. Safe on any thread."""
        self.post(self._listen)

    def _listen(self) -> None:
        if self._books.listen() and not self._stopping:
            self.post(self._listen)  # Behind what came meanwhile.

    @property
    def _waiting(self) -> bool:
        return bool(self._queue)

    def _patience(self) -> float:
        return self._resting_until - time.monotonic() if self._queue and self._free else inf

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
        while self._queue and self._free and (self._stopping or self._resting_until <= time.monotonic()):
            self._start(self._free.pop())

    def _start(self, tray: Tray) -> None:
        batch = self._take(self._queue, tray, _SpillBatch)
        self._do(batch, lambda: self._encode(batch))
        self._resting_until = time.monotonic() + _REST_S * len(batch.blocks)

    def _encode(self, batch: _SpillBatch) -> None:
        self._lay_out(batch)
        for part in batch.parts:
            slots = [block.slot for block in batch.blocks[part.first : part.first + len(part.records)]]
            part.stage.encode(slots, part.records)
        self._store_records(batch, range(len(batch.blocks)))

    def _store_records(self, batch: _SpillBatch, indices: Sequence[int]) -> None:
        batch.moving = indices
        batch.ticket = self._store.store_all(
            [batch.names[index] for index in indices],
            [batch.views[index] for index in indices],
            done=lambda ticket: self.post(partial(self._do, batch, partial(self._landed, batch, ticket))),
        )

    def _landed(self, batch: _SpillBatch, ticket: Ticket) -> None:
        for index, outcome in zip(batch.moving, ticket.outcomes, strict=True):
            batch.outcomes[index] = outcome or Outcome.FAILED
        full = [index for index in batch.moving if batch.outcomes[index] is Outcome.FULL]
        if full and self._books.make_room(batch.blocks[index].key for index in full):
            self._store_records(batch, full)
        else:
            if set(batch.outcomes) == {Outcome.DONE}:
                self._measure(batch)
            self._over(batch)

    def _end_batch(self, batch: _SpillBatch) -> None:
        self._ended_at = time.monotonic()
        self._end(zip(batch.blocks, batch.outcomes, strict=True))

    def _end(self, ends: Iterable[tuple[SlotBlock, Outcome]]) -> None:
        finished = []
        for block, outcome in ends:
            settled = self._settled(partial(self._books.stored, block.key, outcome), outcome)
            finished.append(Finished(block, settled, None))
        self._report(finished)


class RestoreWorker(Worker[_RestoreBatch]):
    """Fetches records and decodes them into slots.

    With nothing to do it measures, at first and then every `measure_s`: it restores up to two trays of held records to
    nowhere. So there is a pace before anybody has to rely on it, and a disk that was slow is found to be well again.
    While the disk is written to it would look slower than it is: the first measurement waits for the end of that, and
    others for `measure_s` more at most.

    Parameters
    ----------
    stores_until
        Until when the disk was last written to; inf while it is.
    """

    _queue: deque[_Job]

    def __init__(self, desk: Desk, *, measure_s: float, stores_until: Callable[[], float]) -> None:
        super().__init__("cold-restore", desk)
        self._queue = deque()
        self._stores_until = stores_until
        self._measure_s = measure_s
        self._measured_at = -inf
        largest = max(stage.codec.encoded_bytes for stage in desk.stages.values())
        self._measured_blocks = 2 * min(self._most_blocks, desk.trays[0].size // largest)

    def restore(self, restore: Restore, blocks: Sequence[SlotBlock], after: Callable[[], None] | None) -> None:
        """Bring up the restore's pinned blocks, once `after` has returned. Safe on any thread."""
        self.post(partial(self._begin, _Job(deque(blocks), restore.deadline, restore), after))

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

    def _begin(self, job: _Job, after: Callable[[], None] | None) -> None:
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
        if idle and self._measure_due <= now and (some := self._books.newest(self._measured_blocks)):
            self._measured_at = now
            self._queue.append(_Job(deque(SlotBlock(*key, slot=0) for key in some), inf, None))
        while self._queue and self._free:
            job = self._queue[0]
            self._start(job, self._free.pop())
            if not job.waiting:
                self._queue.popleft()

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

    def _start(self, job: _Job, tray: Tray) -> None:
        batch = self._take(job.waiting, tray, partial(_RestoreBatch, job=job))
        self._do(batch, lambda: self._fetch(batch))

    def _fetch(self, batch: _RestoreBatch) -> None:
        self._lay_out(batch, in_slots=batch.job.restore is not None)
        deadline = batch.job.deadline
        batch.ticket = self._store.fetch(
            batch.names,
            batch.views,
            deadline_s=None if deadline == inf else max(0.0, deadline - batch.started),
            done=lambda ticket: self.post(partial(self._do, batch, partial(self._landed, batch, ticket))),
        )

    def _landed(self, batch: _RestoreBatch, ticket: Ticket) -> None:
        outcomes = [outcome or Outcome.FAILED for outcome in ticket.outcomes]
        if batch.job.cancelled:
            outcomes = [Outcome.CANCELLED] * len(outcomes)
        for part in batch.parts:
            self._decode(batch, part, outcomes)
        batch.outcomes = outcomes
        if self._teaches(batch, outcomes):
            self._measure(batch)
        self._over(batch)

    def _end_batch(self, batch: _RestoreBatch) -> None:
        self._end(batch.job, list(zip(batch.blocks, batch.outcomes, strict=True)))

    def _teaches(self, batch: _RestoreBatch, outcomes: Sequence[Outcome]) -> bool:
        """Whether the time that the batch took says something of the disk: not if the store gave up at once."""
        if not {Outcome.DONE, Outcome.CORRUPT, Outcome.LATE}.issuperset(outcomes):
            return False
        deadline = min(batch.job.deadline, batch.started + self._store.config.read_deadline_s)
        return Outcome.LATE not in outcomes or time.monotonic() >= deadline

    def _decode(self, batch: _RestoreBatch, part: Part, outcomes: list[Outcome]) -> None:
        """Decode those of the part's records that are right."""
        whole = range(part.first, part.first + len(part.records))
        for right, run in groupby(whole, key=lambda index: outcomes[index] is Outcome.DONE):
            indices = list(run)
            if not right:
                continue
            records = part.records[indices[0] - part.first : indices[-1] + 1 - part.first]
            try:
                if batch.job.restore is not None:
                    part.stage.decode(records, [batch.blocks[index].slot for index in indices])
                elif not part.stage.as_it_is:
                    part.stage.decode_to_nowhere(records)
            except Exception:
                _log.exception("cold_tier_decode_failed")
                outcomes[indices[0] : indices[-1] + 1] = [Outcome.FAILED] * len(indices)

    def _end(self, job: _Job, ends: Sequence[tuple[SlotBlock, Outcome]]) -> None:
        if job.restore is None:
            for block, outcome in ends:
                self._settled(partial(self._books.look, block.key), outcome)
            return
        finished = []
        for block, outcome in ends:
            settled = self._settled(partial(self._books.unpin, block.key, outcome), outcome)
            finished.append(Finished(block, settled, job.restore))
        self._report(finished)


def _compute_alone() -> None:
    """Keep this thread's operators on this thread, whatever their size.

    Each thread that computes with several has a pool of OpenMP threads of its own, and the one that runs the model
    would find no core. What OpenMP is told here concerns the calling thread; `torch.set_num_threads` would concern
    others too.
    """
    torch.get_num_threads()  # Gives a new thread the process's number; later, that would undo the next line.
    with suppress(AttributeError):  # A torch without OpenMP.
        ctypes.CDLL(None).omp_set_num_threads(1)
