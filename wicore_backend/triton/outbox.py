"""From the engine's events to responses: one thread sends for all requests, and groups when it falls behind.

The engine's thread only appends an event to its request's buffer. The sending thread takes a request's whole buffer at
a time, so tokens that arrive while it is busy leave together: a slow client or backend makes responses fewer and
larger, never the engine slower.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol

from wicore_backend.engine.request import Event, FinishedEvent, FinishReason, TokenLogprob, TokensEvent, Usage
from wicore_backend.errors import WicoreError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reply:
    """One response's content. `reason` and `usage` are there on a request's last, and only there."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    reason: FinishReason | None = None
    usage: Usage | None = None
    error: WicoreError | None = None


class Wire(Protocol):
    """The road back to one request's client. Used by the sending thread only, except before the request is opened."""

    def send(self, reply: Reply) -> None:
        """Send a response; after one with a `reason` the request is over."""

    def fail(self, error: WicoreError) -> None:
        """End a request that has had no response yet with an error."""

    def keep_alive(self) -> None:
        """Send whatever lets a cancel be noticed further up, and that the client does not see."""

    def is_cancelled(self) -> bool:
        """Whether the client has gone or has cancelled."""


class Channel:
    """One open request: the buffer between the engine's thread, which puts, and the sending thread, which flushes."""

    def __init__(
        self, wire: Wire, *, stream: bool, cancel: Callable[[], None], ready: SimpleQueue[Channel | None]
    ) -> None:
        self.wire = wire
        self.lost = False
        """Whether the client has gone; the request's end is still sent, for Triton's sake."""
        self.broken = False
        """Whether sending failed; nothing is sent any more."""
        self._cancel = cancel
        self.last_sent = time.monotonic()
        self._stream = stream
        self._events: deque[Event] = deque()
        self._ready = ready
        self._announced = False
        self._answered = False

    def put(self, event: Event) -> None:
        """The request's sink, on the engine's thread."""
        self._events.append(event)
        if not self._announced and (self._stream or isinstance(event, FinishedEvent)):
            self._announced = True
            self._ready.put(self)

    def lose(self) -> None:
        """The client has gone: cancel the request, once."""
        if not self.lost:
            self.lost = True
            self._cancel()

    def flush(self) -> bool:
        """Send what there is; True once the request is over."""
        self._announced = False  # Before the buffer is read: an event that comes now announces itself again.
        events: list[Event] = []
        while self._events:
            events.append(self._events.popleft())
        if not events or self.broken:
            return False
        reply = merge(events)
        if reply.error is not None and not self._answered and not reply.token_ids:
            self.wire.fail(reply.error)
        else:
            self.wire.send(reply)
        self._answered = True
        self.last_sent = time.monotonic()
        return reply.reason is not None


class Outbox:
    """The sending thread and the requests it serves.

    Parameters
    ----------
    interval_s
        How often every open request is asked whether its client is still there, and told of by `keep_alive` if
        nothing else was sent in that time.
    """

    def __init__(self, *, interval_s: float = 0.2) -> None:
        self._interval_s = interval_s
        self._ready: SimpleQueue[Channel | None] = SimpleQueue()
        self._open: set[Channel] = set()
        self._thread = threading.Thread(target=self._run, name="wicore-outbox", daemon=True)
        self._thread.start()

    def open(self, wire: Wire, *, stream: bool, cancel: Callable[[], None]) -> Channel:
        """A channel for one request. `cancel` is called at most once, if the client goes away before the end."""
        channel = Channel(wire, stream=stream, cancel=cancel, ready=self._ready)
        self._open.add(channel)
        return channel

    def discard(self, channel: Channel) -> None:
        """Forget a channel whose request never began: nothing more is sent on it."""
        self._open.remove(channel)

    def close(self) -> None:
        """End the thread, after what is ready now has been sent."""
        self._ready.put(None)
        self._thread.join()

    def _run(self) -> None:
        patrol = time.monotonic() + self._interval_s
        while True:
            try:
                channel = self._ready.get(timeout=max(0.0, patrol - time.monotonic()))
                if channel is None:
                    return
                self._flush(channel)
            except Empty:
                pass
            if time.monotonic() >= patrol:
                self._patrol()
                patrol = time.monotonic() + self._interval_s

    def _flush(self, channel: Channel) -> None:
        try:
            over = channel.flush()
        except Exception:
            # The road back is broken, so nobody hears what is computed from here on.
            _log.exception("a response could not be sent; its request is cancelled")
            channel.broken = True
            channel.lose()
            over = True
        if over:
            self._open.discard(channel)

    def _patrol(self) -> None:
        now = time.monotonic()
        for channel in list(self._open):
            if channel.lost:
                continue
            try:
                if channel.wire.is_cancelled():
                    channel.lose()
                elif now - channel.last_sent >= self._interval_s:
                    channel.wire.keep_alive()
                    channel.last_sent = now
            except Exception:
                _log.exception("a request's client could not be asked after; its request is cancelled")
                channel.lose()


def merge(events: list[Event]) -> Reply:
    """One response's content out of consecutive events of a request."""
    tokens = [event for event in events if isinstance(event, TokensEvent)]
    end = events[-1] if isinstance(events[-1], FinishedEvent) else None
    prompt_logprobs = [event.prompt_logprobs for event in tokens if event.prompt_logprobs is not None]
    return Reply(
        text="".join(event.text for event in tokens),
        token_ids=tuple(token for event in tokens for token in event.token_ids),
        logprobs=tuple(logprob for event in tokens for logprob in event.logprobs or ()),
        prompt_logprobs=prompt_logprobs[0] if prompt_logprobs else None,
        reason=end.reason if end else None,
        usage=end.usage if end else None,
        error=end.error if end else None,
    )
