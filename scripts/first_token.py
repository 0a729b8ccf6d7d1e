"""Where the time to the first token of a prompt goes that an idle engine gets: to its host, its device, its caller."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from wicore_backend import Engine
from wicore_backend.engine.runner import ModelRunner


@dataclass(frozen=True, slots=True)
class Parts:
    """Seconds of one prompt's way to its first token; the first three make up all of it.

    Attributes
    ----------
    to_device
        From the call that asks until the device has the first of its work: the prompt's checks, the queue, planning and
        packing the step.
    on_device
        From there until the device has chosen the token, by its own clock.
    to_caller
        What is left: from there until the token has been told.
    launching
        Beside the device: from its first work until it has been given the last.
    """

    to_device: float
    on_device: float
    to_caller: float
    launching: float

    @staticmethod
    def medians_ms(of: Sequence[Parts]) -> dict[str, float]:
        return {
            name: round(statistics.median(getattr(parts, name) for parts in of) * 1e3, 3) for name in Parts.__slots__
        }


class FirstTokenClock:
    """Notes the times of one prompt after the other, each of which has the engine to itself.

    It looks from outside at what the engine calls, so that the engine itself takes no more time than it does.

    Attributes
    ----------
    asked
        When the last one was asked, by `time.perf_counter`.
    """

    def __init__(self, engine: Engine) -> None:
        self.asked = 0.0
        self._began: tuple[float, Any] | None = None
        self._chosen: tuple[float, Any] | None = None
        runner, emitter = engine._model.runner, engine._emitter
        assert isinstance(runner, ModelRunner)
        self._cuda = runner._executor.device.type == "cuda"
        for owner, name, after in ((runner, "_pack", self._packed), (emitter, "choose", self._chose)):
            mock.patch.object(owner, name, _followed(getattr(owner, name), after)).start()

    def ask(self) -> None:
        """A prompt is asked now."""
        self._began = self._chosen = None
        if self._cuda:
            torch.cuda.synchronize()  # What ended the answer before may still be computed in vain.
        self.asked = time.perf_counter()

    def parts(self, ttft_s: float) -> Parts:
        """Of the prompt asked last, whose first token came after so many seconds."""
        assert self._began is not None
        assert self._chosen is not None
        (began, first), (chosen, last) = self._began, self._chosen
        on_device = first.elapsed_time(last) / 1e3 if self._cuda else chosen - began
        # The device was idle, and so began at once.
        to_device = began - self.asked
        return Parts(to_device, on_device, ttft_s - to_device - on_device, chosen - began)

    def _packed(self) -> None:
        if self._began is None:
            self._began = self._now()

    def _chose(self) -> None:
        if self._chosen is None:
            self._chosen = self._now()

    def _now(self) -> tuple[float, Any]:
        """The host's time, and an event that the device meets when it has done what it was given before."""
        event = None
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
        return time.perf_counter(), event


def _followed(call: Callable[..., Any], after: Callable[[], None]) -> Callable[..., Any]:
    def both(*args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        after()
        return result

    return both
