"""What the scheduler itself takes of a step: `python -m scripts.benchmark scheduler`."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from random import Random
from typing import Any

from scripts.simulation.machine import Machine
from scripts.simulation.replay import Arrival, Replay, RequestClass
from scripts.simulation.traces import TraceRequest
from wicore_backend.engine.plan import Fork, Guess, SchedulerLimits, StepPlan
from wicore_backend.engine.request import PriorityClass, Sequence
from wicore_backend.engine.scheduler import Scheduler
from wicore_backend.engine.step_time import StepTimeModel
from wicore_backend.hmt.blocks import BlockManager

_TARGET_US = 200
_ROOMY = Machine(kv_bytes=220 * 10**9)
"""Its memory holds the 256 sequences, which that of one H200 does not: only the books of it are made."""


class TimedScheduler(Scheduler):
    """Takes the time of `plan`, `complete` and `finished` in steps that find as many to run and to wait as wanted.

    It is the thread's CPU time: on a shared machine, the time that others take is none of the scheduler's.
    """

    running_wanted = 0
    waiting_wanted = 0

    def __init__(self, blocks: BlockManager, limits: SchedulerLimits, step_time: StepTimeModel) -> None:
        super().__init__(blocks, limits, step_time)
        self.seconds: list[float] = []
        self._planned: float | None = None
        self._ended = 0.0

    def plan(self, now: float, guess: Guess | None = None) -> StepPlan:
        """See Scheduler."""
        busy = self.num_running >= self.running_wanted and self.num_waiting >= self.waiting_wanted
        began = time.thread_time()
        plan = super().plan(now, guess)
        self._planned = self._ended + time.thread_time() - began if busy else None
        self._ended = 0.0
        return plan

    def complete(self, plan: StepPlan) -> list[Fork]:
        """See Scheduler."""
        began = time.thread_time()
        forks = super().complete(plan)
        if self._planned is not None:
            self.seconds.append(self._planned + time.thread_time() - began)
        return forks

    def finished(self, sequence: Sequence) -> None:
        """See Scheduler. It counts for the next step."""
        began = time.thread_time()
        super().finished(sequence)
        self._ended += time.thread_time() - began


def benchmark_scheduler(args: argparse.Namespace) -> dict[str, Any]:
    """Microseconds that `plan`, `complete` and `finished` take of a step, `--running` running and `--waiting` waiting.

    Prompts of about 600 tokens and answers of about 400 come and go, in three classes: most steps decode all that run
    but a few, of which they compute the prompts; in two of three steps a sequence ends and another takes its place.
    """
    rounds = [_round(args, seed) for seed in range(args.rounds)]
    medians = [statistics.median(steps) for steps in rounds]
    return {
        "running": args.running,
        "waiting": args.waiting,
        "steps_of_a_round": args.steps,
        "rounds": args.rounds,
        "median_us": round(statistics.median(medians) * 1e6, 1),
        "best_median_us": round(min(medians) * 1e6, 1),
        "p99_us": round(statistics.median(_p99(steps) for steps in rounds) * 1e6, 1),
        "best_p99_us": round(min(_p99(steps) for steps in rounds) * 1e6, 1),
        "target_us": _TARGET_US,
    }


def _round(args: argparse.Namespace, seed: int) -> list[float]:
    """Seconds that each of `--steps` steps takes."""
    random = Random(seed)

    def requests() -> Iterator[Arrival]:
        while True:
            prompt = min(16_000, max(1, round(random.lognormvariate(6.0, 0.9))))
            answer = 1 + round(random.expovariate(1 / 400))
            yield Arrival(0.0, TraceRequest(0.0, prompt, answer), random.choice(_CLASSES))

    limits = SchedulerLimits(
        max_batch_tokens=2048,
        max_running=args.running,
        max_waiting=2 * args.waiting,
        max_waiting_tokens=10**9,
        target_tpot_s=0.15,
    )
    replay = Replay(
        _ROOMY,
        limits,
        block_size=None,
        backlog=requests(),
        backlog_depth=args.waiting + 32,
        seed=seed,
        stop=lambda replay: len(_timed(replay).seconds) >= args.steps,
        scheduler=TimedScheduler,
    )
    scheduler = _timed(replay)
    scheduler.running_wanted, scheduler.waiting_wanted = round(0.95 * args.running), args.waiting
    replay.run()
    return scheduler.seconds


def _timed(replay: Replay) -> TimedScheduler:
    assert isinstance(replay.scheduler, TimedScheduler)
    return replay.scheduler


_CLASSES = [RequestClass(c.name.lower(), c, 1 / 3) for c in PriorityClass]


def _p99(values: list[float]) -> float:
    return sorted(values)[len(values) * 99 // 100]
