"""/health, /ready and /status."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from wicore_backend.gateway.caller import CallerDep

router = APIRouter(tags=["status"])


@router.get("/health")
async def health() -> dict[str, str]:
    """Whether this process lives: it says so."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """Whether requests are taken: 200, or 503 and why not."""
    state = request.app.state
    if state.generations.draining:
        return JSONResponse({"ready": False, "reason": "the gateway is shutting down"}, status_code=503)
    readiness = await state.backend.readiness()
    body: dict[str, Any] = {"ready": readiness.ready}
    if readiness.ready:
        return JSONResponse(body)
    return JSONResponse(body | {"reason": readiness.reason}, status_code=503, headers={"Retry-After": "1"})


@router.get("/status")
async def status(request: Request, _caller: CallerDep) -> dict[str, Any]:
    """What the page shows."""
    found = await request.app.state.backend.status()
    return {"time": time.time(), "server": found.server, "models": [m.name for m in found.models]}
