"""Runs the gateway: settings from outside, uvicorn, an orderly end."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import socket
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from wicore_backend.errors import InvalidArgumentError
from wicore_backend.gateway.access.key_command import keys_command
from wicore_backend.gateway.app import create_app
from wicore_backend.gateway.limits.connections import bounded_protocols
from wicore_backend.gateway.observability.logs import log_to_stderr
from wicore_backend.gateway.settings import GatewaySettings
from wicore_backend.gateway.triton_backend import TritonBackend
from wicore_backend.settings import parse_json

VARIABLE = "WICORE_GATEWAY"


class DrainingServer(uvicorn.Server):
    """Uvicorn, but answers that run when it is told to stop may end first, on WebSockets as well. Meanwhile it
    listens, is not ready, and refuses new requests. A second signal hurries it."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._gateway = app
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain())
        else:
            super().handle_exit(sig, frame)

    async def _drain(self) -> None:
        state = self._gateway.state
        state.generations.draining = True
        await asyncio.sleep(state.settings.drain_notice_s)
        await state.generations.drain(state.settings.drain_s)
        self.should_exit = True


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 when it was told to stop, 1 when it could not start, 2 for wrong settings."""
    if arguments[:1] == ["keys"]:
        return keys_command(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="wicore_backend.gateway", description=__doc__, epilog="`keys --help`: API keys, made, listed and revoked."
    )
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="settings")
    parser.add_argument("--fd", type=int, help="a socket that listens already, inherited; host and port only name it")
    given = parser.parse_args(arguments)
    try:
        settings = read_settings(os.environ.get(VARIABLE) or "{}", given.settings)
        app = create_app(settings, TritonBackend(settings))
    except InvalidArgumentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    log_to_stderr()
    gc.collect()
    gc.freeze()  # What is loaded stays, and need not be looked through again.
    protocols = bounded_protocols(settings.connections, on_refusal=app.state.metrics.connection_refused)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=protocols.http,
        ws=protocols.ws,
        ws_max_size=settings.socket_message_bytes,
        lifespan="on",
        access_log=False,
        server_header=False,
        timeout_keep_alive=settings.connections.keep_alive_s,
        timeout_graceful_shutdown=5,
        **settings.tls.uvicorn_options(),
    )
    server = DrainingServer(config, app)
    server.run([socket.socket(fileno=given.fd)] if given.fd is not None else None)
    return 0 if server.started else 1


def read_settings(environment: str, assignments: Sequence[str]) -> GatewaySettings:
    """The settings of a JSON object, then of NAME=VALUE or SECTION.NAME=VALUE, whose values are JSON or text.

    Raises
    ------
    InvalidArgumentError
        Naming what is wrong.
    """
    values = parse_json(environment, VARIABLE)
    if not isinstance(values, dict):
        raise InvalidArgumentError(f"{VARIABLE} must be a JSON object")
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not (name and equals):
            raise InvalidArgumentError(f"--set {assignment!r} is not NAME=VALUE")
        *sections, last = name.split(".")
        section = values
        for part in sections:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise InvalidArgumentError(f"--set {assignment!r}: {part!r} has been given a value already")
        section[last] = _value(text)
    return GatewaySettings(**values)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
