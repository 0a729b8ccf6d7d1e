"""Block accounting: no block lost or written twice, windows freed, prefixes found again exactly where one can go on."""

from array import array
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wicore_backend.errors import InvalidArgumentError
from wicore_backend.hmt.blocks import BlockAccountingError, BlockManager, PrefixMatch, SequenceBlocks
from wicore_backend.hmt.budget import divide_memory
from wicore_backend.hmt.host_tier import HostTier
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.lower_tiers import LowerTiers
from wicore_backend.hmt.names import BlockNames, NameScheme
from wicore_backend.hmt.policy import POLICIES, Access
from wicore_backend.hmt.policy.lru import LRU
from wicore_backend.hmt.pool import KVPools
from wicore_backend.hmt.transfers import Route
from wicore_backend.hmt.victims import Victims

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


def test_a_block_holds_all_its_groups_layers():
    assert layout().block_bytes(L) == 2 * 2 * 4 * 2 * 8 * 4
    assert layout().layers == ((L, 0), (L, 1), (G, 0))


def test_local_blocks_behind_the_window_are_freed_and_global_ones_kept():
    books = manager()
    blocks = run(books, range(96))
    assert books.pools[G].active == 24
    # The last chunk starts at 88 and sees positions 65 to 95: blocks 16 to 23.
    assert blocks.tables[L].nonzero()[0].tolist() == list(range(16, 24))
    books.close(blocks)
    assert books.pools[L].active == books.pools[G].active == 0
    assert books.pools[G].cached == 24
    books.forget_all()
    books.check_integrity()
    assert books.pools[L].cached == books.pools[G].cached == 0


def test_a_model_without_local_layers_has_one_pool():
    books = BlockManager(layout(groups=(G, G)), {G: 10, L: 1}, max_chunk=4)
    assert list(books.pools) == [G]


