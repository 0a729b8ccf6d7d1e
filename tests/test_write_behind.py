"""Storing what is cached while the engine is idle: it stays where it is, and no slot is given away that is read."""

import random
from typing import Any

import pytest

from tests.fake_cold_tier import FakeColdTier
from wicore_backend.hmt.blocks import BlockManager
from wicore_backend.hmt.host_tier import HostTier
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.lower_tiers import LowerTiers
from wicore_backend.hmt.names import BlockNames, NameScheme
from wicore_backend.hmt.policy import POLICIES
from wicore_backend.hmt.policy.base import Access
from wicore_backend.hmt.policy.lru import LRU
from wicore_backend.hmt.transfers import Route
from wicore_backend.hmt.write_behind import copies_down

G, L = LayerGroup.GLOBAL, LayerGroup.LOCAL


def name(number: int) -> bytes:
    return number.to_bytes(16, "little")


class Bench:
    """Host memory over a disk that moves when told to; a slot's content is the name of its block."""

    def __init__(self, slots: int = 10, *, policy=LRU, capacity: int = 100, backlog: int = 4) -> None:
        self.slots: dict[LayerGroup, list[Any]] = {G: [None] * slots}
        self.disk = FakeColdTier(self.slots, capacity=capacity, backlog=backlog)
        self.host = HostTier({G: slots}, policy)
        self.lower = LowerTiers(self.host, self.disk)

    def spill(self, number: int) -> bool:
        """The device gives a block up; whether it has a slot of host memory now."""
        slot = self.host.spill(G, name(number))
        if slot is not None:
            self.slots[G][slot] = name(number)
        return self.host.holds(G, name(number))

    def behind(self) -> int:
        """One round of writing behind; how many blocks are under way."""
        self.lower.write_behind(None)
        return len(self.disk._under_way)

    def settle(self, *, failing: bool = False) -> None:
        self.disk.move(100, failing=failing)
        self.lower.collect()
        self.check()

    def check(self) -> None:
        self.lower.check_integrity()
        assert all(key[1] == content for key, content in self.disk.records.items()), "a slot was overwritten"


def test_what_is_dearest_is_stored_first_and_stays():
    bench = Bench()
    for number in range(6):
        bench.spill(number)
    assert bench.behind() == 4
    bench.settle()
    assert set(bench.disk.records) == {(G, name(number)) for number in (2, 3, 4, 5)}
    assert all(bench.host.holds(G, name(number)) for number in range(6))
    assert bench.host.counts(G).written_behind == 4
    assert bench.behind() == 2
    bench.settle()
    assert bench.behind() == 0, "all is stored"


def test_one_batch_at_a_time():
    bench = Bench()
    for number in range(6):
        bench.spill(number)
    assert bench.behind() == bench.behind() == 4


def test_the_order_in_which_blocks_leave_is_what_it_was():
    bench = Bench(policy=LRU)
    for number in range(6):
        bench.spill(number)
    while bench.behind():
        bench.settle()
    assert [block.name for block in bench.host.leave(G, beyond=0, most=10)] == [name(number) for number in range(6)]


def test_a_block_that_must_go_while_it_is_stored_gives_its_slot_when_that_is_over():
    bench = Bench(slots=4)
    for number in range(4):
        bench.spill(number)
    assert bench.behind() == 4
    assert not bench.spill(9), "no slot is free as long as all are read"
    bench.check()
    bench.settle()
    assert bench.host.used(G) == 0
    assert len(bench.disk.records) == 4
    assert bench.spill(9)


def test_a_block_can_be_used_while_it_is_stored():
    bench = Bench()
    bench.spill(1)
    bench.behind()
    slot = bench.host.pin(G, name(1))
    assert bench.slots[G][slot] == name(1)
    bench.disk.move(10)
    bench.lower.collect()
    bench.host.unpin(G, name(1))
    bench.check()
    assert bench.host.holds(G, name(1))


