"""What is learnt from a step that has been told, and what is not."""

import pytest

from wicore_backend.engine.computation import Computed
from wicore_backend.engine.learning import StepLearner
from wicore_backend.engine.plan import Chunk, StepPlan
from wicore_backend.engine.speculation import Speculator
from wicore_backend.engine.statistics import StatisticsRecorder
from wicore_backend.engine.step_time import StepShape, StepTimeModel
from wicore_backend.engine.untold import UntoldStep

SHAPE = StepShape(2, 2, 100, 0)
A, B = object(), object()


class Pupils:
    """Notes who is taught what."""

    def __init__(self, monkeypatch):
        self.seen = []
        self.recorder, step_time, speculator = StatisticsRecorder(), StepTimeModel(), Speculator(4)
        monkeypatch.setattr(step_time, "observe", lambda shape, seconds: self.seen.append(("time", shape, seconds)))
        for name in ("learn", "observe"):
            monkeypatch.setattr(speculator, name, lambda *of, name=name, **said: self.seen.append((name, *of, said)))
        monkeypatch.setattr(speculator, "rest", lambda *of: self.seen.append(("rest", *of)))
        self.learner = StepLearner(self.recorder, step_time, speculator)

    def learn(self, *, began=10.0, now=10.5, told=None, retried=False, guessing=False, chunks=(), guesses=None):
        plan = StepPlan([] if chunks else [A, B], list(chunks), SHAPE, guesses=guesses or {})
        computed = Computed(plan, {}, None, {}, retried=retried)
        step = UntoldStep(plan, began, began, computed, None, guessing)
        self.seen.clear()
        self.learner.learn(step, {A: 1, B: 1} if told is None else told, now)
        return self.seen


@pytest.fixture
def pupils(monkeypatch):
    return Pupils(monkeypatch)


def judged(tokens, seconds, *, guessing):
    said = {"decodes": 2, "keys": SHAPE.keys_read, "tokens": tokens, "seconds": seconds, "guessing": guessing}
    return ("observe", said)


def test_a_step_of_decodes_teaches_its_time_and_its_tokens(pupils):
    assert pupils.learn() == [("time", SHAPE, 0.5), judged(2, 0.5, guessing=False)]


def test_a_steps_time_begins_when_the_one_before_was_told(pupils):
    pupils.learn(began=10.0, now=10.5)
    assert pupils.learn(began=10.1, now=10.75)[0] == ("time", SHAPE, 0.25)
    assert pupils.learn(began=12.0, now=12.5)[0] == ("time", SHAPE, 0.5)
    snapshot = pupils.recorder
    assert (snapshot._steps, snapshot._step_seconds) == (3, 1.25)


def test_guesses_are_judged_and_their_step_teaches_no_time(pupils):
    seen = pupils.learn(told={A: 3, B: 1}, guessing=True, guesses={A: (5, 6, 7), B: (5,)})
    assert seen == [
        ("learn", A, {"right": 2, "guessed": 3}),
        ("learn", B, {"right": 0, "guessed": 1}),
        judged(4, 0.5, guessing=True),
    ]


def test_a_guess_of_who_has_left_was_not_right(pupils):
    seen = pupils.learn(told={}, guessing=True, guesses={A: (5, 6)})
    assert seen[0] == ("learn", A, {"right": 0, "guessed": 2})


def test_a_step_with_prompts_teaches_its_time_alone(pupils):
    assert pupils.learn(chunks=[Chunk(A, 0, 5)]) == [("time", SHAPE, 0.5)]


def test_a_step_that_failed_at_first_teaches_nothing_but_to_guess_less(pupils):
    assert pupils.learn(retried=True) == []
    assert pupils.learn(retried=True, guessing=True) == [("rest", 2, SHAPE.keys_read)]
    assert pupils.recorder._steps == 2


def test_a_clock_that_stands_teaches_nothing(pupils):
    assert pupils.learn(began=10.0, now=10.0) == []
