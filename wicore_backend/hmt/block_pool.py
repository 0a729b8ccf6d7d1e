"""Books of one layer group's device blocks: who uses each, and what is kept for later. No tensors, no clock."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


class BlockAccountingError(AssertionError):
    """The books contradict themselves: a bug here or in a caller, never a user's fault."""


@dataclass(eq=False, slots=True)
class CachedRun:
    """Consecutive blocks that are kept, and recycled, together: one block of the global group, a window of the local.

    Attributes
    ----------
    name
        Of the last block: names are chained, so it tells what all of them hold.
    blocks
        Each block's name is known to the pool.
    idle
        How many of the blocks no sequence uses.
    """

    name: bytes
    blocks: tuple[int, ...]
    idle: int


class BlockPool:
    """The blocks of one layer group and their life.

    Block 0 belongs to nobody (unused table entries point at it). Every other block is in exactly one state:

    - *free*: on the free list; its bytes mean nothing.
    - *active*: in the tables of one or more open sequences (`users`); it is written only by the sequence that took it,
      and never again once it is full.
    - *cached*: in no table, but part of a kept run (`keeps`), by whose name a later sequence can find it.

    A free block becomes active by `take`. When its last user releases it, it is cached if a run holds it and free
    otherwise. A cached block becomes active again by `use`, and free when its runs are recycled, which `take` does by
    itself when the free list is empty: longest unused first. So whatever is not active is available.

    Parameters
    ----------
    given_up
        Told of the name and the block that is about to lose what it holds under that name.
    """

    def __init__(self, num_blocks: int, given_up: Callable[[bytes, int], None] | None = None) -> None:
        self.num_blocks = num_blocks
        self.recycled = 0
        """Blocks whose content was given up to make room."""
        self._given_up = given_up
        self._free = list(range(num_blocks - 1, 0, -1))
        self._users = [0] * num_blocks
        self._active = 0
        self._runs: dict[bytes, CachedRun] = {}
        self._holders: dict[int, list[CachedRun]] = {}
        self._names: dict[int, bytes] = {}
        self._named: dict[bytes, int] = {}
        self._victims: OrderedDict[bytes, CachedRun] = OrderedDict()

    @property
    def capacity(self) -> int:
        """Blocks that sequences can use."""
        return self.num_blocks - 1

    @property
    def active(self) -> int:
        return self._active

    @property
    def available(self) -> int:
        """Blocks that can be taken: free ones, and cached ones that are then recycled."""
        return self.capacity - self._active

    @property
    def cached(self) -> int:
        return self.available - len(self._free)

    def is_active(self, block: int) -> bool:
        return self._users[block] > 0

    def take(self) -> int:
        """A block for one user to write to; there must be one `available`."""
        while not self._free:
            if not self._victims:
                raise BlockAccountingError("a block was taken where none was available")
            self._recycle(next(iter(self._victims.values())), self._given_up)
        block = self._free.pop()
        self._users[block] = 1
        self._active += 1
        return block

    def use(self, block: int) -> None:
        """One more sequence has an active or cached block in its table."""
        self._users[block] += 1
        if self._users[block] == 1:
            self._active += 1
            for run in self._holders[block]:
                run.idle -= 1
                if not run.idle:
                    del self._victims[run.name]

    def release(self, block: int) -> None:
        """A sequence has the block in its table no more."""
        self._users[block] -= 1
        if self._users[block]:
            return
        self._active -= 1
        runs = self._holders.get(block)
        if runs is None:
            self._free.append(block)
            return
        for run in runs:
            run.idle += 1
            self._victims[run.name] = run

    def find(self, name: bytes) -> int | None:
        """The kept block of this name."""
        return self._named.get(name)

    def keep(self, names: Sequence[bytes], blocks: Sequence[int]) -> None:
        """Keep active `blocks` from now on, together, each under its name.

        If there is a run that ends with this name already, it counts as used, and nothing else changes.
        """
        name = names[-1]
        if (run := self._runs.get(name)) is not None:
            self._touch(run)
            return
        run = self._runs[name] = CachedRun(name, tuple(blocks), idle=0)
        for block_name, block in zip(names, run.blocks, strict=True):
            self._holders.setdefault(block, []).append(run)
            self._names[block] = block_name
            self._named.setdefault(block_name, block)

    def drop_all(self) -> None:
        """Keep nothing."""
        for run in list(self._runs.values()):
            self._recycle(run, None)

    def _touch(self, run: CachedRun) -> None:
        """The run has been of use: it is recycled after those that have not."""
        if run.idle:
            self._victims.move_to_end(run.name)

    def _recycle(self, run: CachedRun, given_up: Callable[[bytes, int], None] | None) -> None:
        del self._runs[run.name]
        self._victims.pop(run.name, None)
        for block in run.blocks:
            holders = self._holders[block]
            holders.remove(run)
            if holders:
                continue
            del self._holders[block]
            name = self._names.pop(block)
            if self._named.get(name) == block:
                del self._named[name]
            if not self._users[block]:
                if given_up is not None:
                    given_up(name, block)
                self._free.append(block)
                self.recycled += 1

    def check_integrity(self, tables: Iterable[int]) -> None:
        """Raise BlockAccountingError unless the books follow from `tables`, the blocks in all tables, and the runs."""
        users = Counter(tables)
        held = Counter(block for run in self._runs.values() for block in run.blocks)
        if any(self._users[block] != users[block] for block in range(self.num_blocks)) or users[0]:
            raise BlockAccountingError(f"the blocks' users are not those of the tables: {users} in the tables")
        if self._active != len(users):
            raise BlockAccountingError(f"{self._active} blocks counted as active, {len(users)} are in tables")
        if sorted([*self._free, *(users.keys() | held.keys())]) != list(range(1, self.num_blocks)):
            raise BlockAccountingError(
                f"{len(self._free)} free, {len(users)} active and {len(held.keys() - users.keys())} cached blocks "
                f"do not partition {self.capacity}"
            )
        if {block: len(runs) for block, runs in self._holders.items()} != held:
            raise BlockAccountingError("the blocks' runs are not those that are kept")
        if self._names.keys() != held.keys() or not set(self._named.values()) <= held.keys():
            raise BlockAccountingError("a block has a name that is not kept, or none that is")
        for run in self._runs.values():
            if run.idle != sum(not users[block] for block in run.blocks):
                raise BlockAccountingError(f"a run counts {run.idle} idle blocks, which is wrong")
            if (run.name in self._victims) != bool(run.idle):
                raise BlockAccountingError("a run can be recycled that is all in use, or cannot though it is not")
        if not self._victims.keys() <= self._runs.keys():
            raise BlockAccountingError("a run can be recycled that is not kept")
