"""Windows of the local group that overlap: a block is kept until the last of its windows goes, and told of once."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wicore_backend.hmt.block_pool import BlockAccountingError
from wicore_backend.hmt.policy.lru import LRU
from wicore_backend.hmt.window_pool import WindowPool


def name(number: int) -> bytes:
    return b"block %d" % number


def kept(pool: WindowPool, numbers: range) -> list[int]:
    """Which of the blocks can be found."""
    return [number for number in numbers if pool.find(name(number)) is not None]


class World:
    """A pool, and one long sequence, of which windows of four blocks are kept; block n of it is physical n + 1."""

    def __init__(self, length: int = 12, policy: LRU | None = None) -> None:
        self.given_up: list[tuple[bytes, int]] = []
        self.pool = WindowPool(length + 1, lambda *block: self.given_up.append(block), policy)
        self.length = length
        self.blocks = sorted(self.pool.take(length))

    def keep(self, end: int) -> None:
        """Keep the window that ends with block `end` - 1, as whoever computed it does, or somebody after him."""
        span = range(end - 4, end)
        self.pool.keep([name(n) for n in span], [self.blocks[n] for n in span])

    def check(self, in_use: bool = False) -> None:
        self.pool.check_integrity(self.blocks if in_use else [])


def test_a_window_that_goes_leaves_those_kept_before_and_after_it_whole():
    world = World()
    for end in (4, 5, 8):
        world.keep(end)
    world.pool.release(world.blocks)
    world.keep(4)  # Used once more: the two that were kept after it have been unused longer now.
    assert world.pool.give_up(1) == 4, "the second has no block of its own, the third has"
    world.check()
    assert kept(world.pool, range(12)) == [0, 1, 2, 3]
    assert sorted(world.given_up) == [(name(n), n + 1) for n in (4, 5, 6, 7)]
    assert world.pool.give_up(1) == 4
    world.check()
    assert kept(world.pool, range(12)) == []
    assert sorted(world.given_up) == [(name(n), n + 1) for n in range(8)], "each is told of once"


def test_a_block_that_is_given_up_in_use_is_told_at_once_and_free_when_its_user_lets_go():
    world = World()
    world.keep(4)
    world.pool.release(world.blocks[:2])
    assert world.pool.give_up(1) == 2
    assert sorted(world.given_up) == [(name(n), n + 1) for n in range(4)]
    world.pool.check_integrity(world.blocks[2:])
    before = world.pool.available
    world.pool.release(world.blocks[2:])
    assert world.pool.available == before + 10
    world.check()


class Whim(LRU):
    """Gives up anything."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.random = Random(0)

    def evict(self):
        victim = self.random.choice(list(self._queue))
        self.use(victim)
        return victim


class Newest(LRU):
    """Gives up what came last."""

    def evict(self):
        return self._queue.popitem()[0]


@pytest.mark.parametrize(("lacking", "windows"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_whole_windows_are_set_aside_for_what_free_blocks_lack(lacking, windows):
    world = World(policy=Newest(12))
    for end in (4, 8, 12):
        world.keep(end)
    world.pool.release(world.blocks[8:])
    world.pool.release(world.blocks[:8])
    world.pool.tend(1.0, lacking)
    world.pool.give_up(4 * max(1, windows))
    gone = {0: range(8, 12), 1: range(4, 8), 2: range(8)}[windows]  # Unused longest, or what the policy said.
    assert kept(world.pool, range(12)) == [n for n in range(12) if n not in gone]
    world.check()


@settings(max_examples=150, deadline=None)
@given(
    ends=st.lists(st.integers(4, 12), min_size=1, max_size=7),
    steps=st.lists(st.tuples(st.sampled_from(["again", "give up", "tend", "use", "release"]), st.integers(0, 11))),
    policy=st.booleans(),
)
def test_in_whatever_order_windows_go_the_others_are_whole_and_each_block_is_told_once(ends, steps, policy):
    world = World(policy=Whim(12) if policy else None)
    pool = world.pool
    for end in ends:
        world.keep(end)
    every = set(kept(pool, range(12)))
    pool.release(world.blocks)
    users: Counter[int] = Counter()
    for step, number in steps:
        block = pool.find(name(number))
        match step:
            case "again" if name(number) in pool.victims:
                world.keep(number + 1)
            case "give up" if pool.cached:
                assert pool.give_up(1) >= 1
            case "tend":
                pool.tend(float(number), number)
            case "use" if block is not None:
                pool.use(block)
                users[block] += 1
            case "release" if users[world.blocks[number]]:
                pool.release([world.blocks[number]])
                users[world.blocks[number]] -= 1
        pool.check_integrity(users.elements())
        found, told = (
            set(kept(pool, range(12))),
            [n for n in range(12) for told, _ in world.given_up if told == name(n)],
        )
        assert len(told) == len(set(told))
        assert found | set(told) == every
        assert not found & set(told)
        whole = [range(end - 4, end) for end in ends if found.issuperset(range(end - 4, end))]
        assert found == {n for window in whole for n in window}


def test_the_check_finds_a_window_that_is_held_by_blocks_it_does_not_have():
    world = World()
    world.keep(4)
    world.keep(5)
    world.check(in_use=True)
    held = world.pool._holders[2]
    world.pool._holders[2] = held[:1]
    with pytest.raises(BlockAccountingError, match="windows are not those"):
        world.check(in_use=True)
