"""Sequences with the same whole prompt, which is computed once. Pure accounting, like the scheduler's."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from wicore_backend.engine.request import Sequence


class Twins:
    """Who computes a prompt for others, and who waits for that.

    Of the sequences that share a `twin_key` and have no answer yet, one that runs with its prompt under way is the
    *leader*. One that would start beside it is *parked* instead: it has the leader, and is among its followers. When
    the leader's prompt is computed, or it stops, it is dismissed: it leads no more, and its followers are parked no
    more. So nobody is parked without a leader, and no leader has gone; `check_integrity` proves both.
    """

    def __init__(self) -> None:
        self._leaders: dict[bytes, Sequence] = {}
        self._parked: dict[Sequence, None] = {}

    def __len__(self) -> int:
        return len(self._parked)

    def __iter__(self) -> Iterator[Sequence]:
        """Those that are parked."""
        return iter(self._parked)

    @property
    def leaders(self) -> Collection[Sequence]:
        return self._leaders.values()

    def leader(self, sequence: Sequence) -> Sequence | None:
        """Who computes what a sequence would compute if it started now."""
        return self._leaders.get(sequence.twin_key) if sequence.twin_key and not sequence.answered else None

    def lead(self, sequence: Sequence) -> None:
        """A sequence has started that has no leader."""
        if sequence.twin_key and not sequence.answered:
            self._leaders[sequence.twin_key] = sequence

    def park(self, sequence: Sequence, leader: Sequence) -> None:
        """Have a sequence wait for its leader's prompt."""
        sequence.leader = leader
        leader.followers.append(sequence)
        self._parked[sequence] = None

    def unpark(self, sequence: Sequence) -> None:
        """A sequence waits for its leader no more."""
        assert sequence.leader is not None, f"request {sequence.request.id} is not parked"
        sequence.leader.followers.remove(sequence)
        sequence.leader = None
        del self._parked[sequence]

    def dismiss(self, sequence: Sequence) -> list[Sequence]:
        """A running sequence leads no more, if it did; returns those that it had parked."""
        if sequence.twin_key and self._leaders.get(sequence.twin_key) is sequence:
            del self._leaders[sequence.twin_key]
        followers = list(sequence.followers)
        for follower in followers:
            self.unpark(follower)
        return followers

    def check_integrity(self) -> None:
        """Raise AssertionError unless those that are parked, and they alone, follow one that leads."""
        for sequence in self._parked:
            assert sequence.leader in self._leaders.values(), "a parked sequence has no leader"
            assert sequence.blocks is None, "a parked sequence runs"
        followers = [follower for leader in self._leaders.values() for follower in leader.followers]
        assert len(followers) == len(self._parked), "one follows twice, or is parked and follows nobody"
        assert set(followers) == set(self._parked), "one follows a leader, and is not parked"
