"""An engine whose device takes a given time for a step and no processor, to see what the host adds without a card.

The loop, the scheduler, block tables, choosing, telling and sending are the engine's own, as over CUDA: a step is given
to the device before the tokens of the one before are told. Only what a step computes is not there: tokens are random.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from wicore_backend.engine.loading import load_model
from wicore_backend.engine.plan import StepPlan
from wicore_backend.engine.runner import ModelRunner, StepOutput

_DIFFERENT = 16
"""Steps until the same logits come again."""

_MODEL = """\
import sys

sys.path.insert(0, {root!r})

from scripts.emulated_device import emulate

emulate({step_s!r})

from wicore_backend.triton.gemma3 import TritonPythonModel

__all__ = ["TritonPythonModel"]
"""


class EmulatedDevice:
    """Computes one step after the other, each in the same time."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._free = 0.0

    def begin(self) -> float:
        """Give it a step; returns when that will be computed, by `time.monotonic`."""
        self._free = max(self._free, time.monotonic()) + self._step_s
        return self._free


@dataclass(frozen=True, slots=True, eq=False)
class _Output(StepOutput):
    """A step's output whose logits are there for any rows."""

    def logits(self, rows: Any) -> Tensor:
        assert self.computed is not None
        return self.computed[: len(rows)]


class EmulatedRunner:
    """Packs steps as `runner` does, and has `device` take its time for them in place of computing.

    Parameters
    ----------
    most
        Sequences of a step, at most.
    """

    def __init__(self, runner: ModelRunner, device: EmulatedDevice, *, most: int, vocab_size: int) -> None:
        self._runner = runner
        self._device = device
        self.sampling = runner.sampling
        generator = torch.Generator().manual_seed(0)
        self._logits = cycle([torch.rand(most, vocab_size, generator=generator) for _ in range(_DIFFERENT)])
        self._nothing = torch.empty(0)

    def run(self, plan: StepPlan, ahead: Tensor | None = None) -> StepOutput:
        runner, chunks = self._runner, plan.parts
        step = runner._pack(chunks, decodes=len(plan.decodes), measured={})
        runner._ids(plan, ahead)
        offsets = (0, *step.query_lens.cumsum().tolist())
        done = self._device.begin()
        return _Output(
            runner._executor,
            self._nothing,
            self._nothing,
            offsets,
            done=lambda: time.sleep(max(0.0, done - time.monotonic())),
            over=lambda: time.monotonic() >= done,
            computed=next(self._logits),
        )

    def foresee(self, *_: Any) -> None:
        """Nothing shows pictures here."""

    def forget(self, *_: Any) -> None:
        """Nothing was foreseen."""


def emulate(step_s: float) -> Any:
    """Have engines that are made from now on compute on an emulated device; returns what `stop()` ends that by."""

    def load(settings: Any, woken: Any) -> Any:
        loaded = load_model(settings, woken)
        device = EmulatedDevice(step_s)
        runner: Any = EmulatedRunner(loaded.runner, device, most=settings.max_running, vocab_size=loaded.vocab_size)
        return replace(loaded, runner=runner, overlaps=True)

    patch = mock.patch("wicore_backend.engine.engine.load_model", load)
    patch.start()
    return patch


@contextmanager
def emulated(step_s: float | None) -> Iterator[None]:
    """As `emulate`, within the block; None emulates nothing."""
    if step_s is None:
        yield
        return
    patch = emulate(step_s)
    try:
        yield
    finally:
        patch.stop()


def emulating_model(step_s: float) -> str:
    """The `model.py` of a Triton model whose engine computes on an emulated device."""
    return _MODEL.format(root=str(Path(__file__).resolve().parent.parent), step_s=step_s)
