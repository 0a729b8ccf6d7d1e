"""The cold tier: the package's docstring says what it promises."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from math import inf, prod

from torch import Tensor

from wicore_backend.errors import InvalidArgumentError
from wicore_backend.hmt.codecs import Codec
from wicore_backend.hmt.cold_tier.books import ColdAccountingError, ColdBooks
from wicore_backend.hmt.cold_tier.decoders import Decoders
from wicore_backend.hmt.cold_tier.records import record_name
from wicore_backend.hmt.cold_tier.requests import Finished, Restore
from wicore_backend.hmt.cold_tier.restore_worker import RestoreWorker
from wicore_backend.hmt.cold_tier.spill_worker import SpillWorker
from wicore_backend.hmt.cold_tier.staging import Stage, Tray
from wicore_backend.hmt.cold_tier.statistics import ColdStatistics
from wicore_backend.hmt.cold_tier.worker import Desk
from wicore_backend.hmt.host_tier import Key, SlotBlock
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.nvme import NvmeStore, Outcome
from wicore_backend.hmt.policy.base import Access, Policy
from wicore_backend.observability.logfmt import logfmt

_log = logging.getLogger(__name__)
_ABANDON_S = 1.0


@dataclass(frozen=True, kw_only=True)
class ColdTierLimits:
    """What the tier may use.

    Attributes
    ----------
    backlog_bytes
        Of slots that are being spilled; beyond, `spill` takes no more.
    tray_bytes, trays
        A batch is about so many bytes of records, and so many batches are under way each way: two for each of the
        store's threads, so that none waits for a batch's last record. A tray has room for the largest record in any
        case; its memory is taken as it is used first, which is never for records that are slots. Where blocks are
        decoded there is another one for each thread that does it.
    decode_threads
        Batches that are decoded at once: by default half of the CPUs that the process may use, but 2 to 4.
    measure_s
        An idle tier measures how fast restores are when that is so long ago.
    behind_bytes_per_second
        At which `spill_behind` stores; 0 is not at all.
    """

    backlog_bytes: int = 256 << 20
    tray_bytes: int = 4 << 20
    trays: int = 16
    decode_threads: int = field(default_factory=lambda: max(2, min(4, len(os.sched_getaffinity(0)) // 2)))
    measure_s: float = 60.0
    behind_bytes_per_second: float = 200e6

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if not (value > 0 or (value == 0 and limit.name == "behind_bytes_per_second")):
                raise InvalidArgumentError(f"cold tier: {limit.name} is {value}; it has to be above 0")


class ColdTier:
    """Blocks of the host tier on disk.

    Parameters
    ----------
    store
        Of a configuration like that of `store_config`. It stays the caller's to close, after the tier.
    codecs, slots
        For each group how its blocks are encoded, and the host tier's slots [slots, *codec.shape].
    policy
        Makes the policy from the capacity in records. It knows blocks as (group, name).
    woken
        Called when `finished` has something to report.

    Raises
    ------
    InvalidArgumentError
        Codecs and slots do not fit each other, or records do not fit the store.
    """

    def __init__(
        self,
        store: NvmeStore,
        codecs: Mapping[LayerGroup, Codec],
        slots: Mapping[LayerGroup, Tensor],
        *,
        policy: Callable[[int], Policy],
        woken: Callable[[], None],
        limits: ColdTierLimits | None = None,
    ) -> None:
        limits = limits or ColdTierLimits()
        if not codecs or codecs.keys() != slots.keys():
            raise InvalidArgumentError(f"codecs are for {sorted(codecs)}, slots for {sorted(slots)}")
        largest = max(codec.encoded_bytes for codec in codecs.values())
        if largest > store.config.max_payload_bytes:
            raise InvalidArgumentError(
                f"a block of {largest:,} bytes does not fit the store's max_payload_bytes of "
                f"{store.config.max_payload_bytes:,}; make the store with `store_config`"
            )
        self._store = store
        self._woken = woken
        self._limits = limits
        self._slot_counts = {group: len(tensor) for group, tensor in slots.items()}
        self._block_bytes = {group: prod(codec.shape) * codec.dtype.itemsize for group, codec in codecs.items()}
        self._finished: deque[Finished] = deque()
        self._spills: dict[tuple[LayerGroup, int], SlotBlock] = {}
        self._restores: dict[tuple[LayerGroup, int], SlotBlock] = {}
        """What is under way and not reported, by slot."""
        self._spilling_bytes = self._restoring_bytes = 0
        self._spilled_bytes = self._restored_bytes = 0
        self._behind_due = 0.0
        self._closed = False
        self._books = ColdBooks(store, {group: codec.encoded_bytes for group, codec in codecs.items()}, policy)

        stages = {group: Stage(codec, slots[group]) for group, codec in codecs.items()}
        tray_bytes = max(limits.tray_bytes, largest)
        decoded = any(not stage.as_it_is for stage in stages.values())

        def desk(trays: int, report: Callable[[Sequence[Finished]], None]) -> Desk:
            made = [Tray(tray_bytes) for _ in range(trays)]
            return Desk(
                store=store, books=self._books, stages=stages, trays=made, enough=limits.tray_bytes, report=report
            )

        self._decoders = Decoders(stages.values(), threads=limits.decode_threads)
        self._down = SpillWorker(desk(limits.trays, self._report_spilled))
        self._up = RestoreWorker(
            desk(limits.trays + decoded * limits.decode_threads, self._report),
            self._decoders,
            measure_s=limits.measure_s,
            stores_until=lambda: self._down.stores_until,
        )
        for worker in (self._down, self._up):
            worker.start()
        self._up.wake()

    def holds(self, group: LayerGroup, name: bytes) -> bool:
        """Whether the block can be restored."""
        return (group, name) in self._books

    def observe(self, access: Access) -> None:
        """A prompt has come with these blocks, each a (group, name).

        Policies that learn from prompts listen. Those that admit by score take nothing into a full store that they have
        not heard of.
        """
        self._books.observe(access)
        self._down.listen()

    def attend(self, keys: Sequence[Key], masses: Sequence[float]) -> None:
        """Decoding gave blocks, held or not, such attention; see Policy."""
        self._books.attend(keys, masses)
        self._down.listen()

    def room(self, group: LayerGroup) -> int:
        """How many blocks `spill` would take now."""
        left = self._limits.backlog_bytes - self._spilling_bytes
        return max(0 if self._spilling_bytes or self._closed else 1, left // self._block_bytes[group])

    def spill(self, blocks: Sequence[SlotBlock], after: Callable[[], None] | None = None) -> int:
        """Store blocks, whose bytes are in their slots once `after` has returned.

        Returns
        -------
        How many were taken, from the front: their slots are the tier's until they are reported. The others' are not.

        Raises
        ------
        ValueError
            A slot is unknown or has a block under way, or a name is none. Nothing is taken then.
        """
        self._check(blocks)
        count = 0 if self._closed else self._within_backlog(blocks)
        for block in blocks[count:]:
            self._books.leave(block.group, 1)
        work = []
        at_once = []
        for block in blocks[:count]:
            self._spills[block.group, block.slot] = block
            self._spilling_bytes += self._block_bytes[block.group]
            outcome = self._books.offer(block.key)
            if outcome is None:
                work.append(block)
            else:
                at_once.append(Finished(block, outcome, None))
        if work:
            self._down.spill(work, after)
        self._report(at_once)
        return count

    def room_behind(self, group: LayerGroup) -> int:
        """How many blocks of the group `spill_behind` takes now: none while anything is under way, or the disk full."""
        if self.busy or self._closed or not self._limits.behind_bytes_per_second:
            return 0
        room = self._books.room(group) // len(self._slot_counts)
        return min(room, max(1, self._limits.tray_bytes // self._block_bytes[group]))

    def spill_behind(self, blocks: Sequence[SlotBlock], after: Callable[[], None] | None = None) -> int:
        """`spill`, of what need not be stored now, at the pace that the limits set."""
        due = max(time.monotonic(), self._behind_due)
        size = sum(self._block_bytes[block.group] for block in blocks)
        self._behind_due = due + size / self._limits.behind_bytes_per_second

        def when_due() -> None:
            if after is not None:
                after()
            time.sleep(max(0.0, due - time.monotonic()))

        return self.spill(blocks, when_due)

    def restore(
        self, blocks: Sequence[SlotBlock], deadline_s: float | None = None, after: Callable[[], None] | None = None
    ) -> Restore:
        """Bring blocks up into their slots, which may be written to once `after` has returned.

        What is not there within `deadline_s`, from now, is a miss.

        Raises
        ------
        ValueError
            A slot is unknown or has a block under way, or a name is none. Nothing is begun then.
        """
        self._check(blocks)
        deadline = inf if deadline_s is None else time.monotonic() + deadline_s
        restore = Restore(tuple(blocks), deadline, self._up.cancel)
        work = []
        at_once = []
        for block in blocks:
            self._restores[block.group, block.slot] = block
            self._restoring_bytes += self._block_bytes[block.group]
            if self._closed:
                at_once.append(Finished(block, Outcome.CLOSED, restore))
            elif self._books.pin(block.key):
                work.append(block)
            else:
                at_once.append(Finished(block, Outcome.MISSING, restore))
        if work:
            self._up.restore(restore, work, after)
        self._report(at_once)
        return restore

    def finished(self) -> list[Finished]:
        """What has ended since the last call. The slots are the caller's again."""
        ended = []
        with suppress(IndexError):
            while True:
                ended.append(self._finished.popleft())
        for block, outcome, restore in ended:
            size = self._block_bytes[block.group]
            if restore is None:
                del self._spills[block.group, block.slot]
                self._spilling_bytes -= size
                self._spilled_bytes += size * (outcome is Outcome.DONE)
            else:
                del self._restores[block.group, block.slot]
                self._restoring_bytes -= size
                self._restored_bytes += size * (outcome is Outcome.DONE)
                restore.left -= 1
        return ended

    @property
    def busy(self) -> bool:
        """Whether some block is under way, or has not been reported."""
        return bool(self._spills or self._restores)

    def restore_seconds(self, size: int) -> float | None:
        """How long a restore of `size` bytes (of slots) would take if it were asked for now, after those under way.

        None before the first measurement. The tier makes that by itself, as soon as it holds a record.
        """
        cost = self._up.pace.cost
        if cost is None:
            return None
        return cost.latency_s + cost.seconds_per_byte * (self._restoring_bytes + size)

    def statistics(self) -> ColdStatistics:
        spill, restore = self._down.pace, self._up.pace
        return ColdStatistics(
            groups=self._books.counts(),
            held=self._books.held(),
            capacity=self._books.capacity,
            spilling_bytes=self._spilling_bytes,
            restoring_bytes=self._restoring_bytes,
            spilled_bytes=self._spilled_bytes,
            restored_bytes=self._restored_bytes,
            spill_seconds=spill.seconds,
            restore_seconds=restore.seconds,
            spill_bytes_per_second=spill.bytes_per_second,
            restore_bytes_per_second=restore.bytes_per_second,
            restore_latency_s=None if restore.cost is None else restore.cost.latency_s,
            store=self._store.statistics(),
        )

    def close(self, timeout_s: float = 10.0) -> None:
        """Take nothing more, end what is under way and the threads, and flush.

        What does not end within `timeout_s` is cut: it ends as `CLOSED` or `CANCELLED`. Only a thread that somebody
        else's `after` holds can stay behind; its blocks are never reported.
        """
        if self._closed:
            return
        self._closed = True
        end = time.monotonic() + timeout_s
        workers = (self._down, self._up)
        for worker in workers:
            worker.stop()
        if not all(worker.join(max(0.0, end - time.monotonic())) for worker in workers):
            for worker in workers:
                worker.abandon()
            end = time.monotonic() + _ABANDON_S
            if not all(worker.join(max(0.0, end - time.monotonic())) for worker in workers):
                _log.warning(logfmt("cold_tier_left_running", waited_s=timeout_s + _ABANDON_S))
                return
        self._decoders.close()
        self._store.flush()

    def check_integrity(self) -> None:
        """Raise ColdAccountingError unless the books balance. Takes 5 to 10 us for each record that is held."""
        for under_way, counted in ((self._spills, self._spilling_bytes), (self._restores, self._restoring_bytes)):
            if counted != sum(self._block_bytes[block.group] for block in under_way.values()):
                raise ColdAccountingError(f"{counted} bytes are counted as under way")
        if self._spills.keys() & self._restores.keys():
            raise ColdAccountingError("a slot is being read and written to")
        pins: Counter[Key] = Counter(block.key for block in self._restores.values())
        self._books.check_integrity({block.key for block in self._spills.values()}, pins)

    def _check(self, blocks: Sequence[SlotBlock]) -> None:
        seen = set()
        for block in blocks:
            place = block.group, block.slot
            if not 0 <= block.slot < self._slot_counts.get(block.group, 0):
                raise ValueError(f"{block.group} slot {block.slot}: there are {self._slot_counts.get(block.group, 0)}")
            if place in self._spills or place in self._restores or place in seen:
                raise ValueError(f"{block.group} slot {block.slot} has a block under way; wait until it is reported")
            record_name(block.key)
            seen.add(place)

    def _within_backlog(self, blocks: Sequence[SlotBlock]) -> int:
        """How many blocks, from the front, are taken: at least one if nothing is under way."""
        under_way = self._spilling_bytes
        for count, block in enumerate(blocks):
            size = self._block_bytes[block.group]
            if under_way and under_way + size > self._limits.backlog_bytes:
                return count
            under_way += size
        return len(blocks)

    def _report_spilled(self, finished: Sequence[Finished]) -> None:
        self._report(finished)
        if self._up.pace.cost is None:
            self._up.wake()

    def _report(self, finished: Sequence[Finished]) -> None:
        """Any thread's way to the loop thread."""
        if not finished:
            return
        self._finished.extend(finished)
        try:
            self._woken()
        except Exception:
            _log.exception("cold_tier_not_woken")
