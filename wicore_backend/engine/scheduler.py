"""Who computes what in the next step. Pure accounting: no tensors, and no clock but the one handed in.

Each step decodes one token of every sequence that is that far, then spends what is left of its budget on prompts, in
chunks. The budget is a number of tokens, and a time: beside decodes, prompts take no more of it than keeps their pace
(`Pacer`).

Who goes first: smaller priority, then the tenants in turn, then order of arrival (`WaitingQueue`). Nobody overtakes
the head of the queue. Prompts that are under way share a step, so that no long one holds up all others (`Turns`).

The head of the queue is admitted when the memory that it and all who run are *expected* to take is there; if
expectations fail, or if it goes before one who runs, the cheapest of those behind it gives way (`_preempt`): its blocks
stay in the prefix cache for as long as there is room, and it returns to its place in the queue.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType

from wicore_backend.engine.deadlines import DeadlineHeap
from wicore_backend.engine.load import AnswerLength, ServiceRate
from wicore_backend.engine.pacing import Pacer
from wicore_backend.engine.plan import (
    Chunk,
    Fork,
    Rejected,
    RejectReason,
    SchedulerCounts,
    SchedulerLimits,
    StepPlan,
)
from wicore_backend.engine.request import DeadlineKind, Sequence
from wicore_backend.engine.restoring import Decision, Restoring
from wicore_backend.engine.step_time import StepShape, StepTimeModel
from wicore_backend.engine.turns import Turns
from wicore_backend.engine.waiting import Backlog, Next, WaitingQueue
from wicore_backend.hmt.blocks import BlockManager, PrefixMatch
from wicore_backend.hmt.policy.base import Access

_MOST_AHEAD = 4
"""Blocks that a decode gets at once where there is plenty: to place one costs almost as much as to place several."""

Guess = Callable[[Sequence, int], tuple[int, ...]]

_NONE: Mapping[Sequence, tuple[int, ...]] = MappingProxyType({})

MOST_GUESSED = 64
"""Guessed tokens of a step: each has logits of its own, a megabyte, and several times that where it is drawn."""

_RETRY_PLANS = 8
"""While nobody leaves, room changes little: the head of the queue is looked at again after so many steps."""


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
        self._steps = 0
        self._decoding: dict[Sequence, int] = {}  # each with the step, modulo a block's size, that begins a block of it
        self._beginning: list[dict[Sequence, None]] = [{} for _ in range(blocks.block_size)]  # the other way around
        self._begun: list[Sequence] = []  # with a budget, who has begun to decode and may have too many blocks
        self._context = 0  # keys that those who decode see
        self._prefilling: dict[Sequence, None] = {}
        self._leaders: dict[bytes, Sequence] = {}
        self._parked: dict[Sequence, None] = {}
        self._restoring = Restoring(blocks, self.counts, match=self._match, prefill_seconds=self._prefill_seconds)
        self._preemptible: Counter[int] = Counter()  # running and not promoted, by priority
        self._deadlines = DeadlineHeap(self._matters)
        self._live: set[Sequence] = set()
        self._rate = ServiceRate()
        self._answers = AnswerLength()
        self._pacer = Pacer(step_time, target_s=limits.target_tpot_s, slowdown=limits.max_decode_slowdown)
        self._plans = 0
        self._releases = 0
        self._stuck: tuple[Sequence, int, int] | None = None

    # What there is.

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    @property
    def only_ending(self) -> bool:
        """Whether nobody waits, and whoever runs ends with the token that has been chosen, the longest it may be."""
        return (
            not self._prefilling
            and not self.num_waiting
            and all(len(s.tokens) + (s.ahead is not None) >= s.max_tokens for s in self._decoding)
        )

    @property
    def running(self) -> list[Sequence]:
        return [*self._decoding, *self._prefilling]

    @property
    def num_running(self) -> int:
        return len(self._decoding) + len(self._prefilling)

    @property
    def num_decoding(self) -> int:
        return len(self._decoding)

    @property
    def keys_read(self) -> int:
        """Keys that the next step's decodes see in the global group, about."""
        return self._context

    @property
    def num_waiting(self) -> int:
        return len(self._queue) + len(self._parked) + len(self._restoring)

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
        sequence.cost = self._expected_tokens(sequence)
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
        if self._blocks.listening and sequence.names is not None:
            count = self._blocks.startable(len(sequence.tokens))
            retention = sequence.request.retention
            access = Access(
                keys=sequence.names.first(count)[:count],
                retain_seconds=retention.seconds,
                session_end=retention.session_end,
            )
            self._blocks.observe(access, now)
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
        elif sequence not in self._restoring:
            self._queue.remove(sequence)
        self._restoring.end(sequence)

    def finished(self, sequence: Sequence) -> None:
        """An answer has come to its own end: remove its sequence, and learn from it."""
        self._answers.observe(sequence.answered)
        self._queue.charge(sequence.priority, sequence.tenant, len(sequence.tokens) - sequence.cost)
        self.remove(sequence)

    def expire(self, now: float) -> Iterator[tuple[Sequence, DeadlineKind]]:
        """Sequences that have missed a deadline; the caller removes them."""
        return self._deadlines.missed(now)

    def give_up(self, now: float) -> Iterator[Rejected]:
        """Turn away the heads of the queue for which it is too late to begin."""
        while (ahead := self._queue.peek(now)) is not None:
            begun = ahead.item.answered or ahead.item.ahead is not None
            late = None if begun else self._too_late(ahead.item, now, 0)
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

    def plan(self, now: float, guess: Guess | None = None) -> StepPlan:
        """The next step, the blocks for it in place. Admits waiting sequences; preempts where it must.

        Parameters
        ----------
        guess
            For a step of decodes alone, up to so many tokens that may follow those of a sequence.
        """
        self._plans += 1
        for sequence in self._restoring.take_done(now):
            self._queue.push(sequence, charged=True)
        self._place_decodes()
        chunks = self._plan_chunks(now)
        if not chunks and not self._decoding:
            # Who had a chunk gave way to one for whom too little was left of the step. Now there is all of it.
            chunks = self._plan_chunks(now)
        self._rate.tick(now, queueing=len(self._queue) > 0)
        guesses = self._place_guesses(guess) if guess is not None and not chunks else {}
        return StepPlan(list(self._decoding), chunks, self._shape(chunks, guesses), self._pacer.limit_s, guesses)

    def complete(self, plan: StepPlan) -> list[Fork]:
        """Note that a step has been computed. Returns sequences that now go on from prompts that it completed."""
        self._steps += 1
        self._context += len(plan.decodes)
        for sequence in plan.decodes:
            sequence.computed += 1
        forks: list[Fork] = []
        for chunk in plan.chunks:
            sequence = chunk.sequence
            sequence.computed = chunk.end
            self._blocks.note(sequence.running_blocks, chunk.end)
            if chunk.completes:
                del self._prefilling[sequence]
                self._decode(sequence)
                forks += self._fork_followers(sequence)
        return forks

    def _place_decodes(self) -> None:
        size, decoding = self._blocks.block_size, self._decoding
        beginning = self._beginning[self._steps % size]
        if self._blocks.budget is not None:
            self._bound(beginning)
        ends = [s for s in beginning if s.computed >= s.running_blocks.stop * size]
        ahead = min(_MOST_AHEAD, self._blocks.spare // len(decoding)) if ends else 0
        if ahead > 0 and self._blocks.budget is None:
            long = [(s.running_blocks, s.computed) for s in ends if s.max_tokens - s.computed >= ahead * size]
            self._blocks.extend_all(long, ahead)
            ends = [s for s in ends if s.max_tokens - s.computed < ahead * size]
        for sequence in ends:
            if sequence in decoding:  # It may have given way to one before it.
                self._place(sequence, sequence.computed + 1, or_preempt=True)

    def advance(self, sequence: Sequence) -> None:
        """The token after the one that a decode computed had been guessed, so that it is computed, too."""
        self.counts.guessed_right += 1
        sequence.computed += 1
        self._context += 1
        del self._beginning[self._decoding[sequence]][sequence]
        self._begins(sequence)

    def _place_guesses(self, guess: Guess) -> dict[Sequence, tuple[int, ...]]:
        """Guesses, as far as there is room for them without anybody giving way."""
        placed: dict[Sequence, tuple[int, ...]] = {}
        if self._blocks.budget is not None:
            return placed
        left = min(MOST_GUESSED, self._limits.max_batch_tokens - len(self._decoding))
        for sequence in self._decoding:
            tokens = guess(sequence, min(left, sequence.max_tokens - len(sequence.tokens) - 1))
            end = sequence.computed + 1 + len(tokens)
            if tokens and self._blocks.extend(sequence.running_blocks, sequence.computed, end):
                placed[sequence] = tokens
                left -= len(tokens)
                self.counts.guessed_tokens += len(tokens)
        return placed

    def _bound(self, beginning: Iterable[Sequence]) -> None:
        """Have those who begin a block, or to decode, keep what the budget allows."""
        for sequence in dict.fromkeys((*beginning, *self._begun)):
            if sequence in self._decoding:
                self._context -= self._visible(sequence)
                self._blocks.bound(sequence.running_blocks, sequence.computed)
                self._context += self._visible(sequence)
        self._begun.clear()

    def _decode(self, sequence: Sequence) -> None:
        """From now on the sequence is decoded."""
        self._begins(sequence)
        self._context += self._visible(sequence)
        if self._blocks.budget is not None:
            self._begun.append(sequence)

    def _begins(self, sequence: Sequence) -> None:
        """Note when a decode begins its next blocks: all advance together, so that the steps are known from now on."""
        begins = self._decoding[sequence] = (self._steps - sequence.computed) % self._blocks.block_size
        self._beginning[begins][sequence] = None

    def _visible(self, sequence: Sequence) -> int:
        """Keys that a decode of a running sequence sees in the global group."""
        return sequence.computed - sequence.running_blocks.holes * self._blocks.block_size

    def _shape(self, chunks: Iterable[Chunk] = (), guesses: Mapping[Sequence, tuple[int, ...]] = _NONE) -> StepShape:
        """What the step-time model sees of a step with all decodes, with `chunks` and with `guesses`."""
        more = sum(map(len, guesses.values()))
        pairs = sum(len(tokens) * sequence.computed for sequence, tokens in guesses.items())
        shape = StepShape(len(self._decoding) + more, len(self._decoding), self._context, pairs)
        for chunk in chunks:
            shape = shape.with_prefill(chunk.end - chunk.start, chunk.start)
        return shape

    def _plan_chunks(self, now: float) -> list[Chunk]:
        """Chunks of prompts, in their turns, under what the decodes leave of the step's tokens and time."""
        chunks: list[Chunk] = []
        shape = self._shape()
        tokens_left = self._limits.max_batch_tokens - len(self._decoding)
        turns = Turns(self._prefilling)
        blocked = False
        held_back = not self._pacer.begin(shape)
        while tokens_left > 0 and not held_back:
            ahead = None if blocked else self._peek(now)
            if ahead and turns.admit(ahead):
                if not self._admit(ahead, now):
                    blocked = True
                    continue
                sequence = ahead.item
                if sequence.blocks is not None:
                    turns.started(sequence)
                # If someone with a chunk gave way, nobody comes back in the same step: it would have two.
                blocked = any(chunk.sequence.blocks is None for chunk in chunks)
            elif turns:
                sequence = turns.pop()
            else:
                break
            if sequence.blocks is None:  # Parked, or preempted for one before it.
                continue
            if not self._decoding:  # Those there were have given way: there is no pace to be kept.
                self._pacer.begin(self._shape())
            end = self._chunk_end(sequence, shape, tokens_left)
            if end < len(sequence.tokens):
                share = turns.share(sequence, None if blocked else self._peek(now))
                part = self._chunk_end(sequence, shape, tokens_left, share=share)
                # A share that holds no image, or is not worth it, would leave nothing to the others either.
                end = part if part > sequence.computed else end
            if end == sequence.computed:
                held_back = not chunks
                break
            placed = self._place(sequence, end, or_preempt=False)
            blocked = blocked or any(chunk.sequence.blocks is None for chunk in chunks)
            if placed:
                if end == len(sequence.tokens):
                    turns.completed(sequence)
                chunks.append(Chunk(sequence, sequence.computed, end))
                shape = shape.with_prefill(end - sequence.computed, sequence.computed)
                tokens_left -= end - sequence.computed
        self._pacer.end(mixed=bool(chunks and self._decoding), held_back=held_back)
        return [chunk for chunk in chunks if chunk.sequence.blocks is not None]

    def _chunk_end(self, sequence: Sequence, shape: StepShape, tokens_left: int, *, share: float = 1.0) -> int:
        """Where the chunk beside `shape` ends if it may take a share of the tokens and of the time that are left."""
        most = min(sequence.uncomputed, int(share * tokens_left))
        tokens = self._pacer.tokens(shape, context=sequence.computed, most=most, share=share)
        return _unsplit_end(sequence, tokens)

    # Admission.

    def _peek(self, now: float) -> Next[Sequence] | None:
        """The head of the queue. While the prompt of a promoted one is under way, no other is promoted."""
        return self._queue.peek(now, ageing=not any(s.promoted for s in self._prefilling))

    def _admit(self, ahead: Next[Sequence], now: float) -> bool:
        """Take the head of the queue out of it, running now or parked. False if it has to wait."""
        sequence = ahead.item
        if sequence.ahead is not None:  # It gave way in this very step, and its last token is to be read first.
            return False
        leader = self._leaders.get(sequence.twin_key) if sequence.twin_key and not sequence.answered else None
        if leader is None and self._stuck == self._situation(sequence):
            return False
        decision = Decision.START if leader else self._restoring.begin(sequence, now)
        if decision is Decision.WAIT:
            self._stuck = self._situation(sequence)
            return False
        if decision is Decision.RESTORE:
            self._queue.serve(sequence, now)
            return True
        match = None if leader else self._make_room(sequence, promoted=ahead.promoted)
        if leader is None and match is None:
            return False
        self._queue.serve(sequence, now)  # Not simply the head: those who gave way have come into the queue.
        self._rate.admitted(sequence.cost)
        if ahead.promoted:
            sequence.promoted = True
            self.counts.promotions += 1
        if leader is not None:
            self._restoring.end(sequence)
            sequence.leader = leader
            leader.followers.append(sequence)
            self._parked[sequence] = None
            return True
        assert match is not None
        self._start(sequence, match)
        return True

    def _situation(self, sequence: Sequence) -> tuple[Sequence, int, int]:
        """What has to change for a sequence that could not start to be looked at again."""
        return sequence, self._releases, self._plans // _RETRY_PLANS

    def _make_room(self, sequence: Sequence, *, promoted: bool) -> PrefixMatch | None:
        """What the sequence can start from now, after preempting those of lower classes if need be."""
        while (match := self._fits(sequence)) is None:
            victim = self._victim(sequence, promoted=promoted)
            if victim is None:
                self._stuck = self._situation(sequence)
                return None
            self._preempt(victim)
        return match

    def _victim(self, sequence: Sequence, *, promoted: bool) -> Sequence | None:
        """Who is cheapest to preempt for a waiting sequence: see `_cheapest`."""
        lowest = max(self._preemptible, default=None)
        if lowest is None or not (promoted or lowest > sequence.priority):
            return None
        return _cheapest([s for s in self.running if s.request.priority == lowest and not s.promoted])

    def _fits(self, sequence: Sequence) -> PrefixMatch | None:
        """What the sequence can start from now, or None if there is no room for it."""
        if not self.num_running:
            return self._match(sequence)  # The pools hold one sequence of any length.
        if self.num_running >= self._limits.max_running:
            return None
        if not self._pacer.keeps_pace(self._shape().with_prefill(1, self._blocks.visible(len(sequence.tokens)))):
            return None
        match = self._match(sequence)
        room = self._blocks.room_for(
            sequence.names,
            match,
            tokens=len(sequence.tokens),
            expected_tokens=self._expected_tokens(sequence),
        )
        return match if min(room.values()) >= 0 else None

    def kept(self, sequence: Sequence) -> int:
        """Tokens of a sequence that waits which would not have to be computed if it started now."""
        return self._match(sequence).resume * self._blocks.block_size

    def _match(self, sequence: Sequence) -> PrefixMatch:
        if sequence.names is None:
            return PrefixMatch()
        return self._blocks.match(sequence.names, self._blocks.startable(len(sequence.tokens)))

    def _start(self, sequence: Sequence, match: PrefixMatch) -> None:
        size = self._blocks.block_size
        if not sequence.preemptions:
            self._restoring.count_hits(sequence, match)
        sequence.blocks = self._blocks.open(
            sequence.names,
            match,
            max_tokens=sequence.max_tokens,
            expected_tokens=self._expected_tokens(sequence),
            tokens=len(sequence.tokens),
        )
        sequence.computed = match.resume * size
        if sequence.restore is not None:
            self.counts.restored_tokens += match.resume * size
            self._restoring.end(sequence)
        self._count_running(sequence, 1)
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
            sequence.blocks = forked
            sequence.computed = leader.computed
            self._count_running(sequence, 1)
            self.counts.shared_prefill_tokens += leader.computed
            self._decode(sequence)
            yield Fork(leader, sequence)

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
        if sequence in self._prefilling:
            del self._prefilling[sequence]
        else:
            del self._beginning[self._decoding.pop(sequence)][sequence]
            self._context -= self._visible(sequence)
        self._count_running(sequence, -1)
        blocks = sequence.running_blocks
        # What is decoded is noted at once here: it is of use to those who come after the answer.
        self._blocks.note(blocks, sequence.computed)
        self._blocks.close(blocks)
        sequence.blocks = None
        sequence.computed = 0
        sequence.computes = False
        self._releases += 1
        self._lead_no_more(sequence)
        for follower in list(sequence.followers):
            self._unpark(follower)
            self._queue.push(follower, charged=True)

    def _count_running(self, sequence: Sequence, change: int) -> None:
        if sequence.promoted:
            return
        priority = sequence.priority
        count = self._preemptible[priority] = self._preemptible[priority] + change
        if not count:
            del self._preemptible[priority]

    def _lead_no_more(self, sequence: Sequence) -> None:
        if sequence.twin_key and self._leaders.get(sequence.twin_key) is sequence:
            del self._leaders[sequence.twin_key]

    # Expectations.

    def _expected_tokens(self, sequence: Sequence) -> int:
        """Prompt and answer together."""
        prompt = sequence.prompt_len
        return prompt + self._answers.expected(len(sequence.tokens) - prompt, sequence.max_tokens - prompt)

    def _work_before(self, sequence: Sequence) -> int:
        """Tokens of work in the queue that go before a new sequence."""
        return sum(b.tokens for priority, b in self._queue.backlogs().items() if priority <= sequence.priority)

    def _too_late(self, sequence: Sequence, now: float, work_before: int) -> Rejected | None:
        """Whether a waiting sequence can not have its first token in time any more, by what has been measured."""
        deadline = sequence.request.deadlines.first_token
        if deadline is None:
            return None
        wait = (self._rate.seconds_for(work_before) or 0.0) if work_before else 0.0
        match = self._match(sequence)
        begun = now - sequence.arrival + wait
        expected = begun + self._prefill_seconds(sequence, match.resume)
        if expected > deadline and (restored := self._restoring.seconds(sequence, match)) is not None:
            expected = min(expected, begun + restored)
        if expected <= deadline:
            return None
        return Rejected(sequence, RejectReason.TOO_LATE, self.retry_after(), expected)

    def _prefill_seconds(self, sequence: Sequence, blocks: int) -> float:
        """Least time that a sequence's prompt takes from `blocks` on, if it had the machine for itself."""
        if not self._step_time.ready:
            return 0.0
        start = blocks * self._blocks.block_size
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
            return sequence.blocks is None and sequence.leader is None and not sequence.preemptions
        return kind is DeadlineKind.TOTAL or not sequence.answered

    def check_integrity(self) -> None:
        """Raise BlockAccountingError, or AssertionError, unless every live sequence is in one place and books agree."""
        waiting = list(self._queue)
        places = [*waiting, *self._parked, *self._restoring, *self._decoding, *self._prefilling]
        assert len(places) == len(set(places)) == len(self._live), "a sequence is in two places, or in none"
        assert set(places) == self._live, "a sequence is in a place though it is not live"
        assert all(s.blocks is None and s.leader is None and not s.computed for s in waiting), "one both waits and runs"
        assert all(s.leader and s in s.leader.followers for s in self._parked), "a parked sequence has no leader"
        self._restoring.check_integrity()
        assert not any(s.restore for s in self.running), "a running sequence keeps its restore"
        assert all(s.blocks is not None for s in self.running), "a running sequence has no blocks"
        assert all(s.uncomputed == 1 for s in self._decoding), "a decoding sequence has more than one token to compute"
        assert self._context == sum(map(self._visible, self._decoding)), "the decodes' context is miscounted"
        assert all(
            s in self._beginning[begins] and (self._steps - s.computed - begins) % self._blocks.block_size == 0
            for s, begins in self._decoding.items()
        ), "a decode begins its blocks in other steps than it is said to"
        assert sum(map(len, self._beginning)) == len(self._decoding), "one is to begin a block, and does not decode"
        assert self._preemptible == Counter(s.priority for s in self.running if not s.promoted), "who may be preempted"
        assert all(leader in self._prefilling for leader in self._leaders.values()), "a leader does not compute"
        self._blocks.check_integrity()


def _cheapest(behind: list[Sequence]) -> Sequence:
    """Whose preemption costs least: of the lowest class, the one that has computed least."""
    return min(behind, key=lambda s: (s.promoted, -s.priority, s.computed))


def _unsplit_end(sequence: Sequence, budget: int) -> int:
    """Where a chunk of at most `budget` tokens ends that splits no image."""
    end = min(len(sequence.tokens), sequence.computed + budget)
    for image in sequence.request.prompt.images:
        if image.start < end < image.end:
            return image.start
    return end
