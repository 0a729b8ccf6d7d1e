"""What lies below the device tier: the host tier, and a cold tier below that. Books only: no tensors, no clock.

The device spills into host slots and loads from them; both are transfers, made as if in order (`hmt/transfers.py`).
Between the host tier and the cold tier blocks move beside the steps, on threads of the cold tier, from the moment
`submit` hands them over:

1. What is above the host tier's threshold is *leaving*, and then *stored*: it can be found and used until its slot is
   given to another block.
2. A *restore* brings blocks up for one sequence, which waits for it in nobody's way. Its blocks are *asked* for until
   there are free slots, for which others leave; nothing is thrown away for them. Then each is *arriving* in a slot of
   its own. Two restores that want the same block share it.
3. When a restore is done, its blocks are pinned for the sequence until `end`. What could not be read is missing: the
   sequence then goes on from a shorter prefix.
4. Threads read and write slots outside the order of transfers. So `submit` comes after the transfers of a step have
   been issued, with a call that waits for them: the threads make it before they read or write a slot, and nobody else
   waits.
5. What is in host memory is stored *behind* while the engine is idle, the dearest first, so that it outlives a kill.
   It can be found and used meanwhile as ever, and later leaves without being written. Its slot is read until the cold
   tier reports it, and given to nobody before. At most one batch is under way, and none while anything else is; and
   nothing leaves the disk for it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from wicore_backend.hmt.block_pool import BlockAccountingError
from wicore_backend.hmt.host_tier import HostTier, Key, SlotBlock
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.policy.base import Access

_LATEST_PROMPTS = 64
"""Of which blocks are copied from the device while the engine is idle."""

RESTORE_SHARE = 0.5
"""Most of a group's host slots that restores take together: spills need the others. One alone may take all."""

Written = Callable[[], None] | None
"""Returns once all transfers that have been issued are made, on any thread; None if they are."""


class Cancellable(Protocol):
    def cancel(self) -> None: ...


class Reported(Protocol):
    """A block whose slot is the host tier's again."""

    @property
    def block(self) -> SlotBlock: ...
    @property
    def there(self) -> bool: ...
    @property
    def restore(self) -> Cancellable | None: ...


class ColdBlocks(Protocol):
    """The cold tier, as far as the books are concerned; `hmt/cold_tier` is one."""

    def holds(self, group: LayerGroup, name: bytes) -> bool: ...
    def observe(self, access: Access) -> None: ...
    def attend(self, keys: Sequence[Key], masses: Sequence[float]) -> None: ...
    def room(self, group: LayerGroup) -> int: ...
    def room_behind(self, group: LayerGroup) -> int: ...
    def spill_behind(self, blocks: Sequence[SlotBlock], after: Written = None) -> int: ...
    def spill(self, blocks: Sequence[SlotBlock], after: Written = None) -> int: ...
    def restore(
        self, blocks: Sequence[SlotBlock], deadline_s: float | None = None, after: Written = None
    ) -> Cancellable: ...
    def restore_seconds(self, size: int) -> float | None: ...
    def finished(self) -> Sequence[Reported]: ...


class Restore:
    """Blocks that are brought up for one sequence.

    Attributes
    ----------
    keys
        As they were asked for, from the root on.
    waiting
        Those that have not come yet.
    pinned
        Those that are held for the sequence.
    fetched
        Those that came from the cold tier.
    """

    def __init__(self, keys: Iterable[Key]) -> None:
        self.keys = tuple(keys)
        self.waiting: set[Key] = set()
        self.pinned: set[Key] = set()
        self.fetched: set[Key] = set()

    @property
    def done(self) -> bool:
        return not self.waiting


