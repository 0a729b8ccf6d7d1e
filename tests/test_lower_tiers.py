"""What moves between host memory and the cold tier, by the books: what stays, what leaves, what is cancelled."""

from typing import Any

import pytest

from tests.fake_cold_tier import FakeColdTier
from wicore_backend.hmt.host_tier import HostTier, Key
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.lower_tiers import LowerTiers
from wicore_backend.hmt.policy.lru import LRU

G = LayerGroup.GLOBAL
SLOTS = 10


def keys(*numbers: int) -> list[Key]:
    return [(G, b"block %d" % number) for number in numbers]


class World:
    """Ten slots of host memory, and a disk that has blocks 0 to 19."""

    def __init__(self) -> None:
        self.slots: dict[LayerGroup, list[Any]] = {G: [None] * SLOTS}
        self.disk = FakeColdTier(self.slots, capacity=100, backlog=100)
        self.disk.records |= {key: key for key in keys(*range(20))}
        self.host = HostTier({G: SLOTS}, LRU)
        self.lower = LowerTiers(self.host, self.disk)

    def step(self, moved: int = 0) -> None:
        """The disk ends so much of what is under way, and the books hand over what is next."""
        self.disk.move(moved)
        self.lower.collect()
        self.lower.submit(None)
        self.lower.check_integrity()

    def spill(self, *numbers: int) -> list[bool]:
        """The device gives blocks up; for each whether it has to be copied."""
        copied = []
        for key in keys(*numbers):
            slot = self.host.spill(*key)
            copied.append(slot is not None)
            if slot is not None:
                self.slots[G][slot] = key
        return copied

    @property
    def held(self) -> list[int]:
        """Of blocks 0 to 199, those that are found in host memory, each of which is what it was."""
        slots = self.host._shelves[G].slots
        assert all(self.slots[G][slot] == (G, name) for name, slot in slots.items())
        return [n for n, key in enumerate(keys(*range(200))) if self.host.holds(*key)]

    @property
    def under_way(self) -> dict[bytes, bool]:
        """Blocks on their way up, and whether they have been cancelled."""
        return {block.name: call.cancelled for block, call in self.disk._under_way if call is not None}


def test_restores_beside_each_other_take_half_of_the_slots_and_one_alone_takes_all():
    world = World()
    first = world.lower.restore(keys(0, 1))
    assert first is not None
    assert world.lower.restore(keys(2, 3, 4, 5)) is None, "that would be six of ten"
    second = world.lower.restore(keys(2, 3, 4))
    assert second is not None, "five are half"
    assert world.lower.restore(keys(0, 4)) is not None, "these come anyhow"
    alone = World().lower
    assert alone.restore(keys(*range(SLOTS + 1))) is None
    assert alone.restore(keys(*range(SLOTS))) is not None


def test_as_many_blocks_leave_as_a_restore_lacks_slots():
    world = World()
    for key in keys(*range(100, 100 + SLOTS)):
        world.host.spill(*key)
    restore = world.lower.restore(keys(0, 1, 2, 3))
    assert restore is not None
    world.step()
    leaving = [block.name for block, call in world.disk._under_way if call is None]
    assert leaving == [name for _, name in keys(100, 101, 102, 103)]
    assert not world.under_way, "there is no free slot yet"
    world.step(moved=3)
    assert list(world.under_way) == [name for _, name in keys(0, 1, 2)], "as slots get free"
    world.step(moved=1)
    world.step(moved=4)
    assert restore.done
    assert restore.pinned == set(keys(0, 1, 2, 3))


