"""Blocking jobs on a few threads, such that nobody who waits for one waits longer than its deadline.

A thread inside the kernel cannot be called back. So a job is *settled*, and its owner told, apart from the thread's
return:

- *queued*: waiting for a thread. May be abandoned.
- *working*: a thread is in `Job.work`, which may block for as long as a broken disk likes, and so must not write to the
  owner's memory. May be abandoned: by its owner, by its own deadline, or by the lane's deadline for one job's work.
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
from collections import deque
from collections.abc import Sequence
from enum import Enum, auto
from typing import NamedTuple

from wicore_backend.hmt.nvme.outcome import Outcome

_log = logging.getLogger(__name__)


class _State(Enum):
    QUEUED = auto()
    WORKING = auto()
    FINISHING = auto()
    SETTLED = auto()


class Job(ABC):
    """One piece of blocking work. Its methods are called by its lane, with no lock held."""

    def __init__(self) -> None:
        self._state = _State.QUEUED
        self._in_work = False
        self._late = False

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for the outcome; a hint to `work`, out of date at once."""
        return self._state is not _State.SETTLED

    @abstractmethod
    def work(self, buffer: memoryview) -> Outcome:
        """The blocking part; `buffer` is the thread's own. Raises nothing but bugs."""

    @abstractmethod
    def finish(self, outcome: Outcome, *, wanted: bool) -> Outcome:
        """Put what came of the work where it belongs, in memory only; the outcome to settle with, if that is still
        wanted.

        Called once for every job, also for one that never started.
        """

    @abstractmethod
    def settle(self, outcome: Outcome) -> None:
        """Tell the owner. Called once for every job."""


class _Alarm(NamedTuple):
    at: float
    number: int
    job: weakref.ref[Job]
    of_work: bool


class Lane:
    """A queue, its threads, and a thread that watches the clock.

    Parameters
    ----------
    buffers
        One for each thread.
    work_deadline_s
        For the work of one job, from when a thread takes it.
    """

    def __init__(self, name: str, buffers: Sequence[memoryview], *, work_deadline_s: float) -> None:
        self._work_deadline_s = work_deadline_s
        self._lock = threading.Lock()
        self._jobs_wait = threading.Condition(self._lock)
        self._alarms_wait = threading.Condition(self._lock)
        self._queue: deque[Job] = deque()
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

    def submit(self, jobs: Sequence[Job], *, deadline_s: float | None = None) -> bool:
        """Queue jobs, to be settled within `deadline_s` if given. False, and nothing done, if stuck or closed."""
        with self._lock:
            if self.stuck or self._closing:
                return False
            self._queue.extend(jobs)
            self._jobs_wait.notify(len(jobs))
            if deadline_s is not None:
                for job in jobs:
                    self._set_alarm(deadline_s, job, of_work=False)
            return True

    def abandon(self, job: Job, outcome: Outcome) -> bool:
        """Settle `job` with `outcome` now; False if it is finishing or settled already."""
        with self._lock:
            if job._state not in (_State.QUEUED, _State.WORKING):
                return False
            job._state = _State.SETTLED
            started = job._in_work
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
            self._queue.clear()
            self._closed = True
            self._alarms_wait.notify_all()
        for job in left:
            self.abandon(job, Outcome.CLOSED)
        return not any(thread.is_alive() for thread in self._threads)

    def _serve(self, buffer: memoryview) -> None:
        while (job := self._next()) is not None:
            outcome = self._worked(job, buffer)
            with self._lock:
                job._in_work = False
                self._late_threads -= job._late
                wanted = job._state is _State.WORKING
                if wanted:
                    job._state = _State.FINISHING
            outcome = job.finish(outcome, wanted=wanted)
            if wanted:
                with self._lock:
                    job._state = _State.SETTLED
                job.settle(outcome)
            del job  # A thread without work must not keep memory of its last owner alive.

    def _worked(self, job: Job, buffer: memoryview) -> Outcome:
        try:
            return job.work(buffer)
        except Exception:
            _log.exception("nvme_store_bug")
            return Outcome.FAILED

    def _next(self) -> Job | None:
        with self._lock:
            while True:
                while self._queue:
                    job = self._queue.popleft()
                    if job._state is _State.QUEUED:
                        job._state = _State.WORKING
                        job._in_work = True
                        self._set_alarm(self._work_deadline_s, job, of_work=True)
                        return job
                    del job
                if self._closing:
                    return None
                self._jobs_wait.wait()

    def _set_alarm(self, after_s: float, job: Job, *, of_work: bool) -> None:
        alarm = _Alarm(time.monotonic() + after_s, next(self._numbers), weakref.ref(job), of_work)
        heapq.heappush(self._alarms, alarm)
        if self._alarms[0] is alarm:
            self._alarms_wait.notify()

    def _watch_clock(self) -> None:
        while (late := self._next_late()) is not None:
            for job in late:
                self.abandon(job, Outcome.LATE)

    def _next_late(self) -> list[Job] | None:
        """Wait for an alarm; the jobs that it concerns, or None once the lane is closed."""
        with self._lock:
            while not self._closed:
                wait_s = self._alarms[0].at - time.monotonic() if self._alarms else None
                if wait_s is None or wait_s > 0:
                    self._alarms_wait.wait(wait_s)
                    continue
                alarm = heapq.heappop(self._alarms)
                job = alarm.job()
                if job is None or (alarm.of_work and not job._in_work):
                    continue
                late = [job]
                if alarm.of_work:
                    job._late = True
                    self._late_threads += 1
                    if self.stuck:
                        late.extend(self._queue)
                        self._queue.clear()
                return late
            return None
