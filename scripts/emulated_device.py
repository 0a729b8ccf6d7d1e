"""An engine whose device takes a given time for a step and no processor, to see what the host adds without a card.

A step's time is linear in what it computes, as the engine's own model of it (`wicore_backend/engine/step_time.py`).

The loop, the scheduler, block tables, choosing, telling and sending are the engine's own, as over CUDA: a step is given
to the device before the tokens of the one before are told. Only what a step computes is not there: tokens are random.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from wicore_backend.engine.loading import load_model
from wicore_backend.engine.plan import StepPlan
from wicore_backend.engine.runner import ModelRunner, StepOutput
from wicore_backend.engine.step_time import Coefficients, StepShape

_DIFFERENT = 16
"""Steps until the same logits come again."""

_MODEL = """\
import sys

sys.path.insert(0, {root!r})

from scripts.emulated_device import emulate
from wicore_backend.engine.step_time import Coefficients

emulate({costs!r})

from wicore_backend.triton.gemma3 import TritonPythonModel

__all__ = ["TritonPythonModel"]
"""


def add_emulated_device(parser: Any) -> None:
    """The options that `costs_of` reads; `parser` is an ArgumentParser or a group of one."""
    add = partial(parser.add_argument, type=float)
    add("--emulated-step-ms", help="what a step takes of a device that is only emulated, in place of a CPU")
    add("--emulated-sequence-us", default=0.0, help="and each sequence of a step, with the first of its tokens")
    add("--emulated-prefill-token-us", default=0.0, help="and each further token of a prompt")
    add("--emulated-mixed-ms", default=0.0, help="and a step with both decodes and prompts")


def costs_of(args: Namespace) -> Coefficients | None:
    """What the options say that steps take; None if they ask for no emulated device."""
    if args.emulated_step_ms is None:
        return None
    return Coefficients(
        step=args.emulated_step_ms / 1e3,
        sequence=args.emulated_sequence_us / 1e6,
        prefill_token=args.emulated_prefill_token_us / 1e6,
        key=0.0,
        pair=0.0,
        mixed=args.emulated_mixed_ms / 1e3,
    )


class EmulatedDevice:
    """Computes one step after the other, each in the time that `costs` say."""

    def __init__(self, costs: Coefficients) -> None:
        self._costs = costs
        self._free = 0.0

    def begin(self, shape: StepShape) -> float:
        """Give it a step; returns when that will be computed, by `time.monotonic`."""
        self._free = max(self._free, time.monotonic()) + self._costs.seconds(shape)
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
        done = self._device.begin(plan.shape)
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


def emulate(costs: Coefficients) -> Any:
    """Have engines that are made from now on compute on an emulated device; returns what `stop()` ends that by."""

    def load(settings: Any, woken: Any) -> Any:
        loaded = load_model(settings, woken)
        device = EmulatedDevice(costs)
        runner: Any = EmulatedRunner(loaded.runner, device, most=settings.max_running, vocab_size=loaded.vocab_size)
        return replace(loaded, runner=runner, overlaps=True)

    patch = mock.patch("wicore_backend.engine.engine.load_model", load)
    patch.start()
    return patch


@contextmanager
def emulated(costs: Coefficients | None) -> Iterator[None]:
    """As `emulate`, within the block; None emulates nothing."""
    if costs is None:
        yield
        return
    patch = emulate(costs)
    try:
        yield
    finally:
        patch.stop()


def emulating_model(costs: Coefficients) -> str:
    """The `model.py` of a Triton model whose engine computes on an emulated device."""
    return _MODEL.format(root=str(Path(__file__).resolve().parent.parent), costs=costs)