def test_what_nobody_waits_for_any_more_is_cancelled_and_what_another_wants_is_not():
    world = World()
    one, two = world.lower.restore(keys(0, 1)), world.lower.restore(keys(1, 2))
    assert one is not None
    assert two is not None
    world.step()
    assert world.under_way == dict.fromkeys([name for _, name in keys(0, 1, 2)], False)
    world.lower.end(one)
    assert not any(world.under_way.values()), "block 1 is in the same call, and wanted"
    world.lower.end(two)
    assert all(world.under_way.values())
    world.step(moved=3)
    assert not world.lower.restoring
    assert world.host.used(G) == 0
    assert world.host.free(G) == SLOTS


@pytest.mark.parametrize("when", ["before it is asked for", "on its way", "when it has come"])
def test_a_restore_that_ends_leaves_nothing_pinned_whenever_it_does(when):
    world = World()
    restore = world.lower.restore(keys(0, 1))
    assert restore is not None
    if when != "before it is asked for":
        world.step()
    if when == "when it has come":
        world.step(moved=2)
        assert restore.done
        assert restore.fetched == set(keys(0, 1))
    world.lower.end(restore)
    world.lower.end(restore)
    world.step(moved=2)
    world.step()
    assert not world.lower.restoring
    assert not world.host.pins()
    assert world.host.used(G) == (2 if when == "when it has come" else 0)


def test_what_has_been_stored_is_found_in_host_memory_until_its_slot_is_needed():
    world = World()
    world.spill(*range(100, 110))
    world.step()
    assert [block.key for block, _ in world.disk._under_way] == keys(100), "above nine tenths"
    world.step(moved=1)
    assert world.held == list(range(100, 110))
    assert world.host.used(G) == 9
    assert world.host.free(G) == 1
    assert world.host.counts(G).evicted == 0
    assert world.spill(110) == [True]
    world.lower.check_integrity()
    assert world.held == list(range(101, 111))
    assert world.host.counts(G).evicted == 1
    assert world.disk.holds(*keys(100)[0])


def test_of_what_has_been_stored_the_first_gives_its_slot_first_before_anything_is_lost():
    world = World()
    world.spill(*range(100, 110))
    world.lower.spill_all(None)
    world.step(moved=10)
    assert world.host.used(G) == 0
    world.spill(*range(110, 114))
    assert world.held == list(range(104, 114))
    world.spill(*range(114, 120))
    assert world.held == list(range(110, 120))
    world.lower.check_integrity()


def test_a_stored_block_that_is_used_again_stays_before_those_that_are_not():
    world = World()
    world.spill(*range(100, 110))
    world.lower.spill_all(None)
    world.step(moved=10)
    restore = world.lower.restore(keys(100, 101))
    assert restore is not None
    assert restore.done, "they are there"
    world.lower.check_integrity()
    world.lower.end(restore)
    assert world.spill(102) == [False], "it is there, and needs no copying"
    world.lower.check_integrity()
    world.spill(*range(110, 117))
    assert world.held == [100, 101, 102, *range(110, 117)]


def test_a_restore_takes_the_slots_of_what_has_been_stored_and_waits_for_nothing_that_leaves():
    world = World()
    world.spill(*range(100, 110))
    world.lower.spill_all(None)
    world.step(moved=10)
    restore = world.lower.restore(keys(0, 1, 2, 3))
    assert restore is not None
    world.step()
    assert len(world.under_way) == 4
    world.step(moved=4)
    assert restore.done
    assert world.held == [0, 1, 2, 3, *range(104, 110)]


def test_a_block_that_could_not_be_stored_gives_its_slot_at_once():
    world = World()
    world.spill(100, 101)
    world.lower.spill_all(None)
    world.disk.move(2, failing=True)
    world.lower.collect()
    world.lower.check_integrity()
    assert world.held == []
    assert world.host.free(G) == SLOTS


def test_what_has_been_stored_is_forgotten_with_all_the_rest():
    world = World()
    world.spill(*range(100, 104))
    world.lower.spill_all(None)
    world.step(moved=4)
    world.spill(105)
    world.lower.forget_all()
    world.lower.check_integrity()
    assert world.held == []
    assert world.host.free(G) == SLOTS
