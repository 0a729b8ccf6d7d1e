"""What is asked of the cold tier, and what it reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from wicore_backend.hmt.host_tier import SlotBlock
from wicore_backend.hmt.nvme import Outcome


class Restore:
    """A call of `ColdTier.restore`: its blocks are being brought up. For the loop thread.

    Attributes
    ----------
    blocks
        As they were asked for.
    left
        How many of them `ColdTier.finished` has not reported yet.
    """

    def __init__(self, blocks: Sequence[SlotBlock], deadline: float, cancel: Callable[[Restore], None]) -> None:
        self.blocks = blocks
        self.left = len(blocks)
        self.deadline = deadline
        self.cancelled = False
        self._cancel = cancel

    @property
    def done(self) -> bool:
        """Whether every block has been reported."""
        return not self.left

    def cancel(self) -> None:
        """End the blocks that are not being decoded yet; `finished` reports them all the same."""
        if self.left and not self.cancelled:
            self.cancelled = True
            self._cancel(self)


class Finished(NamedTuple):
    """A block whose slot is the caller's again.

    Attributes
    ----------
    outcome
        Of a spill: `DONE` or `HELD` if it can be restored, else why not. Of a restore: `DONE` if the slot holds it.
    restore
        The restore that it belongs to; None for a spill.
    """

    block: SlotBlock
    outcome: Outcome
    restore: Restore | None

    @property
    def there(self) -> bool:
        """Whether the slot holds the restored block, or the spilled one can be restored."""
        return self.outcome in (Outcome.DONE, Outcome.HELD)
