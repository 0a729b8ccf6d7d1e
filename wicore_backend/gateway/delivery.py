"""Getting answers to clients that may leave, or stop reading, at any moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from wicore_backend.gateway.errors import ClientGoneError
from wicore_backend.gateway.patience import Patience

T = TypeVar("T")


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves.

    Parameters
    ----------
    receive
        The request's, whose body has been read.

    Raises
    ------
    ClientGoneError
        If the client has left. Work has ended by then.
    """
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events from a generator of encoded events.

    A client that reads slowly holds up the generator, and with it Triton's stream, whose flow control does the rest:
    nothing is buffered here. One that takes nothing for `stalled_after_s` is left.

    Parameters
    ----------
    behind
        What the events are made of; it is closed with them, also when the client has left before the first.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        behind: AsyncGenerator[Any, None],
        stalled_after_s: float,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})
        self._events = events
        self._behind = behind
        self._stalled_after_s = stalled_after_s

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        self.body = b""
        super().init_headers(headers)
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._behind), aclosing(self._events):
            with suppress(ClientGoneError, OSError):
                await unless_gone(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        sending = asyncio.current_task()
        assert sending is not None
        with Patience(self._stalled_after_s, sending.cancel) as patience:
            try:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                async for event in self._events:
                    patience.begin()
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                    patience.end()
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            except asyncio.CancelledError:
                if not patience.lost:
                    raise
                raise ClientGoneError("the client takes nothing of what is sent to it") from None


def json_response(content: Any) -> Response:
    """A whole answer."""
    return Response(orjson.dumps(content), media_type="application/json")
