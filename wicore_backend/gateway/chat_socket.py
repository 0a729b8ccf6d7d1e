"""/ws/chat: several chat requests on one WebSocket, with streamed tokens and a message that cancels.

Frames are JSON texts. From the client: `generate`, `cancel`, `ping`. To it, per request: `started`, then `delta` and
`finish` (one for each answer), and as the last one exactly one of `done`, `cancelled` and `error`.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing, suppress
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from pydantic import Field, TypeAdapter, ValidationError

from wicore_backend.gateway.caller import Caller, caller_of
from wicore_backend.gateway.error_handlers import invalid_request, told
from wicore_backend.gateway.errors import ApiError, InternalError, InvalidRequestError
from wicore_backend.gateway.generation import Generation
from wicore_backend.gateway.openai.chat_plan import ChatPlan
from wicore_backend.gateway.openai.chat_schema import ChatRequest
from wicore_backend.gateway.openai.fields import Body
from wicore_backend.gateway.openai.usage import completion_usage

router = APIRouter()

PATH = "/ws/chat"

_POLICY_VIOLATION = 1008
_CLIENT_LEFT = (WebSocketDisconnect, OSError, TimeoutError, RuntimeError)
"""Starlette and uvicorn have several ways to say so, or that it takes nothing any more."""

_LONGEST_ID = 64

Id = Annotated[str, Field(min_length=1, max_length=_LONGEST_ID)]


class GenerateFrame(Body):
    """Asks for an answer. `id` is the client's choice, and free again after the request's last frame."""

    type: Literal["generate"]
    id: Id
    request: ChatRequest


class CancelFrame(Body):
    """Ends one early. One that has ended meanwhile is no error."""

    type: Literal["cancel"]
    id: Id


class PingFrame(Body):
    """Is answered by a `pong`."""

    type: Literal["ping"]


_FRAME: TypeAdapter[GenerateFrame | CancelFrame | PingFrame] = TypeAdapter(
    Annotated[GenerateFrame | CancelFrame | PingFrame, Field(discriminator="type")]
)


@router.websocket(PATH)
async def chat(websocket: WebSocket) -> None:
    """See the module."""
    try:
        caller = await caller_of(websocket)
    except ApiError as error:
        await websocket.close(_POLICY_VIOLATION, error.message[:100])
        return
    await websocket.accept()
    await ChatSocket(websocket, caller).run()


class ChatSocket:
    """One WebSocket and the requests on it, each a task of its own. They end with the socket."""

    def __init__(self, websocket: WebSocket, caller: Caller) -> None:
        self._websocket = websocket
        self._caller = caller
        self._settings = websocket.app.state.settings
        self._streams: dict[str, asyncio.Task[dict[str, Any]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Take frames until the client leaves."""
        try:
            while True:
                await self._take(await self._receive())
        except _CLIENT_LEFT:
            pass
        finally:
            tasks = [*self._streams.values(), *self._tasks]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _receive(self) -> str | bytes:
        message = await self._websocket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
        return message.get("text") or message.get("bytes") or ""

    async def _take(self, text: str | bytes) -> None:
        request_id: str | None = None
        try:
            content = _read_json(text)
            request_id = self._new_id(content)
            match frame := _parse(content):
                case GenerateFrame():
                    self._start(frame)
                case CancelFrame():
                    if (stream := self._streams.get(frame.id)) is not None:
                        stream.cancel()
                case PingFrame():
                    await self._send({"type": "pong"})
        except ApiError as error:
            await self._send_error(request_id, error)

    def _new_id(self, content: Any) -> str | None:
        """The id that a frame, right or wrong, gives to a new request: what is wrong with it is that request's last
        frame. An error with the id of a request that is under way would seem to be the end of that one."""
        offered = content.get("id") if isinstance(content, dict) and content.get("type") == "generate" else None
        good = isinstance(offered, str) and 0 < len(offered) <= _LONGEST_ID and offered not in self._streams
        return offered if good else None

    def _start(self, frame: GenerateFrame) -> None:
        if frame.id in self._streams:
            raise InvalidRequestError(f"a request {frame.id!r} is under way on this socket", param="id")
        if len(self._streams) >= self._settings.socket_requests:
            raise ApiError(
                f"{len(self._streams)} requests are under way on this socket, as many as it may have",
                status=429,
                kind="requests",
                code="concurrency_limit_exceeded",
                retry_after_s=1,
            )
        for name in ("stream", "stream_options"):
            if getattr(frame.request, name) is not None:
                raise InvalidRequestError("a WebSocket always streams; leave it out", param=f"request.{name}")
        stream = asyncio.create_task(self._stream(frame))
        self._streams[frame.id] = stream
        self._tasks.add(task := asyncio.create_task(self._last_word(frame.id, stream)))
        task.add_done_callback(self._tasks.discard)

    async def _last_word(self, request_id: str, stream: asyncio.Task[dict[str, Any]]) -> None:
        """Wait for the end of a request's stream and tell it."""
        try:
            await asyncio.wait([stream])
        finally:
            stream.cancel()
            del self._streams[request_id]
        if stream.cancelled():
            last = {"type": "cancelled", "id": request_id}
        elif isinstance(error := stream.exception(), _CLIENT_LEFT):
            return
        elif isinstance(error, Exception):
            last = _error_frame(request_id, told(error))
        else:
            last = stream.result()
        with suppress(*_CLIENT_LEFT):
            await self._send(last)

    async def _stream(self, frame: GenerateFrame) -> dict[str, Any]:
        request = frame.request.model_copy(update={"stream": True})
        plan = await ChatPlan.of(request, self._websocket, self._caller, endpoint=PATH)
        started = {"type": "started", "id": frame.id, "request_id": plan.id, "model": plan.body.model}
        readers = plan.readers()
        quoted_id = orjson.dumps(frame.id)
        heads = [b'{"type":"delta","id":%b,"index":%d,"text":' % (quoted_id, i) for i in range(len(readers))]
        await self._send(started)
        async with aclosing(self._websocket.app.state.generations.run(plan.generation)) as deltas:
            async for delta in deltas:
                reader = readers[delta.index]
                if reader.plain and delta.finish_reason is None:
                    if delta.text:
                        await self._send_text(heads[delta.index] + orjson.dumps(delta.text) + b"}")
                    continue
                for part in reader.read(delta):
                    about = {"id": frame.id, "index": delta.index}
                    content = part.delta | ({"logprobs": part.logprobs} if part.logprobs else {})
                    if content:
                        content["text"] = content.pop("content", "")
                        await self._send({"type": "delta", **about, **content})
                    if part.finish_reason is not None:
                        await self._send({"type": "finish", **about, "finish_reason": part.finish_reason})
        return _done_frame(frame.id, plan.generation)

    async def _send_error(self, request_id: str | None, error: ApiError) -> None:
        await self._send(_error_frame(request_id, error))

    async def _send(self, frame: dict[str, Any]) -> None:
        await self._send_text(orjson.dumps(frame))

    async def _send_text(self, text: bytes) -> None:
        """Waits while the client reads nothing, and with it whoever makes the frames."""
        async with asyncio.timeout(self._settings.stalled_reader_timeout_s):
            await self._websocket.send_text(text.decode())


