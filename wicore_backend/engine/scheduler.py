"""Who computes what in the next step. Pure accounting: no tensors, and no clock but the one handed in.

Each step decodes one token of every sequence that is that far, then spends what is left of its budget on prompts, in
chunks. The budget is a number of tokens, and a time: beside decodes, prompts take no more of it than keeps their pace.
A chunk has to read all keys before it, so time is saved up over some steps until a chunk is worth that.

Who goes first: smaller priority, then the tenants in turn, then order of arrival (`WaitingQueue`). Nobody overtakes
the head of the queue. It is admitted when the memory that it and all who run are *expected* to take is there; if
expectations fail, or if it goes before one who runs, the cheapest of those behind it gives way (`_preempt`): its blocks
stay in the prefix cache for as long as there is room, and it returns to its place in the queue.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple

from wicore_backend.config import EngineConfig
from wicore_backend.engine.deadlines import DeadlineHeap
from wicore_backend.engine.load import AnswerLength, ServiceRate
from wicore_backend.engine.request import DeadlineKind, Sequence
from wicore_backend.engine.step_time import StepShape, StepTimeModel
from wicore_backend.engine.waiting import Backlog, WaitingQueue
from wicore_backend.hmt.blocks import BlockCopy, BlockManager, PrefixMatch
from wicore_backend.processor.prompt import PromptImage

_LEAST_PREFILL_SHARE = 0.1
"""Of the decodes' time, for prompts even where decodes alone are slower than they should be: prompts must get on."""

_DECODES_ALONE_EVERY = 8
"""Of so many steps in a row with decodes, one has nothing but decodes, so that what they take alone stays known: from
steps of one shape nobody could tell what each part takes, and guesses that are too high would confirm themselves."""

