"""Moves KV blocks between the tiers as the books ask. On the engine's thread, which never waits here for a disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from wicore_backend.hmt.blocks import BlockManager
from wicore_backend.hmt.codecs import CodecName, make_codec
from wicore_backend.hmt.cold_tier import ColdTier, ColdTierLimits, store_config
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.nvme import NvmeStore
from wicore_backend.hmt.policy import Policy
from wicore_backend.hmt.pool import KVPools
from wicore_backend.hmt.write_behind import copies_down

_POLL_S = 0.002
_CLOSE_S = 1.0


class ColdStorage:
    """The cold tier and the store that it is on: opened together, closed together.

    Parameters
    ----------
    fingerprint
        Of everything but dtype, layout and codec that changes a block's bytes.
    woken
        Called on any thread when blocks have moved.
    behind_bytes_per_second
        At which an idle engine stores what it has cached.

    Raises
    ------
    StoreUnusableError
        If the directory cannot hold the store, or another process has it open.
    """

    def __init__(
        self,
        directory: Path,
        *,
        capacity_bytes: int,
        codec: CodecName,
        layout: KVLayout,
        pools: KVPools,
        policy: Callable[[int], Policy],
        fingerprint: bytes,
        woken: Callable[[], None],
        behind_bytes_per_second: float = 0.0,
    ) -> None:
        codecs = {
            group: make_codec(codec, layout.block_shape(group), pools.tensors[group].dtype) for group in pools.host
        }
        self._store = NvmeStore(
            store_config(directory, capacity_bytes=capacity_bytes, codecs=codecs, fingerprint=fingerprint)
        )
        try:
            self.tier = ColdTier(
                self._store,
                codecs,
                pools.host,
                policy=policy,
                woken=woken,
                limits=ColdTierLimits(behind_bytes_per_second=behind_bytes_per_second),
            )
        except BaseException:
            self._store.close()
            raise

    def close(self) -> None:
        """End the threads, whatever the disk does, in little more than `_CLOSE_S`."""
        self.tier.close(timeout_s=_CLOSE_S)
        self._store.close(timeout_s=_CLOSE_S)


class BlockMover:
    """Carries out what the books ask for; see `hmt/transfers.py` and `hmt/lower_tiers.py` for the order."""

    def __init__(self, blocks: BlockManager, pools: KVPools, cold: ColdStorage | None) -> None:
        self._blocks = blocks
        self._pools = pools
        self._cold = cold
        self._written: Callable[[], None] | None = None

    def move(self) -> None:
        """Issue the copies of the next step, and hand over what moves beside it."""
        if transfers := self._blocks.take_transfers():
            self._written = self._pools.apply(transfers)
        if self._blocks.lower is not None:
            self._blocks.lower.submit(self._written)

    def tend(self) -> None:
        """Take note of what has moved, go on, and write behind; for an engine that has nothing else to do."""
        lower = self._blocks.lower
        if lower is None:
            return
        lower.collect()
        self.move()
        if copies := copies_down(self._blocks):
            self._written = self._pools.apply(copies)
        lower.write_behind(self._written)

    def close(self, *, persist_s: float) -> None:
        """Store what is cached for as long as `persist_s`, so that another engine finds it, and close all tiers."""
        try:
            if self._cold is not None:
                try:
                    if persist_s:
                        self._persist(self._cold.tier, time.monotonic() + persist_s)
                finally:
                    self._cold.close()
        finally:
            self._pools.close()

    def _persist(self, cold: ColdTier, end: float) -> None:
        lower, layout = self._blocks.lower, self._blocks.layout
        assert lower is not None
        self.move()
        while time.monotonic() < end:
            lower.spill_all(self._written)
            while cold.busy and time.monotonic() < end:
                time.sleep(_POLL_S)
                lower.collect()
            if any(lower.host.used(group) for group in lower.host.slots):
                continue  # More than the cold tier takes at a time.
            given_up = 0
            for group, pool in self._blocks.pools.items():  # Each as it has room: one has many more blocks than slots.
                # Of the local group it is whole windows, so that it may be one more than was asked for.
                whole = layout.blocks_for(layout.window) if group is LayerGroup.LOCAL else 0
                given_up += pool.give_up(max(1, lower.host.free(group) - whole))
            if not given_up:
                return
            self.move()
