"""Planning a step as late as the device allows, on a device whose steps take a time of their own."""

import statistics
import time
from collections import Counter
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from wicore_backend import Engine, EngineConfig, SamplingParams
from wicore_backend.engine.lead import Lead
from wicore_backend.engine.plan import Chunk, StepPlan
from wicore_backend.engine.request import Sequence, TokensEvent
from wicore_backend.engine.step_time import StepShape, StepTimeModel

MODEL = Path(__file__).resolve().parent.parent / "models" / "wicore-demo"
pytestmark = pytest.mark.timing
DECODES = StepShape(4, 4, 100, 0)
PLAN = StepPlan([], [], DECODES)


def learnt(*seconds: float) -> StepTimeModel:
    model = StepTimeModel(ready_after=4)
    for one in seconds:
        model.observe(DECODES, one)
    return model


def test_nothing_is_awaited_before_steps_are_known():
    assert Lead(learnt(0.05, 0.05)).wait_s(PLAN) == 0
    assert Lead(learnt(*[0.05] * 20)).wait_s(PLAN) == pytest.approx(0.045, abs=1e-3)


def test_a_step_with_prompts_leaves_room_for_the_models_error():
    lead = Lead(learnt(*[0.05, 0.06] * 40))
    chunk = Chunk(sequence=None, start=0, end=5)
    assert 0 < lead.wait_s(StepPlan([], [chunk], DECODES)) < lead.wait_s(PLAN) - 0.005


@pytest.mark.parametrize("takes", [0.0004, 0.003, 0.02])
def test_the_lead_becomes_what_planning_takes_and_a_little_more(takes):
    lead = Lead(learnt(*[0.05] * 20))
    for _ in range(200):
        slack = lead.seconds - takes
        lead.observe(max(0.0, slack))
    assert takes < lead.seconds < takes + 0.0025


def test_who_plans_too_late_soon_plans_at_once():
    lead = Lead(learnt(*[0.05] * 20))
    for _ in range(8):
        lead.observe(0.0)
    assert lead.wait_s(PLAN) == 0


def test_a_step_is_counted_from_when_the_device_could_begin_with_it():
    lead = Lead(learnt(*[0.05] * 20))
    ahead = lead.wait_s(PLAN)
    assert lead.plan_at(PLAN, launched=10.0) == 10.0 + ahead
    lead.device_done(10.02)  # It was at another until then.
    assert lead.plan_at(PLAN, launched=10.0) == 10.02 + ahead
    assert lead.plan_at(PLAN, launched=10.03) == 10.03 + ahead


def test_slack_is_from_a_launch_to_the_end_of_the_step_before():
    in_time, late, told = (Lead(learnt(*[0.05] * 20)) for _ in range(3))
    for lead in (in_time, late):
        lead.device_done(10.0)
        lead.followed(launched=9.99, in_time=lead is in_time)
    told.observe(10.0 - 9.99)
    assert in_time.seconds == told.seconds < Lead(learnt()).seconds < late.seconds


STEP_S = 0.05


class Output:
    """Of a step that a device has been given, which is done with it at `ends`."""

    mass: Any = staticmethod(dict)

    def __init__(self, plan, vocab_size, ends):
        lens = [1] * len(plan.decodes) + [chunk.end - chunk.start for chunk in plan.chunks]
        self.offsets = tuple(accumulate(lens, initial=0))
        self._vocab_size = vocab_size
        self._ends = ends

    def logits(self, rows):
        return torch.zeros(len(rows), self._vocab_size)

    def done(self):
        time.sleep(max(0.0, self._ends - time.monotonic()))

    def over(self):
        return time.monotonic() >= self._ends


@pytest.fixture
def engine(monkeypatch):
    """An engine whose device takes STEP_S for each step, beside the host, which has nothing to compute."""
    with Engine(EngineConfig(model=MODEL, device="cpu", dtype="float32", prefix_cache=False)) as engine:
        engine._model = replace(engine._model, overlaps=True)
        free_at = 0.0

        def run(plan, _=None):
            nonlocal free_at
            free_at = max(free_at, time.monotonic()) + STEP_S
            return Output(plan, engine._model.vocab_size, free_at)

        monkeypatch.setattr(engine._model.runner, "run", run)
        yield engine


def first_token_s(engine) -> float:
    began = time.monotonic()
    with engine.stream([2, 300, 301], SamplingParams(max_tokens=1, temperature=0.0)) as stream:
        next(event for event in stream if isinstance(event, TokensEvent))
        return time.monotonic() - began


def test_no_step_is_computed_for_who_is_known_to_end(engine, monkeypatch):
    run, plans = engine._model.runner.run, []
    monkeypatch.setattr(engine._model.runner, "run", lambda plan, ahead=None: (plans.append(plan), run(plan, ahead))[1])
    answer = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    for _ in range(2):
        assert len(engine.generate([[2, 300], [2, 301]], answer)) == 2
    # How many steps there are depends on when the second one came: if in the first one's last step, the first one is
    # computed once more beside it. But each step is needed by somebody in it.
    steps: Counter[Sequence] = Counter()
    for plan in plans:
        of_step = [*plan.decodes, *(chunk.sequence for chunk in plan.chunks)]
        steps.update(of_step)
        assert min(steps[sequence] for sequence in of_step) <= 3, "all of its tokens had been chosen"


def test_who_comes_while_a_step_is_computed_is_in_the_next(engine, monkeypatch):
    long = SamplingParams(max_tokens=500, temperature=0.0, ignore_eos=True)
    with engine.stream([2, 300], long) as decoding:
        for _ in range(40):  # Steps, until their time is known.
            next(iter(decoding))

        def median_first_token_s() -> float:
            waits = []
            for phase in (0.3, 0.5, 0.7, 0.4, 0.6):
                next(iter(decoding))
                time.sleep(phase * STEP_S)
                waits.append(first_token_s(engine))
            return statistics.median(waits)

        # A busy machine wakes the loop too late now and then, and never too early.
        soon = min(median_first_token_s() for _ in range(3))
        monkeypatch.setattr(Lead, "wait_s", lambda *_: 0.0)
        late = median_first_token_s()
    # The rest of the step, half of it or so, and its own.
    assert soon < 1.9 * STEP_S < 2.1 * STEP_S < late, (soon, late)
