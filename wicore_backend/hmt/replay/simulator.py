"""Runs a trace through the books that the engine serves from, `BlockManager` over `LowerTiers`, in the trace's time.

Only bytes are missing, and what moves them. A block of the trace counts as a block of one token in a model of global
layers; transfers are counted; a disk does at once what it is asked (`modelled_disk.py`). Prompts come one after the
other, each computed before the next.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from wicore_backend.hmt.blocks import BlockManager, PrefixMatch
from wicore_backend.hmt.host_tier import HostTier, Key
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.lower_tiers import LowerTiers, Restore
from wicore_backend.hmt.names import BlockNames, NameScheme
from wicore_backend.hmt.nvme import Outcome
from wicore_backend.hmt.policy import Access, Policy
from wicore_backend.hmt.replay.modelled_disk import ModelledDisk
from wicore_backend.hmt.replay.tiers import CostModel, TierName, Tiers
from wicore_backend.hmt.replay.trace import TraceRequest
from wicore_backend.hmt.transfers import Route

_LAYOUT = KVLayout.of((LayerGroup.GLOBAL,), block_size=1, kv_heads=1, head_dim=1, window=1, bytes_per_value=1)
_STEP_BLOCKS = 8
"""What the device gives up before the disk gets its turn: of 512 tokens each, about what an engine's step computes."""

PolicyOf = Callable[[TierName, int], Policy]
"""Makes a tier's policy from the number of its blocks."""


@dataclass(slots=True)
class Counts:
    """What happened to some of the trace's blocks.

    Attributes
    ----------
    blocks, tokens
        Asked for.
    hit_blocks
        By the tier that they were found in first: blocks of the prompts' unbroken runs of cached blocks from the root.
    hit_tokens
        Tokens of all of those.
    """

    blocks: int = 0
    tokens: int = 0
    hit_blocks: Counter[TierName] = field(default_factory=Counter)
    hit_tokens: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the blocks that were hits, 0 to 1."""
        return self.hit_blocks.total() / self.blocks if self.blocks else 0.0


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What a replay found.

    Attributes
    ----------
    halves
        Counts of the first and of the second half of the requests. The second starts with the first's cache.
    stored, loaded
        For each tier, blocks that were written to it (the device's: computed blocks), and that came up from it.
    restores_declined
        Prompts of which a disk had more, and that were computed because that was faster.
    seconds
        CPU time of the whole replay on this machine.
    """

    halves: tuple[Counts, Counts]
    stored: Counter[TierName]
    loaded: Counter[TierName]
    restores_declined: int
    seconds: float

    @property
    def hit_rate(self) -> float:
        """Share of all blocks that were hits, 0 to 1."""
        return sum(half.hit_blocks.total() for half in self.halves) / sum(half.blocks for half in self.halves)


def named(requests: Sequence[TraceRequest]) -> list[BlockNames]:
    """The names of each request's blocks: those of a sequence whose tokens are the trace's blocks."""
    tokens: dict[int, int] = {}
    scheme, names = NameScheme(_LAYOUT.block_size), []
    for request in requests:
        names.append(BlockNames(scheme, [tokens.setdefault(block, len(tokens)) for block in request.blocks], (), ""))
        names[-1].first(len(request.blocks))
    return names


def replay(
    requests: Sequence[TraceRequest],
    names: Sequence[BlockNames],
    tiers: Tiers,
    policy: PolicyOf,
    costs: CostModel,
) -> ReplayResult:
    """Serve `requests`, whose blocks are `named`, from `tiers`."""
    cache = _Cache(tiers, policy, costs, longest=max(len(request.blocks) for request in requests))
    counts = Counts(), Counts()
    start = time.process_time()
    for index, (request, chain) in enumerate(zip(requests, names, strict=True)):
        cache.serve(request, chain, counts[2 * index >= len(requests)])
    seconds = time.process_time() - start
    cache.end()
    return ReplayResult(counts, cache.stored, cache.loaded, cache.restores_declined, seconds)


