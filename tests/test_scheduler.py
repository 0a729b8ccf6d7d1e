"""What each step computes: decodes first, prompts in chunks, images whole, who gives way, who is turned away."""

import numpy as np
import pytest

from wicore_backend.engine.pacing import Pacer
from wicore_backend.engine.plan import RejectReason, SchedulerLimits
from wicore_backend.engine.request import DeadlineKind, Deadlines, PriorityClass, Request, Sequence
from wicore_backend.engine.sampling_params import SamplingParams
from wicore_backend.engine.scheduler import Scheduler
from wicore_backend.engine.step_time import StepShape, StepTimeModel
from wicore_backend.hmt.blocks import BlockManager
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.lower_tiers import LowerTiers
from wicore_backend.hmt.names import BlockNames, NameScheme
from wicore_backend.processor.prompt import Prompt, PromptImage

REALTIME, INTERACTIVE, BATCH = PriorityClass.REALTIME, PriorityClass.INTERACTIVE, PriorityClass.BATCH
SCHEME = NameScheme(4)


def sequence(
    prompt: int,
    answer: int = 10,
    *,
    images=(),
    priority: int = INTERACTIVE,
    arrival: float = 0.0,
    first: int = 0,
    tenant: str = "",
    deadlines: Deadlines | None = None,
    named: bool = True,
) -> Sequence:
    """A sequence whose prompt has tokens `first`, `first` + 1, ...; the same `first` and length are the same prompt."""
    spans = tuple(PromptImage(start, length, np.zeros((3, 1, 1), np.uint8), b"") for start, length in images)
    tokens = Prompt(np.arange(first, first + prompt, dtype=np.int32), spans)
    params = SamplingParams()
    request = Request("r", tokens, params, lambda _: None, arrival, priority, tenant, deadlines or Deadlines())
    made = Sequence(request, max_tokens=prompt + answer)
    if named:
        made.names = BlockNames(SCHEME, made.tokens, spans, tenant)
        made.twin_key = made.names.whole(prompt)
    return made


class Bench:
    """A scheduler, and a clock that a step moves by a second."""

    def __init__(
        self, *, budget: int = 16, running: int = 4, blocks: int = 1000, lower: LowerTiers | None = None, **limits
    ) -> None:
        groups = [LayerGroup.LOCAL, LayerGroup.GLOBAL]
        layout = KVLayout.of(groups, block_size=4, kv_heads=1, head_dim=4, window=8, bytes_per_value=4)
        self.books = BlockManager(layout, dict.fromkeys(LayerGroup, blocks + 1), max_chunk=budget, lower=lower)
        self.step_time = StepTimeModel()
        self.now = 0.0
        self.scheduler = Scheduler(
            self.books, SchedulerLimits(max_batch_tokens=budget, max_running=running, **limits), self.step_time
        )

    def add(self, *sequences: Sequence) -> list:
        rejected = [r for s in sequences for r in self.scheduler.add(s, self.now)]
        self.scheduler.check_integrity()
        return rejected

    def step(self) -> list[tuple[Sequence, int, int]]:
        """One step; every sequence that is complete so far gets a token, and ends when it is as long as it may be."""
        plan = self.scheduler.plan(self.now)
        self.scheduler.check_integrity()
        done = [(s, s.computed, s.computed + 1) for s in plan.decodes] + [
            (c.sequence, c.start, c.end) for c in plan.chunks
        ]
        ready = [*plan.decodes, *(c.sequence for c in plan.chunks if c.completes)]
        ready += [fork.sequence for fork in self.scheduler.complete(plan)]
        for s in ready:
            s.tokens.append(7)
            if len(s.tokens) >= s.max_tokens:
                self.scheduler.finished(s)
        self.scheduler.check_integrity()
        self.now += 1
        return done

    def run(self, limit: int = 3000) -> int:
        """Steps until nothing is left."""
        for n in range(limit):
            if not self.scheduler.has_work:
                return n
            assert self.step(), "work, but an empty step"
        raise AssertionError("it does not end")

    @property
    def counts(self):
        return self.scheduler.counts

    def teach(self, *, step: float, token: float) -> None:
        """Let the step-time model learn a machine."""
        for n in range(200):
            sequences, prefill = n % 7 + 1, (n % 5) * 20
            shape = StepShape(sequences, sequences, sequences * 30, 0)
            if prefill:
                shape = shape.with_prefill(prefill, 0)
            self.step_time.observe(shape, step + token * shape.tokens)


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


