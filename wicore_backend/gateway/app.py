"""Puts the gateway together."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI

from wicore_backend.gateway import chat_socket, inference, status
from wicore_backend.gateway.backend import Backend
from wicore_backend.gateway.caller import admit_anybody
from wicore_backend.gateway.error_handlers import add_error_handlers
from wicore_backend.gateway.extensions import Extension, standard_extensions
from wicore_backend.gateway.generation import Generations
from wicore_backend.gateway.openai import chat, completions, models, responses
from wicore_backend.gateway.settings import GatewaySettings
from wicore_backend.gateway.web import add_pages

_log = logging.getLogger(__name__)


def create_app(
    settings: GatewaySettings, backend: Backend, *, extensions: Sequence[Extension] | None = None
) -> FastAPI:
    """The gateway as an ASGI application.

    `app.state` has `settings`, `backend`, `generations`, `authenticate` (see `caller`) and `hooks` (see `generation`);
    extensions change the last two.

    Parameters
    ----------
    extensions
        What is plugged in; None for what the settings ask for.
    """
    plugged = standard_extensions(settings) if extensions is None else extensions

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            await backend.start()
            stack.push_async_callback(backend.close)
            for extension in plugged:
                await extension.start()
                stack.push_async_callback(extension.close)
            yield

    app = FastAPI(title="Wicore", version="0.1.0", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.settings = settings
    app.state.backend = backend
    app.state.authenticate = admit_anybody
    app.state.hooks = []
    app.state.generations = Generations(backend, app.state.hooks)
    add_error_handlers(app)
    for extension in plugged:
        extension.install(app)
    for router in (
        chat.router,
        completions.router,
        responses.router,
        models.router,
        inference.router,
        status.router,
        chat_socket.router,
    ):
        app.include_router(router)
    add_pages(app)
    return app