class _Cache:
    """One engine's books."""

    def __init__(self, tiers: Tiers, policy: PolicyOf, costs: CostModel, *, longest: int) -> None:
        self.stored: Counter[TierName] = Counter()
        self.loaded: Counter[TierName] = Counter()
        self.restores_declined = 0
        self._now = 0.0
        self._tiers = tiers
        self._costs = costs
        self._disk = None
        if tiers.nvme:
            self._disk = ModelledDisk(
                tiers.nvme,
                partial(policy, TierName.NVME),
                clock=lambda: self._now,
                seconds_per_byte=costs.restore_seconds(1) / costs.block_bytes,
            )
        self._lower = LowerTiers(
            HostTier({LayerGroup.GLOBAL: tiers.host}, partial(policy, TierName.HOST)),
            self._disk,
            burst=2 * _STEP_BLOCKS,
        )
        # Block 0 is nobody's. The longest prompt has room beside what the device keeps.
        blocks = {LayerGroup.GLOBAL: 1 + longest + tiers.device}
        self.books = BlockManager(_LAYOUT, blocks, max_chunk=longest, lower=self._lower)
        self._pool = self.books.pools[LayerGroup.GLOBAL]

    def serve(self, request: TraceRequest, names: BlockNames, counts: Counts) -> None:
        """One prompt: found as far as it is cached, computed from there on, and left in the cache."""
        count = len(request.blocks)
        self._now = request.time
        access = Access(keys=names.first(count), full_blocks=request.full_blocks)
        self._lower.observe(access, request.time)
        match, found, restore = self._find(request, names)
        counts.blocks += count
        counts.tokens += request.tokens
        counts.hit_blocks += found
        counts.hit_tokens += min(match.resume * self._costs.block_tokens, request.tokens)
        self.stored[TierName.DEVICE] += count - match.resume
        blocks = self.books.open(names, match, max_tokens=count, expected_tokens=count)
        if restore is not None:
            self._lower.end(restore)
        fits = self.books.extend(blocks, match.resume, count)
        assert fits, "the device has no room for a prompt"
        self.books.note(blocks, count)
        self.books.close(blocks)
        self._move()
        while (excess := self._pool.cached - self._tiers.device) > 0:
            self.books.give_up(min(excess, _STEP_BLOCKS))
            self._move()

    def _find(self, request: TraceRequest, names: BlockNames) -> tuple[PrefixMatch, Counter[TierName], Restore | None]:
        """Where the prompt can go on, where the blocks before that were, and what holds those that were on disk."""
        count = len(request.blocks)
        match = self.books.match(names, count)
        resume, keys = self.books.restorable(names, count, match)
        where = [self._tier_of(name) for name in names.first(count)[:resume]]
        restore = self._restore(keys, where[match.resume :]) if keys else None
        if restore is not None:
            while not restore.done:
                self._move()
            match = self.books.match(names, count)
        return match, Counter(where[: match.resume]), restore

    def _restore(self, keys: Sequence[Key], where: Sequence[TierName]) -> Restore | None:
        """Begin to bring up blocks that are needed to go on later, by as many blocks as `where` tells of."""
        costs = self._costs
        if costs.restore_seconds(where.count(TierName.NVME)) < costs.prefill_seconds(len(where) * costs.block_tokens):
            return self._lower.restore(keys)
        self.restores_declined += 1
        return None

    def _tier_of(self, name: bytes) -> TierName:
        if self._pool.find(name) is not None:
            return TierName.DEVICE
        return TierName.HOST if self._lower.host.holds(LayerGroup.GLOBAL, name) else TierName.NVME

    def _move(self) -> None:
        """What the engine's mover does before a step; a disk has done its part at once."""
        for transfer in self.books.take_transfers():
            if transfer.route is Route.HOST_TO_DEVICE:
                self.loaded[TierName.HOST] += 1
            elif transfer.route is Route.DEVICE_TO_HOST:
                self.stored[TierName.HOST] += 1
        self._lower.submit(None)
        self._lower.collect()

    def end(self) -> None:
        """Prove the books, and ask the disk's what happened."""
        self.books.check_integrity()
        if self._disk is not None:
            self._disk.check_integrity()
            of_disk = self._disk.counts()[LayerGroup.GLOBAL]
            self.stored[TierName.NVME] = of_disk.spills[Outcome.DONE]
            self.loaded[TierName.NVME] = of_disk.restores[Outcome.DONE]
