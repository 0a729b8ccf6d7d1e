"""Sequences whose prefix is on the disk: who waits for it, for how long, and that nothing is lost or held for it."""

import pytest

from tests.fake_cold_tier import FakeColdTier
from tests.scheduler_bench import Bench, sequence
from wicore_backend.engine.request import Deadlines
from wicore_backend.hmt.host_tier import HostTier
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.lower_tiers import LowerTiers
from wicore_backend.hmt.policy import POLICIES, Access
from wicore_backend.hmt.policy.lru import LRU

G, L = LayerGroup.GLOBAL, LayerGroup.LOCAL


class ColdBench(Bench):
    """A scheduler over three tiers, whose disk moves when told to."""

    def __init__(self, *, host: int = 100, burst: int = 0, host_policy=LRU, **options) -> None:
        self.disk = FakeColdTier({g: [None] * host for g in (L, G)}, capacity=100_000, backlog=100_000)
        self.lower = LowerTiers(HostTier({L: host, G: host}, host_policy), self.disk, burst=burst)
        super().__init__(lower=self.lower, **options)

    def store(self, *sequences) -> None:
        """Have all that the sequences can start from on the disk."""
        for s in sequences:
            count = (len(s.tokens) - 1) // 4
            self.disk.records |= {(group, name): name for name in s.names.first(count)[:count] for group in (L, G)}

    def step(self):
        done = super().step()
        self.books.take_transfers()
        self.lower.submit(None)
        return done

    def run(self, limit: int = 3000) -> int:
        for n in range(limit):
            if not self.scheduler.has_work:
                return n
            self.step()
            self.disk.move(10_000)
        raise AssertionError("it does not end")


def test_a_sequence_starts_where_the_disk_ends():
    b, a = ColdBench(), sequence(41)
    b.store(a)
    b.add(a)
    assert b.step() == []
    b.disk.move(100)
    assert b.step() == [(a, 40, 41)]
    assert a.cached_tokens == b.counts.restored_tokens == 40


@pytest.mark.parametrize("ends", [False, True], ids=["comes", "ends_while_it_waits"])
def test_how_long_a_sequence_waited_for_the_disk_is_known(ends):
    b, a = ColdBench(), sequence(41)
    b.store(a)
    b.add(a)
    b.step()
    began = a.restore_began
    assert a.restore_seconds(began + 2.5) == 2.5, "it waits still"
    if ends:
        b.scheduler.remove(a)
        assert a.restore_seconds(began + 3.0) == 3.0
        return
    b.disk.move(100)
    b.now = began + 0.25
    b.step()
    assert a.restore_seconds(began + 100.0) == 0.25, "it waits no more"


def test_hits_are_counted_by_the_tier_that_has_them():
    b, a = ColdBench(), sequence(41)
    names = a.names.first(10)
    b.store(a)
    for block in b.lower.host.reserve(G, names[:3]):  # These are in host memory already.
        b.lower.host.arrived(*block.key, there=True)
    b.add(a)
    b.step()
    b.disk.move(100)
    b.step()
    counts = b.counts
    assert (counts.prefix_hit_tokens, counts.host_hit_tokens, counts.nvme_hit_tokens) == (40, 12, 28)
    b.run()
    again = sequence(41)
    b.add(again)
    b.step()
    assert (counts.prefix_hit_tokens, counts.host_hit_tokens, counts.nvme_hit_tokens) == (80, 12, 28), "on the device"


def test_who_finds_no_room_in_host_memory_computes_and_is_counted():
    b, a = ColdBench(host=5), sequence(41)
    b.store(a)
    b.add(a)
    b.step()
    assert b.counts.restores_declined == b.counts.restores_without_room == 1


def test_others_run_while_one_waits_for_the_disk():
    b, a, other = ColdBench(), sequence(41), sequence(9, first=1000, arrival=0.5)
    b.store(a)
    b.add(a, other)
    assert b.step() == [(other, 0, 9)]


def test_a_disk_slower_than_computing_is_not_waited_for():
    b, a = ColdBench(running=1), sequence(41)
    b.teach(step=0.01, token=0.001)
    b.disk.seconds = 1.0
    blocker = sequence(5, answer=100, first=1000)
    b.add(blocker)
    b.step()
    b.store(a)
    b.add(a)
    for _ in range(40):
        b.step()
    assert b.counts.restores_declined == 1, "counted once, however often it is looked at"
    assert b.counts.restores_without_room == 0
    b.run()
    assert a.cached_tokens == 0


