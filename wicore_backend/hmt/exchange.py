"""What moves between the device's blocks and the host tier's slots, as the books decide it. No tensors, no clock.

The copies are listed in the order of the decisions (`hmt/transfers.py` says what holds while they are made).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from wicore_backend.hmt.block_pool import BlockPool, GivenUp
from wicore_backend.hmt.host_tier import HostTier
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.transfers import Route, Transfer

Missing = list[tuple[int, int]]
"""Of a sequence's table, entries whose blocks are in host memory alone, each with the slot; all of them are pinned."""


class Exchange:
    """Lists copies, and tells the host tier of them.

    Parameters
    ----------
    host
        None if there is nothing below the device.
    """

    def __init__(self, host: HostTier | None) -> None:
        self._host = host
        self._transfers: list[Transfer] = []

    def take(self) -> list[Transfer]:
        """The copies that have to be made now, in this order; they are listed no more."""
        transfers, self._transfers = self._transfers, []
        return transfers

    def spilling(self, group: LayerGroup) -> GivenUp | None:
        """What becomes of the blocks that a group's pool gives up; None if they are gone."""
        host = self._host
        if host is None:
            return None

        def spill(name: bytes, block: int) -> None:
            slot = host.spill(group, name)
            if slot is not None:
                self._transfers.append(Transfer(Route.DEVICE_TO_HOST, group, block, slot))

        return spill

    def copy(self, group: LayerGroup, source: int, target: int) -> None:
        """A block gets the bytes of another one."""
        self._transfers.append(Transfer(Route.WITHIN_DEVICE, group, source, target))

    def take_up(
        self,
        group: LayerGroup,
        pool: BlockPool,
        table: NDArray[np.int32],
        chain: Sequence[bytes],
        indices: Iterable[int],
    ) -> Missing:
        """Put kept blocks into a sequence's table: those on the device. The others stay pinned in host memory.

        They are to be loaded when all of the sequence's have been taken up: taking a block recycles others.
        """
        found: list[int] = []
        blocks: list[int] = []
        missing: list[int] = []
        for index in indices:
            block = pool.find(chain[index])
            if block is None:
                missing.append(index)
            else:
                pool.use(block)
                found.append(index)
                blocks.append(block)
        table[found] = blocks
        if not missing:
            return []
        assert self._host is not None, "a block that is nowhere was matched"
        return list(zip(missing, self._host.pin_all(group, [chain[index] for index in missing]), strict=True))

    def load(
        self, group: LayerGroup, pool: BlockPool, table: NDArray[np.int32], chain: Sequence[bytes], missing: Missing
    ) -> None:
        """Bring what is missing to the device; there is room for it.

        Global blocks can be found there from then on; of local ones the caller keeps the window.
        """
        if not missing:
            return
        assert self._host is not None
        indices, slots = zip(*missing, strict=True)
        blocks = pool.take(len(missing))
        table[list(indices)] = blocks
        self._transfers += [
            Transfer(Route.HOST_TO_DEVICE, group, slot, block) for slot, block in zip(slots, blocks, strict=True)
        ]
        names = [chain[index] for index in indices]
        self._host.unpin_all(group, reversed(names))  # Deepest first, as policies want it.
        self._host.loaded(group, len(missing))
        if group is LayerGroup.GLOBAL:
            pool.keep(names, blocks)
