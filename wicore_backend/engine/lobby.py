"""Everybody who waits, and who is turned away from there. Pure accounting: no tensors, no clock."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

from wicore_backend.engine.expectations import Expectations
from wicore_backend.engine.kept_prefix import KeptPrefixes
from wicore_backend.engine.plan import Rejected, RejectReason, SchedulerLimits
from wicore_backend.engine.request import Sequence
from wicore_backend.engine.restoring import Decision, Restoring
from wicore_backend.engine.twins import Twins
from wicore_backend.engine.waiting import Backlog, Next, WaitingQueue


class Lobby:
    """The sequences that have no blocks, each in one of three places.

    - In the *queue* it comes in (`push`), and comes back to (`put_back`): after it gave way, after its leader did, and
      after a restore. From there it is served in the order of `WaitingQueue`.
    - *Parked*, it waits for a twin's prompt (`Twins`).
    - *Restoring*, for its prefix to come from the cold tier (`Restoring`).

    `check_integrity` proves that nobody is in two of them, or runs.
    """

    def __init__(
        self, limits: SchedulerLimits, prefixes: KeptPrefixes, expectations: Expectations, restoring: Restoring
    ) -> None:
        self.twins = Twins()
        self.restoring = restoring
        self._queue: WaitingQueue[Sequence] = WaitingQueue(
            ageing_s=limits.ageing_s, aged_share=limits.aged_share, weights=limits.tenant_weights
        )
        self._limits = limits
        self._prefixes = prefixes
        self._expectations = expectations

    def __len__(self) -> int:
        return len(self._queue) + len(self.twins) + len(self.restoring)

    def __iter__(self) -> Iterator[Sequence]:
        return chain(self._queue, self.twins, self.restoring)

    @property
    def queueing(self) -> bool:
        """Whether somebody is in the queue itself."""
        return len(self._queue) > 0

    def backlogs(self) -> Mapping[int, Backlog]:
        """What is in the queue, by priority."""
        return self._queue.backlogs()

    # Who comes and goes.

    def push(self, sequence: Sequence) -> None:
        """A sequence is new."""
        self._queue.push(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """A sequence that has been taken comes back, to its old place in the queue."""
        self._queue.push(sequence, charged=True)

    def remove(self, sequence: Sequence) -> None:
        """A sequence has ended, wherever it waits."""
        if sequence.leader is not None:
            self.twins.unpark(sequence)
        elif sequence not in self.restoring:
            self._queue.remove(sequence)
        self.restoring.end(sequence)

    def settle(self, sequence: Sequence) -> None:
        """An answer has come to its end: its tenant owes what it took, instead of what had been expected."""
        self._queue.charge(sequence.priority, sequence.tenant, len(sequence.tokens) - sequence.cost)

    # Who is next.

    def peek(self, now: float, *, ageing: bool = True) -> Next[Sequence] | None:
        """The head of the queue; it is taken with `take`, `park` or `restore`."""
        return self._queue.peek(now, ageing=ageing)

    def restore(self, sequence: Sequence, now: float) -> Decision:
        """Have the head of the queue wait for more of its prefix, if that is worth while; the queue loses it then."""
        decision = self.restoring.begin(sequence, now)
        if decision is Decision.RESTORE:
            self._queue.serve(sequence, now)
        return decision

    def take(self, sequence: Sequence, now: float) -> None:
        """Take a sequence out of the queue that was its head: what has come back since may be before it."""
        self._queue.serve(sequence, now)
        self._expectations.admitted(sequence.cost)

    def park(self, sequence: Sequence, leader: Sequence) -> None:
        """Have a sequence that has been taken wait for its leader's prompt, and for nothing else."""
        self.restoring.end(sequence)
        self.twins.park(sequence, leader)

    def started(self, sequence: Sequence) -> None:
        """A sequence that has been taken runs: nothing is held for it any more, and others may wait for its prompt."""
        self.restoring.started(sequence)
        self.twins.lead(sequence)

    def take_restored(self, now: float) -> None:
        """Those whose restore is done, or too late, come back into the queue."""
        for sequence in self.restoring.take_done(now):
            self.put_back(sequence)

    # Who is turned away.

    def too_late(self, sequence: Sequence, now: float, *, behind: bool) -> Rejected | None:
        """Whether a waiting sequence can not have its first token in time any more, by what has been measured.

        Parameters
        ----------
        behind
            Whether it is still to come behind all who wait in its class, and in better ones.
        """
        deadline = sequence.request.deadlines.first_token
        if deadline is None:
            return None
        begun = now - sequence.arrival
        if behind:
            begun += self._expectations.queue_seconds(self._work_before(sequence))
        match = self._prefixes.match(sequence)
        expected = begun + self.restoring.prefill_seconds(sequence, match.resume)
        if expected > deadline and (restored := self.restoring.seconds(sequence, match)) is not None:
            expected = min(expected, begun + restored)
        if expected <= deadline:
            return None
        return Rejected(sequence, RejectReason.TOO_LATE, self.retry_after(), expected)

    def overflow(self, sequence: Sequence, *, free_places: int) -> RejectReason | None:
        """Which bound of the queue one more sequence would break; `free_places` sequences leave it in the next step."""
        if len(self) >= self._limits.max_waiting + free_places:
            return RejectReason.QUEUE_REQUESTS
        if self.queueing and self._queue.tokens + sequence.cost > self._limits.max_waiting_tokens:
            return RejectReason.QUEUE_TOKENS
        return None

    def last_below(self, priority: int) -> Sequence | None:
        """Who is to be turned away first for a new sequence of that priority: somebody of a lower class, or nobody."""
        last = self._queue.newest_of_lowest()
        return last if last is not None and last.priority > priority else None

    def retry_after(self) -> float:
        """Seconds after which, at the rate measured, the present queue will be gone."""
        return self._expectations.retry_after(self._queue.tokens)

    def _work_before(self, sequence: Sequence) -> int:
        """Tokens of work in the queue that go before a new sequence."""
        return sum(b.tokens for priority, b in self._queue.backlogs().items() if priority <= sequence.priority)

    def check_integrity(self) -> None:
        """Raise AssertionError unless everybody waits in one place, and for something."""
        places = list(self)
        assert len(places) == len(set(places)), "a sequence waits in two places"
        assert all(s.blocks is None and not s.computed for s in places), "one both waits and runs"
        assert all(s.leader is None for s in self._queue), "one is in the queue, and has a leader"
        self.twins.check_integrity()
        self.restoring.check_integrity()
