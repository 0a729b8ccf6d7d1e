"""How much memory a piece of work takes, seen by PyTorch's own allocator."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most that `work` has of the CPU's memory at one time, what operators take inside themselves included.

    The median of three times, since a thread that an earlier test has left may take some meanwhile, or let some go.
    """
    gc.collect()  # What earlier tests have left would be let go meanwhile.
    return sorted(_peak(work) for _ in range(3))[1]


def _peak(work: Callable[[], Any]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as observed, torch.inference_mode():
        kept = work()
    del kept
    now = peak = 0
    results = observed.profiler.kineto_results
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
