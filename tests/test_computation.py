"""What is got out of a step that fails."""

import time
from collections.abc import Sequence as Rows
from unittest import mock

import numpy as np
import pytest
import torch

from wicore_backend.engine.computation import compute
from wicore_backend.engine.plan import StepPlan
from wicore_backend.engine.request import Request, Sequence
from wicore_backend.engine.runner import StepOutput
from wicore_backend.engine.sampling_params import SamplingParams
from wicore_backend.engine.step_time import StepShape
from wicore_backend.processor.prompt import Prompt


class ReplayingRunner:
    """Leaves each step's logits where it left those of the step before, as a captured step does.

    A sequence's are its place among `sequences` in every column.
    """

    def __init__(self, sequences: Rows[Sequence], fault: Sequence | None) -> None:
        self._sequences = sequences
        self._fault = fault
        self._logits = torch.empty(len(sequences), 4)

    def run(self, plan: StepPlan, _ahead: torch.Tensor | None = None) -> StepOutput:
        if self._fault in plan.decodes:
            raise RuntimeError("no luck")
        for row, sequence in enumerate(plan.decodes):
            self._logits[row] = self._sequences.index(sequence)
        nothing = torch.empty(0)
        return StepOutput(mock.Mock(), nothing, nothing, tuple(range(len(plan.decodes) + 1)), computed=self._logits)


def sequence() -> Sequence:
    request = Request("r", Prompt(np.zeros(1, np.int32)), SamplingParams(), lambda _: None, time.monotonic())
    return Sequence(request, max_tokens=8)


@pytest.mark.parametrize("faulty", [0, 2, 3])
def test_each_keeps_its_own_logits_where_steps_leave_theirs_in_one_place(faulty):
    sequences = [sequence() for _ in range(4)]
    runner = ReplayingRunner(sequences, sequences[faulty])
    computed = compute(runner, StepPlan(sequences, [], StepShape(4, 4, 4, 0)))
    assert list(computed.failed) == [sequences[faulty]]
    assert computed.logits[:, 0].tolist() == [sequences.index(s) for s in computed.ready]
