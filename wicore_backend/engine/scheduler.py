"""Who computes what in the next step. Pure accounting: no tensors, and no clock but the one handed in.

Each step decodes one token of every sequence that is that far, then spends what is left of its budget on prompts, in
chunks. The budget is a number of tokens, and a time: beside decodes, prompts take no more of it than keeps their pace
(`Pacer`).

Who goes first: smaller priority, then the tenants in turn, then order of arrival (`WaitingQueue`). Nobody overtakes
the head of the queue. Prompts that are under way share a step, so that no long one holds up all others (`Turns`).

A live sequence either waits (`Lobby`) or runs (`Running`, some of them `Decodes`), and passes from one to the other by
`Admission` alone. The head of the queue is let in when there is the memory that it and all who run are *expected* to
take (`Expectations`). If expectations fail, or if it goes before one who runs, the cheapest of those behind gives way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from wicore_backend.engine.admission import Admission
from wicore_backend.engine.chunks import Chunks
from wicore_backend.engine.deadlines import DeadlineHeap
from wicore_backend.engine.expectations import Expectations
from wicore_backend.engine.kept_prefix import KeptPrefixes
from wicore_backend.engine.lobby import Lobby
from wicore_backend.engine.pacing import Pacer
from wicore_backend.engine.plan import Chunk, Fork, Guess, Rejected, SchedulerCounts, SchedulerLimits, StepPlan
from wicore_backend.engine.request import DeadlineKind, Sequence
from wicore_backend.engine.restoring import Restoring
from wicore_backend.engine.running import Running
from wicore_backend.engine.step_time import StepTimeModel
from wicore_backend.engine.turns import Turns
from wicore_backend.engine.waiting import Backlog
from wicore_backend.hmt.blocks import BlockManager


class Scheduler:
    """See the module's docstring."""

    def __init__(self, blocks: BlockManager, limits: SchedulerLimits, step_time: StepTimeModel) -> None:
        self.counts = SchedulerCounts()
        self._blocks = blocks
        self._limits = limits
        self._live: set[Sequence] = set()
        self._deadlines = DeadlineHeap(self._live)
        self._prefixes = KeptPrefixes(blocks)
        self._expectations = Expectations(step_time, max_batch_tokens=limits.max_batch_tokens)
        restoring = Restoring(blocks, self._prefixes, self._expectations, self.counts)
        self._lobby = Lobby(limits, self._prefixes, self._expectations, restoring)
        self._running = Running(blocks, self._expectations, max_running=limits.max_running)
        self._decodes = self._running.decodes
        self._pacer = Pacer(step_time, target_s=limits.target_tpot_s, slowdown=limits.max_decode_slowdown)
        self._admission = Admission(self._lobby, self._running, self._prefixes, self._pacer, self.counts)

    # What there is.

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    @property
    def only_ending(self) -> bool:
        """Whether nobody waits, and whoever runs ends with the token that has been chosen, the longest it may be."""
        return (
            not self._running.prefilling
            and not self._lobby
            and all(len(s.tokens) + (s.ahead is not None) >= s.max_tokens for s in self._decodes)
        )

    @property
    def running(self) -> list[Sequence]:
        return list(self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_decoding(self) -> int:
        return len(self._decodes)

    @property
    def keys_read(self) -> int:
        """Keys that the next step's decodes see in the global group, about."""
        return self._decodes.keys

    @property
    def num_waiting(self) -> int:
        return len(self._lobby)

    def backlogs(self) -> Mapping[int, Backlog]:
        """What is in the queue, by priority; for statistics."""
        return self._lobby.backlogs()

    def kept(self, sequence: Sequence) -> int:
        """Tokens of a sequence that waits which would not have to be computed if it started now."""
        return self._prefixes.match(sequence).resume * self._blocks.block_size

    # What comes and goes.

    def add(self, sequence: Sequence, now: float) -> list[Rejected]:
        """Put a new sequence into the queue. Returns those that are turned away for it: itself, or lower classes."""
        sequence.cost = self._expectations.tokens(sequence)
        if (late := self._lobby.too_late(sequence, now, behind=True)) is not None:
            return [late]
        rejected: list[Rejected] = []
        while reason := self._lobby.overflow(sequence, free_places=self._running.free_places):
            last = self._lobby.last_below(sequence.priority)
            rejected.append(Rejected(sequence if last is None else last, reason, self._lobby.retry_after()))
            if last is None:
                return rejected
            self.remove(last)
        self._live.add(sequence)
        self._lobby.push(sequence)
        self._prefixes.tell_of(sequence, now)
        self._deadlines.add(sequence)
        self._expectations.tick(now, queueing=True)
        return rejected

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is. What it computed stays in the prefix cache as long as there is room."""
        self._live.remove(sequence)
        if sequence.blocks is not None:
            self._admission.stop(sequence)
        else:
            self._lobby.remove(sequence)

    def finished(self, sequence: Sequence) -> None:
        """An answer has come to its own end: remove its sequence, and learn from it."""
        self._expectations.answered(sequence.answered)
        self._lobby.settle(sequence)
        self.remove(sequence)

    def expire(self, now: float) -> Iterator[tuple[Sequence, DeadlineKind]]:
        """Sequences that have missed a deadline; the caller removes them."""
        return self._deadlines.missed(now)

    def give_up(self, now: float) -> Iterator[Rejected]:
        """Turn away the heads of the queue for which it is too late to begin."""
        while (ahead := self._lobby.peek(now)) is not None:
            begun = ahead.item.answered or ahead.item.ahead is not None
            late = None if begun else self._lobby.too_late(ahead.item, now, behind=False)
            if late is None:
                return
            self.remove(late.sequence)
            yield late

    def preempt(self, sequence: Sequence) -> None:
        """Have a running sequence give way: it returns to its place in the queue."""
        self._admission.preempt(sequence)

    def forget_cache(self) -> None:
        """Preempt whoever runs and keep nothing of what has been computed: the pools' bytes are in doubt."""
        for sequence in self.running:
            self.preempt(sequence)
        self._blocks.forget_all()

    # A step.

    def plan(self, now: float, guess: Guess | None = None) -> StepPlan:
        """The next step, the blocks for it in place. Admits waiting sequences; preempts where it must.

        Parameters
        ----------
        guess
            Asked in a step of decodes alone for tokens that are computed with it, in case they come.
        """
        self._admission.begin_step(now)
        for sequence in self._decodes.grow():
            if sequence in self._decodes:  # It may have given way to one before it.
                self._admission.place(sequence, sequence.computed + 1, or_preempt=True)
        chunks = self._plan_chunks(now)
        if not chunks and not self._decodes:
            # Who had a chunk gave way to one for whom too little was left of the step. Now there is all of it.
            chunks = self._plan_chunks(now)
        self._expectations.tick(now, queueing=self._lobby.queueing)
        guesses: Mapping[Sequence, tuple[int, ...]] = {}
        if guess is not None and not chunks:
            guesses = self._decodes.place_guesses(guess, max_batch_tokens=self._limits.max_batch_tokens)
            self.counts.guessed_tokens += sum(map(len, guesses.values()))
        shape = self._decodes.shape(guesses)
        for chunk in chunks:
            shape = shape.with_prefill(chunk.end - chunk.start, chunk.start)
        return StepPlan(list(self._decodes), chunks, shape, self._pacer.limit_s, guesses)

    def complete(self, plan: StepPlan) -> list[Fork]:
        """Note that a step has been computed. Returns sequences that now go on from prompts that it completed."""
        self._decodes.computed(plan.decodes)
        forks: list[Fork] = []
        for chunk in plan.chunks:
            self._running.computed(chunk)
            if chunk.completes:
                forks += self._admission.fork_followers(chunk.sequence)
        return forks

    def advance(self, sequence: Sequence) -> None:
        """The token after the one that a decode computed had been guessed, so that it is computed, too."""
        self.counts.guessed_right += 1
        self._decodes.advance(sequence)

    def _plan_chunks(self, now: float) -> list[Chunk]:
        """Chunks of prompts, in their turns, under what the decodes leave of the step's tokens and time."""
        shape = self._decodes.shape()
        chunks = Chunks(self._pacer, shape, tokens=self._limits.max_batch_tokens - len(self._decodes))
        turns = Turns(self._running.prefilling)
        blocked = False
        held_back = not self._pacer.begin(shape)
        while chunks.room and not held_back:
            ahead = None if blocked else self._admission.peek(now)
            if ahead and turns.admit(ahead):
                if not self._admission.admit(ahead, now):
                    blocked = True
                    continue
                sequence = ahead.item
                if sequence.blocks is not None:
                    turns.started(sequence)
                # If someone with a chunk gave way, nobody comes back in the same step: it would have two.
                blocked = chunks.any_lost
            elif turns:
                sequence = turns.pop()
            else:
                break
            if sequence.blocks is None:  # Parked, or preempted for one before it.
                continue
            if not self._decodes:  # Those there were have given way: there is no pace to be kept.
                self._pacer.begin(self._decodes.shape())
            end = chunks.end(sequence)
            if end < len(sequence.tokens):
                share = turns.share(sequence, None if blocked else self._admission.peek(now))
                part = chunks.end(sequence, share=share)
                # A share that holds no image, or is not worth it, would leave nothing to the others either.
                end = part if part > sequence.computed else end
            if end == sequence.computed:
                held_back = not chunks
                break
            placed = self._admission.place(sequence, end, or_preempt=False)
            blocked = blocked or chunks.any_lost
            if placed:
                if end == len(sequence.tokens):
                    turns.completed(sequence)
                chunks.add(sequence, end)
        self._pacer.end(chunks.shape, held_back=held_back)
        return chunks.kept

    def check_integrity(self) -> None:
        """Raise BlockAccountingError, or AssertionError, unless every live sequence is in one place and books agree."""
        places = [*self._lobby, *self._running]
        assert len(places) == len(set(places)) == len(self._live), "a sequence is in two places, or in none"
        assert set(places) == self._live, "a sequence is in a place though it is not live"
        self._lobby.check_integrity()
        self._running.check_integrity()
        self._admission.check_integrity()
        self._blocks.check_integrity()
