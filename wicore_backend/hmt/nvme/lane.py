"""Blocking jobs on a few threads, such that nobody who waits for one waits longer than its deadline.

A thread inside the kernel cannot be called back. So a job is *settled*, and its owner told, apart from the thread's
return:

- *queued*: waiting for a thread. May be abandoned.
- *working*: a thread is in the lane's `work` with it, which may block for as long as a broken disk likes, and so must
  not write to the owner's memory. May be abandoned: by its owner, by its own deadline, or by the lane's deadline for
  one job's work.
- *finishing*: in `Job.finish`, which touches memory only and is over soon. Too late to abandon.
- *settled*: `Job.settle` has been called, once; the owner's memory is the owner's again.

An abandoned job is settled at once. Its thread, when it comes back, still calls `finish`, and is told there that nobody
wants the outcome. While all threads are late, the lane is *stuck*: it settles what is queued and refuses new jobs,
until one comes back.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Any, Generic, NamedTuple, TypeVar

from wicore_backend.hmt.nvme.outcome import Outcome

_log = logging.getLogger(__name__)
_MOST_JOBS = 256  # Two pieces each, and the kernel takes 1,024 in a call.


class _State(Enum):
    QUEUED = auto()
    WORKING = auto()
    FINISHING = auto()
    SETTLED = auto()


class Job(ABC):
    """One piece of blocking work. Its methods are called by its lane, with no lock held.

    Parameters
    ----------
    weight
        Bytes of the thread's buffer that it needs.
    """

    def __init__(self, *, weight: int) -> None:
        self.weight = weight
        self._state = _State.QUEUED
        self._in_work = False

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for the outcome; a hint to the work, out of date at once."""
        return self._state is not _State.SETTLED

    @abstractmethod
    def finish(self, outcome: Outcome, *, wanted: bool) -> Outcome:
        """Put what came of the work where it belongs, in memory only; the outcome to settle with, if still wanted.

        Called once for every job, also for one that never started.
        """

    @abstractmethod
    def settle(self, outcome: Outcome) -> None:
        """Tell the owner. Called once for every job."""


J = TypeVar("J", bound=Job)


class _Group(Generic[J]):
    """Jobs that a thread works on together."""

    def __init__(self, jobs: list[J]) -> None:
        self.jobs = jobs
        self.in_work = True
        self.late = False


class _Alarm(NamedTuple):
    at: float
    number: int
    concerns: weakref.ref[Any]
    """A job that its owner wants by then, or a group that should be worked off by then."""


