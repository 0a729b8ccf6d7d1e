"""Books of one layer group's device blocks: who uses each, and what is kept for later. No tensors, no clock."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from wicore_backend.hmt.policy.base import Policy
from wicore_backend.hmt.victims import Victims

GivenUp = Callable[[bytes, int], None]
"""Told of the name and the block that is found under it no more.

The block may be in use all the same. It is full, so that nobody writes to it before it is free and taken again: a copy
that is listed now reads what the name says.
"""


class BlockAccountingError(AssertionError):
    """The books contradict themselves: a bug here or in a caller, never a user's fault."""


class BlockPool(ABC):
    """The blocks of one layer group and their life.

    Block 0 belongs to nobody (unused table entries point at it). Every other block is in exactly one state:

    - *free*: on the free list; its bytes mean nothing.
    - *active*: in the tables of one or more open sequences (`users`); it is written only by the sequence that took it,
      and never again once it is full.
    - *cached*: in no table, but kept under a name by which a later sequence can find it.

    A free block becomes active by `take`. When its last user releases it, it is cached if it is kept, else free.
    A cached block becomes active again by `use`, and free when it is recycled, which `take` does by itself when the
    free list is empty: longest unused first, or what `tend` has had a policy set aside (`hmt/victims.py`). So whatever
    is not active is available.

    Parameters
    ----------
    given_up
        Told of each block that is kept no more, in use or not.
    """

    def __init__(self, num_blocks: int, given_up: GivenUp | None = None) -> None:
        self.num_blocks = num_blocks
        self.recycled = 0
        """Blocks whose content was given up to make room."""
        self._given_up = given_up
        self._free = list(range(num_blocks - 1, 0, -1))
        self._users = [0] * num_blocks
        self._active = 0
        self._names: list[bytes | None] = [None] * num_blocks
        self._named: dict[bytes, int] = {}

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
        return self.num_blocks - 1 - self._active

    @property
    def cached(self) -> int:
        return self.available - len(self._free)

    def is_active(self, block: int) -> bool:
        return self._users[block] > 0

    def take(self, count: int = 1) -> list[int]:
        """Blocks for one user to write to; there must be as many `available`."""
        free, users = self._free, self._users
        if len(free) < count:
            self._recycle(count - len(free))
        kept = len(free) - count
        taken = free[kept:]
        del free[kept:]
        for block in taken:
            users[block] = 1
        self._active += count
        return taken

    def use(self, block: int) -> None:
        """One more sequence has an active or cached block in its table."""
        self._users[block] += 1
        if self._users[block] == 1:
            self._active += 1
            self._taken_up(block)

    def release(self, blocks: Iterable[int]) -> None:
        """A sequence has the blocks in its table no more. Of those that are kept, the first is recycled first."""
        users, names, free = self._users, self._names, self._free
        kept: list[int] = []
        before = len(free)
        for block in blocks:
            left = users[block] = users[block] - 1
            if not left:
                (free if names[block] is None else kept).append(block)
        self._active -= len(free) - before + len(kept)
        if kept:
            self._let_go(kept)

    def find(self, name: bytes) -> int | None:
        """The kept block of this name."""
        return self._named.get(name)

    def give_up(self, count: int) -> int:
        """Recycle `count` cached blocks or so, or all if there are fewer; how many it was."""
        before = len(self._free)
        self._recycle(min(count, self.cached))
        return len(self._free) - before

    @abstractmethod
    def tend(self, now: float, count: int) -> None:
        """Bring the policy up to date, and have it set aside what goes first: as much as free blocks lack to `count`.

        Takes microseconds for each block, so it is for moments when there is time.
        """

    @property
    @abstractmethod
    def victims(self) -> Victims[Any]:
        """What can be recycled; for what its policy is told."""

    @abstractmethod
    def keep(self, names: Sequence[bytes], blocks: Sequence[int]) -> None:
        """Keep active `blocks` from now on, each under its name; nothing changes for a name that is kept already."""

    @abstractmethod
    def drop_all(self) -> None:
        """Keep nothing, and tell nobody: the bytes are in doubt."""

    @abstractmethod
    def _taken_up(self, block: int) -> None:
        """A cached block has become active."""

    @abstractmethod
    def _let_go(self, blocks: Sequence[int]) -> None:
        """Kept blocks have become cached."""

    @abstractmethod
    def _recycle(self, count: int) -> None:
        """Give up what has been unused longest, `count` blocks or a few more. Raises BlockAccountingError if fewer are
        cached."""

    def _unname(self, blocks: Iterable[int], given_up: GivenUp | None) -> None:
        """The blocks are kept no more: they are free, unless someone uses them."""
        names, named, users, free = self._names, self._named, self._users, self._free
        before = len(free)
        for block in blocks:
            name = names[block]
            assert name is not None
            names[block] = None
            del named[name]
            if given_up is not None:
                given_up(name, block)
            if not users[block]:
                free.append(block)
        self.recycled += len(free) - before

    def check_integrity(self, tables: Iterable[int]) -> None:
        """Raise BlockAccountingError unless the books follow from `tables`, the blocks in all tables, and the names."""
        users = Counter(tables)
        kept = {block for block, name in enumerate(self._names) if name is not None}
        if any(self._users[block] != users[block] for block in range(self.num_blocks)) or users[0]:
            raise BlockAccountingError(f"the blocks' users are not those of the tables: {users} in the tables")
        if self._active != len(users):
            raise BlockAccountingError(f"{self._active} blocks counted as active, {len(users)} are in tables")
        if sorted([*self._free, *(users.keys() | kept)]) != list(range(1, self.num_blocks)):
            raise BlockAccountingError(
                f"{len(self._free)} free, {len(users)} active and {len(kept - users.keys())} cached blocks "
                f"do not partition {self.capacity}"
            )
        if any(self._names[block] != name for name, block in self._named.items()):
            raise BlockAccountingError("a name leads to a block of another name")
        if len(self._named) != len(kept):
            raise BlockAccountingError("a block is kept that cannot be found")
        self._check_cached(kept - users.keys())

    @abstractmethod
    def _check_cached(self, cached: set[int]) -> None:
        """Raise BlockAccountingError unless what is said of cached blocks, and of how others are kept, is so."""


