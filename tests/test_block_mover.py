"""What an engine that ends leaves on the disk: everything it had cached, each block as it was."""

import dataclasses
import time

import pytest
import torch

from wicore_backend.engine.tiers import BlockMover, ColdStorage
from wicore_backend.hmt.blocks import BlockManager
from wicore_backend.hmt.host_tier import HostTier, SlotBlock
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.lower_tiers import LowerTiers
from wicore_backend.hmt.names import BlockNames, NameScheme
from wicore_backend.hmt.policy.lru import LRU
from wicore_backend.hmt.pool import KVPools

G, L = LayerGroup.GLOBAL, LayerGroup.LOCAL
LAYOUT = KVLayout.of([L, G], block_size=4, kv_heads=1, head_dim=64, window=8, bytes_per_value=4)


class World:
    """Three tiers, whose blocks are filled with a number that tells what they should hold."""

    def __init__(self, directory, *, device: int, host: int, host_local: int | None = None) -> None:
        count = {G: device + 1, L: device + 1}
        slots = {G: host, L: host if host_local is None else host_local}
        self.pools = KVPools.allocate(LAYOUT, count, slots, device=torch.device("cpu"), dtype=torch.float32)
        self.cold = ColdStorage(
            directory,
            capacity_bytes=20_000_000,
            codec="exact",
            layout=LAYOUT,
            pools=self.pools,
            policy=LRU,
            fingerprint=b"a model",
            woken=lambda: None,
        )
        self.lower = LowerTiers(HostTier(slots, LRU), self.cold.tier)
        self.books = BlockManager(LAYOUT, count, max_chunk=16, lower=self.lower)
        self.mover = BlockMover(self.books, self.pools, self.cold)

    def compute(self, first: int, tokens: int):
        """An open sequence of tokens `first` and on; its block n holds `first` + n."""
        names = BlockNames(NameScheme(4), list(range(first, first + tokens)), (), "")
        blocks = self.books.open(
            names, self.books.match(names, tokens // 4), max_tokens=tokens + 8, expected_tokens=tokens
        )
        for start in range(0, tokens, 16):
            end = min(tokens, start + 16)
            assert self.books.extend(blocks, start, end)
            self.mover.move()
            for group in (G, L):
                for n in range(start // 4, -(-end // 4)):
                    self.pools.tensors[group][int(blocks.tables[group][n])] = float(first + n)
            self.books.note(blocks, end)
        return names, blocks

    def stored(self, known: dict[int, BlockNames]) -> list[bool]:
        """For each block that the disk holds, whether it is right."""
        right = []
        for first, names in known.items():
            for n, name in enumerate(names.first(0)):
                for group in (G, L):
                    if self.cold.tier.holds(group, name):
                        restore = self.cold.tier.restore([SlotBlock(group, name, 0)])
                        while not restore.done:
                            self.cold.tier.finished()
                            time.sleep(0.0005)
                        right.append(bool((self.pools.host[group][0] == float(first + n)).all()))
        return right


def test_blocks_that_were_given_up_a_moment_before_the_end_are_stored_as_they_were(tmp_path):
    world, known = World(tmp_path, device=24, host=100), {}
    for first in range(0, 4000, 1000):
        known[first], blocks = world.compute(first, 24)
        world.books.close(blocks)
    names, blocks = world.compute(9000, 18)
    forks = [
        world.books.fork(blocks, names, computed=18, max_tokens=40, expected_tokens=30) for _ in range(8)
    ]  # Each takes a block, for which another one's content has to go, and no step comes after them.
    for fork in forks:
        if fork is not None:
            world.books.close(fork)
    world.books.close(blocks)
    world.mover.close(persist_s=4.0)
    world = World(tmp_path, device=24, host=100)
    right = world.stored(known)
    world.cold.close()
    assert len(right) > 20
    assert all(right)


@pytest.mark.parametrize("host", [60, 1000])
def test_all_that_is_cached_is_stored_however_little_the_disk_takes_at_a_time(tmp_path, host):
    world, known = World(tmp_path, device=40, host=host), {}
    backlog = 20 * LAYOUT.block_bytes(G)
    world.cold.tier._limits = dataclasses.replace(world.cold.tier._limits, backlog_bytes=backlog)
    for first in range(0, 20_000 if host == 1000 else 2000, 1000):
        known[first], blocks = world.compute(first, 40)
        world.books.close(blocks)
    cached = sum(world.lower.host.used(group) + world.books.pools[group].cached for group in (G, L))
    world.mover.close(persist_s=20.0)
    world = World(tmp_path, device=40, host=host)
    right = world.stored(known)
    world.cold.close()
    assert len(right) >= cached
    assert all(right)


def test_few_slots_for_windows_do_not_hold_up_all_other_blocks(tmp_path, monkeypatch):
    world = World(tmp_path, device=60, host=100, host_local=4)
    names, blocks = world.compute(0, 200)
    world.books.close(blocks)
    assert world.books.pools[G].cached == 50
    moves, move = [], world.mover.move
    monkeypatch.setattr(world.mover, "move", lambda: moves.append(move()))
    world.mover.close(persist_s=10.0)
    assert len(moves) <= 6, "each time it waits for the disk"
    world = World(tmp_path, device=60, host=100, host_local=4)
    right = world.stored({0: names})
    world.cold.close()
    assert len(right) >= 50
    assert all(right)


def test_a_prompt_as_large_as_host_memory_comes_back_without_the_disk(tmp_path):
    world = World(tmp_path, device=24, host=24)
    names, blocks = world.compute(0, 96)
    world.books.close(blocks)
    world.books.give_up(24)
    world.mover.move()
    while world.cold.tier.busy:
        world.lower.collect()
        time.sleep(0.0005)
    assert any(world.cold.tier.holds(G, name) for name in names.first(24)), "host memory was above its threshold"
    world.books.check_integrity()
    match = world.books.match(names, 24)
    assert match.resume == 24
    assert not world.books.restorable(names, 24, match)[1]
    for pool in world.pools.tensors.values():
        pool.fill_(-1.0)
    again = world.books.open(names, match, max_tokens=100, expected_tokens=100)
    world.mover.move()
    for n, block in enumerate(again.tables[G][:24].tolist()):
        assert bool((world.pools.tensors[G][block] == float(n)).all())
    world.books.close(again)
    world.books.check_integrity()
    world.cold.close()
