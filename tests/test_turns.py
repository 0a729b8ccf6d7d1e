"""How prompts share steps: no long one holds up those after it, and none is held up for ever."""

import numpy as np

from wicore_backend.engine.plan import SchedulerLimits
from wicore_backend.engine.request import Request, Sequence
from wicore_backend.engine.sampling_params import SamplingParams
from wicore_backend.engine.scheduler import Scheduler
from wicore_backend.engine.step_time import StepTimeModel
from wicore_backend.engine.turns import Turns
from wicore_backend.hmt.blocks import BlockManager
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.processor.prompt import Prompt, PromptImage

STEP = 64


def scheduler(**limits) -> Scheduler:
    groups = [LayerGroup.LOCAL, LayerGroup.GLOBAL]
    layout = KVLayout.of(groups, block_size=4, kv_heads=1, head_dim=4, window=8, bytes_per_value=4)
    books = BlockManager(layout, dict.fromkeys(LayerGroup, 20_001), max_chunk=STEP)
    return Scheduler(books, SchedulerLimits(max_batch_tokens=STEP, max_running=16, **limits), StepTimeModel())


def add(s: Scheduler, prompt: int, *, priority: int = 0, at: float = 0.0, images=()) -> Sequence:
    request = Request("r", Prompt(np.zeros(prompt, np.int32), images), SamplingParams(), lambda _: None, at, priority)
    sequence = Sequence(request, max_tokens=prompt + 4)
    assert not s.add(sequence, at)
    return sequence


def step(s: Scheduler, now: float = 0.0) -> dict[Sequence, int]:
    """Prompt tokens that one step computes of each; answers end with their first token."""
    plan = s.plan(now)
    s.complete(plan)
    for chunk in plan.chunks:
        if chunk.sequence.uncomputed == 0:
            chunk.sequence.tokens.append(0)
            s.finished(chunk.sequence)
    s.check_integrity()
    return {chunk.sequence: chunk.end - chunk.start for chunk in plan.chunks}


def test_a_short_prompt_does_not_wait_for_the_end_of_a_long_one():
    s = scheduler()
    long = add(s, 1000)
    assert step(s) == {long: 64}
    short = add(s, 40, at=1.0)
    assert step(s, 1.0) == {long: 16, short: 40}


def test_prompts_that_fit_are_computed_whole_in_order():
    s = scheduler()
    first, second, third = add(s, 30), add(s, 20, at=0.1), add(s, 60, at=0.2)
    assert step(s, 1.0) == {first: 30, second: 20, third: 14}


def test_the_oldest_gets_on_however_many_shorter_ones_come():
    s = scheduler()
    long = add(s, 640)
    for turn in range(40):
        add(s, 48, at=turn)
        add(s, 48, at=turn)
        step(s, turn)
    assert long not in s.running


def test_only_a_few_prompts_of_a_class_are_under_way_at_once():
    s = scheduler()
    for turn in range(12):
        add(s, 500, at=turn)
    for _ in range(5):
        step(s, 20.0)
        assert s.num_running <= 4


def test_a_higher_class_takes_the_whole_step():
    s = scheduler()
    add(s, 1000)
    step(s)
    urgent = add(s, 300, priority=-10, at=1.0)
    assert step(s, 1.0) == {urgent: 64}


def test_a_higher_class_goes_before_others_even_while_a_promoted_prompt_is_under_way():
    s = scheduler(ageing_s=5.0, aged_share=1)
    aged = add(s, 1000, priority=10)
    add(s, 1000, priority=0, at=9.0)
    assert step(s, 9.0)[aged] == 16
    urgent = add(s, 300, priority=-10, at=9.0)
    shares = step(s, 9.0)
    assert list(shares.items()) == [(aged, 16), (urgent, 48)]
    assert step(s, 9.0) == {aged: 16, urgent: 48}


def test_one_promoted_prompt_is_under_way_at_a_time():
    s = scheduler(ageing_s=5.0, aged_share=1)
    aged = [add(s, 1000, priority=10) for _ in range(6)]
    add(s, 1000, priority=0, at=1.0)
    for now in range(10, 20):
        step(s, now)
    assert [sequence.promoted for sequence in aged] == [True] + [False] * 5


def test_an_image_larger_than_a_share_is_computed_all_the_same():
    s = scheduler()
    picture = PromptImage(0, 40, np.zeros((3, 1, 1), np.uint8), b"")
    shown = add(s, 100, images=(picture,))
    add(s, 90, at=1.0)
    assert step(s, 1.0)[shown] >= 40


def test_who_gave_way_before_its_turn_and_is_back_has_one_turn():
    s = scheduler()
    sequence = add(s, 200)
    step(s)
    turns = Turns([sequence])
    turns.started(sequence)
    assert not turns
