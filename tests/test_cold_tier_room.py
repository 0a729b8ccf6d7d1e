"""Room on the disk and in the queue: who leaves for whom, and what is left to the caller."""

import time
from collections import Counter
from dataclasses import replace

import pytest

from tests.cold_tier_bench import GLOBAL, LIMITS, LOCAL, SHAPES, SLOTS, Bench, name, wait_for_measurement
from tests.nvme_kit import FaultyFiles
from wicore_backend.hmt.cold_tier import (
    ColdTierLimits,
)
from wicore_backend.hmt.host_tier import SlotBlock
from wicore_backend.hmt.nvme import Outcome
from wicore_backend.hmt.policy import POLICIES, Access
from wicore_backend.hmt.policy.a2cr import A2CR
from wicore_backend.hmt.policy.lru import LRU


@pytest.mark.parametrize("policy", ["lru", "arc", "s3fifo", "a2cr"])
def test_a_full_store_gives_up_what_its_policy_says_and_groups_share_the_room(tmp_path, policy):
    with Bench(tmp_path, capacity_bytes=300_000, policy=POLICIES[policy]) as bench:
        for group in SHAPES:
            bench.tier.observe(Access(keys=[(group, name(number)) for number in range(60)]))
            assert Outcome.DONE in bench.spill_numbers(group, range(60))
        statistics = bench.tier.statistics()
        evicted = sum(counts.evicted for counts in statistics.groups.values())
        done = sum(counts.spills[Outcome.DONE] for counts in statistics.groups.values())
        refused = sum(counts.spills[Outcome.REFUSED] for counts in statistics.groups.values())
        assert (refused if policy == "a2cr" else evicted) > 20  # All being alike, A2CR has no reason for an exchange.
        assert done - evicted == sum(statistics.held.values()) == len(bench.store.records())
        assert bench.store.statistics().used_bytes <= 300_000
        bench.tier.check_integrity()
        for group in SHAPES:
            held = [number for number in range(60) if bench.tier.holds(group, name(number))]
            assert set(bench.restore([SlotBlock(group, name(n), s) for s, n in enumerate(held[:SLOTS])])) <= {
                Outcome.DONE
            }


@pytest.mark.parametrize("group", [GLOBAL, LOCAL])
def test_no_more_leave_than_have_to(tmp_path, group):
    with Bench(tmp_path, capacity_bytes=200_000) as bench:
        assert set(bench.spill_numbers(group, range(80), at_once=4)) == {Outcome.DONE}
        wait_for_measurement(bench)
        full = bench.tier.statistics().held[group]
        assert 10 < full < 80
        for number in range(100, 110):
            assert bench.spill_numbers(group, [number]) == [Outcome.DONE]
            assert bench.tier.statistics().held[group] == full
        bench.tier.check_integrity()


def test_what_was_restored_lately_stays_longer(tmp_path):
    with Bench(tmp_path, capacity_bytes=200_000) as bench:
        assert set(bench.spill_numbers(GLOBAL, range(100), at_once=4)) == {Outcome.DONE}
        oldest = next(number for number in range(100) if bench.tier.holds(GLOBAL, name(number)))
        assert bench.restore([SlotBlock(GLOBAL, name(oldest), 0)]) == [Outcome.DONE]
        bench.spill_numbers(GLOBAL, range(100, 110))
        assert bench.tier.holds(GLOBAL, name(oldest))
        assert not bench.tier.holds(GLOBAL, name(oldest + 1))


def test_a_policy_can_refuse_a_block_when_the_store_is_full(tmp_path):
    class Closed(LRU):
        def admit(self, _key):
            return False

    with Bench(tmp_path, capacity_bytes=200_000, policy=Closed) as bench:
        outcomes = Counter(bench.spill_numbers(GLOBAL, range(100)))
        assert outcomes[Outcome.DONE] == bench.tier.statistics().held[GLOBAL] > 10
        assert outcomes[Outcome.REFUSED] == 100 - outcomes[Outcome.DONE]
        assert bench.tier.statistics().groups[GLOBAL].evicted == 0
        assert bench.tier.statistics().groups[GLOBAL].refused == outcomes[Outcome.REFUSED]


