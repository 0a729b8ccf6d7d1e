"""A stand-in for the gateway that the pages are tested against: its routes, with answers that a test lays down.

The pages themselves, and their headers, come from the gateway's own code.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from wicore_backend.gateway.web import add_pages

USAGE = {
    "prompt_tokens": 40,
    "completion_tokens": 12,
    "total_tokens": 52,
    "prompt_tokens_details": {"cached_tokens": 32},
}


@dataclass
class Answer:
    """A stream of pieces of text.

    Attributes
    ----------
    pause_s
        Before each piece.
    breaks
        The connection ends after the pieces, with nothing to say that this was all.
    error
        Comes as an event after the pieces, instead of an end.
    hold
        After the pieces nothing happens until the client leaves or this is set.
    """

    pieces: list[str]
    pause_s: float = 0.0
    breaks: bool = False
    error: dict[str, Any] | None = None
    hold: threading.Event | None = None
    finish: str = "stop"


@dataclass
class Refusal:
    """An error instead of a stream."""

    status: int
    message: str
    code: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class FakeGateway:
    """What is served, and what was asked for."""

    answers: list[Answer | Refusal] = field(default_factory=list)
    """Taken one by one; without any, the question comes back."""
    key: str | None = None
    """What a client has to bring."""
    models: list[str] = field(default_factory=lambda: ["wicore"])
    status: dict[str, Any] | None = field(default_factory=lambda: status_page())
    """None: /status fails."""
    metrics: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    left: int = 0
    """Streams whose client went away before their end."""

    def reset(self) -> None:
        """As it was at first."""
        self.__dict__.update(FakeGateway().__dict__)

    def app(self) -> Starlette:
        """Its ASGI application."""
        app = Starlette()
        for path, endpoint, method in (
            ("/v1/chat/completions", self._chat, "POST"),
            ("/v1/models", self._models, "GET"),
            ("/status", self._status, "GET"),
            ("/metrics", self._metrics, "GET"),
        ):
            app.add_route(path, endpoint, methods=[method])
        add_pages(app)
        return app

    def _refused(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return _error(Refusal(401, "There is no such key.", "invalid_api_key"))

    async def _models(self, request: Request) -> Response:
        models = [{"id": name, "object": "model"} for name in self.models]
        return self._refused(request) or JSONResponse({"object": "list", "data": models})

    async def _status(self, request: Request) -> Response:
        if self.status is None:
            return _error(Refusal(503, "Triton does not answer."))
        return self._refused(request) or JSONResponse(self.status)

    async def _metrics(self, request: Request) -> Response:
        return self._refused(request) or PlainTextResponse(self.metrics)

    async def _chat(self, request: Request) -> Response:
        refused = self._refused(request)
        if refused is not None:
            return refused
        body = await request.json()
        self.requests.append(body)
        answer = self.answers.pop(0) if self.answers else Answer([_text(body["messages"][-1])])
        if isinstance(answer, Refusal):
            return _error(answer)
        return StreamingResponse(self._events(answer), media_type="text/event-stream")

    async def _events(self, answer: Answer) -> AsyncIterator[str]:
        whole = False
        try:
            yield _chunk(delta={"role": "assistant", "content": ""})
            for piece in answer.pieces:
                await asyncio.sleep(answer.pause_s)
                yield _chunk(delta={"content": piece})
            while answer.hold is not None and not answer.hold.is_set():
                await asyncio.sleep(0.01)
                yield ": still here\n\n"
            whole = True
            if answer.breaks:
                return
            if answer.error is not None:
                yield f"data: {json.dumps({'error': answer.error})}\n\n"
                return
            yield _chunk(delta={}, finish_reason=answer.finish)
            yield f"data: {json.dumps({'choices': [], 'usage': USAGE})}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            self.left += not whole


def _chunk(*, delta: dict[str, str], finish_reason: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return f"data: {json.dumps({'object': 'chat.completion.chunk', 'choices': [choice]}, ensure_ascii=False)}\n\n"


def _error(refusal: Refusal) -> Response:
    error = {"message": refusal.message, "type": "error", "code": refusal.code}
    return JSONResponse({"error": error}, refusal.status, headers=dict(refusal.headers))


def _text(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else " ".join(part.get("text", "(picture)") for part in content)


def status_page(*, generated: int = 1000, found: int = 600, missed: int = 400, running: int = 2) -> dict[str, Any]:
    """What /status says, in the gateway's form."""
    tier = {"used_disk_bytes": None, "disk_bytes": None, "stored_bytes": 0, "loaded_bytes": 0}
    return {
        "time": 1.8e9,
        "gateway": {"version": "0.1.0", "uptime_s": 4000.0, "running": running, "draining": False},
        "ready": True,
        "reason": None,
        "server": "triton 2.51.0",
        "models": [{"name": "wicore", "version": "1", "ready": True, "reason": None, "requests": {}}],
        "executors": [{"model": "wicore", "name": "onnx", "reason": "executor = 'onnx'"}],
        "devices": [],
        "load": {
            "running": running,
            "waiting": 1,
            "queue_oldest_s": 0.2,
            "prompt_tokens_total": found + missed,
            "generated_tokens_total": generated,
            "requests_total": {"stop": 20, "length": 3, "cancelled": 1},
            "rejected_total": {"queue_full": 2},
            "kv_blocks": {},
        },
        "cache": {
            "found_tokens": found,
            "missed_tokens": missed,
            "reasons": [{"reason": "never seen before", "count": missed, "unit": "tokens"}],
            "tiers": [
                tier
                | {"tier": "device", "found_tokens": found // 2, "used_bytes": 6 << 20, "groups": [_group(60, 100)]},
                tier
                | {"tier": "host", "found_tokens": found // 3, "used_bytes": 90 << 20, "groups": [_group(30, 400)]},
                tier
                | {"tier": "nvme", "found_tokens": found // 6, "used_bytes": 2 << 30, "groups": [_group(9, None)]}
                | {"used_disk_bytes": 1 << 30, "disk_bytes": 8 << 30},
            ],
        },
    }


def _group(used: int, capacity: int | None) -> dict[str, Any]:
    return {"group": "global", "used": used, "capacity": capacity, "stored": 0, "loaded": 0, "evicted": 0}


class Served:
    """An application on a free port of this machine, on a thread of its own."""

    def __init__(self, app: Any) -> None:
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> str:
        """Serves, and says where."""
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError("the server of the pages did not start")
            threading.Event().wait(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    def __exit__(self, *_exception: object) -> None:
        self._server.should_exit = True
        self._thread.join(10)
