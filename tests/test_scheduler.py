"""What each step computes: decodes first, prompts in chunks, images whole, in the time there is; and who goes first."""

import pytest

from tests.scheduler_bench import BATCH, REALTIME, Bench, sequence
from wicore_backend.engine.chunks import Chunks
from wicore_backend.engine.pacing import Pacer
from wicore_backend.engine.step_time import StepShape, StepTimeModel


def test_a_long_prompt_is_computed_in_chunks_of_the_budget():
    b, a = Bench(), sequence(40)
    b.add(a)
    assert [b.step() for _ in range(4)] == [[(a, 0, 16)], [(a, 16, 32)], [(a, 32, 40)], [(a, 40, 41)]]


def test_decodes_come_first_and_prefill_takes_the_rest():
    b, a, c = Bench(), sequence(3), sequence(40, first=100)
    b.add(a)
    b.step()
    b.add(c)
    assert b.step() == [(a, 3, 4), (c, 0, 15)]


def test_several_prompts_share_a_step():
    b = Bench()
    x, y, z = sequence(5), sequence(6, first=50), sequence(9, first=90)
    b.add(x, y, z)
    assert b.step() == [(x, 0, 5), (y, 0, 6), (z, 0, 5)]


def test_an_image_is_never_split():
    b, a = Bench(), sequence(40, images=[(10, 8), (20, 12)])
    b.add(a)
    assert [b.step()[0][1:] for _ in range(4)] == [(0, 10), (10, 20), (20, 36), (36, 40)]


def test_an_image_that_does_not_fit_beside_the_decodes_waits_for_the_next_step():
    b = Bench()
    x, y = sequence(14), sequence(12, images=[(0, 12)], first=50)
    b.add(x, y)
    assert b.step() == [(x, 0, 14)]
    assert b.step() == [(x, 14, 15), (y, 0, 12)]


def test_nobody_overtakes_one_that_does_not_fit():
    b = Bench(running=2, blocks=30)
    big, bigger, small = sequence(40, 8, first=1), sequence(40, 50, first=100), sequence(2, 2, first=300)
    b.add(big, bigger, small)
    b.step()
    assert b.scheduler.running == [big]
    b.run()
    assert b.counts.preemptions == 0


# Time


def test_beside_decodes_a_prompt_gets_as_much_as_keeps_their_pace():
    b = Bench(budget=512, target_tpot_s=0.02)
    b.teach(step=0.01, token=0.0001)
    talker = sequence(5, 100)
    b.add(talker)
    b.step()
    b.add(sequence(400, first=1000))
    (_, chunk) = b.step()
    assert 80 <= chunk[2] - chunk[1] <= 100, "0.01 s for the step, 0.01 s for prompts"
    b.scheduler.remove(talker)
    (chunk,) = b.step()
    assert chunk[2] == 400, "alone, it gets all"


def test_without_a_target_prompts_slow_decodes_by_a_factor():
    b = Bench(budget=512, max_decode_slowdown=1.5)
    b.teach(step=0.01, token=0.0001)
    b.add(sequence(5, 100))
    b.step()
    b.add(sequence(400, first=1000))
    (_, chunk) = b.step()
    assert 40 <= chunk[2] - chunk[1] <= 55


def test_a_chunk_is_as_long_as_the_time_left_and_whole_only_if_it_fits():
    b = Bench()
    b.teach(step=0.01, token=0.001)
    pacer = Pacer(b.step_time, target_s=0.05, slowdown=1.5)
    decodes = StepShape(4, 4, 120, 0)
    assert pacer.begin(decodes)
    tokens = pacer.tokens(decodes, context=0, most=1000)
    assert b.step_time.predict(decodes.with_prefill(tokens, 0)) <= pacer.limit_s
    assert b.step_time.predict(decodes.with_prefill(tokens + 1, 0)) > pacer.limit_s
    assert [pacer.tokens(decodes, context=0, most=most) for most in (tokens - 1, tokens, tokens + 1)] == [
        tokens - 1,
        tokens,
        tokens,
    ]
    assert abs(pacer.tokens(decodes, context=0, most=1000, share=0.5) - tokens / 2) <= 1


def test_a_prompt_gets_on_however_slow_the_decodes_are():
    b = Bench(budget=512, target_tpot_s=0.001)
    b.teach(step=0.01, token=0.0001)
    b.add(sequence(5, 100))
    b.step()
    long = sequence(100, first=1000, images=[(40, 30)], priority=REALTIME)
    b.add(long)
    starts = []
    for _ in range(100):
        starts += [start for s, start, _ in b.step() if s is long]
        if long.answered:
            break
    assert long.answered
    assert len(starts) < 12


