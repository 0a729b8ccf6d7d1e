"""A gateway to test: the real application in front of a scripted server of models."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.testclient import TestClient

from wicore_backend.gateway.access.key_file import KeySet, TenantRecord, write_keys
from wicore_backend.gateway.access.keys import KeyLimits, new_key
from wicore_backend.gateway.app import create_app
from wicore_backend.gateway.backend import BackendStatus, Delta, GenerationRequest, Readiness, Usage
from wicore_backend.gateway.errors import ApiError
from wicore_backend.gateway.limits.connections import bounded_protocols
from wicore_backend.gateway.settings import GatewaySettings

CHAT = {"model": "wicore", "messages": [{"role": "user", "content": "Hello there, how are you today?"}]}


@dataclass
class ScriptedBackend:
    """Answers every request with `tokens` tokens, each after `pause_s`; keeps what it was asked."""

    tokens: int = 3
    prompt_tokens: int = 10
    pause_s: float = 0.0
    error: ApiError | None = None
    requests: list[GenerationRequest] = field(default_factory=list)
    running: int = 0

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        self.requests.append(request)
        self.running += 1
        try:
            if self.error is not None:
                raise self.error
            for answer in range(request.answers):
                for _ in range(self.tokens):
                    await asyncio.sleep(self.pause_s)
                    yield Delta(answer, "word ", (7,))
                last = answer == request.answers - 1
                usage = (
                    Usage(self.prompt_tokens, self.tokens * request.answers, queue_ms=1.0, ttft_ms=20.0, total_ms=60.0)
                    if last
                    else None
                )
                yield Delta(answer, "", (), finish_reason="stop", usage=usage)
        finally:
            self.running -= 1

    def end_requests(self) -> None: ...

    async def readiness(self) -> Readiness:
        return Readiness(True)

    async def status(self) -> BackendStatus:
        return BackendStatus("scripted", (), {}, "")

    async def metrics(self) -> str:
        return ""

    async def fingerprint(self) -> str:
        return "fp"


class Keys:
    """A keys' file, and the keys themselves."""

    def __init__(self, path) -> None:
        self.path = path
        self.set = KeySet()
        write_keys(path, self.set)

    def add(self, tenant: str = "acme", **record: Any) -> str:
        """A new key, as a client has it."""
        key, kept = new_key({"tenant": tenant, **record})
        self.set = self.set.with_key(key.id, kept)
        write_keys(self.path, self.set)
        return str(key)

    def tenant(self, name: str, **limits: Any) -> None:
        """Limits of a tenant."""
        self.set = KeySet(
            keys=self.set.keys, tenants={**self.set.tenants, name: TenantRecord(limits=KeyLimits(**limits))}
        )
        write_keys(self.path, self.set)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@contextmanager
def gateway(backend: ScriptedBackend | None = None, **settings: Any) -> Iterator[TestClient]:
    """A client of a gateway in this process."""
    app = create_app(GatewaySettings(**settings), backend or ScriptedBackend())
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client


@contextmanager
def served_gateway(backend: ScriptedBackend | None = None, **settings: Any) -> Iterator[int]:
    """The port of a gateway that listens, on a thread of its own, with the protocols that its command uses."""
    values = GatewaySettings(**settings)
    app = create_app(values, backend or ScriptedBackend())
    protocols = bounded_protocols(values.connections, on_refusal=app.state.metrics.connection_refused)
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        http=protocols.http,
        ws=protocols.ws,
        timeout_keep_alive=values.connections.keep_alive_s,
        log_level="error",
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the gateway did not start"
        threading.Event().wait(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)


def metric(page: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples with these labels."""
    total = 0.0
    for line in page.splitlines():
        head, _, value = line.rpartition(" ")
        if head.split("{")[0] == name and all(f"{k}={json.dumps(v)}" in head for k, v in labels.items()):
            total += float(value)
    return total


if __name__ == "__main__":  # A gateway with nothing behind it, for tools that try its API from outside.
    import sys

    keys_file = {"access": {"keys_file": sys.argv[1]}} if len(sys.argv) > 1 else {}
    with served_gateway(ScriptedBackend(tokens=20), **keys_file) as served_port:
        print(served_port, flush=True)
        threading.Event().wait()
