"""The one road from other threads to an engine's loop, and its doors: who may still come in, and when all have left."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from enum import Enum, auto
from queue import Empty, SimpleQueue

from wicore_backend.engine.ledger import CLOSING_RETRY_S
from wicore_backend.engine.plan import RejectReason
from wicore_backend.engine.statistics import StatisticsRecorder
from wicore_backend.errors import EngineError, OverloadedError

Call = Callable[[], object]
"""What the loop's thread is asked to do."""


class Doors(Enum):
    """Whether requests come in."""

    OPEN = auto()
    SHUT = auto()
    """Those that are in end, in one way or another, and no more come in."""
    BROKEN = auto()
    """The loop has ended on its own."""


class Inbox:
    """Calls for the loop's thread, which makes them in the order in which they came; some of them bring requests.

    The doors are open at first, and never open again. A request comes in under the lock that they are shut under, so
    that none is put behind the loop's last call and waits for ever.

    Parameters
    ----------
    recorder
        Hears of requests that are turned away.
    """

    def __init__(self, recorder: StatisticsRecorder) -> None:
        self._recorder = recorder
        self._calls: SimpleQueue[Call] = SimpleQueue()
        self._doors = Doors.OPEN
        self._lock = threading.Lock()
        self._left = threading.Condition(self._lock)
        self._unfinished = 0

    # From any thread.

    @property
    def doors(self) -> Doors:
        """As they are at this moment."""
        return self._doors

    @property
    def unfinished(self) -> int:
        """Requests that have come in and have not left."""
        return self._unfinished

    def put(self, call: Call) -> None:
        """Have a call made, if the loop still runs."""
        self._calls.put(call)

    def wake(self) -> None:
        """Have the loop look around, if it waits: something has changed."""
        self._calls.put(lambda: None)

    def check(self) -> None:
        """Raise what `admit` would."""
        with self._lock:
            self._check(of_request=True)

    def admit(self, call: Call) -> None:
        """Let a request in, which `call` brings; it is to leave by `leave`.

        Raises
        ------
        OverloadedError
            If the doors are shut.
        EngineError
            If the loop has broken down.
        """
        with self._lock:
            self._check(of_request=True)
            self._unfinished += 1
            self._calls.put(call)

    def ask(self, call: Call) -> None:
        """Have a call made that somebody waits for; raises as `admit`."""
        with self._lock:
            self._check(of_request=False)
            self._calls.put(call)

    def shut(self) -> None:
        """Let no more requests in."""
        with self._lock:
            if self._doors is Doors.OPEN:
                self._doors = Doors.SHUT

    def wait_until_all_left(self, timeout_s: float) -> bool:
        """Whether all requests have left, or nobody is there to end them, before so much time has passed."""
        with self._lock:
            return self._left.wait_for(lambda: not self._unfinished or self._doors is Doors.BROKEN, timeout_s)

    def _check(self, *, of_request: bool) -> None:
        if self._doors is Doors.BROKEN:
            raise EngineError("the engine has broken down, its log says why; restart it")
        if self._doors is Doors.SHUT:
            self._recorder.rejected[RejectReason.DRAINING] += of_request
            raise OverloadedError(
                "the engine is shutting down and takes no new requests", retry_after_s=CLOSING_RETRY_S
            )

    # On the loop's thread.

    def take_all(self) -> None:
        """Make all calls that are there."""
        with suppress(Empty):
            while True:
                self._calls.get_nowait()()

    def take_one(self, timeout_s: float | None = None) -> bool:
        """Make the next call, waiting for it for so long, or for ever; whether one came."""
        try:
            call = self._calls.get(timeout=timeout_s)
        except Empty:
            return False
        call()
        return True

    def leave(self) -> None:
        """A request has had its last event."""
        with self._lock:
            self._unfinished -= 1
            self._left.notify_all()

    def break_down(self) -> None:
        """Let nobody in any more, and make the calls that are there, whatever comes of them.

        They bring requests, which are to end with the others, or end some.
        """
        with self._lock:
            self._doors = Doors.BROKEN
            self._left.notify_all()
        while not self._calls.empty():
            with suppress(Exception):
                self._calls.get_nowait()()
