"""From the engine's events to responses: one thread sends for all requests, in rounds, and groups tokens between them.

The engine's thread only appends an event to its request's buffer. In a round the sending thread takes the buffers of
all requests that have tokens and sends each as one response; then it rests for several times as long as the round took,
since what it takes is taken from the engine. So a slow client or backend, or many streams, make responses fewer and
larger, never the engine slow. The first tokens and the last ones of an answer wait for no round.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from queue import Empty, SimpleQueue
from typing import Protocol

from wicore_backend.engine.request import Event, FinishedEvent, FinishReason, TokenLogprob, TokensEvent, Usage
from wicore_backend.errors import EngineError, WicoreError

_log = logging.getLogger(__name__)

_PATROL_S = (0.2, 0.75)
"""Shortest and longest time between two questions whether a client is still there."""

_SENDING_SHARE = 0.15
"""Share of its time that the sending thread spends in rounds."""

_LONGEST_REST_S = 0.1
"""Longest time between two rounds: what reads as fluent."""

_LONGEST_WAIT_S = 30.0
"""How long an end waits for its wire to accept it; far more than a busy server takes to bring a tick back."""

_CHANNELS_PER_S = 80
"""Clients asked after in a second at most, between those times: asking costs an ensemble about 1 ms of CPU."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One response's content. `reason` and `usage` are there on a request's last, and only there. It may be empty."""

    index: int | None = None
    """Which answer it belongs to, if the request has several."""
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    reason: FinishReason | None = None
    usage: Usage | None = None
    error: WicoreError | None = None
    answers: tuple[Reply, ...] = ()
    """On the last of a request with several answers: why each ended, and what of it has not been sent before."""


class Wire(Protocol):
    """The road back to one request's client. Used by the sending thread only."""

    def accepts(self, *, last: bool) -> bool:
        """Whether a response, or the last one, may be sent now; if not, the wire's owner flushes when it may."""

    def send(self, reply: Reply) -> None:
        """Send a response; after one with a `reason` the request is over."""

    def fail(self, error: WicoreError) -> None:
        """End a request with an error: one without tokens yet, or one whose tokens could not be sent."""

    def probe(self) -> None:
        """Do what it takes for `is_cancelled` to be true soon if the client has gone."""

    def is_cancelled(self) -> bool:
        """Whether the client is known to have gone, or to have cancelled."""


