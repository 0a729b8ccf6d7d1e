"""Where in the cache the blocks of a prompt are at this moment, and what replacement makes of them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from wicore_backend.hmt.blocks import BlockManager
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.names import BlockNames
from wicore_backend.hmt.policy.a2cr import ScoreTerms

Terms = Callable[[LayerGroup, bytes], ScoreTerms | None]
"""A block's score in its terms; None for a block that the policy does not know, or a policy that has none."""


class Tier(StrEnum):
    """Where a block can be, the fastest first."""

    DEVICE = "device"
    HOST = "host"
    NVME = "nvme"


@dataclass(frozen=True, slots=True)
class BlockPlace:
    """One block of a prompt in one layer group.

    Attributes
    ----------
    index
        It holds tokens `index * block_size` to `(index + 1) * block_size - 1`.
    tiers
        Those that have it, the fastest first. In the local group only the blocks of window ends are kept.
    score
        What the host tier's policy thinks of it, wherever it is. A block that no tier has was computed once and given
        up if there is a score, and was never computed, or long ago, if there is none.
    """

    index: int
    group: LayerGroup
    tiers: tuple[Tier, ...]
    score: ScoreTerms | None


@dataclass(frozen=True, slots=True)
class CachedPrompt:
    """How much of a prompt need not be computed, and where each of its full blocks is.

    Attributes
    ----------
    tokens
        Of the prompt.
    resume_tokens
        Where it could go on at once.
    known_tokens
        How far the global group reaches: between the two only the local window is missing.
    restorable_tokens
        Where it could go on after a restore from the cold tier.
    """

    tokens: int
    block_size: int
    resume_tokens: int
    known_tokens: int
    restorable_tokens: int
    blocks: tuple[BlockPlace, ...]


def explain(blocks: BlockManager, names: BlockNames, tokens: int, terms: Terms | None = None) -> CachedPrompt:
    """Look a prompt of so many tokens up in the books, which do not change. On the engine's thread.

    Parameters
    ----------
    terms
        The host tier's policy, if it can say what its scores are made of.
    """
    size = blocks.block_size
    limit = blocks.startable(tokens)
    match = blocks.match(names, limit)
    restorable, _ = blocks.restorable(names, limit, match)
    count = tokens // size
    return CachedPrompt(
        tokens=tokens,
        block_size=size,
        resume_tokens=match.resume * size,
        known_tokens=match.known * size,
        restorable_tokens=restorable * size,
        blocks=tuple(
            BlockPlace(index, group, _tiers_of(blocks, group, name), None if terms is None else terms(group, name))
            for index, name in enumerate(names.first(count)[:count])
            for group in blocks.pools
        ),
    )


def _tiers_of(blocks: BlockManager, group: LayerGroup, name: bytes) -> tuple[Tier, ...]:
    tiers = []
    if blocks.pools[group].find(name) is not None:
        tiers.append(Tier.DEVICE)
    if blocks.lower is not None:
        if blocks.lower.host.holds(group, name):
            tiers.append(Tier.HOST)
        if blocks.lower.cold is not None and blocks.lower.cold.holds(group, name):
            tiers.append(Tier.NVME)
    return tuple(tiers)


class CacheQuestion:
    """An `explain` that one thread asks for and the engine's thread makes."""

    def __init__(self, blocks: BlockManager, names: BlockNames, tokens: int, terms: Terms | None = None) -> None:
        self._explain = partial(explain, blocks, names, tokens, terms)
        self._future: Future[CachedPrompt] = Future()

    def answer(self) -> None:
        """On the engine's thread. Never raises: whoever asked does."""
        try:
            self._future.set_result(self._explain())
        except Exception as error:
            self._future.set_exception(error)

    def result(self) -> CachedPrompt:
        """Wait for the answer; not on the engine's thread."""
        return self._future.result()