def test_a_disk_that_says_nothing_is_not_waited_for_for_ever():
    b, a = ColdBench(), sequence(41)
    b.store(a)
    b.add(a)
    for _ in range(20):
        b.step()
    assert a not in b.scheduler._lobby.restoring
    b.run()
    assert a.cached_tokens == 0


def test_a_twin_that_waited_for_the_disk_too_holds_nothing_when_it_goes_on_from_the_first():
    b, first, second = ColdBench(), sequence(41, answer=20), sequence(41, answer=20)
    b.store(first)
    b.add(first, second)
    b.step()
    assert len(b.scheduler._lobby.restoring) == 2
    b.disk.move(100)
    for _ in range(3):
        b.step()
    assert b.scheduler.num_running == 2
    assert not b.lower.host.pins()


def test_the_queue_deadline_holds_while_one_waits_for_the_disk():
    b, a = ColdBench(), sequence(41, deadlines=Deadlines(queue_s=2.0))
    b.store(a)
    b.add(a)
    b.step()
    assert a in b.scheduler._lobby.restoring
    b.now = 5.0
    ((late, _),) = b.scheduler.expire(b.now)
    b.scheduler.remove(late)
    b.disk.move(100)
    b.step()
    assert not b.scheduler.has_work
    assert not b.lower.host.pins()


def test_who_is_in_time_by_way_of_the_disk_is_not_turned_away():
    def rejected(seconds: float) -> int:
        b, a = ColdBench(), sequence(401, deadlines=Deadlines(first_token_s=1.0))
        b.teach(step=0.01, token=0.01)
        b.disk.seconds = seconds
        b.store(a)
        return len(b.add(a))

    assert rejected(0.001) == 0
    assert rejected(2.0) == 1


def test_sessions_that_come_back_in_turn_are_hardly_ever_computed_again():
    b = ColdBench(running=2, blocks=100, host=100, burst=32, budget=64)

    def ask(number: int) -> int:
        s = sequence(161, answer=1, first=1000 * number, arrival=b.now)
        b.add(s)
        b.run(200)
        b.lower.collect()
        b.lower.submit(None)
        b.disk.move(10_000)
        b.lower.collect()
        return s.cached_tokens

    assert [ask(n) for n in range(10)] == [0] * 10
    # To load 40 blocks, the device gives up more in one step than the 32 slots that are kept free: some are lost.
    assert sum(ask(n) for _ in range(3) for n in range(10)) >= 0.9 * 30 * 160


def test_restores_together_leave_room_for_others():
    b = ColdBench(host=100)
    sequences = [sequence(121, first=1000 * n) for n in range(4)]
    b.store(*sequences)
    b.add(*sequences)
    for _ in range(3):
        b.step()
        b.disk.move(100)
        assert sum(group is G for group, _ in b.lower.host.pins()) <= 50
    b.run()
    assert [s.cached_tokens for s in sequences] == [120] * 4


def test_one_who_wants_what_another_has_just_cancelled_gets_it():
    b, a, again = ColdBench(), sequence(41), sequence(41)
    b.store(a)
    b.add(a)
    b.step()
    b.scheduler.remove(a)
    b.add(again)
    b.step()
    for _ in range(3):
        b.disk.move(100)
        b.step()
    assert again.cached_tokens == 40


def test_long_prompts_are_heard_step_by_step_and_never_pile_up():
    host = HostTier({G: 10}, POLICIES["a2cr"])
    last = [number.to_bytes(16, "little") for number in range(3_000)]
    host.observe(G, Access(keys=last))
    assert host.explain(G, last[0]) is None, "that takes more than a step"
    for _ in range(12):
        host.go_on()
    assert host.explain(G, last[-1]) is not None
    for _ in range(40):
        host.observe(G, Access(keys=last))
    assert len(host._shelves[G].unheard) <= 16


@pytest.mark.parametrize("policy", ["lru", "lfu", "a2cr", "a2cr_weighted"])
def test_what_was_loaded_together_leaves_from_its_end(policy):
    b, a = ColdBench(host=40, host_policy=POLICIES[policy]), sequence(41, answer=1)
    b.store(a)
    b.add(a)
    b.run()
    names = a.names.first(10)
    assert b.lower.host.used(G) == 10
    left = [block.name for block in b.lower.host.leave(G, beyond=5, most=10)]
    assert left == names[9:4:-1][: len(left)]
    assert left
