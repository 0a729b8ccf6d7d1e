"""Who gets which blocks, and when: expected memory, blocks ahead of time, and prompts that are alike."""

import numpy as np
import pytest

from tests.scheduler_bench import Bench, sequence
from wicore_backend.engine.request import Request
from wicore_backend.engine.sampling_params import SamplingParams
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.processor.prompt import Prompt


def test_more_is_admitted_than_the_longest_answers_would_allow_and_memory_runs_out_without_harm():
    b = Bench(running=8, blocks=40, budget=32)
    for n in range(6):
        b.add(sequence(4, 60, first=100 * n, arrival=n))
    b.scheduler._expectations.answered(2)
    for _ in range(64):
        b.scheduler._expectations.answered(2)
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
        b.scheduler._expectations.answered(60)
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
