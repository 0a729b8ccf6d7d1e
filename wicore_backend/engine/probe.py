"""A step for nobody, to see whether an engine in trouble can compute."""

from __future__ import annotations

import time

import numpy as np

from wicore_backend.engine.health import HealthMonitor
from wicore_backend.engine.loading import LoadedModel
from wicore_backend.engine.plan import Chunk, StepPlan
from wicore_backend.engine.request import Request, Sequence
from wicore_backend.engine.sampling_params import SamplingParams
from wicore_backend.engine.step_time import StepShape
from wicore_backend.hmt.blocks import PrefixMatch
from wicore_backend.processor.prompt import Prompt


def probe(model: LoadedModel, monitor: HealthMonitor) -> None:
    """Tell `monitor` whether one token can be computed: who is told to stay away will not come to show it.

    To be called while nothing runs.
    """
    try:
        _compute_for_nobody(model)
        monitor.recovered()
    except Exception as error:
        monitor.trouble(f"the engine cannot compute: {error}")


def _compute_for_nobody(model: LoadedModel) -> None:
    prompt = Prompt(np.zeros(1, np.int32))
    sequence = Sequence(Request("probe", prompt, SamplingParams(), lambda _: None, time.monotonic()), max_tokens=1)
    sequence.blocks = model.blocks.open(None, PrefixMatch(), max_tokens=1, expected_tokens=1)
    try:
        model.blocks.extend(sequence.blocks, 0, 1)
        model.mover.move()
        model.runner.run(StepPlan([], [Chunk(sequence, 0, 1)], StepShape(1, 1, 0, 0, 1))).done()
    finally:
        model.blocks.close(sequence.blocks)