class LowerTiers:
    """See the module's docstring.

    Parameters
    ----------
    threshold
        Share of the host tier's slots above which blocks leave for the cold tier, ...
    burst
        ... or sooner, so that as many slots of each group are free or stored, up to half of them: what the device may
        give up in a step. What finds no such slot takes that of a block which is then in no tier.
    restore_deadline_s
        After which a block that is not there yet counts as missing.
    """

    def __init__(
        self,
        host: HostTier,
        cold: ColdBlocks | None = None,
        *,
        threshold: float = 0.9,
        burst: int = 0,
        restore_deadline_s: float = 10.0,
    ) -> None:
        self.host = host
        self.cold = cold
        self.restore_deadline_s = restore_deadline_s
        self._most = {
            group: min(int(threshold * slots), max(slots // 2, slots - burst)) for group, slots in host.slots.items()
        }
        self._restores: set[Restore] = set()
        self._wanted: dict[Key, list[Restore]] = {}  # what has not come, and who waits for it
        self._asked: dict[Key, None] = {}  # of that, what has no slot yet
        self._calls: dict[Key, Cancellable] = {}  # of that, what is arriving
        self._cut: set[Key] = set()  # of that, what has been cancelled
        self._store_behind = True  # until the cold tier does not take a block
        self.latest: deque[Sequence[bytes]] = deque(maxlen=_LATEST_PROMPTS)
        """The blocks of the latest prompts, by name, the newest last; whoever has seen to one takes it out."""

    def observe(self, access: Access, now: float) -> None:
        """A prompt has come, its blocks by their names; for the policies."""
        self._store_behind = True
        if self.cold is not None:
            self.latest.append([name for name in access.keys if isinstance(name, bytes)])
        self.host.advance(now)
        for group in self.host.slots:
            self.host.observe(group, access)
        if self.cold is not None:
            keys = [(group, name) for name in access.keys for group in self.host.slots]
            self.cold.observe(replace(access, keys=keys))

    def attend(self, group: LayerGroup, names: Sequence[bytes], masses: Sequence[float]) -> None:
        """A sequence gave blocks such attention, each against the mean of its blocks; for the policies."""
        for name, mass in zip(names, masses, strict=True):
            self.host.attend(group, name, mass)
        if self.cold is not None:
            self.cold.attend([(group, name) for name in names], masses)

    def reachable(self, group: LayerGroup, name: bytes) -> bool:
        """Whether a block is held here, or could be brought up."""
        return self.host.holds(group, name) or (self.cold is not None and self.cold.holds(group, name))

    @property
    def restoring(self) -> bool:
        """Whether a restore is not done."""
        return bool(self._wanted)

    def restore(self, keys: Sequence[Key]) -> Restore | None:
        """Begin to bring up blocks that are all reachable; None if there is no room beside other restores."""
        if not self._has_room(keys):
            return None
        restore = Restore(keys)
        self._restores.add(restore)
        for key in keys:
            if self.host.holds(*key):
                self.host.pin(*key)
                restore.pinned.add(key)
                continue
            if key not in self._wanted:
                self._wanted[key] = []
                self._asked[key] = None
            self._wanted[key].append(restore)
            restore.waiting.add(key)
        return restore

    def end(self, restore: Restore) -> None:
        """The sequence has been opened, or does not want its blocks any more; once more does nothing."""
        self._restores.discard(restore)
        for key in reversed(restore.keys):  # Deepest first, as policies want it.
            if key in restore.pinned:
                self.host.unpin(*key)
        restore.pinned.clear()
        given_up = set()
        for key in restore.waiting:
            self._wanted[key].remove(restore)
            if not self._wanted[key]:
                given_up.add(key)
        restore.waiting.clear()
        self._cancel(given_up)

    def submit(self, written: Written) -> None:
        """Hand over what is to move between the host tier and the cold one. Once a step."""
        self.host.go_on()
        if self.cold is None:
            return
        for key in list(self._asked):
            if not self._wanted[key]:  # Whoever wanted it has ended.
                del self._asked[key], self._wanted[key]
            elif self.host.holds(*key):  # The device has given it up meanwhile.
                del self._asked[key]
                self._come(key, there=True, fetched=False)
        reserved: list[SlotBlock] = []
        for group in self.host.slots:
            names = [name for asked_group, name in self._asked if asked_group is group]
            reserved += self.host.reserve(group, names[: self.host.free(group)])
        if reserved:
            call = self.cold.restore(reserved, self.restore_deadline_s, written)
            for block in reserved:
                del self._asked[block.key]
                self._calls[block.key] = call
        for group, slots in self.host.slots.items():
            still_asked = sum(asked_group is group for asked_group, _ in self._asked)
            self._spill(group, min(self._most[group], max(0, slots - still_asked)), written)

    def write_behind(self, written: Written) -> None:
        """Have some of what is in host memory alone stored, the dearest first, while it stays. For an idle engine."""
        if self.cold is None or not self.may_write_behind:
            return
        blocks: list[SlotBlock] = []
        for group in self.host.slots:
            blocks += self.host.copy(group, self.cold.room_behind(group), self._lacks)
        if blocks:
            for block in blocks[self.cold.spill_behind(blocks, written) :]:
                self.host.left(block.group, block.name, there=False)

    @property
    def may_write_behind(self) -> bool:
        """Whether the cold tier has nothing else to do, has room, and took what it was given last."""
        cold = self.cold
        return cold is not None and self._store_behind and all(cold.room_behind(group) for group in self.host.slots)

    def _lacks(self, group: LayerGroup, name: bytes) -> bool:
        return self.cold is not None and not self.cold.holds(group, name)

    def spill_all(self, written: Written) -> None:
        """Have everything in the host tier leave, as far as the cold tier takes it, before the engine ends."""
        for group in self.host.slots:
            self._spill(group, 0, written)

    def collect(self) -> None:
        """Take note of what has moved."""
        if self.cold is None:
            return
        for reported in self.cold.finished():
            key = reported.block.key
            if reported.restore is None:
                self.host.left(*key, there=reported.there)
                self._store_behind = self._store_behind and reported.there
                continue
            del self._calls[key]
            cut = key in self._cut
            self._cut.discard(key)
            self.host.arrived(*key, there=reported.there)
            if cut and not reported.there and self._wanted[key]:
                self._asked[key] = None  # Somebody has come who wants it after all.
            else:
                self._come(key, there=reported.there, fetched=True)

    def forget_all(self) -> None:
        """Hold nothing in the host tier that is not on its way. What the cold tier has is stored, and stays."""
        for restore in self._restores:
            restore.pinned.clear()
        self.host.forget_all()

    def check_integrity(self) -> None:
        """Raise BlockAccountingError unless the books balance."""
        self.host.check_integrity()
        pins = Counter(key for restore in self._restores for key in restore.pinned)
        if pins != self.host.pins():
            raise BlockAccountingError(f"blocks of the host tier are pinned, or not, that no restore holds: {pins}")
        waiting = {(key, restore) for restore in self._restores for key in restore.waiting}
        if waiting != {(key, restore) for key, restores in self._wanted.items() for restore in restores}:
            raise BlockAccountingError("restores wait for other blocks than those that are to come")
        if self._asked.keys() & self._calls.keys() or self._asked.keys() | self._calls.keys() != self._wanted.keys():
            raise BlockAccountingError("a block that is to come is neither asked for nor arriving, or both")

    def _has_room(self, keys: Sequence[Key]) -> bool:
        """Whether what restores hold and wait for, these keys with it, leaves enough to others."""
        taken = {key for restore in self._restores for key in (*restore.pinned, *restore.waiting)} | self._wanted.keys()
        for group, slots in self.host.slots.items():
            others = sum(key[0] is group for key in taken)
            new = sum(key[0] is group and key not in taken for key in keys)
            if new and others + new > (RESTORE_SHARE * slots if others else slots):
                return False
        return True

    def _cancel(self, keys: set[Key]) -> None:
        """Cancel the calls for keys that nobody waits for, where all of a call's keys are such."""
        for call in {id(call): call for key in keys if (call := self._calls.get(key)) is not None}.values():
            of_call = {key for key, other in self._calls.items() if other is call}
            if not any(self._wanted[key] for key in of_call):
                self._cut |= of_call
                call.cancel()

    def _come(self, key: Key, *, there: bool, fetched: bool) -> None:
        """A block that was to come is held, `fetched` from the cold tier or not, or lost."""
        for restore in self._wanted.pop(key):
            restore.waiting.remove(key)
            if there:
                self.host.pin(*key)
                restore.pinned.add(key)
                if fetched:
                    restore.fetched.add(key)

    def _spill(self, group: LayerGroup, beyond: int, written: Written) -> None:
        if self.cold is None:
            return
        blocks = self.host.leave(group, beyond=beyond, most=self.cold.room(group))
        if blocks:
            for block in blocks[self.cold.spill(blocks, written) :]:
                self.host.stay(block.group, block.name)
