"""Small books of blocks, and sequences that are computed in them: what the tests of the books share."""

from dataclasses import dataclass

from wicore_backend.hmt.blocks import BlockManager, PrefixMatch, SequenceBlocks
from wicore_backend.hmt.host_tier import HostTier
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.lower_tiers import LowerTiers
from wicore_backend.hmt.names import BlockNames, NameScheme
from wicore_backend.hmt.policy.lru import LRU

L, G = LayerGroup.LOCAL, LayerGroup.GLOBAL


NOTHING = PrefixMatch()


@dataclass(frozen=True)
class Image:
    start: int
    end: int
    digest: bytes = b"picture"


def layout(window: int = 24, groups=(L, L, G), block_size: int = 4) -> KVLayout:
    return KVLayout.of(groups, block_size=block_size, kv_heads=2, head_dim=8, window=window, bytes_per_value=4)


def manager(blocks: int = 40, max_chunk: int = 8, **kwargs) -> BlockManager:
    return BlockManager(layout(**kwargs), {L: blocks, G: blocks}, max_chunk=max_chunk)


def names(tokens, images=(), salt: str = "", size: int = 4) -> BlockNames:
    return BlockNames(NameScheme(size), list(tokens), images, salt)


def run(books: BlockManager, tokens, *, chunk: int = 8, chain: BlockNames | None = None) -> SequenceBlocks:
    """Open a sequence on what is kept, and compute all its tokens."""
    chain = names(tokens) if chain is None else chain
    match = books.match(chain, (len(tokens) - 1) // 4)
    blocks = books.open(chain, match, max_tokens=len(tokens), expected_tokens=len(tokens))
    for start in range(match.resume * 4, len(tokens), chunk):
        end = min(start + chunk, len(tokens))
        assert books.extend(blocks, start, end)
        books.note(blocks, end)
        books.check_integrity()
    return blocks


def tiered(host: int, blocks: int = 31) -> BlockManager:
    return BlockManager(layout(), {L: 12, G: blocks}, max_chunk=8, lower=LowerTiers(HostTier({L: host, G: host}, LRU)))
