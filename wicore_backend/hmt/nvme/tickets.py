"""What a caller holds while the store works for it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from wicore_backend.hmt.nvme.outcome import Outcome

_log = logging.getLogger(__name__)


class Ticket:
    """One call's operations, until each has its outcome. Safe on any thread.

    The memory that was handed in is the store's to read (store) or to fill (fetch) until the ticket is done, and not
    for a moment longer.
    """

    def __init__(self, count: int, done: Callable[[Ticket], None] | None) -> None:
        self._outcomes: list[Outcome | None] = [None] * count
        self._left = count
        self._done = done
        self._lock = threading.Lock()
        self._event = threading.Event()
        self._cancel: Callable[[], object] | None = None
        if not count:
            self._finish()

    @property
    def done(self) -> bool:
        """Whether every operation has its outcome."""
        return self._event.is_set()

    @property
    def outcomes(self) -> Sequence[Outcome | None]:
        """In the order of the call; None where it is not known yet."""
        return tuple(self._outcomes)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until done; whether it is."""
        return self._event.wait(timeout_s)

    def cancel(self) -> None:
        """End what has not ended without waiting for the disk; done follows at once, or after a copy under way."""
        cancel = self._cancel
        if cancel is not None:
            cancel()

    def bind(self, cancel: Callable[[], object]) -> None:
        """For the store: what `cancel` is to call."""
        self._cancel = cancel

    def settle(self, index: int, outcome: Outcome) -> None:
        """For the store: one operation's outcome."""
        with self._lock:
            self._outcomes[index] = outcome
            self._left -= 1
            last = not self._left
        if last:
            self._finish()

    def _finish(self) -> None:
        self._cancel = None
        self._event.set()
        if self._done is not None:
            try:
                self._done(self)
            except Exception:
                _log.exception("nvme_store_callback_failed")
