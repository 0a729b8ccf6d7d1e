"""What the device gives up, in which order, and where it is found again: windows, policies, the host tier."""

from tests.block_books import G, L, layout, manager, names, run, tiered
from wicore_backend.hmt.blocks import BlockManager, PrefixMatch
from wicore_backend.hmt.policy.lru import LRU
from wicore_backend.hmt.transfers import Route
from wicore_backend.hmt.victims import Victims


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


# To host memory.


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


def test_what_was_loaded_from_host_memory_leaves_it_from_its_end():
    books = tiered(host=60)
    books.close(run(books, range(48)))
    books.close(run(books, range(1000, 1120)))
    again = run(books, range(50))
    chain = names(range(48)).first(12)
    assert books.lower is not None
    leaving = [block.name for block in books.lower.host.leave(G, beyond=0, most=100)]
    assert [name for name in leaving if name in chain] == list(reversed(chain))
    books.close(again)


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


def test_a_host_tier_is_forgotten_with_the_rest():
    books = tiered(host=60)
    for start in (0, 1000, 2000):
        books.close(run(books, range(start, start + 110)))
    books.forget_all()
    books.check_integrity()
    assert books.lower is not None
    assert books.lower.host.used(G) == books.lower.host.used(L) == 0


# By a policy.


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
