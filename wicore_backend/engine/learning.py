"""What is learnt from steps that have been told: how long they take, whether guesses pay, what statistics say."""

from __future__ import annotations

from collections.abc import Mapping

from wicore_backend.engine.request import Sequence
from wicore_backend.engine.speculation import Speculator
from wicore_backend.engine.statistics import StatisticsRecorder
from wicore_backend.engine.step_time import StepTimeModel
from wicore_backend.engine.untold import UntoldStep


class StepLearner:
    """Teaches those who foresee: one thread's, step by step in their order.

    A step's time is that from the end of the one before, or from its own beginning if that was later: what the host
    does for one step while the device is at another is in neither twice.
    """

    def __init__(self, recorder: StatisticsRecorder, step_time: StepTimeModel, speculator: Speculator) -> None:
        self._recorder = recorder
        self._step_time = step_time
        self._speculator = speculator
        self._told_at = 0.0

    def learn(self, step: UntoldStep, told: Mapping[Sequence, int], now: float) -> None:
        """`step` has been told, so many tokens of each sequence, the last of them just `now`."""
        seconds, self._told_at = now - max(step.began, self._told_at), now
        plan = step.plan
        self._recorder.step(plan, seconds, self._step_time)
        if step.computed.retried:
            if step.guessing:
                self._speculator.rest(len(plan.decodes), plan.shape.keys_read)
            return
        if seconds <= 0:  # Of a clock that has not moved nothing is learnt.
            return
        if not plan.guesses:
            self._step_time.observe(plan.shape, seconds)
        if plan.decodes and not plan.chunks:
            self._judge_guesses(step, told, seconds)

    def _judge_guesses(self, step: UntoldStep, told: Mapping[Sequence, int], seconds: float) -> None:
        for sequence, guessed in step.plan.guesses.items():
            right = max(0, told.get(sequence, 0) - 1)
            self._speculator.learn(sequence, right=right, guessed=len(guessed))
        self._speculator.observe(
            decodes=len(step.plan.decodes),
            keys=step.plan.shape.keys_read,
            tokens=sum(told.values()),
            seconds=seconds,
            guessing=step.guessing,
        )