class Lane(Generic[J]):
    """A queue, its threads, and a thread that watches the clock.

    Parameters
    ----------
    work
        The blocking part of some jobs, done together: their outcomes. Raises nothing but bugs.
    buffers
        One for each thread, handed to `work`. Jobs that wait are worked on together as long as they fit it and leave
        enough for the other threads, ...
    enough
        ... until they have that weight together: while a thread is busy with what it has read, the next read waits.
    work_deadline_s
        For one call of `work`.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[Sequence[J], memoryview], list[Outcome]],
        buffers: Sequence[memoryview],
        *,
        enough: int,
        work_deadline_s: float,
    ) -> None:
        self._work = work
        self._enough = enough
        self._work_deadline_s = work_deadline_s
        self._lock = threading.Lock()
        self._jobs_wait = threading.Condition(self._lock)
        self._alarms_wait = threading.Condition(self._lock)
        self._queue: OrderedDict[J, None] = OrderedDict()
        self._alarms: list[_Alarm] = []
        self._numbers = itertools.count()
        self._late_threads = 0
        self._closing = False
        self._closed = False
        self._threads = [
            threading.Thread(target=self._serve, args=(buffer,), name=f"{name}-{number}", daemon=True)
            for number, buffer in enumerate(buffers)
        ]
        self._watch = threading.Thread(target=self._watch_clock, name=f"{name}-clock", daemon=True)
        for thread in (*self._threads, self._watch):
            thread.start()

    @property
    def queued(self) -> int:
        """Jobs that wait for a thread."""
        return len(self._queue)

    @property
    def stuck(self) -> bool:
        """Whether every thread is past its deadline."""
        return self._late_threads == len(self._threads)

    def submit(self, jobs: Sequence[J], *, deadline_s: float | None = None) -> bool:
        """Queue jobs, to be settled within `deadline_s` if given. False, and nothing done, if stuck or closed."""
        with self._lock:
            if self.stuck or self._closing:
                return False
            self._queue.update(dict.fromkeys(jobs))
            self._jobs_wait.notify(len(jobs))
            if deadline_s is not None:
                for job in jobs:
                    self._set_alarm(deadline_s, job)
            return True

    def abandon(self, job: J, outcome: Outcome) -> bool:
        """Settle `job` with `outcome` now; False if it is finishing or settled already."""
        with self._lock:
            if job._state not in (_State.QUEUED, _State.WORKING):
                return False
            job._state = _State.SETTLED
            started = job._in_work
            if not started:
                self._queue.pop(job, None)
        if not started:
            job.finish(outcome, wanted=False)
        job.settle(outcome)
        return True

    def close(self, timeout_s: float) -> bool:
        """Work off the queue and end the threads. False if some stay blocked; what still waits is settled as closed."""
        with self._lock:
            self._closing = True
            self._jobs_wait.notify_all()
        end = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        with self._lock:
            left = list(self._queue)
            self._closed = True
            self._alarms_wait.notify_all()
        for job in left:
            self.abandon(job, Outcome.CLOSED)
        self._watch.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _serve(self, buffer: memoryview) -> None:
        while (group := self._next(len(buffer))) is not None:
            outcomes = self._worked(group.jobs, buffer)
            with self._lock:
                group.in_work = False
                self._late_threads -= group.late
                wanted = [job._state is _State.WORKING for job in group.jobs]
                for job, still in zip(group.jobs, wanted, strict=True):
                    job._in_work = False
                    if still:
                        job._state = _State.FINISHING
            for job, outcome, still in zip(group.jobs, outcomes, wanted, strict=True):
                settled = self._finished(job, outcome, wanted=still)
                if still:
                    job._state = _State.SETTLED
                    job.settle(settled)
            del group, job  # A thread without work must not keep memory of its last owners alive.

    def _worked(self, jobs: list[J], buffer: memoryview) -> list[Outcome]:
        try:
            return self._work(jobs, buffer)
        except Exception:
            _log.exception("nvme_store_bug")
            return [Outcome.FAILED] * len(jobs)

    def _finished(self, job: J, outcome: Outcome, *, wanted: bool) -> Outcome:
        try:
            return job.finish(outcome, wanted=wanted)
        except Exception:
            _log.exception("nvme_store_bug")
            return Outcome.FAILED

    def _next(self, room: int) -> _Group[J] | None:
        with self._lock:
            while not self._queue:
                if self._closing:
                    return None
                self._jobs_wait.wait()
            share = -(-len(self._queue) // len(self._threads))
            group = _Group([self._start()])
            weight = group.jobs[0].weight
            while self._queue and weight < self._enough and len(group.jobs) < min(share, _MOST_JOBS):
                weight += next(iter(self._queue)).weight
                if weight > room:
                    break
                group.jobs.append(self._start())
            self._set_alarm(self._work_deadline_s, group)
            return group

    def _start(self) -> J:
        job, _ = self._queue.popitem(last=False)
        job._state = _State.WORKING
        job._in_work = True
        return job

    def _set_alarm(self, after_s: float, concerns: J | _Group[J]) -> None:
        alarm = _Alarm(time.monotonic() + after_s, next(self._numbers), weakref.ref(concerns))
        heapq.heappush(self._alarms, alarm)
        if self._alarms[0] is alarm:
            self._alarms_wait.notify()

    def _watch_clock(self) -> None:
        while (late := self._next_late()) is not None:
            for job in late:
                self.abandon(job, Outcome.LATE)

    def _next_late(self) -> list[J] | None:
        """Wait for an alarm; the jobs that it concerns, or None once the lane is closed."""
        with self._lock:
            while not self._closed:
                wait_s = self._alarms[0].at - time.monotonic() if self._alarms else None
                if wait_s is None or wait_s > 0:
                    self._alarms_wait.wait(wait_s)
                    continue
                concerned = heapq.heappop(self._alarms).concerns()
                if isinstance(concerned, _Group):
                    if concerned.in_work:
                        return self._late(concerned)
                elif concerned is not None:
                    return [concerned]
            return None

    def _late(self, group: _Group[J]) -> list[J]:
        group.late = True
        self._late_threads += 1
        return [*group.jobs, *self._queue] if self.stuck else list(group.jobs)
