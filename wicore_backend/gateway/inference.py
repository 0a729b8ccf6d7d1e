"""/v1/inference: Wicore's own small endpoint, a prompt and pictures in, one answer out."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from wicore_backend.gateway.backend import Delta, GenerationRequest
from wicore_backend.gateway.caller import CallerDep
from wicore_backend.gateway.delivery import json_response, unless_gone
from wicore_backend.gateway.generation import Generation, request_id
from wicore_backend.gateway.openai.documentation import answers_documented
from wicore_backend.gateway.openai.fields import WicoreFields
from wicore_backend.gateway.openai.messages import read_base64
from wicore_backend.gateway.server_metrics import ServerMetrics

router = APIRouter(tags=["Wicore"])

PATH = "/v1/inference"


class InferenceRequest(WicoreFields):
    """The body: a question, and pictures that go before it."""

    prompt: Annotated[str, Field(min_length=1)]
    images: Annotated[list[str], Field(default_factory=list, max_length=256)]
    """Files as base64: PNG, JPEG, WebP or GIF."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None


class InferenceAnswer(BaseModel):
    """The answer."""

    id: str
    content: str
    token_count: int
    """Of the answer."""
    finish_reason: Literal["stop", "length"]
    latency_ms: float
    """From the request's arrival here to the answer's end."""
    gpu_utilization: float | None
    """0 to 1, of the busiest GPU, as the server's metrics page has it now; null on a machine without."""


@router.post(PATH, response_model=None, responses=answers_documented(InferenceAnswer))
async def create_inference(body: InferenceRequest, request: Request, caller: CallerDep) -> Response:
    """One answer to a question, with pictures or without."""
    state = request.app.state
    caller.check_model(state.settings.model)
    names = ("max_tokens", "temperature", "top_p", "seed")
    options = {name: value for name in names if (value := getattr(body, name)) is not None}
    asked = GenerationRequest(
        id=request_id(request),
        model=state.settings.model,
        prompt=body.prompt,
        images=tuple(read_base64(image, f"images[{i}]") for i, image in enumerate(body.images)),
        options=options | body.wicore_options(caller),
        stream=False,
    )
    generation = Generation(request, caller, PATH, state.settings.model, asked)
    return json_response(await unless_gone(request.receive, _answer(generation, request)))


async def _answer(generation: Generation, request: Request) -> dict[str, Any]:
    deltas: list[Delta] = [delta async for delta in request.app.state.generations.run(generation)]
    latency_ms = (time.perf_counter() - generation.began) * 1000
    return {
        "id": f"inference-{generation.request.id}",
        "content": "".join(delta.text for delta in deltas),
        "token_count": generation.tokens,
        "finish_reason": deltas[-1].finish_reason,
        "latency_ms": round(latency_ms, 3),
        "gpu_utilization": await _gpu_utilization(request),
    }


async def _gpu_utilization(request: Request) -> float | None:
    page: str = await request.app.state.backend.metrics()
    return ServerMetrics.parse(page).largest("nv_gpu_utilization")
