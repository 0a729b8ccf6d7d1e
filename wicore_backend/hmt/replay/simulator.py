"""Runs a trace through tiers of blocks, each ordered by a policy. Only books: no bytes, no clock but the trace's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from wicore_backend.hmt.policy import Access, Key, Policy
from wicore_backend.hmt.replay.trace import TraceRequest


@dataclass(frozen=True, slots=True)
class Tier:
    """A tier and the policy that orders its blocks; `policy.capacity` is its size."""

    name: str
    policy: Policy


@dataclass(slots=True)
class Counts:
    """What happened to some of the trace's blocks.

    Attributes
    ----------
    blocks, tokens
        Asked for.
    hit_blocks
        For each tier, blocks found there that continue the prompt's unbroken run of cached blocks from its root.
    hit_tokens
        Tokens of all of those.
    """

    blocks: int = 0
    tokens: int = 0
    hit_blocks: list[int] = field(default_factory=list)
    hit_tokens: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the blocks that were hits, 0 to 1."""
        return sum(self.hit_blocks) / self.blocks if self.blocks else 0.0


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What a replay found.

    Attributes
    ----------
    halves
        Counts of the first and of the second half of the requests. The second starts with the first's cache.
    stored, restored
        For each tier, blocks that were written to it (the first tier's: computed blocks), and hits taken from it.
    seconds
        CPU time of the whole replay on this machine.
    """

    halves: tuple[Counts, Counts]
    stored: list[int]
    restored: list[int]
    seconds: float

    @property
    def hit_rate(self) -> float:
        """Share of all blocks that were hits, 0 to 1."""
        return sum(sum(half.hit_blocks) for half in self.halves) / sum(half.blocks for half in self.halves)


def replay(requests: Sequence[TraceRequest], tiers: Sequence[Tier], *, block_tokens: int = 512) -> ReplayResult:
    """Serve `requests` from `tiers`, the warmest first.

    A cached block is in exactly one tier. A prompt's blocks are all in the warmest tier when it has been served
    (computed, or restored from a colder one), then the tier gives up what exceeds its capacity, which may be blocks
    of that very prompt: that is how a policy declines a newcomer. A victim moves to the next tier if that one's policy
    admits it, and is gone after the last.
    """
    counts = Counts(hit_blocks=[0] * len(tiers)), Counts(hit_blocks=[0] * len(tiers))
    where: dict[Key, int] = {}
    stored, restored = [0] * len(tiers), [0] * len(tiers)
    start = time.process_time()
    for index, request in enumerate(requests):
        access = Access(keys=request.blocks, full_blocks=request.full_blocks)
        for tier in tiers:
            tier.policy.advance(request.time)
            tier.policy.observe(access)
        half = counts[2 * index >= len(requests)]
        half.blocks += len(request.blocks)
        half.tokens += request.tokens
        hits = 0
        for block in request.blocks:
            level = where.get(block)
            if level is None:
                break
            half.hit_blocks[level] += 1
            restored[level] += 1
            hits += 1
        half.hit_tokens += min(hits * block_tokens, request.tokens)
        for block in request.blocks:
            level = where.get(block)
            if level == 0:
                tiers[0].policy.use(block)
            elif level is None:
                stored[0] += 1
            else:
                tiers[level].policy.discard(block)
        for block in reversed(request.blocks):
            tiers[0].policy.add(block)
            where[block] = 0
        _shrink(tiers, where, stored)
    return ReplayResult(counts, stored, restored, time.process_time() - start)


def _shrink(tiers: Sequence[Tier], where: dict[Key, int], stored: list[int]) -> None:
    """Move victims down until no tier is beyond its capacity."""
    for level, tier in enumerate(tiers):
        while len(tier.policy) > tier.policy.capacity:
            block = tier.policy.evict()
            colder = level + 1
            if colder < len(tiers) and tiers[colder].policy.admit(block):
                tiers[colder].policy.add(block)
                where[block] = colder
                stored[colder] += 1
            else:
                del where[block]
