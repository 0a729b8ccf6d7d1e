"""/v1/models, and what there is no model for."""

from __future__ import annotations

import time
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel

from wicore_backend.gateway.caller import CallerDep
from wicore_backend.gateway.errors import InvalidRequestError, NotFoundError
from wicore_backend.gateway.openai.documentation import refusals_documented
from wicore_backend.gateway.settings import GatewaySettings

router = APIRouter(tags=["OpenAI"])

_STARTED = int(time.time())
_REFUSALS = refusals_documented(400, 401, 403, 404, 429)


class ModelCard(BaseModel):
    """A model that may be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int = _STARTED
    owned_by: str = "wicore"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


def model_names(settings: GatewaySettings) -> tuple[str, ...]:
    """The names by which the model may be asked for."""
    return (settings.model, *settings.aliases)


def check_model(name: str, settings: GatewaySettings) -> None:
    """Raise NotFoundError unless `name` is a model's."""
    if name not in model_names(settings):
        raise NotFoundError(
            f"the model {name!r} does not exist; there is: {', '.join(model_names(settings))}",
            param="model",
            code="model_not_found",
        )


@router.get("/v1/models", responses=_REFUSALS)
async def list_models(request: Request, caller: CallerDep) -> ModelList:
    """The models that the caller may use."""
    names = model_names(request.app.state.settings)
    return ModelList(data=[ModelCard(id=name) for name in names if caller.models is None or name in caller.models])


@router.get("/v1/models/{model:path}", responses=_REFUSALS)
async def get_model(model: str, request: Request, caller: CallerDep) -> ModelCard:
    """One of them."""
    check_model(model, request.app.state.settings)
    caller.check_model(model)
    return ModelCard(id=model)


@router.post("/v1/embeddings", status_code=400, response_model=None, responses=_REFUSALS)
async def embeddings(_caller: CallerDep) -> None:
    """Refused: there is no model for it."""
    raise InvalidRequestError("this server generates text; it has no model for embeddings", code="unsupported_endpoint")
