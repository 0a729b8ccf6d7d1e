"""Beside decodes: what a mixed step costs is paid seldom, for many prompts at once, and the mean pace is kept."""

from itertools import pairwise
from statistics import mean

import pytest

from tests.scheduler_bench import Bench, sequence
from wicore_backend.engine.pacing import Pacer
from wicore_backend.engine.step_time import Coefficients, StepShape, StepTimeModel

MACHINE = Coefficients(step=15e-3, sequence=78e-6, prefill_token=80e-6, key=0.0, pair=0.0, mixed=8e-3)
"""A step of 64 decodes takes 20 ms. A prompt of 25 tokens takes 2 ms beside them, and that it is there at all 8."""
PROMPT = 25
DECODES = StepShape(64, 64, 0, 0)
ALONE = MACHINE.seconds(DECODES)


def learnt(machine: Coefficients = MACHINE) -> StepTimeModel:
    model = StepTimeModel()
    for n in range(300):
        sequences, chunks = n % 67 + 1, n % 4
        shape = StepShape(sequences, sequences, 0, 0)
        for chunk in range(chunks):
            shape = shape.with_prefill(25 + n % 7 * 50 * chunk, 0)
        model.observe(shape, machine.seconds(shape))
    return model


def planned(pacer: Pacer, prompts: list[int], decodes: StepShape = DECODES) -> StepShape:
    """A step with as much of each prompt as the pacer allows."""
    shape = decodes
    held_back = not pacer.begin(decodes)
    if not held_back:
        for prompt in prompts:
            if tokens := pacer.tokens(shape, context=0, most=prompt):
                shape = shape.with_prefill(tokens, 0)
        held_back = bool(prompts) and not shape.chunks
    pacer.end(shape, held_back=held_back)
    return shape


def pacer(model: StepTimeModel | None = None, *, slowdown: float = 1.5, target_s: float | None = None) -> Pacer:
    return Pacer(model or learnt(), target_s=target_s, slowdown=slowdown)


class Machine:
    """A scheduler on the machine: the model learns from its steps, beginning with nothing."""

    def __init__(self) -> None:
        self.bench = Bench(budget=2048, running=64, blocks=5000)
        self.shapes: list[StepShape] = []
        self._prompts = 0

    def add(self, prompts: int, answer: int = 250) -> None:
        for _ in range(prompts):
            self._prompts += 1
            self.bench.add(sequence(PROMPT, answer, first=100 * self._prompts))

    def step(self) -> StepShape:
        self.bench.step()
        assert self.bench.latest is not None
        shape = self.bench.latest.shape
        self.bench.step_time.observe(shape, MACHINE.seconds(shape))
        self.shapes.append(shape)
        return shape

    def until_all_decode(self) -> list[StepShape]:
        """Steps until nobody waits, and those in which what was taken ahead is paid back."""
        before = len(self.shapes)
        while self.bench.scheduler.num_decoding < self.bench.scheduler.num_running + self.bench.scheduler.num_waiting:
            self.step()
        steps = self.shapes[before:]
        for _ in range(10):
            assert not self.step().chunks
        return steps

    def mean_slowdown(self, since: int) -> float:
        """How much longer steps took than their decodes would have alone."""
        shapes = self.shapes[since:]
        decodes = [s.sequences - s.chunks for s in shapes]
        alone = sum(MACHINE.seconds(StepShape(n, n, 0, 0)) for n in decodes)
        return sum(map(MACHINE.seconds, shapes)) / alone


def test_a_lone_prompt_is_computed_at_once_and_whole_though_it_takes_more_than_its_step_leaves():
    paced = pacer(target_s=1.2 * ALONE)  # 4 ms of a step, where 10 are taken.
    assert planned(paced, [PROMPT]) == DECODES.with_prefill(PROMPT, 0)


def test_what_was_taken_ahead_is_paid_back_before_the_next_prompt():
    paced = pacer(target_s=1.2 * ALONE)
    shapes = [planned(paced, [PROMPT]) for _ in range(60)]
    assert mean(map(MACHINE.seconds, shapes)) == pytest.approx(1.2 * ALONE, rel=0.03)
    mixed = [n for n, shape in enumerate(shapes) if shape.mixed]
    assert all(next_ - one in (2, 3) for one, next_ in pairwise(mixed))


def test_once_a_step_is_mixed_further_prompts_cost_their_tokens_alone():
    shape = planned(pacer(), [PROMPT] * 64)
    took = MACHINE.seconds(shape) - ALONE
    assert took == pytest.approx(6 * 8e-3, rel=0.1)
    assert shape.chunks > 15


def test_a_long_prompt_is_read_in_few_mixed_steps_at_the_decodes_mean_pace():
    paced = pacer(target_s=1.5 * ALONE)
    shapes = []
    left = 8192
    while left:
        shapes.append(planned(paced, [left]))
        left -= shapes[-1].tokens - DECODES.tokens
    shapes += [planned(paced, []) for _ in range(10)]
    assert sum(map(MACHINE.seconds, shapes)) <= 1.5 * ALONE * len(shapes)
    assert sum(shape.mixed for shape in shapes) < 20
    assert max(map(MACHINE.seconds, shapes)) < 3.5 * ALONE, "a pause is bounded"


