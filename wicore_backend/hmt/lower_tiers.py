"""What lies below the device tier: the host tier, and a cold tier below that. Books only: no tensors, no clock.

The device spills into host slots and loads from them; both are transfers, made in order on the device's stream
(`hmt/transfers.py`). Between the host tier and the cold tier blocks move beside the steps, on threads of the cold tier,
from the moment `submit` hands them over:

1. What is above the host tier's threshold is *leaving*: it can be found and used until it is stored, and then goes.
2. A *restore* brings blocks up for one sequence, which waits for it in nobody's way. Each block is *arriving* in a slot
   of its own. Two restores that want the same block share it.
3. When a restore is done, its blocks are pinned for the sequence until `end`. What could not be read is missing: the
   sequence then goes on from a shorter prefix.
4. Threads read and write slots outside the stream's order. So `submit` comes after the transfers of a step have been
   issued, with a call that waits for them: the threads make it before they read a slot, and `submit` itself before it
   gives away a slot to write to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from wicore_backend.hmt.block_pool import BlockAccountingError
from wicore_backend.hmt.host_tier import Key, SlotBlock
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.policy.base import Access

PINNED_SHARE = 0.5
"""Most of the host tier's slots of a group that restores may take up at a time: spills need the others."""


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
    def observe(self, access: Access, now: float) -> None:
        """A prompt has come, its blocks by their names; for the policies."""
        self.host.advance(now)
        for group in self.host.slots:
            self.host.observe(group, access)
        if self.cold is not None:
            keys = [(group, name) for name in access.keys for group in self.host.slots]
            self.cold.observe(replace(access, keys=keys))

    def reachable(self, group: LayerGroup, name: bytes) -> bool:
        """Whether a block is held here, or could be brought up."""
        return self.host.holds(group, name) or (self.cold is not None and self.cold.holds(group, name))

    def restore(self, keys: Sequence[Key]) -> Restore | None:
        """Begin to bring up blocks that are all reachable; None if there is no room for them."""
        wanted = {group: [n for g, n in keys if g is group and not self.host.holds(g, n)] for group in LayerGroup}
        new = {
            group: [name for name in names if (group, name) not in self._arriving] for group, names in wanted.items()
        }
        for group, names in new.items():
            busy = sum(g is group for g, _ in self._arriving)
            limit = int(PINNED_SHARE * self.host.slots.get(group, 0))
            if names and (len(names) > self.host.room(group) or len(names) + busy > limit):
                return None
        restore = Restore(keys)
        self._restores.add(restore)
        for key in keys:  # Before slots are reserved, for which others go.
            if self.host.holds(*key):
                self.host.pin(*key)
                restore.pinned.add(key)
        if any(len(names) > self.host.room(group) for group, names in new.items()):
            self.end(restore)
            return None
        for group, names in new.items():
            if names:
                self._asked += self.host.reserve(group, names)
        for group, names in wanted.items():
            for name in names:
                self._arriving.setdefault((group, name), []).append(restore)
                restore.waiting.add((group, name))
        return restore

    def end(self, restore: Restore) -> None:
        """The sequence has been opened, or does not want its blocks any more."""
        self._restores.discard(restore)
        for key in restore.pinned:
            self.host.unpin(*key)
        restore.pinned.clear()
        alone = set()
        for key in restore.waiting:
            self._arriving[key].remove(restore)
            if not self._arriving[key]:
                alone.add(key)
        restore.waiting.clear()
        for call in {id(call): call for key in alone if (call := self._calls.get(key)) is not None}.values():
            if not any(self._arriving[key] for key, other in self._calls.items() if other is call):
                call.cancel()

    def submit(self, written: Callable[[], None] | None) -> None:
        """Hand over what is to move between the host tier and the cold one.

        Parameters
        ----------
        written
            Returns once all transfers listed so far have been made; None if they have.
        """
        if self.cold is None:
            return
        asked, self._asked = self._asked, []
        wanted = [block for block in asked if self._arriving[block.key]]
        if wanted:
            if written is not None:
                written()
            call = self.cold.restore(wanted, self._deadline_s)
            self._calls |= dict.fromkeys((block.key for block in wanted), call)
        for block in asked:
            if not self._arriving[block.key]:  # Whoever wanted it has ended.
                self._arrived(block.key, there=False)
        for group in self.host.slots:
            self._spill(self.host.leave(group, beyond=self._most[group]), written)

    def spill_all(self) -> None:
        """Have everything in the host tier leave, as far as the cold tier takes it, before the engine ends."""
        for group in self.host.slots:
            self._spill(self.host.leave(group, beyond=0), None)

    def collect(self) -> None:
        """Take note of what has moved."""
        if self.cold is None:
            return
        for reported in self.cold.finished():
            if reported.restore is None:
                self.host.left(*reported.block.key)
            else:
                del self._calls[reported.block.key]
                self._arrived(reported.block.key, there=reported.there)

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
        if waiting != {(key, restore) for key, restores in self._arriving.items() for restore in restores}:
            raise BlockAccountingError("restores wait for other blocks than those that arrive")

    def _arrived(self, key: Key, *, there: bool) -> None:
        self.host.arrived(*key, there=there)
        for restore in self._arriving.pop(key):
            restore.waiting.remove(key)
            if there:
                self.host.pin(*key)
                restore.pinned.add(key)

    def _spill(self, blocks: Sequence[SlotBlock], written: Callable[[], None] | None) -> None:
        if self.cold is None or not blocks:
            return
        for block in blocks[self.cold.spill(blocks, written) :]:
            self.host.stay(block.group, block.name)