def test_a_cache_that_is_forgotten_while_it_is_stored_is_gone_when_that_is_over():
    bench = Bench()
    for number in range(3):
        bench.spill(number)
    bench.behind()
    bench.lower.forget_all()
    bench.check()
    bench.settle()
    assert bench.host.used(G) == 0


def test_a_disk_that_takes_nothing_is_not_asked_again_before_the_next_prompt():
    bench = Bench()
    bench.spill(1)
    bench.behind()
    bench.settle(failing=True)
    assert bench.host.holds(G, name(1))
    assert bench.behind() == 0
    bench.lower.observe(Access(keys=[name(1)]), 1.0)
    assert bench.behind() == 1


@pytest.mark.parametrize("policy", ["lru", "s3fifo", "a2cr"])
@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_calls_keeps_the_books_and_the_bytes(policy, seed):
    draw = random.Random(seed)
    bench = Bench(slots=8, policy=POLICIES[policy], capacity=12, backlog=3)
    restores = []
    for step in range(300):
        numbers = [draw.randrange(20) for _ in range(3)]
        match draw.randrange(7):
            case 0 | 1:
                bench.lower.observe(Access(keys=[name(number) for number in dict.fromkeys(numbers)]), float(step))
                for number in numbers:
                    bench.spill(number)
            case 2:
                bench.lower.write_behind(None)
            case 3:
                bench.lower.submit(None)
            case 4:
                bench.disk.move(draw.randrange(4), failing=draw.random() < 0.2)
                bench.lower.collect()
            case 5:
                keys = [(G, name(n)) for n in dict.fromkeys(numbers) if bench.lower.reachable(G, name(n))]
                if keys and (restore := bench.lower.restore(keys)) is not None:
                    restores.append(restore)
            case 6:
                if restores:
                    bench.lower.end(restores.pop(draw.randrange(len(restores))))
                if draw.random() < 0.05:
                    bench.lower.forget_all()
        bench.check()
        for shelf_name, slot in bench.host._shelves[G].slots.items():
            assert bench.slots[G][slot] == shelf_name
    assert bench.host.counts(G).written_behind > 0


def manager(host: int) -> tuple[BlockManager, BlockNames]:
    """Books with a prompt of 40 tokens, ten blocks, in the device's cache."""
    layout = KVLayout.of((L, G), block_size=4, kv_heads=1, head_dim=8, window=16, bytes_per_value=4)
    slots = {group: [None] * host for group in (L, G)}
    lower = LowerTiers(HostTier({L: host, G: host}, LRU), FakeColdTier(slots, capacity=100, backlog=100))
    books = BlockManager(layout, {L: 41, G: 41}, max_chunk=64, lower=lower)
    names = BlockNames(NameScheme(4), list(range(40)), (), "")
    lower.observe(Access(keys=names.first(10)[:10]), 1.0)
    blocks = books.open(names, books.match(names, 9), max_tokens=40, expected_tokens=40)
    assert books.extend(blocks, 0, 40)
    books.note(blocks, 40)
    books.close(blocks)
    books.take_transfers()
    return books, names


def test_what_the_device_alone_has_is_copied_and_kept():
    books, names = manager(host=40)
    copies = copies_down(books)
    assert {copy.route for copy in copies} == {Route.DEVICE_TO_HOST}
    assert sum(copy.group is G for copy in copies) == 10
    assert sum(copy.group is L for copy in copies) == 4, "the window's end"
    assert all(books.pools[G].find(block) is not None for block in names.first(10))
    assert copies_down(books) == []
    books.check_integrity()


def test_half_of_the_free_slots_stay_free():
    books, names = manager(host=8)
    copies = [copy for copy in copies_down(books) if copy.group is G]
    assert [copy.source for copy in copies] == [books.pools[G].find(block) for block in names.first(10)[:4]]
    assert books.lower is not None
    assert books.lower.host.free(G) == 4


def test_nothing_is_copied_for_a_disk_that_takes_nothing():
    books, _ = manager(host=40)
    assert books.lower is not None
    assert isinstance(books.lower.cold, FakeColdTier)
    books.lower.cold.backlog = 0
    assert copies_down(books) == []