def test_nobody_starts_with_whom_decodes_would_miss_their_target():
    b = Bench(running=8, target_tpot_s=0.035)
    b.teach(step=0.01, token=0.01)  # Two decodes take 0.03 s, three 0.04 s.
    for n in range(3):
        b.add(sequence(4, 50, first=100 * n))
        for _ in range(4):
            b.step()
    assert (b.scheduler.num_running, b.scheduler.num_waiting) == (2, 1)


def test_a_chunk_is_fitted_beside_those_before_it():
    class Asked(Pacer):
        def tokens(self, shape: StepShape, *, context: int, most: int, share: float = 1.0) -> int:
            asked.append((shape, context, most))
            return super().tokens(shape, context=context, most=most, share=share)

    asked: list[tuple[StepShape, int, int]] = []
    decodes = StepShape(2, 2, 50, 0)
    chunks = Chunks(Asked(StepTimeModel(), target_s=None, slowdown=1.5), decodes, tokens=20)
    first = sequence(20)
    first.computed = 8
    chunks.add(first, 12)
    chunks.end(sequence(30, first=50))
    assert asked == [(decodes.with_prefill(4, 8), 0, 16)]


# Priorities


def test_a_higher_class_goes_first_and_has_its_prompt_computed_first():
    b = Bench(running=8)
    slow, urgent, usual = (
        sequence(60, priority=BATCH),
        sequence(20, first=100, priority=REALTIME),
        sequence(20, first=200),
    )
    b.add(slow)
    b.step()
    b.add(usual, urgent)
    assert b.step() == [(urgent, 0, 16)]
    assert b.step() == [(urgent, 16, 20), (usual, 0, 12)]
    assert b.step()[1:] == [(usual, 12, 20), (slow, 16, 23)]


def test_a_higher_class_takes_the_place_of_the_cheapest_of_the_lowest():
    b = Bench(running=3, budget=64)
    costly, cheap, usual = (
        sequence(30, 20, priority=BATCH),
        sequence(8, 20, first=100, priority=BATCH),
        sequence(4, 20, first=200),
    )
    b.add(costly, cheap, usual)
    b.step()
    urgent = sequence(10, 3, first=300, priority=REALTIME)
    b.add(urgent)
    assert (urgent, 0, 10) in b.step()
    assert set(b.scheduler.running) == {costly, usual, urgent}
    assert b.counts.preemptions == cheap.preemptions == 1
    another = sequence(10, 3, first=400, priority=REALTIME)
    b.add(another, sequence(10, 3, first=500, priority=REALTIME), sequence(10, 3, first=600, priority=REALTIME))
    b.step()
    assert {s.priority for s in b.scheduler.running} == {REALTIME}
    b.run()
    assert costly.answered == cheap.answered == 20


def test_one_that_was_preempted_goes_on_from_what_the_cache_kept():
    b = Bench(running=1, budget=64)
    slow = sequence(30, 20, priority=BATCH)
    b.add(slow)
    for _ in range(5):
        b.step()
    b.add(sequence(10, 3, first=300, priority=REALTIME))
    for _ in range(3):
        b.step()
    assert b.step() == [(slow, 32, 35)], "34 tokens had been computed, 32 of them in full blocks"


def test_what_has_waited_long_goes_before_a_higher_class_and_is_not_preempted():
    b = Bench(running=1, budget=64, ageing_s=10.0, aged_share=2)
    old = sequence(10, 30, priority=BATCH)
    b.add(sequence(10, 12, first=50, priority=REALTIME), old)
    for n in range(60):
        b.add(sequence(10, 4, first=100 + 20 * n, priority=REALTIME, arrival=b.now))
        b.step()
        if not b.scheduler.num_waiting or old.answered == 30:
            break
    assert old.answered == 30
    assert b.counts.promotions == 1
    assert old.preemptions == 0


def test_when_all_that_decode_give_way_there_is_no_pace_to_be_kept():
    b = Bench(running=1, budget=64, ageing_s=10.0, aged_share=1, target_tpot_s=0.001)
    b.teach(step=0.01, token=0.01)
    b.add(sequence(10, 50, priority=REALTIME))
    b.step()
    old = sequence(30, priority=BATCH, first=100)
    b.now = 20
    b.add(old, sequence(10, priority=REALTIME, first=200, arrival=19.0))
    assert b.step() == [(old, 0, 30)]


# Those that go


def test_a_waiting_request_is_removed_without_a_trace():
    b, a = Bench(), sequence(4)
    b.add(a)
    b.scheduler.remove(a)
    assert not b.scheduler.has_work
    b.scheduler.check_integrity()
    with pytest.raises(KeyError):
        b.scheduler.remove(a)


def test_after_the_pools_are_in_doubt_everything_is_computed_again():
    b = Bench()
    a = sequence(30, 5)
    b.add(a)
    b.step()
    b.scheduler.forget_cache()
    b.scheduler.check_integrity()
    assert b.step() == [(a, 0, 16)]
    b.run()
    assert a.answered == 5