_RETRY_PLANS = 8
"""While nobody leaves, room changes little: the head of the queue is looked at again after so many steps."""


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """How much at once.

    Attributes
    ----------
    max_batch_tokens
        Of one step; at least `max_running` plus the tokens of an image, since an image is never split.
    max_waiting, max_waiting_tokens
        Requests, and their tokens with the answers expected, that may wait.
    target_tpot_s
        Mean length of a step with decodes in it; None is `max_decode_slowdown` times what the decodes alone would take.
    ageing_s, aged_share
        See WaitingQueue.
    tenant_weights
        Shares of service; 1 for who is not named.
    """

    max_batch_tokens: int
    max_running: int
    max_waiting: int = 1024
    max_waiting_tokens: int = 2**21
    target_tpot_s: float | None = None
    max_decode_slowdown: float = 1.5
    ageing_s: float = 30.0
    aged_share: int = 8
    tenant_weights: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, config: EngineConfig) -> SchedulerLimits:
        """What the settings say."""
        return cls(
            max_batch_tokens=config.max_batch_tokens,
            max_running=config.max_running,
            max_waiting=config.max_waiting,
            max_waiting_tokens=config.max_waiting_tokens,
            target_tpot_s=None if config.target_tpot_ms is None else config.target_tpot_ms / 1000,
            max_decode_slowdown=config.max_decode_slowdown,
            ageing_s=config.priority_ageing_s,
            tenant_weights=config.tenant_weights,
        )


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` to `end` - 1 of a sequence, to be computed in one step."""

    sequence: Sequence
    start: int
    end: int

    @property
    def completes(self) -> bool:
        """Whether the step yields the sequence's next token."""
        return self.end == len(self.sequence.tokens)

    @property
    def images(self) -> list[PromptImage]:
        """The images whose soft tokens the chunk computes, all of each."""
        return [i for i in self.sequence.request.prompt.images if self.start <= i.start < self.end]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes, the blocks for it in place.

    Attributes
    ----------
    decodes
        Sequences of which the last token is computed.
    chunks
        Parts of prompts, and of what a preempted sequence had.
    shape
        The step as the step-time model sees it.
    """

    decodes: list[Sequence]
    chunks: list[Chunk]
    shape: StepShape

    def __bool__(self) -> bool:
        return bool(self.decodes or self.chunks)


class Fork(NamedTuple):
    """A sequence that now goes on from another one's prompt, after `copies` are made."""

    source: Sequence
    sequence: Sequence
    copies: list[BlockCopy]


class RejectReason(StrEnum):
    """Why a request was turned away before it ran."""

    QUEUE_REQUESTS = "queue_requests"
    QUEUE_TOKENS = "queue_tokens"
    TOO_LATE = "too_late"
    """It could not have met its deadline."""
    DRAINING = "draining"


class Rejected(NamedTuple):
    """A waiting sequence that was turned away. `retry_after_s` is when there may be room."""

    sequence: Sequence
    reason: RejectReason
    retry_after_s: float
    expected_s: float | None = None
    """When its first token would have come, in seconds after its arrival, if that is the reason."""


@dataclass(slots=True)
class SchedulerCounts:
    """What happened since the start."""

    preemptions: int = 0
    lost_tokens: int = 0
    """Computed, and then given up by a preemption; those that the cache still has are not computed again."""
    prefix_hit_tokens: int = 0
    prefix_missed_tokens: int = 0
    window_missing_tokens: int = 0
    """Of the missed ones, those whose global blocks were there: only the local window was not."""
    shared_prefill_tokens: int = 0
    """Prompt tokens that a sequence got from another one that was computing the same prompt."""
    promotions: int = 0


class Scheduler:
    """See the module's docstring."""

    def __init__(self, blocks: BlockManager, limits: SchedulerLimits, step_time: StepTimeModel) -> None:
        self.counts = SchedulerCounts()
        self._blocks = blocks
        self._limits = limits
        self._step_time = step_time
        self._queue: WaitingQueue[Sequence] = WaitingQueue(
            ageing_s=limits.ageing_s, aged_share=limits.aged_share, weights=limits.tenant_weights
        )
        self._decoding: dict[Sequence, None] = {}
        self._prefilling: dict[Sequence, None] = {}
        self._leaders: dict[bytes, Sequence] = {}
        self._parked: dict[Sequence, None] = {}
        self._deadlines = DeadlineHeap(self._matters)
        self._live: set[Sequence] = set()
        self._rate = ServiceRate()
        self._answers = AnswerLength()
        self._prefill_credit = 0.0
        self._mixed_steps = 0
        self._plans = 0
        self._releases = 0
        self._stuck: tuple[Sequence, int, int] | None = None

    # What there is.

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    @property
    def running(self) -> list[Sequence]:
        return [*self._decoding, *self._prefilling]

    @property
    def num_running(self) -> int:
        return len(self._decoding) + len(self._prefilling)

    @property
    def num_waiting(self) -> int:
        return len(self._queue) + len(self._parked)

    def backlogs(self) -> dict[int, Backlog]:
        """What is in the queue, by priority; for statistics."""
        return self._queue.backlogs()

    def retry_after(self) -> float:
        """Seconds after which, at the rate measured, the present queue will be gone."""
        seconds = self._rate.seconds_for(self._queue.tokens)
        return 1.0 if seconds is None else min(60.0, max(0.1, seconds))

    # What comes and goes.

    def add(self, sequence: Sequence, now: float) -> list[Rejected]:
        """Put a new sequence into the queue. Returns those that are turned away for it: itself, or lower classes."""
        sequence.cost = len(sequence.tokens) + self._expected_answer(sequence)
        late = self._too_late(sequence, now, self._work_before(sequence))
        if late is not None:
            return [late]
        rejected: list[Rejected] = []
        while reason := self._overflow(sequence):
            last = self._queue.newest_of_lowest()
            if last is None or last.priority <= sequence.priority:
                return [*rejected, Rejected(sequence, reason, self.retry_after())]
            rejected.append(Rejected(last, reason, self.retry_after()))
            self.remove(last)
        self._live.add(sequence)
        self._queue.push(sequence)
        self._deadlines.add(sequence)
        self._rate.tick(now, queueing=True)
        return rejected

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is. What it computed stays in the prefix cache as long as there is room."""
        self._live.remove(sequence)
        if sequence.blocks is not None:
            self._stop(sequence)
        elif sequence.leader is not None:
            self._unpark(sequence)
        else:
            self._queue.remove(sequence)

    def finished(self, sequence: Sequence) -> None:
        """An answer has come to its own end: remove its sequence, and learn from it."""
        self._answers.observe(sequence.answered)
        self._queue.charge(sequence.priority, sequence.tenant, sequence.prompt_len + sequence.answered - sequence.cost)
        self.remove(sequence)

    def expire(self, now: float) -> Iterator[tuple[Sequence, DeadlineKind]]:
        """Sequences that have missed a deadline; the caller removes them."""
        return self._deadlines.missed(now)

    def give_up(self, now: float) -> Iterator[Rejected]:
        """Turn away the heads of the queue for which it is too late to begin."""
        while (ahead := self._queue.peek(now)) is not None:
            late = None if ahead.item.answered else self._too_late(ahead.item, now, 0)
            if late is None:
                return
            self.remove(late.sequence)
            yield late

    def forget_cache(self) -> None:
        """Preempt whoever runs and keep nothing of what has been computed: the pools' bytes are in doubt."""
        for sequence in self.running:
            self._preempt(sequence)
        self._blocks.forget_all()

    # A step.

    def plan(self, now: float) -> StepPlan:
        """The next step, the blocks for it in place. Admits waiting sequences; preempts where it must."""
        self._plans += 1
        self._place_decodes()
        chunks = self._plan_chunks(now)
        self._rate.tick(now, queueing=len(self._queue) > 0)
        decodes = list(self._decoding)
        return StepPlan(decodes, chunks, _shape(decodes, chunks))

    def complete(self, plan: StepPlan) -> list[Fork]:
        """Note that a step has been computed. Returns sequences that now go on from prompts that it completed."""
        size, note = self._blocks.block_size, self._blocks.note
        for sequence in plan.decodes:
            sequence.computed += 1
            if sequence.computed % size == 0:
                note(sequence.running_blocks, sequence.computed)
        forks: list[Fork] = []
        for chunk in plan.chunks:
            sequence = chunk.sequence
            sequence.computed = chunk.end
            note(sequence.running_blocks, chunk.end)
            if chunk.completes:
                del self._prefilling[sequence]
                self._decoding[sequence] = None
                forks += self._fork_followers(sequence)
        return forks

    def _place_decodes(self) -> None:
        size = self._blocks.block_size
        for sequence in [s for s in self._decoding if s.computed >= s.running_blocks.stop * size]:
            if sequence.blocks is not None:  # It may have given way to one before it.
                self._place(sequence, sequence.computed + 1, or_preempt=True)

    def _plan_chunks(self, now: float) -> list[Chunk]:
        """Chunks of prompts, best rank first, under what the decodes leave of the step's tokens and time."""
        chunks: list[Chunk] = []
        shape = decodes = _shape(self._decoding, ())
        tokens_left = self._limits.max_batch_tokens - len(self._decoding)
        time_limit = self._time_limit(decodes)
        prefilling = deque(sorted(self._prefilling, key=lambda s: s.rank))
        blocked = False
        held_back = time_limit is not None and self._mixed_steps >= _DECODES_ALONE_EVERY - 1
        while tokens_left > 0 and not held_back:
            ahead = None if blocked else self._queue.peek(now)
            if ahead and (ahead.promoted or not prefilling or ahead.item.priority < prefilling[0].priority):
                if not self._admit(now):
                    blocked = True
                    continue
                sequence = ahead.item
            elif prefilling:
                sequence = prefilling.popleft()
            else:
                break
            if sequence.blocks is None:  # Parked, or preempted for one before it.
                continue
            budget = tokens_left
            if time_limit is not None:
                budget = min(tokens_left, self._worthwhile(shape, time_limit, sequence))
            end = _chunk_end(sequence, budget)
            if end == sequence.computed:
                held_back = not chunks
                break
            preempted = self.counts.preemptions
            placed = self._place(sequence, end, or_preempt=False)
            # Whoever gave way does not come back in the same step: it may have a chunk in it.
            blocked = blocked or self.counts.preemptions > preempted
            if placed:
                chunks.append(Chunk(sequence, sequence.computed, end))
                shape = shape.with_prefill(end - sequence.computed, sequence.computed)
                tokens_left -= end - sequence.computed
        if not held_back:
            self._prefill_credit = 0.0
        self._mixed_steps = self._mixed_steps + 1 if chunks and decodes.sequences else 0
        return [chunk for chunk in chunks if chunk.sequence.blocks is not None]

    def _time_limit(self, decodes: StepShape) -> float | None:
        """Seconds that the step may take, for the sake of its decodes; None without any. Adds this step's credit."""
        if not decodes.sequences or not self._step_time.ready:
            return None
        alone = self._step_time.predict(decodes)
        target = self._limits.target_tpot_s or self._limits.max_decode_slowdown * alone
        self._prefill_credit += max(target - alone, _LEAST_PREFILL_SHARE * alone)
        return alone + self._prefill_credit

    def _worthwhile(self, shape: StepShape, time_limit: float, sequence: Sequence) -> int:
        """Tokens of a sequence's prefill that fit beside `shape`; 0 if they take less time than reading its keys."""
        model, context = self._step_time, sequence.computed
        tokens = model.prefill_tokens(shape, time_limit, context)
        if tokens < min(sequence.uncomputed, self._limits.max_batch_tokens - shape.tokens):
            empty = model.predict(shape.with_prefill(1, context))
            if time_limit - empty < empty - model.predict(shape):
                return 0
        return tokens

    # Admission.

    def _admit(self, now: float) -> bool:
        """Take the head of the queue out of it, running now or parked. False if it has to wait."""
        ahead = self._queue.peek(now)
        assert ahead is not None
        sequence = ahead.item
        leader = self._leaders.get(sequence.twin_key) if sequence.twin_key and not sequence.answered else None
        if leader is None and not self._make_room(sequence, promoted=ahead.promoted):
            return False
        self._queue.serve(sequence, now)  # Not simply the head: those who gave way have come into the queue.
        self._rate.admitted(sequence.cost)
        if ahead.promoted:
            sequence.promoted = True
            self.counts.promotions += 1
        if leader is not None:
            sequence.leader = leader
            leader.followers.append(sequence)
            self._parked[sequence] = None
            return True
        self._start(sequence)
        return True

    def _make_room(self, sequence: Sequence, *, promoted: bool) -> bool:
        """Whether the sequence can start now, after preempting those of lower classes if that is what it takes."""
        now_stuck = (sequence, self._releases, self._plans // _RETRY_PLANS)
        if self._stuck == now_stuck:
            return False
        while not self._fits(sequence):
            behind = [s for s in self.running if not s.promoted and (promoted or s.priority > sequence.priority)]
            if not behind:
                self._stuck = now_stuck
                return False
            self._preempt(_cheapest(behind))
        return True

    def _fits(self, sequence: Sequence) -> bool:
        if not self.num_running:
            return True  # The pools hold one sequence of any length.
        if self.num_running >= self._limits.max_running:
            return False
        target = self._limits.target_tpot_s
        if target is not None and self._step_time.ready:
            decodes = _shape(self._decoding, ())
            more = replace(
                decodes,
                tokens=decodes.tokens + 1,
                sequences=decodes.sequences + 1,
                keys_read=decodes.keys_read + len(sequence.tokens),
            )
            if self._step_time.predict(more) > target:
                return False
        room = self._blocks.room_for(
            sequence.names,
            self._match(sequence),
            tokens=len(sequence.tokens),
            expected_tokens=self._expected_tokens(sequence),
        )
        return all(left >= 0 for left in room.values())

    def _match(self, sequence: Sequence) -> PrefixMatch:
        if sequence.names is None:
            return PrefixMatch()
        # The last token has to be computed in any case: its output is the next one.
        return self._blocks.match(sequence.names, (len(sequence.tokens) - 1) // self._blocks.block_size)

    def _start(self, sequence: Sequence) -> None:
        match, size = self._match(sequence), self._blocks.block_size
        sequence.blocks = self._blocks.open(
            sequence.names,
            match,
            max_tokens=sequence.max_tokens,
            expected_tokens=self._expected_tokens(sequence),
        )
        sequence.computed = match.resume * size
        self._blocks.keep_window(sequence.blocks, (sequence.prompt_len - 1) // size)
        if not sequence.preemptions:
            sequence.cached_tokens = sequence.computed
            self.counts.prefix_hit_tokens += sequence.computed
            self.counts.prefix_missed_tokens += sequence.uncomputed
            self.counts.window_missing_tokens += (match.known - match.resume) * size
        self._prefilling[sequence] = None
        if sequence.twin_key and not sequence.answered:
            self._leaders[sequence.twin_key] = sequence

    def _fork_followers(self, leader: Sequence) -> Iterator[Fork]:
        """Let the sequences that waited for this prompt go on from it, as far as there is room."""
        self._lead_no_more(leader)
        for sequence in list(leader.followers):
            self._unpark(sequence)
            forked = None
            if self.num_running < self._limits.max_running:
                forked = self._blocks.fork(
                    leader.running_blocks,
                    sequence.names,
                    computed=leader.computed,
                    max_tokens=sequence.max_tokens,
                    expected_tokens=self._expected_tokens(sequence),
                )
            if forked is None:
                self._queue.push(sequence, charged=True)
                continue
            sequence.blocks, copies = forked
            sequence.computed = leader.computed
            self.counts.shared_prefill_tokens += leader.computed
            self._decoding[sequence] = None
            yield Fork(leader, sequence, copies)

    def _unpark(self, sequence: Sequence) -> None:
        assert sequence.leader is not None
        sequence.leader.followers.remove(sequence)
        sequence.leader = None
        del self._parked[sequence]

    # Memory.

    def _place(self, sequence: Sequence, end: int, *, or_preempt: bool) -> bool:
        """Get blocks up to `end`, if need be from those behind in rank; failing that, give way oneself if told to."""
        while not self._blocks.extend(sequence.running_blocks, sequence.computed, end):
            behind = [s for s in self.running if s.rank > sequence.rank]
            if behind:
                self._preempt(_cheapest(behind))
                continue
            if or_preempt:
                self._preempt(sequence)
            return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks from it and put it back into the queue, at its old place."""
        self.counts.preemptions += 1
        self.counts.lost_tokens += sequence.computed
        sequence.preemptions += 1
        self._stop(sequence)
        self._queue.push(sequence, charged=True)

    def _stop(self, sequence: Sequence) -> None:
        self._prefilling.pop(sequence, None)
        self._decoding.pop(sequence, None)
        self._blocks.close(sequence.running_blocks)
        sequence.blocks = None
        sequence.computed = 0
        self._releases += 1
        self._lead_no_more(sequence)
        for follower in list(sequence.followers):
            self._unpark(follower)
            self._queue.push(follower, charged=True)

    def _lead_no_more(self, sequence: Sequence) -> None:
        if sequence.twin_key and self._leaders.get(sequence.twin_key) is sequence:
            del self._leaders[sequence.twin_key]

    # Expectations.

    def _expected_answer(self, sequence: Sequence) -> int:
        return self._answers.expected(sequence.answered, sequence.max_tokens - sequence.prompt_len)

    def _expected_tokens(self, sequence: Sequence) -> int:
        return sequence.prompt_len + self._expected_answer(sequence)

    def _work_before(self, sequence: Sequence) -> int:
        """Tokens of work in the queue that go before a new sequence."""
        return sum(b.tokens for priority, b in self._queue.backlogs().items() if priority <= sequence.priority)

    def _too_late(self, sequence: Sequence, now: float, work_before: int) -> Rejected | None:
        """Whether a waiting sequence can not have its first token in time any more, by what has been measured."""
        deadline = sequence.request.deadlines.first_token
        if deadline is None:
            return None
        wait = (self._rate.seconds_for(work_before) or 0.0) if work_before else 0.0
        expected = now - sequence.arrival + wait + self._prefill_seconds(sequence)
        if expected <= deadline:
            return None
        return Rejected(sequence, RejectReason.TOO_LATE, self.retry_after(), expected)

    def _prefill_seconds(self, sequence: Sequence) -> float:
        """Least time that a sequence's prompt takes, if it had the machine for itself."""
        if not self._step_time.ready:
            return 0.0
        start = self._match(sequence).resume * self._blocks.block_size
        tokens = len(sequence.tokens) - start
        pairs = start * tokens + tokens * tokens // 2
        steps = -(-tokens // self._limits.max_batch_tokens)
        once = self._step_time.predict(StepShape(0, 0, 0, 0))
        return (steps - 1) * once + self._step_time.predict(StepShape(tokens, 1, 0, pairs))

    def _overflow(self, sequence: Sequence) -> RejectReason | None:
        """Which bound of the queue one more sequence would break."""
        if self.num_waiting >= self._limits.max_waiting + self._free_places:
            return RejectReason.QUEUE_REQUESTS
        if len(self._queue) and self._queue.tokens + sequence.cost > self._limits.max_waiting_tokens:
            return RejectReason.QUEUE_TOKENS
        return None

    @property
    def _free_places(self) -> int:
        """Sequences that are in the queue only until the next step."""
        return max(0, self._limits.max_running - self.num_running)

    def _matters(self, sequence: Sequence, kind: DeadlineKind) -> bool:
        if sequence not in self._live:
            return False
        if kind is DeadlineKind.QUEUE:
            return sequence.blocks is None and not sequence.preemptions and sequence.leader is None
        return kind is DeadlineKind.TOTAL or not sequence.answered

    def check_integrity(self) -> None:
        """Raise BlockAccountingError, or AssertionError, unless every live sequence is in one place and books agree."""
        waiting = list(self._queue)
        places = [*waiting, *self._parked, *self._decoding, *self._prefilling]
        assert len(places) == len(set(places)) == len(self._live), "a sequence is in two places, or in none"
        assert set(places) == self._live, "a sequence is in a place though it is not live"
        assert all(s.blocks is None and s.leader is None and not s.computed for s in waiting), "one both waits and runs"
        assert all(s.leader and s in s.leader.followers for s in self._parked), "a parked sequence has no leader"
        assert all(s.blocks is not None for s in self.running), "a running sequence has no blocks"
        assert all(s.uncomputed == 1 for s in self._decoding), "a decoding sequence has more than one token to compute"
        assert all(leader in self._prefilling for leader in self._leaders.values()), "a leader does not compute"
        self._blocks.check_integrity()


def _cheapest(behind: list[Sequence]) -> Sequence:
    """Whose preemption costs least: of the lowest class, the one that has computed least."""
    return min(behind, key=lambda s: (s.promoted, -s.priority, s.computed))


def _chunk_end(sequence: Sequence, budget: int) -> int:
    """Where a chunk of at most `budget` tokens ends that splits no image."""
    end = min(len(sequence.tokens), sequence.computed + budget)
    for image in sequence.request.prompt.images:
        if image.start < end < image.end:
            return image.start
    return end


def _shape(decodes: Collection[Sequence], chunks: Iterable[Chunk]) -> StepShape:
    shape = StepShape(len(decodes), len(decodes), sum([s.computed for s in decodes]), 0)
    for chunk in chunks:
        shape = shape.with_prefill(chunk.end - chunk.start, chunk.start)
    return shape