class Channel:
    """One request's buffer between the engine's thread, which puts, and the sending thread, which flushes.

    It is *open* until its last response is sent. If its client goes away it is *lost*: the request is cancelled, and
    the channel stays open for its end, which Triton needs. If a response cannot be made or sent, the channel has a
    *fault*: the request is cancelled as well, and its end is that error.

    A stream that has nothing to say gets an empty response now and then: Triton's HTTP server does not look at a
    connection before it writes to it, so that nothing else shows that a client went away during a long prefill.
    """

    def __init__(
        self,
        wire: Wire,
        *,
        stream: bool,
        answers: int,
        cancel: Callable[[], None],
        announce: Callable[[Channel, bool], None],
        on_end: Callable[[FinishedEvent], None],
        longest_wait_s: float,
    ) -> None:
        self.wire = wire
        self.open = True
        self.lost = False
        self._stream = stream
        self._answers = answers
        self._reasons: dict[int, FinishReason] = {}
        self._cancel = cancel
        self._announce = announce
        self._on_end = on_end
        self._longest_wait_s = longest_wait_s
        self._events: deque[Event] = deque()
        self._announced = False
        self._fault: WicoreError | None = None
        self.answered = False
        """Whether tokens have been sent."""
        self._last_sent = time.monotonic()
        self._ended = inf

    def put(self, event: Event) -> None:
        """The request's sink, on the engine's thread."""
        last = isinstance(event, FinishedEvent)
        if last:
            self._ended = time.monotonic()
        self._events.append(event)
        if (self._stream and not self._announced) or last:
            self._announced = True
            self._announce(self, last or not self.answered)

    @property
    def ending(self) -> bool:
        """Whether the last event is there."""
        return bool(self._events) and isinstance(self._events[-1], FinishedEvent)

    def flush(self, *, force: bool = False) -> None:
        """Send what there is, if the wire accepts it; with `force` in any case."""
        self._announced = False  # Before the buffer is read: an event that comes now announces itself again.
        events = [self._events.popleft() for _ in range(len(self._events))]
        if not events or not self.open:
            return
        end = events[-1]
        ending = isinstance(end, FinishedEvent)
        if not (self._stream or ending) or not (force or self.wire.accepts(last=ending)):
            self._events.extendleft(reversed(events))
            return
        if self._fault is None:
            try:
                for reply in self._replies(events):
                    self._send(reply)
            except Exception as error:
                _log.exception("a response could not be sent; its request ends")
                self._fault = EngineError(f"a response could not be sent: {error}")
                self.lose()
        if isinstance(end, FinishedEvent):
            self.open = False
            if self._fault is not None:
                self._end_with(self._fault)
            # It leads back here, so that the sender and all else of the request would wait for a full collection, of
            # which a busy server has none.
            self._cancel = _nothing
            self._on_end(end)

    def _replies(self, events: list[Event]) -> list[Reply]:
        if self._answers == 1:
            return [merge(events)]
        groups: dict[int, list[Event]] = {index: [] for index in range(self._answers)}
        for event in events:
            if isinstance(event, TokensEvent):
                groups[event.index].append(event)
                if event.reason is not None:
                    self._reasons[event.index] = event.reason
        parts = [replace(merge(group), index=index) for index, group in groups.items()]
        said = [part for part in parts if groups[part.index or 0]]
        end = events[-1]
        if not isinstance(end, FinishedEvent):
            return said
        if self._stream:
            parts = [Reply(index=index) for index in groups]
        answers = tuple(replace(part, reason=self._reasons.get(part.index or 0, end.reason)) for part in parts)
        last = replace(merge([end]), answers=answers)
        return [*said, last] if self._stream else [replace(last, text=parts[0].text, token_ids=parts[0].token_ids)]

    def _send(self, reply: Reply) -> None:
        silent = not (self.answered or reply.token_ids or any(answer.token_ids for answer in reply.answers))
        if reply.error is not None and silent:
            self.wire.fail(reply.error)
        else:
            self.wire.send(reply)
        self.answered = True
        self._last_sent = time.monotonic()

    def _end_with(self, fault: WicoreError) -> None:
        try:
            self.wire.fail(fault)
        except Exception:
            _log.exception("nor could its end: the road back is broken")

    def begin(self) -> None:
        """The first look at the client, and what has come so far.

        An answer can have ended by now, and still needs the probe: it opens an ensemble's road to the client.
        """
        self._ask_after(silence_s=inf)
        self.flush()

    def patrol(self, silence_s: float) -> None:
        """Ask after the client, with an empty response if there was none for `silence_s`.

        An end that no road opens for goes at last by whatever road there is: a client that calls the model as an
        ensemble's first step, and never sends its second, must not keep its request in the server for ever.
        """
        if not (self.lost or self.ending):
            self._ask_after(silence_s)
        elif time.monotonic() - self._ended >= self._longest_wait_s:
            self.flush(force=True)

    def _ask_after(self, silence_s: float) -> None:
        try:
            if self.wire.is_cancelled():
                self.lose()
                return
            self.wire.probe()
            if self._stream and time.monotonic() - self._last_sent >= silence_s and self.wire.accepts(last=False):
                self.wire.send(Reply())
                self._last_sent = time.monotonic()
        except Exception:
            _log.exception("a request's client cannot be asked after; the request is cancelled")
            self.lose()

    def lose(self) -> None:
        """The client has gone: cancel the request, once."""
        if not self.lost:
            self.lost = True
            self._cancel()


