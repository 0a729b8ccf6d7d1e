"""Block accounting: no block lost, none held twice, windows freed, reservations kept."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wicore_backend.errors import InvalidArgumentError
from wicore_backend.hmt.blocks import BlockAccountingError, BlockManager
from wicore_backend.hmt.budget import divide_memory
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.pool import KVPools

L, G = LayerGroup.LOCAL, LayerGroup.GLOBAL


def layout(window: int = 24, groups=(L, L, G), block_size: int = 4) -> KVLayout:
    return KVLayout.of(groups, block_size=block_size, kv_heads=2, head_dim=8, window=window, bytes_per_value=4)


def manager(blocks: int = 40, max_chunk: int = 8, **kwargs) -> BlockManager:
    return BlockManager(layout(**kwargs), {L: blocks, G: blocks}, max_chunk=max_chunk)


def test_a_block_holds_all_its_groups_layers():
    assert layout().block_bytes(L) == 2 * 2 * 4 * 2 * 8 * 4
    assert layout().layers == ((L, 0), (L, 1), (G, 0))


def test_local_blocks_behind_the_window_are_freed_and_global_ones_kept():
    books = manager()
    blocks = books.open(100)
    for start in range(0, 96, 8):
        books.extend(blocks, start, start + 8)
        books.check_integrity()
    assert books.pools[G].used == 24
    # The last chunk starts at 88 and sees positions 65 to 95: blocks 16 to 23.
    assert blocks.tables[L].nonzero()[0].tolist() == list(range(16, 24))
    books.close(blocks)
    assert books.pools[L].used == books.pools[G].used == 0
    assert books.fits(100)


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
        assert BlockManager(shape, blocks, max_chunk=8).fits(100)
    assert blocks == {g: 1 + 4 * shape.blocks_held(g, 100, 8) for g in (L, G)}
    with pytest.raises(InvalidArgumentError, match="kv_cache_bytes"):
        divide_memory(shape, memory_bytes=least - 1, **sizes)


def test_what_does_not_fit_is_not_opened():
    books = manager(blocks=11)
    assert books.fits(40)
    assert not books.fits(41)
    books.open(40)
    assert not books.fits(1)
    with pytest.raises(BlockAccountingError, match="reserved"):
        books.open(1)


def test_the_check_finds_a_lost_block_and_one_held_twice():
    books = manager()
    blocks = books.open(16)
    books.extend(blocks, 0, 16)
    lost = int(blocks.tables[G][1])
    blocks.tables[G][1] = blocks.tables[G][0]
    with pytest.raises(BlockAccountingError, match="partition"):
        books.check_integrity()
    blocks.tables[G][1] = lost
    books.check_integrity()


@settings(max_examples=200, deadline=None)
@given(
    window=st.integers(1, 40),
    block_size=st.integers(1, 9),
    max_chunk=st.integers(1, 20),
    steps=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 20), st.integers(1, 90)), max_size=60),
)
def test_any_interleaving_keeps_the_books(window, block_size, max_chunk, steps):
    """Open, extend by chunks, close: what a local layer can see is always in place, and reservations suffice."""
    books = manager(blocks=64, max_chunk=max_chunk, window=window, block_size=block_size)
    running: dict[int, list] = {}
    for slot, chunk, length in steps:
        if slot not in running:
            if books.fits(length):
                running[slot] = [books.open(length), 0, length]
        else:
            blocks, computed, length = running[slot]
            end = min(computed + min(chunk, max_chunk), length)
            if computed == end:
                books.close(blocks)
                del running[slot]
            else:
                books.extend(blocks, computed, end)
                running[slot][1] = end
                for position in range(max(0, computed - window + 1), end):
                    assert blocks.tables[L][position // block_size]
                for position in range(end):
                    assert blocks.tables[G][position // block_size]
        books.check_integrity()
    for blocks, _, _ in running.values():
        books.close(blocks)
    books.check_integrity()
    assert all(pool.used == 0 and pool.unreserved == pool.capacity for pool in books.pools.values())