def test_records_that_are_being_restored_do_not_leave_and_a_store_full_of_them_says_so(tmp_path):
    with Bench(tmp_path, capacity_bytes=60_000, open_files=FaultyFiles) as bench:
        bench.spill_numbers(GLOBAL, range(4))
        wait_for_measurement(bench)
        bench.spill_numbers(GLOBAL, range(4, 20), at_once=4)
        held = [number for number in range(20) if bench.tier.holds(GLOBAL, name(number))]
        assert 0 < len(held) < 20
        (files,) = bench.files
        files.blocked.add("read")
        up = [SlotBlock(GLOBAL, name(number), slot) for slot, number in enumerate(held)]
        restore = bench.tier.restore(up)
        assert bench.tier.spill([bench.put(GLOBAL, 100, SLOTS - 1)]) == 1
        (ended,) = bench.wait(1)
        assert ended.outcome is Outcome.FULL
        assert all(bench.tier.holds(GLOBAL, name(number)) for number in held)
        bench.tier.check_integrity()
        files.go.set()
        assert {done.outcome for done in bench.wait(len(up))} == {Outcome.DONE}
        assert restore.done
        assert all(bench.right(block) for block in up)
        files.blocked.clear()
        assert bench.spill([bench.put(GLOBAL, 100, SLOTS - 1)]) == [Outcome.DONE]


def test_a_slow_disk_makes_spills_fewer_and_never_waits(tmp_path):
    limits = ColdTierLimits(tray_bytes=1 << 14, trays=3, backlog_bytes=5 * 2048, measure_s=3600.0)
    with Bench(tmp_path, limits=limits, open_files=FaultyFiles) as bench:
        (files,) = bench.files
        files.blocked.add("write")
        blocks = [bench.put(GLOBAL, slot, slot) for slot in range(SLOTS)]
        started = time.perf_counter()
        assert bench.tier.spill(blocks) == 5
        assert bench.tier.spill(blocks[5:]) == 0
        assert time.perf_counter() - started < 4  # The disk has 5.
        assert bench.tier.statistics().groups[GLOBAL].unasked == 19 + 19
        assert bench.tier.statistics().spilling_bytes == 5 * 2048
        files.go.set()
        bench.wait(5)
        assert bench.tier.spill(blocks[5:]) == 5
        bench.wait(5)
        large = bench.put(LOCAL, 1, 0)
        assert bench.spill([large]) == [Outcome.DONE]


def test_a_block_that_is_larger_than_the_backlog_goes_down_alone(tmp_path):
    with Bench(tmp_path, limits=replace(LIMITS, backlog_bytes=1)) as bench:
        blocks = [bench.put(LOCAL, slot, slot) for slot in range(3)]
        for block in blocks:
            assert bench.tier.room(LOCAL) == 1
            assert bench.tier.spill([block, bench.put(GLOBAL, 9, 9)]) == 1
            assert bench.tier.room(LOCAL) == 0
            assert [done.outcome for done in bench.wait(1)] == [Outcome.DONE]


# What its policy hears.


def test_a_long_prompt_holds_the_books_lock_a_part_at_a_time(tmp_path):
    keys = [(group, name(number)) for number in range(4096) for group in (GLOBAL, LOCAL)]
    policy = A2CR(100)
    with Bench(tmp_path, policy=lambda _: policy) as bench:
        bench.tier.close()  # So that nobody else listens.
        bench.tier.observe(Access(keys=keys))
        assert policy.explain(keys[0]) is None, "not on the caller's thread"
        parts = 0
        while bench.tier._books.listen():
            parts += 1
        assert parts > 16
        assert policy.explain(keys[-1]) is not None


def test_the_policy_hears_of_prompts_on_the_tiers_thread(tmp_path):
    policy = A2CR(100)
    with Bench(tmp_path, policy=lambda _: policy) as bench:
        bench.tier.observe(Access(keys=[(GLOBAL, name(1))]))
        bench.tier.attend([(GLOBAL, name(1))], [1.0])
        end = time.monotonic() + 10
        while policy.explain((GLOBAL, name(1))) is None and time.monotonic() < end:
            time.sleep(0.001)
        assert policy.explain((GLOBAL, name(1))) is not None