class Outbox:
    """The sending thread and the channels it serves.

    Parameters
    ----------
    on_end
        Told of the end of each request, once its client has been.
    """

    def __init__(
        self,
        *,
        on_end: Callable[[FinishedEvent], None] = lambda _event: None,
        patrol_s: tuple[float, float] = _PATROL_S,
        longest_wait_s: float = _LONGEST_WAIT_S,
    ) -> None:
        self._on_end = on_end
        self._patrol_s = patrol_s
        self._longest_wait_s = longest_wait_s
        self._ready: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._channels: set[Channel] = set()
        self._unanswered = 0
        self._answered = threading.Condition()
        self._for_next_round: deque[Channel] = deque()
        self._thread = threading.Thread(target=self._run, name="wicore-outbox", daemon=True)
        self._thread.start()

    def channel(self, wire: Wire, *, stream: bool, cancel: Callable[[], None], answers: int = 1) -> Channel:
        """A channel for one request; nothing is sent on it before `begin`.

        Parameters
        ----------
        answers
            How many the request gets.
        cancel
            Called at most once, if the client goes away before the end.
        """
        return Channel(
            wire,
            stream=stream,
            answers=answers,
            cancel=cancel,
            announce=self._announce,
            on_end=self._ended,
            longest_wait_s=self._longest_wait_s,
        )

    def begin(self, channel: Channel) -> None:
        """Serve a channel whose request has been accepted."""

        def begin() -> None:
            self._channels.add(channel)
            channel.begin()

        with self._answered:
            self._unanswered += 1
        self.post(begin)

    def post(self, action: Callable[[], None]) -> None:
        """Have the sending thread do something."""
        self._ready.put(action)

    def wait_until_answered(self, timeout_s: float) -> bool:
        """Wait until every channel that has begun has had its last response; whether that came in time."""
        with self._answered:
            return self._answered.wait_for(lambda: not self._unanswered, timeout_s)

    def close(self) -> None:
        """End the thread, after everything that is ready has been sent."""
        self._ready.put(None)
        self._thread.join()

    def _ended(self, event: FinishedEvent) -> None:
        """A channel has had its last response."""
        with self._answered:
            self._unanswered -= 1
            self._answered.notify_all()
        self._on_end(event)

    def _announce(self, channel: Channel, urgent: bool) -> None:
        """A channel has events; on the engine's thread."""
        if urgent:
            self.post(channel.flush)
            return
        self._for_next_round.append(channel)
        if len(self._for_next_round) == 1:
            self.post(lambda: None)  # Wakes the thread, which sees that there will be a round.

    def _run(self) -> None:
        patrol = time.monotonic() + self._patrol_s[0]
        next_round = 0.0
        while True:
            wake = min(patrol, next_round) if self._for_next_round else patrol
            try:
                action = self._ready.get(timeout=max(0.0, wake - time.monotonic()))
                if action is None:
                    break
                _attempt(action)
            except Empty:
                pass
            began = time.monotonic()
            if self._for_next_round and began >= next_round:
                for _ in range(len(self._for_next_round)):
                    _attempt(self._for_next_round.popleft().flush)
                ended = time.monotonic()
                next_round = ended + min((ended - began) / _SENDING_SHARE, _LONGEST_REST_S)
            if began >= patrol:
                patrol = began + self._patrol()
        for channel in self._channels:
            _attempt(partial(channel.flush, force=True))

    def _patrol(self) -> float:
        """Ask after every open channel's client; returns the seconds until the next time."""
        self._channels = {channel for channel in self._channels if channel.open}
        for channel in self._channels:
            _attempt(partial(channel.patrol, self._patrol_s[0]))
        shortest, longest = self._patrol_s
        return min(longest, max(shortest, len(self._channels) / _CHANNELS_PER_S))


def _nothing() -> None:
    """What is left to cancel of a request that has ended."""


def _attempt(action: Callable[[], None]) -> None:
    """Do it: one request's fault must not end the thread that all others are answered by."""
    try:
        action()
    except Exception:
        _log.exception("the sending thread could not do what a request asked of it")


def merge(events: list[Event]) -> Reply:
    """One response's content out of consecutive events of an answer."""
    tokens = [event for event in events if isinstance(event, TokensEvent)]
    end = events[-1] if events and isinstance(events[-1], FinishedEvent) else None
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