@pytest.mark.parametrize("groups", [(L, L, G), (G,), (L,)])
def test_pools_are_zeros_of_the_layouts_shape_for_the_groups_there_are(groups):
    shape = layout(groups=groups)
    pools = KVPools.allocate(shape, {L: 3, G: 5}, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert set(pools.tensors) == set(groups)
    for group, tensor in pools.tensors.items():
        assert tuple(tensor.shape) == ({L: 3, G: 5}[group], *shape.block_shape(group))
        assert tensor.dtype == torch.bfloat16
        assert not tensor.any()


def test_memory_is_divided_so_that_one_longest_sequence_always_fits():
    shape = layout()
    sizes = {"max_sequences": 4, "max_tokens": 100, "max_chunk": 8}
    least = sum((shape.blocks_held(g, 100, 8) + 1) * shape.block_bytes(g) for g in (L, G))
    for memory in (least, 2 * least, 3 * least, 100 * least):
        blocks = divide_memory(shape, memory_bytes=memory, **sizes)
        assert sum(blocks[g] * shape.block_bytes(g) for g in (L, G)) <= memory
        run(BlockManager(shape, blocks, max_chunk=8), range(100))
    assert blocks == {g: 1 + 4 * shape.blocks_held(g, 100, 8) for g in (L, G)}
    with pytest.raises(InvalidArgumentError, match="kv_cache_bytes"):
        divide_memory(shape, memory_bytes=least - 1, **sizes)


def test_what_does_not_fit_is_not_placed_and_nothing_is_lost_by_it():
    books = manager(blocks=11)
    first = run(books, range(24))
    second = books.open(None, NOTHING, max_tokens=40, expected_tokens=40)
    assert not books.extend(second, 0, 20)
    assert second.stop == 0
    assert books.extend(second, 0, 16)
    books.check_integrity()
    books.close(first)
    assert books.extend(second, 16, 20), "what the first one left is recycled"
    books.check_integrity()


def test_several_sequences_are_extended_at_once_as_they_are_one_by_one():
    one_by_one, at_once = manager(blocks=81), manager(blocks=81)
    opened = [
        [books.open(None, NOTHING, max_tokens=96, expected_tokens=n) for n in (30, 60, 0)]
        for books in (one_by_one, at_once)
    ]
    for books, running in ((one_by_one, opened[0]), (at_once, opened[1])):
        assert all(
            books.extend(blocks, start, end)
            for start, end in ((0, 8), (8, 16), (16, 24), (24, 32))
            for blocks in running
        )
    at_once.extend_all([(blocks, 32) for blocks in opened[1]], 3)
    assert all(one_by_one.extend(blocks, 32, 44) for blocks in opened[0])
    for books in (one_by_one, at_once):
        books.check_integrity()
    assert at_once.spare == one_by_one.spare
    for alone, together in zip(*opened, strict=True):
        for group in (L, G):
            assert together.tables[group].nonzero()[0].tolist() == alone.tables[group].nonzero()[0].tolist()
            assert together.held(group) == alone.held(group)


def test_what_is_spare_is_what_is_not_expected_to_be_taken():
    books = manager(blocks=41)
    assert books.spare == 40
    blocks = books.open(None, NOTHING, max_tokens=96, expected_tokens=48)
    assert books.spare == 40 - 12
    for start in range(0, 56, 8):
        assert books.extend(blocks, start, start + 8)
    assert books.spare == 40 - 14, "it has grown longer than expected"


def test_room_counts_what_those_that_run_are_expected_to_take():
    books = manager(blocks=41)
    assert books.room_for(None, NOTHING, tokens=10, expected_tokens=80)[G] == 20
    blocks = books.open(None, NOTHING, max_tokens=200, expected_tokens=80)
    for end in (8, 16, 24):
        assert books.room_for(None, NOTHING, tokens=10, expected_tokens=80)[G] == 0
        assert books.extend(blocks, end - 8, end)
    assert books.room_for(None, NOTHING, tokens=10, expected_tokens=84)[G] == -1


# Prefixes


def test_a_prefix_is_found_again_and_shared():
    books = manager(blocks=80)
    first = run(books, range(60))
    again = books.match(names(range(60)), 14)
    assert again == PrefixMatch(resume=0, known=14), "a window is kept at resume points only, and there is none yet"
    books.close(first)
    longer = names([*range(60), *range(500, 530)])
    assert books.match(longer, 22) == PrefixMatch(resume=15, known=15), "the end of what a sequence computed is one"
    used = books.pools[G].active
    second = run(books, [*range(60), *range(500, 530)])
    assert books.pools[G].active - used == 23
    assert second.full == 22
    third = run(books, [*range(60), *range(700, 720)])
    assert third.tables[G][:15].tolist() == second.tables[G][:15].tolist()
    assert third.tables[L][14] == second.tables[L][14] != 0 or second.first[L] > 14
    for blocks in (second, third):
        books.close(blocks)
    books.check_integrity()


def test_the_end_of_a_prompt_is_a_resume_point_while_its_answer_grows():
    books = manager(blocks=80)
    chain = names(range(100))
    blocks = books.open(chain, NOTHING, max_tokens=100, expected_tokens=100)
    books.keep_window(blocks, (41 - 1) // 4)
    for start, end in ((0, 41), *((n, n + 1) for n in range(41, 99))):
        assert books.extend(blocks, start, end)
        books.note(blocks, end)
    assert blocks.first[L] > 10, "the sequence itself has left that window behind"
    assert books.match(names(range(41)), 10) == PrefixMatch(resume=10, known=10)
    books.check_integrity()


def test_a_place_where_sequences_part_becomes_a_resume_point():
    books = manager(blocks=200)
    system = list(range(50))
    for question, resume in ((100, 0), (200, 0), (300, 12), (400, 12)):
        tokens = [*system, *range(question, question + 37)]
        match = books.match(names(tokens), 21)
        assert match.resume == resume
        assert match.known == (0 if question == 100 else 12)
        books.close(run(books, tokens))


def test_another_token_picture_or_tenant_is_another_block():
    seen = set()
    for tokens, images, salt in (
        (range(8), (), ""),
        (range(1, 9), (), ""),
        (range(8), (), "tenant"),
        (range(8), (Image(2, 6),), ""),
        (range(8), (Image(3, 7),), ""),
        (range(8), (Image(2, 6, b"other"),), ""),
        (range(8), (Image(2, 4), Image(4, 6)), ""),
    ):
        chain = names(tokens, images, salt)
        seen |= {chain.first(2)[0], chain.first(2)[1], chain.whole(7)}
    assert len(seen) == 7 * 3
    assert names(range(8)).first(2) == names(range(8)).first(2)
    assert NameScheme(4, b"weights").root("") != NameScheme(4).root("")


@given(counts=st.lists(st.integers(0, 12), min_size=1, max_size=5), start=st.integers(0, 40), length=st.integers(1, 20))
def test_a_name_does_not_depend_on_how_many_are_asked_for_at_once(counts, start, length):
    images = (Image(start, start + length),)
    chain = names(range(51), images)
    for count in counts:
        assert len(chain.first(count)) >= count
    assert chain.whole(50) == names(range(51), images).whole(50)
    assert [*chain.first(12)] == [names(range(4 * n), images).first(n)[-1] for n in range(1, 13)]


def test_a_name_covers_a_picture_that_ends_after_the_block():
    ends = [names(range(12), (Image(2, 10, digest),)).first(1)[0] for digest in (b"a", b"b")]
    assert ends[0] != ends[1]


def test_nobody_goes_on_in_the_middle_of_a_picture():
    books = manager(blocks=80)
    tokens, images = list(range(60)), (Image(18, 34),)
    chain = names(tokens, images)
    assert [chain.resumable(n) for n in (4, 5, 8, 9)] == [4, 4, 4, 9]
    blocks = books.open(chain, NOTHING, max_tokens=60, expected_tokens=60)
    books.keep_window(blocks, 6)
    for start, end in ((0, 18), (18, 34), (34, 42), (42, 50)):
        assert books.extend(blocks, start, end)
        books.note(blocks, end)
    assert books.match(names(range(26), images), 6).resume == 4
    books.check_integrity()


def test_without_a_local_group_every_block_is_a_resume_point():
    books = BlockManager(layout(groups=(G,)), {G: 40}, max_chunk=8)
    blocks = run(books, range(60))
    assert books.match(names(range(60)), 14) == PrefixMatch(14, 14)
    books.close(blocks)


def test_the_least_recently_used_and_deepest_blocks_are_recycled_first():
    books = manager(blocks=31)
    for start in (0, 1000):
        books.close(run(books, range(start, start + 48)))
    books.close(run(books, range(50)))
    blocks = run(books, range(2000, 2040))
    assert books.pools[G].recycled == 4
    assert books.match(names(range(48)), 12).known == 12
    assert books.match(names(range(1000, 1048)), 12).known == 8
    books.close(blocks)


def test_a_window_in_use_outlives_the_recycling_of_those_that_are_not():
    books = manager(blocks=200)
    books.close(run(books, range(40)))
    busy = run(books, range(42))
    assert busy.stop == 11
    for start in range(1000, 9000, 100):
        books.close(run(books, range(start, start + 90)))
        books.check_integrity()
    assert books.match(names(range(41)), 10).resume == 10
    books.close(busy)


def test_a_fork_shares_full_blocks_and_copies_the_last():
    books = manager(blocks=80)
    first = run(books, range(30))
    second = books.fork(first, names(range(30)), computed=30, max_tokens=50, expected_tokens=40)
    assert second is not None
    assert {(c.group, c.source, c.target) for c in books.take_transfers()} == {
        (g, int(first.tables[g][7]), int(second.tables[g][7])) for g in (G, L)
    }
    assert second.tables[G][:7].tolist() == first.tables[G][:7].tolist()
    assert second.tables[G][7] != first.tables[G][7]
    assert books.extend(second, 30, 31)
    assert second.stop == 8
    books.check_integrity()
    books.close(first)
    books.check_integrity()
    books.close(second)
    assert books.pools[G].active == 0


def test_a_fork_at_a_blocks_end_copies_nothing():
    books = manager(blocks=80)
    first = run(books, range(32))
    assert books.fork(first, None, computed=32, max_tokens=50, expected_tokens=40) is not None
    assert books.take_transfers() == []
    books.check_integrity()


def tiered(host: int, blocks: int = 31) -> BlockManager:
    return BlockManager(layout(), {L: 12, G: blocks}, max_chunk=8, lower=LowerTiers(HostTier({L: host, G: host}, LRU)))


def test_what_the_device_gives_up_is_found_in_host_memory_and_loaded():
    books = tiered(host=60)
    books.close(run(books, range(48)))
    books.take_transfers()
    books.close(run(books, range(1000, 1120)))
    spilled = [t for t in books.take_transfers() if t.route is Route.DEVICE_TO_HOST]
    assert len([t for t in spilled if t.group is G]) == 12
    assert books.match(names(range(50)), 12) == PrefixMatch(12, 12)
    again = run(books, range(50))
    loaded = [t for t in books.take_transfers() if t.route is Route.HOST_TO_DEVICE]
    assert len([t for t in loaded if t.group is G]) == 12
    assert [t for t in loaded if t.group is L]
    assert {(t.group, t.source) for t in loaded} <= {(t.group, t.target) for t in spilled}
    books.close(again)
    books.check_integrity()


def test_a_full_host_tier_lets_go_of_what_was_spilled_first():
    books = tiered(host=20)
    for start in range(0, 10_000, 1000):
        books.close(run(books, range(start, start + 110)))
        books.check_integrity()
    assert books.lower is not None
    assert books.lower.host.used(G) == 20
    assert books.lower.host.counts(G).evicted > 50
    assert books.match(names(range(110)), 27).known == 0


def test_a_window_that_is_given_up_while_a_longer_sequence_uses_its_end_is_found_whole_in_host_memory():
    books = tiered(host=200, blocks=201)
    prompt = [*range(48), 1]
    books.close(run(books, prompt))
    longer = run(books, [*range(48), *range(500, 560)])
    assert books.match(names(prompt), 12) == PrefixMatch(12, 12)
    spilled = [t.source for t in books.take_transfers() if t.route is Route.DEVICE_TO_HOST and t.group is L]
    assert len(spilled) == 6, "the blocks that a token after the prompt sees"
    books.close(longer)
    while any(pool.cached for pool in books.pools.values()):
        books.give_up(64)
        books.check_integrity()
    assert books.match(names(prompt), 12) == PrefixMatch(12, 12)
    again = run(books, prompt)
    assert again.full == 12


def test_windows_that_overlap_are_one_copy_of_what_they_share_and_outlive_each_other():
    books = manager(blocks=80)
    books.close(run(books, range(60)))  # Its window is that of blocks 9 to 14.
    alone = books.pools[L].cached
    second = [*range(50), *range(500, 530)]
    books.close(run(books, second))  # Computes blocks 9 to 11 anew, and keeps the window of 6 to 11: they part there.
    kept = books.pools[L].cached
    assert kept == alone + 3 + 6, "blocks 6 to 8, and those at the end of its own"
    books.pools[L].give_up(1)
    books.check_integrity()
    assert books.match(names(range(60)), 14).resume == 12, "the window of the first is gone"
    assert books.match(names(second), 12) == PrefixMatch(12, 12)


def test_a_host_tier_is_forgotten_with_the_rest():
    books = tiered(host=60)
    for start in (0, 1000, 2000):
        books.close(run(books, range(start, start + 110)))
    books.forget_all()
    books.check_integrity()
    assert books.lower is not None
    assert books.lower.host.used(G) == books.lower.host.used(L) == 0


class ByList(LRU):
    """Gives up what is on a list first."""

    listed: tuple[bytes, ...] = ()

    def evict(self):
        name = next((name for name in self.listed if name in self._queue), None)
        if name is None:
            return super().evict()
        self.use(name)
        return name


def test_the_device_gives_up_first_what_its_policy_has_set_aside_when_there_was_time():
    books = BlockManager(layout(), {L: 200, G: 25}, max_chunk=8, policy=ByList)
    for start in (0, 1000):
        books.close(run(books, range(start, start + 48)))
    books.pools[G].victims._policy.listed = tuple(reversed(names(range(1000, 1048)).first(12)))
    books.tend(1.0)

    def known():
        return [books.match(names(range(start, start + 48)), 12).known for start in (0, 1000)]

    first = run(books, range(2000, 2016))
    assert known() == [12, 8], "the later of the two, from its end"
    second = run(books, range(3000, 3008))
    assert known() == [10, 8], "what was not set aside is the longest unused"
    books.tend(2.0)
    third = run(books, range(4000, 4016))
    assert known() == [10, 4]
    for blocks in (first, second, third):
        books.close(blocks)


def test_a_policy_orders_windows_as_a_whole():
    books = BlockManager(layout(window=16), {L: 17, G: 400}, max_chunk=8, policy=ByList)
    for start in range(0, 4000, 1000):
        books.close(run(books, range(start, start + 16)))
    books.pools[L].victims._policy.listed = tuple(names(range(2000, 2016)).first(4))
    books.tend(1.0)
    assert len(books.pools[L].victims._aside) == 1, "one window has the four blocks that a step may take"
    blocks = run(books, range(5000, 5008))
    kept = [start for start in range(0, 4000, 1000) if books.match(names(range(start, start + 17)), 4).resume == 4]
    assert kept == [0, 1000, 3000]
    books.close(blocks)


def test_what_is_set_aside_can_be_used_again_and_is_no_victim_then():
    books = BlockManager(layout(), {L: 40, G: 31}, max_chunk=60, policy=LRU)
    books.close(run(books, range(48)))
    books.close(run(books, range(1000, 1048)))
    books.tend(1.0)
    again = run(books, range(49))
    books.check_integrity()
    assert again.full == 12
    books.close(run(books, range(2000, 2040)))
    assert books.match(names(range(48)), 12).known == 12
    books.close(again)


def test_nothing_is_set_aside_any_more_when_all_is_forgotten():
    books = BlockManager(layout(), {L: 40, G: 31}, max_chunk=60, policy=LRU)
    books.close(run(books, range(48)))
    books.close(run(books, range(1000, 1048)))
    books.tend(1.0)
    books.forget_all()
    books.check_integrity()
    books.close(run(books, range(100)))
    books.tend(2.0)
    books.check_integrity()


class Told(LRU):
    """Notes how much it is told at once."""

    def add(self, key):
        self.calls = getattr(self, "calls", 0) + 1
        super().add(key)


def test_a_policy_is_told_in_portions_and_catches_up_with_any_load():
    policy = Told(10_000)
    victims: Victims[int] = Victims(policy)
    for turn in range(300):
        victims.add([b"%d %d" % (turn, n) for n in range(1000)], range(1000))
        victims.tend(float(turn), 5)
        assert victims._waiting < 8 * 2000, "of 2,000 names a turn an eighth of what waits is told"
        assert policy.calls <= 1000 * (turn + 1)
        assert len(victims.take(990)) == 990
        victims.check_integrity()
    for turn in range(40):
        victims.tend(300.0 + turn, 5)
    assert len(policy) == len(victims) - 5 == 300 * 10 - 5


def test_the_check_finds_a_lost_block_and_one_that_has_a_wrong_user():
    books = manager()
    blocks = run(books, range(16))
    lost = int(blocks.tables[G][1])
    blocks.tables[G][1] = blocks.tables[G][0]
    with pytest.raises(BlockAccountingError, match="users"):
        books.check_integrity()
    blocks.tables[G][1] = lost
    books.check_integrity()
    books.pools[G]._free.pop()
    with pytest.raises(BlockAccountingError, match="partition"):
        books.check_integrity()


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
            blocks = [pool.find(chain[n]) for n in books._span(group, match.resume)]
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
