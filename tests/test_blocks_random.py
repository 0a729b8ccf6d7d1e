"""The books under any interleaving of sequences: what one sees is what was written for its prefix."""

from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.block_books import G, L, layout, names
from wicore_backend.hmt.blocks import BlockManager, SequenceBlocks
from wicore_backend.hmt.host_tier import HostTier
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.lower_tiers import LowerTiers
from wicore_backend.hmt.names import BlockNames
from wicore_backend.hmt.policy import POLICIES, Access
from wicore_backend.hmt.policy.lru import LRU
from wicore_backend.hmt.transfers import Route

BOUNDLESS = 10_000
"""Slots of host memory, which no test fills."""


@settings(max_examples=200, deadline=None)
@given(
    window=st.integers(1, 40),
    size=st.integers(1, 9),
    max_chunk=st.integers(1, 20),
    local=st.sampled_from([0, 2, 10, 100]),
    host=st.sampled_from([0, 5, 100, BOUNDLESS]),
    policy=st.sampled_from([None, "lru", "lfu", "s3fifo", "a2cr"]),
    steps=st.lists(
        st.tuples(st.integers(0, 4), st.integers(1, 20), st.integers(2, 90), st.integers(0, 2), st.integers(0, 20)),
        max_size=60,
    ),
)
def test_any_interleaving_keeps_the_books_and_every_block_its_content(
    window, size, max_chunk, local, host, policy, steps
):
    """Open on a prefix, extend by chunks, fork, close: what a sequence sees is what was written for its prefix.

    Host memory that is never full has all that the device has ever kept and keeps no more, the bytes too. The device
    has `local` blocks more than a prompt holds at once in the local group.
    """
    shape = layout(window=window, block_size=size)
    books = BlockManager(
        shape,
        {L: 1 + shape.blocks_held(L, 90, max_chunk) + local, G: 91},
        max_chunk=max_chunk,
        lower=LowerTiers(HostTier({L: host, G: host}, LRU)) if host else None,
        policy=None if policy is None else POLICIES[policy],
    )
    written: dict[tuple[LayerGroup, int, int], bytes] = {}
    in_host: dict[tuple[LayerGroup, int, int], bytes] = {}
    running: dict[int, tuple[SequenceBlocks, list[int], BlockNames]] = {}
    progress: dict[int, int] = {}
    right: dict[bytes, list[bytes]] = {}  # What a block of a name holds, at each offset.
    on_device: dict[LayerGroup, set[bytes]] = {L: set(), G: set()}

    def check():
        books.check_integrity()
        for group, pool in books.pools.items():
            gone, on_device[group] = on_device[group] - pool._named.keys(), set(pool._named)
            assert host != BOUNDLESS or all(books.lower.host.holds(group, name) for name in gone)

    def fits(chain, match):
        """Whether there is room for what a sequence goes on from."""
        chain = chain.first(match.resume)
        for group, pool in books.pools.items():
            blocks = [pool.find(chain[n]) for n in books._prefixes.span(group, match.resume)]
            if sum(block is None or not pool.is_active(block) for block in blocks) > pool.available:
                return False
        return True

    def copy():
        """Make the copies that the books ask for."""
        ends = {
            Route.WITHIN_DEVICE: (written, written),
            Route.DEVICE_TO_HOST: (written, in_host),
            Route.HOST_TO_DEVICE: (in_host, written),
        }
        for transfer in books.take_transfers():
            source, target = ends[transfer.route]
            for offset in range(size):
                target.pop((transfer.group, transfer.target, offset), None)
                if (transfer.group, transfer.source, offset) in source:
                    held = source[transfer.group, transfer.source, offset]
                    target[transfer.group, transfer.target, offset] = held

    def content(tokens, position):
        return array("i", tokens[: position + 1]).tobytes()

    def see(slot, computed, end):
        blocks, tokens, _ = running[slot]
        for group in (L, G):
            first = max(0, computed - window + 1) if group is L else 0
            for position in range(first, end):
                block = int(blocks.tables[group][position // size])
                assert block
                assert written[group, block, position % size] == content(tokens, position)

    def grow(count):
        """Give whoever has no block left `count` of them, as decodes get them."""
        ends = [
            (blocks, progress[slot])
            for slot, (blocks, _, _) in running.items()
            if progress[slot] == blocks.stop * size and blocks.stop + count <= len(blocks.tables[G])
        ]
        if books.spare >= count * len(ends):
            books.extend_all(ends, count)
            check()

    for slot, chunk, length, branch, common in steps:
        if chunk % 4 == 0:
            grow(branch + 1)
        if common % 3 == 0:
            books.tend(float(common))
            check()
        if slot not in running:
            tokens = [*range(min(common, length)), *range(1000 * branch, 1000 * branch + length)][:length]
            chain = names(tokens, size=size)
            full = (length - 1) // size
            books.observe(Access(keys=chain.first(full)[:full]), 0.0)
            match = books.match(chain, full)
            assert match.resume <= match.known
            if not fits(chain, match):
                continue
            running[slot] = (books.open(chain, match, max_tokens=length, expected_tokens=length), tokens, chain)
            books.keep_window(running[slot][0], (length // 2) // size)
            progress[slot] = match.resume * size
            copy()
            see(slot, progress[slot], progress[slot])
            first = max(0, progress[slot] - window + 1)
            for position in range(first, progress[slot]):
                block = int(running[slot][0].tables[L][position // size])
                assert written[L, block, position % size] == content(tokens, position)
        else:
            blocks, tokens, _ = running[slot]
            computed = progress[slot]
            end = min(computed + min(chunk, max_chunk), len(tokens))
            if computed == end or not books.extend(blocks, computed, end):
                if branch == 0 and computed and slot + 10 not in running:
                    chain = names(tokens, size=size)
                    if forked := books.fork(
                        blocks, chain, computed=computed, max_tokens=len(tokens), expected_tokens=9
                    ):
                        running[slot + 10] = (forked, tokens, chain)
                        progress[slot + 10] = computed
                books.close(blocks)
                del running[slot], progress[slot]
            else:
                copy()
                for group in (L, G):
                    for position in range(computed, end):
                        block = int(blocks.tables[group][position // size])
                        written[group, block, position % size] = content(tokens, position)
                progress[slot] = end
                see(slot, computed, end)
                books.note(blocks, end)
                for n in range(computed // size, end // size):
                    right[running[slot][2].first(n + 1)[n]] = [
                        content(tokens, n * size + offset) for offset in range(size)
                    ]
        check()
    for blocks, _, _ in running.values():
        books.close(blocks)
    check()
    copy()
    assert all(pool.active == 0 for pool in books.pools.values())
    for group in (L, G) if host else ():
        for name in filter(lambda name: books.lower.host.holds(group, name), right):
            slot = books.lower.host.pin(group, name)
            assert [in_host[group, slot, offset] for offset in range(size)] == right[name]
            books.lower.host.unpin(group, name)
