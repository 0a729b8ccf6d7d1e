"""How an operation on the store can end."""

from __future__ import annotations

from enum import StrEnum


class Outcome(StrEnum):
    """The end of one store or fetch. Every value but `DONE` means: not stored, or nothing in the buffer."""

    DONE = "done"
    """Stored: it can be fetched from now on. Fetched: the buffer holds the payload, checksum verified."""
    MISSING = "missing"
    """Fetch: no payload of that name and that length."""
    HELD = "held"
    """Store: the name is there already, or on its way."""
    FULL = "full"
    """Store: too few free slots; delete something first."""
    BUSY = "busy"
    """Store: as many stores as allowed are waiting."""
    REFUSED = "refused"
    """Store: a write has just failed, or the files have been deleted; no store is tried for a while."""
    LATE = "late"
    """A deadline passed first, or the disk answers nothing at the moment."""
    FAILED = "failed"
    """The disk reported an error."""
    CORRUPT = "corrupt"
    """Fetch: the bytes on the disk are not the ones that were stored; the record is dropped."""
    CANCELLED = "cancelled"
    CLOSED = "closed"
    """The store is closed."""