def _read_json(text: str | bytes) -> Any:
    try:
        return orjson.loads(text)
    except ValueError as error:
        raise InvalidRequestError(f"the frame is not JSON: {error}", code="invalid_json") from None


def _parse(content: Any) -> GenerateFrame | CancelFrame | PingFrame:
    try:
        return _FRAME.validate_python(content)
    except ValidationError as error:
        raise invalid_request(error.errors(include_url=False), content) from None


def _error_frame(request_id: str | None, error: ApiError) -> dict[str, Any]:
    about = {**error.body["error"], "status": error.status, "retry_after": error.retry_after_s}
    return {"type": "error", "id": request_id, "error": about}


def _done_frame(request_id: str, generation: Generation) -> dict[str, Any]:
    usage = generation.usage
    if usage is None:
        raise InternalError("the answer ended without its usage")
    now = time.perf_counter()
    ttft_s = generation.ttft_s
    decoding_s = now - generation.began - (ttft_s or 0)
    return {
        "type": "done",
        "id": request_id,
        "usage": completion_usage(usage).model_dump(),
        "timing": {
            "ttft_ms": None if ttft_s is None else round(ttft_s * 1000, 3),
            "total_ms": round((now - generation.began) * 1000, 3),
            "queue_ms": usage.queue_ms,
            "tokens_per_second": round((generation.tokens - 1) / decoding_s, 3) if generation.tokens > 1 else None,
        },
    }