# Memory


def test_more_is_admitted_than_the_longest_answers_would_allow_and_memory_runs_out_without_harm():
    b = Bench(running=8, blocks=40, budget=32)
    for n in range(6):
        b.add(sequence(4, 60, first=100 * n, arrival=n))
    b.scheduler._answers.observe(2)
    for _ in range(64):
        b.scheduler._answers.observe(2)
    b.step()
    assert b.scheduler.num_running == 6, "6 x 16 blocks would not fit into 40"
    sequences = b.scheduler.running
    b.run()
    assert b.counts.preemptions > 0
    assert sequences[0].preemptions == 0, "who came first gives way to nobody"
    assert all(s.answered == 60 for s in sequences)


@pytest.mark.parametrize(("blocks", "at_once"), [(1000, 4), (21, 4), (20, 3), (18, 1), (17, 1)])
def test_a_decode_gets_several_blocks_at_once_where_more_are_spare_than_all_will_need(blocks, at_once):
    b, a = Bench(blocks=blocks), sequence(6, 60)
    b.add(a)
    held = [b.step() and a.blocks.stop for _ in range(3)]
    assert held == [2, 2, 2]
    b.step()
    assert a.blocks.stop == 2 + at_once


def test_a_decode_gets_no_block_beyond_its_longest_answer():
    b, a = Bench(), sequence(6, 11)
    b.add(a)
    while b.scheduler.has_work:
        assert a.blocks is None or a.blocks.stop <= len(a.blocks.tables[LayerGroup.GLOBAL]) == 5
        b.step()


def test_decodes_that_begin_at_different_times_get_their_blocks_when_they_need_them():
    b = Bench(running=8)
    for n in range(8):
        b.add(sequence(3 + n, 30 + 3 * n, first=1000 * n))
        b.step()
    b.run()  # check_integrity holds who begins a block against what has been computed.
    assert b.books.pools[LayerGroup.GLOBAL].active == 0


def test_expectations_grow_with_the_answers_seen():
    b = Bench(running=8, blocks=40, budget=32)
    for _ in range(64):
        b.scheduler._answers.observe(60)
    for n in range(6):
        b.add(sequence(4, 60, first=100 * n, arrival=n))
    b.step()
    assert b.scheduler.num_running == 2
    b.run()
    assert b.counts.preemptions == 0


# Prompts that are alike


def test_equal_prompts_in_flight_are_computed_once():
    b = Bench(running=4)
    twins = [sequence(30, 5) for _ in range(3)]
    b.add(*twins)
    assert b.step() == [(twins[0], 0, 16)]
    assert b.scheduler.num_waiting == 2
    assert b.step() == [(twins[0], 16, 30)]
    assert [s.answered for s in twins] == [1, 1, 1]
    assert b.step() == [(s, 30, 31) for s in twins]
    assert b.counts.shared_prefill_tokens == 60
    b.run()


def test_who_waited_for_a_prompt_computes_it_when_the_other_is_cancelled():
    b = Bench(running=4)
    twins = [sequence(40, 5) for _ in range(3)]
    b.add(*twins)
    b.step()
    b.scheduler.remove(twins[1])
    b.scheduler.remove(twins[0])
    assert b.step() == [(twins[2], 16, 32)], "from where the first one left off"
    b.run()


def test_a_later_turn_goes_on_from_the_end_of_the_answer():
    b = Bench()
    first = sequence(30, 11)
    b.add(first)
    b.run()
    second = sequence(30, 5)
    second.tokens += [*[7] * 10, *range(900, 910)]
    second.request = Request("r", Prompt(np.array(second.tokens, np.int32)), SamplingParams(), lambda _: None, 0.0)
    second.max_tokens = 60
    b.add(second)
    assert b.step() == [(second, 40, 50)]
    assert second.cached_tokens == 40
    b.run()


def test_prompts_without_names_share_nothing():
    b = Bench()
    b.add(sequence(30, 5, named=False), sequence(30, 5, named=False))
    b.run()
    assert b.counts.prefix_hit_tokens == b.counts.shared_prefill_tokens == 0


# Deadlines and overload


