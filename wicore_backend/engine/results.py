"""What callers in the same process get: a stream of events, or the whole result."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from wicore_backend.engine.request import Event, FinishedEvent, FinishReason, TokenLogprob, TokensEvent, Usage


@dataclass(frozen=True, slots=True)
class Result:
    """A whole answer. If a stop token ended it, `token_ids` has that token; `text` has no stop token or string."""

    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    usage: Usage
    logprobs: list[TokenLogprob] | None
    prompt_logprobs: list[TokenLogprob | None] | None


class EventStream:
    """Iterator over one request's events; closing it before its end, or leaving its `with` block, cancels the request.

    Parameters
    ----------
    cancel
        Called at most once, when the stream is closed before its FinishedEvent.
    """

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._finished = threading.Event()
        self._open = True

    def put(self, event: Event) -> None:
        """The request's sink."""
        self._events.put(event)
        if isinstance(event, FinishedEvent):
            self._finished.set()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        if not self._open:
            raise StopIteration
        event = self._events.get()
        self._open = not isinstance(event, FinishedEvent)
        return event

    def close(self) -> None:
        """Cancel the request unless it has ended."""
        if self._open:
            self._open = False
            self._cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def collect(self) -> Result:
        """Wait for the end.

        Raises
        ------
        WicoreError
            What the FinishedEvent says, if the answer is not whole.
        """
        self._finished.wait()  # Sleeping once: whoever wakes for each token takes the interpreter from the engine.
        token_ids: list[int] = []
        texts: list[str] = []
        logprobs: list[TokenLogprob] = []
        prompt_logprobs: list[TokenLogprob | None] | None = None
        for event in self:
            if isinstance(event, TokensEvent):
                token_ids += event.token_ids
                texts.append(event.text)
                logprobs += event.logprobs or ()
                if event.prompt_logprobs is not None:
                    prompt_logprobs = list(event.prompt_logprobs)
            elif event.error is not None:
                raise event.error
            else:
                return Result(
                    token_ids=token_ids,
                    text="".join(texts),
                    finish_reason=event.reason,
                    usage=event.usage,
                    logprobs=logprobs or None,
                    prompt_logprobs=prompt_logprobs,
                )
        raise RuntimeError("the stream was read before")
