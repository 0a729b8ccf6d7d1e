"""The requests that an engine has, from when its loop takes them up to their last event. On the loop's thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict

from wicore_backend.config import EngineConfig
from wicore_backend.engine.generation import Generation
from wicore_backend.engine.job import Job
from wicore_backend.engine.plan import Rejected, RejectReason
from wicore_backend.engine.request import DeadlineKind, FinishReason, Request, Sequence
from wicore_backend.engine.scheduler import Scheduler
from wicore_backend.engine.statistics import StatisticsRecorder
from wicore_backend.errors import (
    CancelledError,
    DeadlineExceededError,
    EngineError,
    InvalidArgumentError,
    OverloadedError,
    WicoreError,
)
from wicore_backend.observability.logfmt import logfmt

_log = logging.getLogger(__name__)

CLOSING_RETRY_S = 5.0
"""What a client of a closing engine is told to wait: time for another one to take its place."""


class RequestLedger:
    """Whose each sequence is, and how each request ends: with one last event, whatever happens.

    Parameters
    ----------
    ended
        Called after each request's last event.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        recorder: StatisticsRecorder,
        config: EngineConfig,
        ended: Callable[[Request], None],
    ) -> None:
        self._scheduler = scheduler
        self._recorder = recorder
        self._config = config
        self._ended = ended
        self._jobs: dict[str, Job] = {}
        self._owners: dict[Sequence, tuple[Job, Generation]] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, sequence: Sequence) -> bool:
        """Whether somebody still waits for the sequence's tokens."""
        return sequence in self._owners

    def owner(self, sequence: Sequence) -> tuple[Job, Generation]:
        """The request and the answer that a sequence computes."""
        return self._owners[sequence]

    def add(self, job: Job) -> None:
        """Queue a request; one that is turned away ends at once."""
        request = job.request
        if request.id in self._jobs:
            error = InvalidArgumentError(f"a request with id {request.id!r} is already running; ids must differ")
            self._conclude(job, FinishReason.ERROR, error)
            return
        self._jobs[request.id] = job
        for generation in job.generations:
            if request.id in self._jobs:  # Not yet rejected with an earlier answer.
                self._owners[generation.sequence] = (job, generation)
                self._reject(self._scheduler.add(generation.sequence, time.monotonic()))

    def note_start(self, sequences: Iterable[Sequence], now: float) -> None:
        """Sequences are in the step that begins `now`."""
        for sequence in sequences:
            job = self._owners[sequence][0]
            if job.start(now):
                self._recorder.started(job.request, now)

    def count_token(self) -> None:
        """An answer has grown by a token."""
        self._recorder.completion_tokens += 1

    def end_answer(self, job: Job, sequence: Sequence) -> None:
        """An answer has come to its own end; with the last of its request's, so has the request."""
        self._scheduler.finished(sequence)
        del self._owners[sequence]
        if job.done:
            reason = job.generations[0].reason
            assert reason is not None
            self._finish(job, reason)

    def cancel(self, request_id: str) -> None:
        """End a request; an unknown id is none's."""
        job = self._jobs.get(request_id)
        if job is not None:
            self._finish(job, FinishReason.CANCELLED, CancelledError("the request was cancelled"))

    def expire(self, now: float) -> None:
        """End whose deadline has passed, and who cannot be in time any more."""
        for sequence, kind in self._scheduler.expire(now):
            job = self._owners[sequence][0]
            if kind is DeadlineKind.QUEUE and job.started is not None:
                continue  # Another of its answers has begun in time.
            limit = dict(job.request.deadlines.items())[kind]
            said = _MISSED[kind].format(limit)
            self._finish(job, FinishReason.DEADLINE, DeadlineExceededError(said))
        self._reject(self._scheduler.give_up(now))

    def fail(self, sequence: Sequence, fault: Exception) -> None:
        """End the request of a sequence that cannot be computed."""
        if sequence in self._owners:
            own_words = fault if isinstance(fault, WicoreError) else None
            error = own_words or EngineError(f"the engine failed while it computed this request: {fault}")
            self._finish(self._owners[sequence][0], FinishReason.ERROR, error)

    def finish_all(self, why: str) -> None:
        """End every request: who has not begun is told to come again."""
        for job in list(self._jobs.values()):
            if job.started is None:
                self._recorder.rejected[RejectReason.DRAINING] += 1
                self._finish(job, FinishReason.REJECTED, OverloadedError(why, retry_after_s=CLOSING_RETRY_S))
            else:
                self._finish(job, FinishReason.CANCELLED, CancelledError(why))

    def abandon_all(self, error: WicoreError) -> None:
        """End every request without touching the scheduler's books."""
        for job in self._jobs.values():
            self._conclude(job, FinishReason.ERROR, error)
        self._jobs.clear()
        self._owners.clear()

    def _reject(self, rejected: Iterable[Rejected]) -> None:
        refused: dict[Job, Rejected] = {}  # Several answers of a request may be turned away at once.
        for refusal in rejected:
            job, _ = self._owners.pop(refusal.sequence)
            refused.setdefault(job, refusal)
        for job, refusal in refused.items():
            error = _refusal(refusal, self._config)
            if job.started is None:
                self._recorder.rejected[refusal.reason] += 1
                self._finish(job, FinishReason.REJECTED, error)
            else:  # Another of its answers runs, or this one has been preempted.
                late = refusal.reason is RejectReason.TOO_LATE
                self._finish(job, FinishReason.DEADLINE if late else FinishReason.CANCELLED, error)

    def _finish(self, job: Job, reason: FinishReason, error: WicoreError | None = None) -> None:
        del self._jobs[job.request.id]
        try:
            for generation in job.generations:
                if self._owners.pop(generation.sequence, None) is not None:
                    self._scheduler.remove(generation.sequence)
        finally:
            self._conclude(job, reason, error)

    def _conclude(self, job: Job, reason: FinishReason, error: WicoreError | None) -> None:
        event = job.finish(reason, time.monotonic(), error)
        self._recorder.finished(event)
        self._ended(job.request)
        _log.info(
            logfmt(
                "request",
                id=job.request.id,
                tenant=job.request.tenant or None,
                priority=job.request.priority,
                reason=reason,
                code=error and error.code,
                images=len(job.request.prompt.images),
                **asdict(event.usage),
                tpot_s=event.usage.tpot_s,
                preemptions=sum(g.sequence.preemptions for g in job.generations),
                error=error,
            )
        )


_MISSED = {
    DeadlineKind.QUEUE: "the queue deadline of {:.3f} s has passed before the first step",
    DeadlineKind.FIRST_TOKEN: "the first-token deadline of {:.3f} s has passed",
    DeadlineKind.TOTAL: "the deadline of {:.3f} s has passed",
}


def _refusal(refusal: Rejected, config: EngineConfig) -> WicoreError:
    match refusal.reason:
        case RejectReason.TOO_LATE:
            return DeadlineExceededError(
                f"the first token would come {refusal.expected_s:.3f} s after the request, and it is due after "
                f"{refusal.sequence.request.deadlines.first_token:.3f} s; allow more time, or retry later"
            )
        case RejectReason.QUEUE_TOKENS:
            bound = f"max_waiting_tokens = {config.max_waiting_tokens:,}"
        case _:
            bound = f"max_waiting = {config.max_waiting:,}"
    return OverloadedError(f"the queue is full ({bound})", retry_after_s=round(refusal.retry_after_s, 1))