def test_a_deadline_is_missed_once_and_only_while_it_matters():
    b = Bench(running=1)
    all_of_them = Deadlines(queue_s=3, first_token_s=5, total_s=9)
    running, waiting = sequence(4, 50, deadlines=all_of_them), sequence(4, first=50, deadlines=all_of_them)
    b.add(running, waiting)
    missed = []
    for _ in range(12):
        for s, kind in list(b.scheduler.expire(b.now)):
            missed.append((s, kind, b.now))
            b.scheduler.remove(s)
        if b.scheduler.has_work:
            b.step()
    assert missed == [(waiting, DeadlineKind.QUEUE, 3), (running, DeadlineKind.TOTAL, 9)]


def test_deadlines_of_those_who_ended_are_forgotten():
    b = Bench()
    for n in range(2000):
        a = sequence(2, first=10 * n, deadlines=Deadlines(total_s=10**6))
        b.add(a)
        b.scheduler.remove(a)
    assert len(b.scheduler._deadlines._heap) < 200


def test_a_full_queue_turns_away_the_newest_of_the_lowest_class():
    b = Bench(running=1, max_waiting=2)
    b.add(sequence(4, 50))
    b.step()
    low, middle = sequence(4, first=50, priority=BATCH), sequence(4, first=100)
    assert b.add(low, middle) == []
    (refused,) = b.add(sequence(4, first=150, priority=BATCH))
    assert refused.sequence.priority == BATCH
    assert refused.sequence is not low
    assert refused.reason is RejectReason.QUEUE_REQUESTS
    assert refused.retry_after_s > 0
    (refused,) = b.add(sequence(4, first=200, priority=REALTIME))
    assert refused.sequence is low
    b.scheduler.check_integrity()


def test_the_queue_is_bounded_in_tokens_too_but_takes_one_of_any_length():
    b = Bench(running=1, max_waiting_tokens=500)
    b.add(sequence(4, 50))
    b.step()
    assert b.add(sequence(1000, first=50)) == []
    (refused,) = b.add(sequence(4, first=5000))
    assert refused.reason is RejectReason.QUEUE_TOKENS


def test_what_cannot_be_in_time_is_turned_away_before_it_costs_anything():
    b = Bench(budget=100)
    b.teach(step=0.01, token=0.001)
    (late,) = b.add(sequence(1000, deadlines=Deadlines(first_token_s=0.5)))
    assert late.reason is RejectReason.TOO_LATE
    assert late.expected_s == pytest.approx(1.1, rel=0.15)
    assert b.add(sequence(1000, deadlines=Deadlines(first_token_s=2.0))) == []
    b.run()


def test_who_waited_too_long_to_be_in_time_is_given_up_at_the_head_of_the_queue():
    b = Bench(running=1, budget=100)
    b.teach(step=0.01, token=0.001)
    b.add(sequence(4, 50))
    b.step()
    doomed = sequence(1000, first=50, deadlines=Deadlines(first_token_s=5.0), arrival=b.now)
    b.add(doomed)
    b.now += 3
    assert list(b.scheduler.give_up(b.now)) == []
    b.now += 1.5
    (late,) = b.scheduler.give_up(b.now)
    assert late.sequence is doomed
    b.scheduler.check_integrity()


def test_the_time_to_retry_follows_the_rate_at_which_the_queue_moves():
    b = Bench(running=1, budget=64)
    for n in range(30):
        b.add(sequence(10, 10, first=100 * n, arrival=n / 100))
    for _ in range(100):
        b.step()
    backlog = sum(q.tokens for q in b.scheduler.backlogs().values())
    # A request of about 20 tokens takes 10 steps of a second.
    assert b.scheduler.retry_after() == pytest.approx(min(60, backlog / 2), rel=0.5)


def test_a_tenant_that_floods_slows_itself():
    b = Bench(running=2, budget=64)
    flood = [sequence(10, 10, first=100 * n, tenant="flood", arrival=n / 1000) for n in range(50)]
    modest = [sequence(10, 10, first=10_000 + 100 * n, tenant="modest", arrival=0.1 + n / 1000) for n in range(5)]
    b.add(*flood, *modest)
    while not all(s.answered == 10 for s in modest):
        b.step()
    assert sum(s.answered == 10 for s in flood) <= 8


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
