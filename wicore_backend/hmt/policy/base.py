"""What a replacement policy is told, and what it answers. No tensors, no clock of its own, no device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Key: TypeAlias = Hashable
"""Name of a block: a chained hash in the prefix cache, an integer in a trace."""


BLOCKS_AT_ONCE = 512
"""Of a prompt, between two breaths of `Policy.observing`: about a millisecond's work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """The blocks of one prompt, told to a policy before any of them is used or added.

    Attributes
    ----------
    keys
        The prompt's blocks, root first, cached or not. Names are chained: a block's position and its ancestors are
        the same in every prompt that has it.
    full_blocks
        How many of `keys` are full; the rest, at most one, is the partial end of the prompt. A cache that names
        full blocks only leaves this at None.
    retain_seconds
        The request's wish: keep these blocks at least that long. None wishes nothing.
    session_end
        The request says that no other will follow it.
    """

    keys: Sequence[Key]
    full_blocks: int | None = None
    retain_seconds: float | None = None
    session_end: bool = False

    @property
    def partial_from(self) -> int:
        """Index in `keys` from which blocks are partial."""
        return len(self.keys) if self.full_blocks is None else self.full_blocks


class Policy(ABC):
    """Orders the blocks of one tier by who should leave first.

    To a policy a block is in one of three states. *Evictable*: cached, and nobody uses it, so it may be the next
    victim. *In use*: cached and referenced by a running request; never a victim. *Gone*: not cached; the policy may
    still remember it (a ghost), in memory bounded by a multiple of `capacity`. The calls are the arrows:

        gone or in use  -- add -->      evictable
        evictable       -- use -->      in use           (a hit)
        evictable       -- evict -->    gone             (the policy chose it)
        any             -- discard -->  gone             (somebody else chose it)

    `observe` comes once per prompt, before its blocks are used or added, and `advance` moves the clock. Blocks that
    one request lets go of are added deepest first, so that a policy that knows nothing better breaks a path at its end.
    Every call is O(log n) or better, amortized.

    Parameters
    ----------
    capacity
        Blocks that the tier holds. A policy sizes its parts by it and does not enforce it.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity = {capacity}: a tier holds at least one block")
        self.capacity = capacity
        self.now = 0.0

    @abstractmethod
    def __len__(self) -> int:
        """Evictable blocks."""

    def advance(self, now: float) -> None:
        """It is `now`, in seconds of a clock that never runs backwards."""
        self.now = now

    def observe(self, access: Access) -> None:
        """A prompt with these blocks has arrived. Peers that learn from hits alone need not listen."""
        del access

    def observing(self, access: Access) -> Iterator[None]:
        """`observe` in parts, each a millisecond or so however long the prompt is. Other calls may come in between."""
        self.observe(access)
        yield from ()

    def think(self) -> bool:
        """Do a part of what need not be done at once, a millisecond or so; whether there was something to do."""
        return False

    def attend(self, key: Key, mass: float) -> None:
        """Decoding gave `key` this share of its attention (0 to 1). Only policies that weigh attention listen."""
        del key, mass

    @abstractmethod
    def add(self, key: Key) -> None:
        """The block is cached and nobody uses it (any more)."""

    def adopt(self, keys: Sequence[Key]) -> None:
        """`add` blocks that a former process left, of which nothing is known but their order: the oldest first."""
        for key in keys:
            self.add(key)

    @abstractmethod
    def use(self, key: Key) -> None:
        """An evictable block is used again: a hit. KeyError if it is not evictable."""

    @abstractmethod
    def evict(self) -> Key:
        """Choose a victim, which is gone with this call. KeyError if nothing is evictable."""

    @abstractmethod
    def discard(self, key: Key) -> None:
        """The block is gone for a reason other than its score; nothing happens if it is not cached."""

    @abstractmethod
    def dearest(self) -> Iterator[Key]:
        """Evictable blocks, those that would leave last first, as nearly as that is cheap to say.

        To begin costs O(n log n) at most; nothing else may be asked of the policy before the end.
        """

    def admit(self, key: Key) -> bool:
        """Whether a block that a warmer tier gave up is worth a place here, were this tier full."""
        del key
        return True


def no_victim(name: str) -> KeyError:
    """What `evict` raises when there is nothing to evict."""
    return KeyError(f"{name} has no evictable block; release one first")
