"""Endpoints for whoever runs the gateway, on keys of their own."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request

from wicore_backend.gateway.caller import Caller
from wicore_backend.gateway.errors import InvalidRequestError, NotFoundError
from wicore_backend.gateway.openai.documentation import refusals_documented


async def _administrator(request: Request) -> Caller:
    caller: Caller = await request.app.state.authentication.administrator(request)
    return caller


router = APIRouter(
    prefix="/admin",
    tags=["admin"],
    dependencies=[Depends(_administrator)],
    responses=refusals_documented(400, 401, 403, 404),
)

KeyIdQuery = Annotated[str, Query(description="The 12 digits after wk_.", max_length=64)]


@router.post("/drain")
async def drain(request: Request) -> dict[str, Any]:
    """Refuse new requests and be not ready, while running ones end; the process goes on."""
    generations = request.app.state.generations
    generations.draining = True
    return {"draining": True, "running": generations.running}


@router.post("/resume")
async def resume(request: Request) -> dict[str, Any]:
    """Take requests again after a drain."""
    generations = request.app.state.generations
    generations.draining = False
    return {"draining": False, "running": generations.running}


@router.get("/keys")
async def keys(request: Request) -> dict[str, Any]:
    """The keys in force, without what could be used to guess them, and why the file is not in force, if it is not."""
    ring = request.app.state.key_ring
    records = {
        key_id: record.model_dump(mode="json", exclude={"salt", "sha256"}) for key_id, record in ring.keys.keys.items()
    }
    return {"keys": records, "problem": ring.problem or None}


@router.post("/keys/reload")
async def reload_keys(request: Request) -> dict[str, Any]:
    """Read the keys' file now; it is read by itself a second after a change."""
    ring = request.app.state.key_ring
    ring.reload()
    if ring.problem:
        raise InvalidRequestError(f"the keys in force stay: {ring.problem}", code="keys_file_invalid")
    return {"keys": len(ring.keys.keys)}


@router.get("/limits")
async def limits(request: Request, key_id: KeyIdQuery) -> dict[str, Any]:
    """What a key and its tenant may use at this moment."""
    record = request.app.state.key_ring.keys.keys.get(key_id)
    if record is None:
        raise NotFoundError(f"there is no key {key_id!a}", param="key_id", code="key_not_found")
    state = await request.app.state.rate_limits.state(key_id, record.tenant)
    return {"key_id": key_id, "tenant": record.tenant, "limits": state}
