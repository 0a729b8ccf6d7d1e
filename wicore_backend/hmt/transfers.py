"""Copies of blocks that the books ask for: what they list, and what holds while the copies are made.

`KVPools.apply` takes the list. On a CPU it makes the copies before it returns, in the order of the list. On CUDA it
issues them (`hmt/streamed_copies.py`), and they are made beside the steps, on two streams of their own, with the same
bytes as a result as if each had been made in order, between the step before and the step after. For that:

1. **Commitment.** What `apply` has taken will be made; nothing cuts it. A sequence that is cancelled gives its blocks
   back like any other, and its copies harm nobody. So a block or a slot may change its owner in the books as soon as a
   transfer is listed: whatever reads its old bytes was listed before whatever writes new ones. If `apply` itself
   raises, the books and the bytes differ: the engine ends.
2. **Who may read a loaded block.** It is active, and can be found under its name, at once. Whoever finds it reads it in
   the next step at the earliest, and that step, before the attention of a layer, calls `KVPools.wait(layer)`.
3. **Streams.** STEP runs the model. SWAP is the only other one that reads or writes device blocks: it reads what is
   spilled into trays on the device, makes forks, and loads from slots. DRAIN writes trays into slots. Nothing else
   touches slots but the cold tier's threads. STEP and SWAP depend on each other through two events:
   SWAP waits for what STEP had been given when `apply` was called: so the steps before have written what leaves, and
   have read what is overwritten.
   STEP waits, in `wait(layer)`, for SWAP's copies of the part of the blocks that has the layer. What is spilled of that
   part has then been read, what is loaded has been written, forks have been made.
4. **Trays.** SWAP reads into a tray only after DRAIN's event for what was in it before: if all trays are full, SWAP
   waits, and the step with it. DRAIN reads a tray after SWAP's event for what has been put there.
5. **Slots.** SWAP loads from a slot after DRAIN's event for whatever was spilled into it before. DRAIN writes a slot
   after an event of SWAP that comes, on SWAP, after all loads that were listed before.
6. **Order on SWAP.** Transfers that do not touch the same block or slot may be made in any order. The list is cut into
   rounds (`in_rounds`): in each all spills, then all forks, then all loads are made. Large lists are made part by
   part, each part's rounds after those of the part before: layers do not overlap in memory, so each part is a
   list of its own.
7. **The cold tier's threads** stand outside all streams. `apply` returns a call that returns once SWAP and DRAIN have
   done all of this list's, and all before; they make it before they read or write a slot that they have been given.
8. **Failure of a step.** What a step has waited for stays waited for, since a retry follows on the same stream; what it
   has not come to is waited for by the retry, or by whatever step comes next. The next `apply` needs no step to have
   ended well: SWAP keeps its own order. `KVPools.clear` waits for all that SWAP has, so that no late copy follows it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from wicore_backend.hmt.layout import LayerGroup


class Route(Enum):
    """From where to where."""

    WITHIN_DEVICE = auto()
    DEVICE_TO_HOST = auto()
    HOST_TO_DEVICE = auto()


class Transfer(NamedTuple):  # A prompt's beginning is thousands, and a dataclass takes five times as long to make.
    """One block's bytes, from a device block or a host slot to another, of the same group."""

    route: Route
    group: LayerGroup
    source: int
    target: int


@dataclass(eq=False, slots=True)
class Pairs:
    """Of transfers of one group and route: from each source to the target at the same place."""

    sources: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Round:
    """Transfers of one group that give the same as listed if they are made by route: first all spills, then all forks,
    then all loads, each route's in any order or at once."""

    spills: Pairs = field(default_factory=Pairs)
    forks: Pairs = field(default_factory=Pairs)
    loads: Pairs = field(default_factory=Pairs)
    _slots: set[int] = field(default_factory=set)
    """Spilled into, or loaded from."""
    _written: set[int] = field(default_factory=set)
    """Blocks that are forked into, or loaded into."""
    _loaded: set[int] = field(default_factory=set)
    _forked: set[int] = field(default_factory=set)
    """Blocks that are forked from."""

    def add(self, route: Route, source: int, target: int) -> bool:
        """Put the next transfer of the list into the round; False if it does not fit there."""
        if route is Route.HOST_TO_DEVICE:
            if target in self._loaded:
                return False
            self._loaded.add(target)
            self._written.add(target)
            self._slots.add(source)
            pairs = self.loads
        elif route is Route.DEVICE_TO_HOST:
            if source in self._written or target in self._slots:
                return False
            self._slots.add(target)
            pairs = self.spills
        else:
            if source in self._written or target in self._written or target in self._forked:
                return False
            self._forked.add(source)
            self._written.add(target)
            pairs = self.forks
        pairs.sources.append(source)
        pairs.targets.append(target)
        return True


def in_rounds(transfers: Iterable[Transfer]) -> dict[LayerGroup, list[Round]]:
    """The list cut into rounds, for each group by itself: groups share neither blocks nor slots."""
    rounds: dict[LayerGroup, list[Round]] = {}
    for transfer in transfers:
        of_group = rounds.get(transfer.group)
        if of_group is None:
            of_group = rounds[transfer.group] = [Round()]
        if not of_group[-1].add(transfer.route, transfer.source, transfer.target):
            of_group.append(Round())
            of_group[-1].add(transfer.route, transfer.source, transfer.target)
    return rounds
