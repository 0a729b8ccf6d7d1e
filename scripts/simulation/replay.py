"""Replays requests through the engine's own Scheduler, on a clock that a model of the machine moves.

What `Engine` does around a step is done here in the same order: new requests, deadlines, plan, compute, complete, one
token for whoever is due one. An answer's length stays hidden until the answer has it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random

import numpy as np

from scripts.simulation.machine import Machine
from scripts.simulation.traces import TraceRequest
from wicore_backend.engine.plan import Rejected, SchedulerCounts, SchedulerLimits
from wicore_backend.engine.request import Deadlines, Request, Sequence
from wicore_backend.engine.sampling_params import SamplingParams
from wicore_backend.engine.scheduler import Scheduler
from wicore_backend.engine.step_time import StepTimeModel
from wicore_backend.hmt.names import BlockNames, NameScheme
from wicore_backend.processor.prompt import Prompt

_BLOCK_SIZE = 32
"""The engine's default, where the trace has no blocks of its own."""


class End(StrEnum):
    """How a request ended."""

    FINISHED = "finished"
    EXPIRED = "expired"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class RequestClass:
    """Requests of one kind, and what they are promised.

    Attributes
    ----------
    share
        Of all requests.
    first_token_s, first_token_s_per_1k
        Deadline of the first token, and what each 1,000 tokens of prompt add to it; None is no deadline.
    """

    name: str
    priority: int
    share: float
    first_token_s: float | None = None
    first_token_s_per_1k: float = 0.0

    def deadlines(self, prompt_tokens: int) -> Deadlines:
        if self.first_token_s is None:
            return Deadlines()
        return Deadlines(first_token_s=self.first_token_s + self.first_token_s_per_1k * prompt_tokens / 1000)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of a trace, when it comes here, and as what."""

    at: float
    request: TraceRequest
    klass: RequestClass


@dataclass(eq=False, slots=True)
class Record:
    """What became of a request. Times are in seconds of the simulated clock."""

    arrival: Arrival
    answer_left: int
    deadline_s: float | None
    arrived_in_step: int
    started: float | None = None
    queue_steps: int | None = None
    """Steps from the one that ran when the request came to the first one that computed some of it."""
    first_token: float | None = None
    ended: float | None = None
    end: End | None = None
    tokens: int = 0
    preemptions: int = 0

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.arrival.at

    @property
    def queue_s(self) -> float | None:
        return None if self.started is None else self.started - self.arrival.at

    @property
    def tpot_s(self) -> float:
        """Seconds for each token after the first; 0 for an answer without one."""
        if self.first_token is None or self.ended is None or self.tokens < 2:
            return 0.0
        return (self.ended - self.first_token) / (self.tokens - 1)

    def is_good(self, tpot_s: float) -> bool:
        """Whether the answer came whole, its first token in time and the others in step."""
        in_time = self.deadline_s is None or (self.ttft_s is not None and self.ttft_s <= self.deadline_s)
        return self.end is End.FINISHED and in_time and self.tpot_s <= tpot_s


@dataclass(slots=True)
class Replayed:
    """What a replay has seen."""

    records: list[Record]
    counts: SchedulerCounts
    computed_in_vain: int = 0
    """Tokens computed for those that expired."""
    seconds: float = 0.0
    steps: int = 0
    computed_tokens: int = 0
    rejections: dict[str, int] = field(default_factory=dict)
    model_error: float = 0.0
    """Median relative error of the step-time model at the end."""


class TraceNames(BlockNames):
    """Names of a sequence's blocks by the ids that a trace gives them; those of the answer are its own."""

    def __init__(self, blocks: tuple[int, ...], prompt_tokens: int, block_size: int, number: int) -> None:
        full = blocks[: prompt_tokens // block_size]
        self._chain = [b"p%d" % block for block in full]
        self._own = b"a%d." % number

    def first(self, count: int) -> list[bytes]:
        """See BlockNames."""
        while len(self._chain) < count:
            self._chain.append(self._own + b"%d" % len(self._chain))
        return self._chain

    def resumable(self, count: int) -> int:
        """See BlockNames; there are no images."""
        return count


class Replay:
    """One run of the scheduler, from no load to no load.

    Parameters
    ----------
    block_size
        Of the ids in the requests; None if they have none.
    arrivals
        In order of time.
    backlog
        Requests that come as fast as the queue takes them: `backlog_depth` of them wait at any time. Their `at` is
        not looked at.
    stop
        Ends the replay early, whoever is left.
    """

    def __init__(
        self,
        machine: Machine,
        limits: SchedulerLimits,
        *,
        block_size: int | None,
        arrivals: Iterable[Arrival] = (),
        backlog: Iterable[Arrival] = (),
        backlog_depth: int = 64,
        max_answer: int = 4096,
        seed: int = 0,
        stop: Callable[[Replay], bool] = lambda _: False,
        scheduler: type[Scheduler] = Scheduler,
    ) -> None:
        self.now = 0.0
        self.records: list[Record] = []
        self._live: dict[Sequence, Record] = {}
        self._machine = machine
        self._trace_blocks = block_size is not None
        self._scheme = NameScheme(block_size or _BLOCK_SIZE)
        self._step_time = StepTimeModel()
        self._books = machine.blocks(
            block_size=self._scheme.block_size,
            max_running=limits.max_running,
            max_batch_tokens=limits.max_batch_tokens,
        )
        self.scheduler = scheduler(self._books, limits, self._step_time)
        self._arrivals = deque(arrivals)
        self._backlog = iter(backlog)
        self._backlog_depth = backlog_depth
        self._backlog_waiting: set[Sequence] = set()
        self._max_answer = max_answer
        self._random = Random(seed)
        self._stop = stop
        self._replayed = Replayed([], self.scheduler.counts)

    def run(self) -> Replayed:
        """Replay it all."""
        out = self._replayed
        while not self._stop(self):
            self._take_arrivals()
            for sequence, _ in self.scheduler.expire(self.now):
                out.computed_in_vain += sequence.computed - sequence.cached_tokens
                self.scheduler.remove(sequence)
                self._end(sequence, End.EXPIRED)
            self._reject(self.scheduler.give_up(self.now))
            if self.scheduler.has_work:
                self._step()
            elif self._arrivals:
                self.now = max(self.now, self._arrivals[0].at)
            else:
                break
        self.scheduler.check_integrity()
        out.records = self.records
        out.seconds = self.now
        out.model_error = self._step_time.error
        return out

    def _take_arrivals(self) -> None:
        while self._arrivals and self._arrivals[0].at <= self.now:
            self._add(self._arrivals.popleft())
        while len(self._backlog_waiting) < self._backlog_depth and (arrival := next(self._backlog, None)):
            self._backlog_waiting.add(self._add(Arrival(self.now, arrival.request, arrival.klass)))

    def _add(self, arrival: Arrival) -> Sequence:
        request, number = arrival.request, len(self.records)
        # No two prompts begin alike, but for the blocks that the trace says are the same.
        tokens = np.full(request.prompt_tokens, number % 2**18, np.int32)
        room = self._machine.max_model_len - request.prompt_tokens
        sequence = Sequence(
            Request(
                id=str(number),
                prompt=Prompt(tokens),
                params=_PARAMS,
                sink=_nobody,
                arrival=arrival.at,
                priority=arrival.klass.priority,
                deadlines=arrival.klass.deadlines(request.prompt_tokens),
            ),
            max_tokens=request.prompt_tokens + min(self._max_answer, room),
        )
        if request.blocks is not None and self._trace_blocks:
            sequence.names = TraceNames(request.blocks, request.prompt_tokens, self._scheme.block_size, number)
            sequence.twin_key = repr((request.prompt_tokens, request.blocks)).encode()
        else:
            sequence.names = BlockNames(self._scheme, sequence.tokens, (), "")
            sequence.twin_key = sequence.names.whole(request.prompt_tokens)
        record = self._live[sequence] = Record(
            arrival,
            answer_left=min(request.answer_tokens, self._max_answer, room),
            deadline_s=sequence.request.deadlines.first_token,
            arrived_in_step=self._replayed.steps,
        )
        self.records.append(record)
        self._reject(self.scheduler.add(sequence, self.now))
        return sequence

    def _reject(self, rejected: Iterable[Rejected]) -> None:
        for refusal in rejected:
            self._end(refusal.sequence, End.REJECTED)
            reasons = self._replayed.rejections
            reasons[refusal.reason] = reasons.get(refusal.reason, 0) + 1

    def _step(self) -> None:
        plan = self.scheduler.plan(self.now)
        if not plan:
            raise AssertionError(f"{self.scheduler.num_waiting} wait at {self.now:.3f} s, but the step is empty")
        out = self._replayed
        out.steps += 1
        out.computed_tokens += plan.shape.tokens
        for chunk in plan.chunks:
            self._note_start(chunk.sequence)
        seconds = self._machine.seconds(plan.shape, self._random)
        self.now += seconds
        ready = [*plan.decodes, *(chunk.sequence for chunk in plan.chunks if chunk.completes)]
        for fork in self.scheduler.complete(plan):
            self._note_start(fork.sequence)
            ready.append(fork.sequence)
        self._books.take_transfers()  # Copies between blocks take no time here.
        for sequence in ready:
            self._give_token(sequence)
        self._step_time.observe(plan.shape, seconds)

    def _note_start(self, sequence: Sequence) -> None:
        record = self._live[sequence]
        if record.started is None:
            record.started = self.now
            record.queue_steps = self._replayed.steps - record.arrived_in_step
            self._backlog_waiting.discard(sequence)

    def _give_token(self, sequence: Sequence) -> None:
        record = self._live[sequence]
        sequence.tokens.append(0)
        if record.first_token is None:
            record.first_token = self.now
        record.tokens += 1
        record.answer_left -= 1
        if record.answer_left <= 0:
            self.scheduler.finished(sequence)
            self._end(sequence, End.FINISHED)

    def _end(self, sequence: Sequence, end: End) -> None:
        record = self._live.pop(sequence)
        record.ended, record.end, record.preemptions = self.now, end, sequence.preemptions
        self._backlog_waiting.discard(sequence)


_PARAMS = SamplingParams()


def _nobody(_: object) -> None:
    """Takes the events of requests that nobody waits for."""
