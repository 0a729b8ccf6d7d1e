"""Tokens that are computed in case they come: when one is asked for them, how many, and what they do to the books."""

from collections.abc import Sequence as Several

from tests.scheduler_bench import Bench, sequence
from wicore_backend.engine.plan import MOST_GUESSED, StepPlan
from wicore_backend.engine.request import Sequence


class GuessingBench(Bench):
    """Steps of decodes alone compute up to `ahead` guesses for each sequence; so many of them as `right` come."""

    def __init__(self, *, ahead: int, right: Several[int] = (), **options) -> None:
        super().__init__(**options)
        self.ahead = ahead
        self.right = right
        self.asked: list[int] = []

    def guess(self, _: Sequence, most: int) -> tuple[int, ...]:
        self.asked.append(most)
        return (7,) * min(self.ahead, most)

    def guessing_step(self) -> StepPlan:
        plan = self.scheduler.plan(self.now, self.guess)
        self.scheduler.check_integrity()
        self.scheduler.complete(plan)
        for n, s in enumerate(plan.decodes):
            s.tokens.append(7)
            for _ in range(min(self.right[n % len(self.right)] if self.right else 0, len(plan.guesses.get(s, ())))):
                s.tokens.append(7)
                self.scheduler.advance(s)
        for chunk in plan.chunks:
            if chunk.completes:
                chunk.sequence.tokens.append(7)
        self.scheduler.check_integrity()
        for s in self.scheduler.running:
            if len(s.tokens) >= s.max_tokens:
                self.scheduler.finished(s)
        self.now += 1
        return plan


def test_nobody_is_asked_beside_a_prompt():
    b = GuessingBench(ahead=3)
    b.add(sequence(4, 30))
    b.step()
    b.add(sequence(40, first=100))
    plans = [b.guessing_step() for _ in range(4)]
    assert [(bool(plan.chunks), bool(plan.guesses)) for plan in plans] == [(True, False)] * 3 + [(False, True)]
    assert len(b.asked) == 2


def test_no_more_is_guessed_than_the_longest_answer_can_hold():
    b, a = GuessingBench(ahead=100, right=[0]), sequence(6, 5)
    b.add(a)
    b.step()
    plans = []
    while b.scheduler.has_work:
        plans.append(b.guessing_step())
    assert b.asked == [3, 2, 1, 0], "a step tells one token in any case"
    assert [sum(map(len, plan.guesses.values())) for plan in plans] == b.asked
    assert b.counts.guessed_tokens == 6
    assert b.counts.guessed_right == 0


def test_guesses_share_a_step_and_its_shape_counts_them():
    b = GuessingBench(ahead=100, budget=256, running=4)
    for n in range(3):
        b.add(sequence(4, 1000, first=100 * n))
    b.step()
    plan = b.guessing_step()
    ((placed, tokens),) = plan.guesses.items()
    assert b.asked == [MOST_GUESSED, 0, 0]
    assert len(tokens) == MOST_GUESSED
    assert plan.shape == (3 + MOST_GUESSED, 3, 3 * placed.computed - 3, MOST_GUESSED * 4, 0)


def test_a_step_has_no_more_guesses_than_tokens():
    b = GuessingBench(ahead=100, budget=16, running=2)
    b.add(sequence(4, 100), sequence(4, 100, first=50))
    b.step()
    assert b.guessing_step().shape.tokens == 16


def test_nobody_gives_way_to_a_guess_for_which_there_is_no_block():
    b, a = GuessingBench(ahead=5, blocks=2), sequence(5, 30)
    b.add(a)
    b.step()
    b.ahead = 2
    (placed,) = b.guessing_step().guesses.values()
    assert len(placed) == 2, "positions 5 to 7 are in the second block"
    b.ahead = 3
    assert not b.guessing_step().guesses, "position 9 would be in a third one"
    assert b.scheduler.running == [a]
    assert b.counts.preemptions == 0


def test_sequences_whose_guesses_come_begin_their_blocks_when_they_are_there():
    b = GuessingBench(ahead=5, right=[0, 3, 1, 5], running=4, budget=64)
    for n in range(12):
        b.add(sequence(3 + n, 40 + n, first=1000 * n))
    while b.scheduler.has_work:  # The books are proved after each step.
        b.guessing_step()
    assert b.counts.guessed_right > 100
