"""Block accounting: no block lost or written twice, windows freed, room counted, the last block copied for a fork."""

import pytest
import torch

from tests.block_books import NOTHING, G, L, layout, manager, names, run
from wicore_backend.errors import InvalidArgumentError
from wicore_backend.hmt.blocks import BlockAccountingError, BlockManager
from wicore_backend.hmt.budget import divide_memory
from wicore_backend.hmt.pool import KVPools


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
    left = books.room_for(None, NOTHING, tokens=10, expected_tokens=80)
    assert left == {G: 40 - 20, L: 40 - 8 - 2}, "of the window, what a decode holds, and a chunk of a prompt"
    blocks = books.open(None, NOTHING, max_tokens=200, expected_tokens=80)
    for end in (8, 16, 24):
        assert books.room_for(None, NOTHING, tokens=10, expected_tokens=80)[G] == 0
        assert books.extend(blocks, end - 8, end)
    assert books.room_for(None, NOTHING, tokens=10, expected_tokens=84)[G] == -1


def test_what_others_use_already_takes_no_room_and_what_nobody_uses_does():
    books = manager(blocks=81)
    books.close(run(books, range(60)))
    other = names([*range(60), *range(500, 520)])
    match = books.match(other, 19)
    assert match.resume == 15

    def saved():
        alone = books.room_for(None, NOTHING, tokens=80, expected_tokens=80)
        shared = books.room_for(other, match, tokens=80, expected_tokens=80)
        return {group: shared[group] - alone[group] for group in (L, G)}

    assert saved() == {L: 0, G: 0}, "it would be taken from what is left"
    blocks = run(books, range(62))
    assert saved() == {L: 6, G: 15}, "the window after 15 blocks has 6"
    books.close(blocks)
    assert saved() == {L: 0, G: 0}


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