def test_what_a_mixed_step_costs_is_no_part_of_a_prompts_share():
    paced = pacer()
    assert paced.begin(DECODES)
    whole = paced.tokens(DECODES, context=0, most=10_000)
    quarter = paced.tokens(DECODES, context=0, most=10_000, share=0.25)
    assert quarter == pytest.approx(whole / 4, rel=0.02)


def test_a_guess_of_a_mixed_steps_cost_that_is_far_too_high_is_soon_mended():
    """It fits the steps that it was learnt from, all of 2,048 tokens, and would ask for no others."""
    guess = Coefficients(step=15e-3, sequence=78e-6, prefill_token=46e-6, key=0.0, pair=0.0, mixed=78e-3)
    model = StepTimeModel()
    for n in range(200):
        shape = StepShape(n % 64 + 1, n % 64 + 1, 0, 0)
        model.observe(shape, guess.seconds(shape))
        shape = shape.with_prefill(2048 if n % 2 else 1024, 0)
        model.observe(shape, guess.seconds(shape))
    assert model.coefficients.mixed == pytest.approx(guess.mixed, rel=0.1)
    paced = pacer(model, target_s=1.5 * ALONE)
    took = []
    for _ in range(400):
        shape = planned(paced, [2048])
        took.append(MACHINE.seconds(shape))
        model.observe(shape, took[-1])
    assert model.coefficients.mixed < 1.5 * MACHINE.mixed
    assert mean(took[100:]) == pytest.approx(1.5 * ALONE, rel=0.05)


def test_nothing_is_owed_to_decodes_that_are_gone():
    paced = pacer(target_s=1.1 * ALONE)
    assert planned(paced, [PROMPT] * 64).mixed
    assert not planned(paced, [PROMPT]).mixed
    planned(paced, [], StepShape(0, 0, 0, 0))
    assert planned(paced, [PROMPT]).mixed


def mixed_before_the_first_pause(paced: Pacer) -> list[StepShape]:
    shapes = [planned(paced, [PROMPT] * 200) for _ in range(100)]
    return shapes[: next(n for n, shape in enumerate(shapes) if not shape.mixed)]


def test_what_quiet_steps_left_is_kept_for_a_burst_and_spent_in_steps_as_short_as_ever():
    paced = pacer()
    while len(mixed_before_the_first_pause(paced)) > 1:  # What nobody needed before decodes came is spent.
        pass
    for _ in range(40):
        assert not planned(paced, []).mixed
    shapes = mixed_before_the_first_pause(paced)
    took = [MACHINE.seconds(shape) - ALONE for shape in shapes]
    assert 32 * 0.5 * ALONE < sum(took) < (32 + len(shapes)) * 0.5 * ALONE + 6.5 * MACHINE.mixed
    assert max(took) < 6.5 * MACHINE.mixed


def test_nothing_is_kept_from_those_who_are_promised_a_target():
    paced = pacer(target_s=1.5 * ALONE)
    for _ in range(30):
        assert not planned(paced, []).mixed
    assert len(mixed_before_the_first_pause(paced)) == 1


def test_a_target_that_decodes_miss_lets_prompts_get_on():
    paced = pacer(target_s=0.5 * ALONE)
    shapes = [planned(paced, [10_000]) for _ in range(200)]
    assert sum(shape.mixed for shape in shapes) > 5
    assert mean(map(MACHINE.seconds, shapes)) < 1.15 * ALONE


@pytest.mark.parametrize("lone", [0, 3, 12], ids=["nothing was mixed before", "few lone prompts", "lone prompts"])
def test_a_burst_of_short_prompts_gets_in_within_few_mixed_steps(lone):
    machine = Machine()
    machine.add(1)
    for _ in range(40):
        machine.step()
    for _ in range(lone):  # All of one length: they cannot tell what a mixed step costs from what a token does.
        machine.add(1, answer=2)
        machine.until_all_decode()
    machine.add(63)
    steps = machine.until_all_decode()
    assert sum(shape.mixed for shape in steps) <= 8
    assert sum(map(MACHINE.seconds, steps)) < 0.4
    assert machine.mean_slowdown(0) < 1.5


def test_decodes_are_not_charged_for_a_mixed_step_when_it_is_asked_whether_one_more_keeps_pace():
    b = Bench(running=8, budget=64, target_tpot_s=0.035)
    b.teach(step=0.01, token=0.01, mixed=0.02)  # Two decodes take 0.03 s, three 0.04 s.
    for n in range(3):
        b.add(sequence(4, 200, first=100 * n))
        for _ in range(30):
            b.step()
    assert (b.scheduler.num_running, b.scheduler.num_waiting) == (2, 1)