def nothing_cached() -> BlockAccountingError:
    """For a pool that is asked for more than is available."""
    return BlockAccountingError("a block was taken where none was available")


class SingleBlockPool(BlockPool):
    """Blocks are kept and recycled one by one: those of the global group."""

    def __init__(self, num_blocks: int, given_up: GivenUp | None = None, policy: Policy | None = None) -> None:
        super().__init__(num_blocks, given_up)
        self._victims: Victims[int] = Victims(policy)

    @property
    def victims(self) -> Victims[int]:
        """See BlockPool."""
        return self._victims

    def keep(self, names: Sequence[bytes], blocks: Sequence[int]) -> None:
        """See BlockPool."""
        for name, block in zip(names, blocks, strict=True):
            if self._named.setdefault(name, block) == block:
                self._names[block] = name

    def drop_all(self) -> None:
        """See BlockPool."""
        self._victims.clear()
        self._unname(list(self._named.values()), None)

    def _taken_up(self, block: int) -> None:
        name = self._names[block]
        assert name is not None
        self._victims.use(name)

    def _let_go(self, blocks: Sequence[int]) -> None:
        names = self._names
        self._victims.add([name for block in blocks if (name := names[block]) is not None], blocks)

    def _recycle(self, count: int) -> None:
        if count > len(self._victims):
            raise nothing_cached()
        self._unname(self._victims.take(count), self._given_up)

    def tend(self, now: float, count: int) -> None:
        """See BlockPool."""
        self._victims.tend(now, count - len(self._free))

    def _check_cached(self, cached: set[int]) -> None:
        if sorted(self._victims) != sorted(cached):
            raise BlockAccountingError("a cached block cannot be recycled")
        self._victims.check_integrity()
