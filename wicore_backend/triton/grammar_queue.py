"""Requests that wait until their grammars are compiled: a bounded number, which a cancel or a deadline ends at once."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import inf

from wicore_backend.engine.request import Deadlines, FinishedEvent, FinishReason, Sink, Usage
from wicore_backend.errors import (
    CancelledError,
    DeadlineExceededError,
    EngineError,
    ErrorCode,
    OverloadedError,
    WicoreError,
)

_log = logging.getLogger(__name__)

_THREADS = 8
"""More than compile at once, so that who asks for what others have asked for has it with them."""

_MOST_WAITING = 64

_RETRY_S = 2.0
"""What the worst of grammars takes."""

_REASONS = {
    ErrorCode.CANCELLED: FinishReason.CANCELLED,
    ErrorCode.DEADLINE_EXCEEDED: FinishReason.DEADLINE,
    ErrorCode.UNAVAILABLE: FinishReason.REJECTED,
}
"""Of an end by an error; of all others ERROR."""


class WaitingRequest:
    """One that waits, until it is submitted or ended, whichever comes first.

    Parameters
    ----------
    sink
        Hears of an end that comes first, as it would from the engine.
    """

    def __init__(self, sink: Sink, *, prompt_tokens: int, arrival: float, deadlines: Deadlines) -> None:
        self._sink = sink
        self._prompt_tokens = prompt_tokens
        self._arrival = arrival
        self._lock = threading.Lock()
        self._settled = False
        self._within_s = min((seconds for _, seconds in deadlines.items()), default=inf)

    @property
    def settled(self) -> bool:
        """Whether it waits no more."""
        return self._settled

    @property
    def due(self) -> float:
        """When its first deadline passes, as `time.monotonic` has it."""
        return self._arrival + self._within_s

    def submit(self, submit: Callable[[], None]) -> None:
        """Call `submit`, unless the request has ended. A cancel that comes meanwhile comes after it."""
        with self._lock:
            if not self._settled:
                submit()
                self._settled = True

    def cancel(self) -> bool:
        """End it; False if it has been submitted or has ended."""
        return self.end(CancelledError("the request was cancelled"))

    def expire(self) -> bool:
        """End it for its deadline; False if it has been submitted or has ended."""
        limit = f"the deadline of {self._within_s:.3f} s has passed while the request's grammar was compiled"
        return self.end(DeadlineExceededError(limit))

    def end(self, error: Exception) -> bool:
        """End it with an error; False if it has been submitted or has ended."""
        told = error if isinstance(error, WicoreError) else EngineError(f"the request could not be submitted: {error}")
        with self._lock:
            if self._settled:
                return False
            self._settled = True
        usage = Usage(self._prompt_tokens, 0, queue_s=None, ttft_s=None, total_s=time.monotonic() - self._arrival)
        self._sink(FinishedEvent(_REASONS.get(told.code, FinishReason.ERROR), usage, told))
        return True


class GrammarQueue:
    """Has grammars compiled on threads of its own, and looks after the deadlines of who waits for that."""

    def __init__(self, *, threads: int = _THREADS, most_waiting: int = _MOST_WAITING) -> None:
        self._most_waiting = most_waiting
        self._waiting: set[WaitingRequest] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="wicore-compiling")
        self._watch = threading.Thread(target=self._expire, name="wicore-grammar-deadlines", daemon=True)
        self._watch.start()

    def check_room(self) -> None:
        """Raise OverloadedError if as many wait as may."""
        with self._changed:
            if len(self._waiting) >= self._most_waiting:
                raise OverloadedError(
                    f"{self._most_waiting} requests wait for their grammars to be compiled", retry_after_s=_RETRY_S
                )

    def add(self, request: WaitingRequest, *, compile_it: Callable[[], None], submit: Callable[[], None]) -> None:
        """Call `compile_it` on another thread, in its turn, and then `submit` there, unless the request ends before.

        What either raises ends the request.
        """
        with self._changed:
            self._waiting.add(request)
            self._changed.notify()
        self._threads.submit(self._see_through, request, compile_it, submit)

    def close(self) -> None:
        """Wait for who waits."""
        self._threads.shutdown()
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._watch.join()

    def _see_through(self, request: WaitingRequest, compile_it: Callable[[], None], submit: Callable[[], None]) -> None:
        try:
            if not request.settled:
                compile_it()
                request.submit(submit)
        except Exception as error:
            if not isinstance(error, WicoreError):
                _log.exception("a request with a grammar could not be submitted")
            request.end(error)
        finally:
            with self._changed:
                self._waiting.discard(request)

    def _expire(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                # Who has ended keeps its place until its thread looks: places are what the threads have to do.
                due = min((request.due for request in self._waiting if not request.settled), default=inf)
                self._changed.wait(None if due == inf else max(0.0, due - time.monotonic()))
                now = time.monotonic()
                late = [request for request in self._waiting if not request.settled and request.due <= now]
            for request in late:
                request.expire()
