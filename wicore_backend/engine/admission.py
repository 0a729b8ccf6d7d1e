"""Every way between those who wait and those who run. Pure accounting: no tensors, no clock but the one handed in."""

from __future__ import annotations

from wicore_backend.engine.kept_prefix import KeptPrefixes
from wicore_backend.engine.lobby import Lobby
from wicore_backend.engine.pacing import Pacer
from wicore_backend.engine.plan import Fork, SchedulerCounts
from wicore_backend.engine.request import Sequence
from wicore_backend.engine.restoring import Decision
from wicore_backend.engine.running import Running
from wicore_backend.engine.waiting import Next
from wicore_backend.hmt.blocks import PrefixMatch

_RETRY_STEPS = 8
"""While nobody leaves, room changes little: the head of the queue is looked at again after so many steps."""


class Admission:
    """Who comes from the `Lobby` to the `Running`, and who has to go back.

    - The head of the queue *starts* when the memory is there that it and all who run are expected to take, and when
      decodes keep their pace with it. Until then it stays the head: nobody overtakes it.
    - Whoever has to have room gets it from the cheapest of those behind it, who is *preempted*: its blocks stay in the
      prefix cache as long as there is room, and it returns to its place in the queue.
    - Those parked for a prompt that is computed *fork*, as far as there is room, or return to the queue.

    It holds nobody itself; `check_integrity` proves that both sides agree on who leads.
    """

    def __init__(
        self, lobby: Lobby, running: Running, prefixes: KeptPrefixes, pacer: Pacer, counts: SchedulerCounts
    ) -> None:
        self._lobby = lobby
        self._running = running
        self._prefixes = prefixes
        self._pacer = pacer
        self._counts = counts
        self._steps = 0
        self._stuck: tuple[Sequence, int, int] | None = None

    def begin_step(self, now: float) -> None:
        """A step is about to be planned: those whose restores are done are in the queue again."""
        self._steps += 1
        self._lobby.take_restored(now)

    # From the queue.

    def peek(self, now: float) -> Next[Sequence] | None:
        """The head of the queue. While the prompt of a promoted one is under way, no other is promoted."""
        return self._lobby.peek(now, ageing=not any(s.promoted for s in self._running.prefilling))

    def admit(self, ahead: Next[Sequence], now: float) -> bool:
        """Take the head of the queue out of it: it runs now, is parked, or restores. False if it has to wait."""
        sequence = ahead.item
        if sequence.ahead is not None:  # It gave way in this very step, and its last token is to be read first.
            return False
        if (leader := self._lobby.twins.leader(sequence)) is not None:
            self._take(ahead, now)
            self._lobby.park(sequence, leader)
            return True
        if self._stuck == self._situation(sequence):
            return False
        decision = self._lobby.restore(sequence, now)
        if decision is Decision.RESTORE:
            return True
        match = None if decision is Decision.WAIT else self._make_room(sequence, promoted=ahead.promoted)
        if match is None:
            self._stuck = self._situation(sequence)
            return False
        self._take(ahead, now)
        self._start(sequence, match)
        return True

    def _take(self, ahead: Next[Sequence], now: float) -> None:
        self._lobby.take(ahead.item, now)
        if ahead.promoted:
            ahead.item.promoted = True
            self._counts.promotions += 1

    def _start(self, sequence: Sequence, match: PrefixMatch) -> None:
        if not sequence.preemptions:
            self._prefixes.count_hits(sequence, match, self._counts)
        self._running.start(sequence, match)
        self._lobby.started(sequence)

    def _situation(self, sequence: Sequence) -> tuple[Sequence, int, int]:
        """What has to change for a sequence that could not start to be looked at again."""
        return sequence, self._running.stops, self._steps // _RETRY_STEPS

    def _make_room(self, sequence: Sequence, *, promoted: bool) -> PrefixMatch | None:
        """What the sequence can start from now, after preempting those of lower classes if need be."""
        while (match := self._fits(sequence)) is None:
            victim = self._running.victim_for(sequence, promoted=promoted)
            if victim is None:
                return None
            self.preempt(victim)
        return match

    def _fits(self, sequence: Sequence) -> PrefixMatch | None:
        """What the sequence can start from now, or None if there is no room for it."""
        running = self._running
        if not running:
            return self._prefixes.match(sequence)  # The pools hold one sequence of any length.
        if not running.free_places or not self._pacer.keeps_pace(running.shape_beside(sequence)):
            return None
        match = self._prefixes.match(sequence)
        return match if running.has_room_for(sequence, match) else None

    # From a twin.

    def fork_followers(self, leader: Sequence) -> list[Fork]:
        """Let the sequences that waited for this prompt go on from it, as far as there is room."""
        forks = []
        for sequence in self._lobby.twins.dismiss(leader):
            if self._running.fork(leader, sequence):
                self._counts.shared_prefill_tokens += leader.computed
                forks.append(Fork(leader, sequence))
            else:
                self._lobby.put_back(sequence)
        return forks

    # Back.

    def place(self, sequence: Sequence, end: int, *, or_preempt: bool) -> bool:
        """Get blocks up to `end`, if need be from those behind in rank; failing that, give way oneself if told to."""
        while not self._running.extend(sequence, end):
            if (victim := self._running.victim_behind(sequence)) is not None:
                self.preempt(victim)
                continue
            if or_preempt:
                self.preempt(sequence)
            return False
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks from it and put it back into the queue, at its old place."""
        self._counts.preemptions += 1
        self._counts.lost_tokens += sequence.computed
        sequence.preemptions += 1
        self.stop(sequence)
        self._lobby.put_back(sequence)

    def stop(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks from it; those that waited for its prompt are in the queue again."""
        self._running.stop(sequence)
        for follower in self._lobby.twins.dismiss(sequence):
            self._lobby.put_back(follower)

    def check_integrity(self) -> None:
        """Raise AssertionError unless those that lead compute their prompts."""
        prefilling = self._running.prefilling
        assert all(leader in prefilling for leader in self._lobby.twins.leaders), "a leader does not compute"
