"""What the lanes carry: one record on its way to the disk, or to the caller's buffer."""

from __future__ import annotations

from wicore_backend.hmt.nvme.lane import Job
from wicore_backend.hmt.nvme.ledger import Ledger
from wicore_backend.hmt.nvme.outcome import Outcome
from wicore_backend.hmt.nvme.record import Record
from wicore_backend.hmt.nvme.tickets import Ticket
from wicore_backend.hmt.nvme.transfer import checked_copy


class _RecordJob(Job):
    """A record on its way between the disk and the caller's memory.

    Attributes
    ----------
    payload
        The caller's memory: what the record holds, or where that is to go.
    bad_place
        Whether the disk has failed at the record's slots.
    """

    def __init__(
        self, ledger: Ledger, record: Record, payload: memoryview, ticket: Ticket, place: int, *, weight: int
    ) -> None:
        super().__init__(weight=weight)
        self.record = record
        self.payload = payload
        self.bad_place = False
        self._ledger = ledger
        self._ticket = ticket
        self._place = place

    def settle(self, outcome: Outcome) -> None:
        """See Job."""
        self._ticket.settle(self._place, outcome)


class WriteJob(_RecordJob):
    """A record on its way to the disk."""

    def finish(self, outcome: Outcome, *, wanted: bool) -> Outcome:
        """See Job."""
        return self._ledger.written(self.record, outcome, wanted=wanted, bad=self.bad_place)

    def settle(self, outcome: Outcome) -> None:
        """See Job."""
        self._ledger.store_ended(self.record, outcome)
        super().settle(outcome)


class ReadJob(_RecordJob):
    """A record on its way to the caller's buffer.

    It goes by way of a buffer of the reading thread's. That copy is the price of deadlines: a read that is late still
    writes to memory whenever the disk answers.

    Attributes
    ----------
    loaded
        The payload, unchecked, in the thread's buffer.
    """

    loaded = memoryview(b"")

    def finish(self, outcome: Outcome, *, wanted: bool) -> Outcome:
        """See Job."""
        if wanted and outcome is Outcome.DONE and checked_copy(self.payload, self.loaded) != self.record.checksum:
            outcome = Outcome.CORRUPT
        self._ledger.read(self.record, outcome, bad=self.bad_place)
        return outcome

    def settle(self, outcome: Outcome) -> None:
        """See Job."""
        self._ledger.fetch_ended(outcome)
        super().settle(outcome)
