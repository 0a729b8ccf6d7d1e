"""/v1/inference: Wicore's own small endpoint, a prompt and pictures in, one answer out; by JSON or as a form."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, Field, ValidationError

from wicore_backend.gateway.backend import Delta, GenerationRequest
from wicore_backend.gateway.caller import Caller, CallerDep
from wicore_backend.gateway.delivery import json_response, unless_gone
from wicore_backend.gateway.errors import InvalidRequestError
from wicore_backend.gateway.generation import Generation, request_id
from wicore_backend.gateway.openai.documentation import answers_documented
from wicore_backend.gateway.openai.fields import WicoreFields
from wicore_backend.gateway.openai.messages import read_base64
from wicore_backend.gateway.server_metrics import ServerMetrics

router = APIRouter(tags=["Wicore"])

PATH = "/v1/inference"
UPLOAD_PATH = f"{PATH}/upload"

_MOST_PICTURES = 256
_FORM_FIELDS, _FORM_FIELD_BYTES = 64, 4 << 20


class Question(WicoreFields):
    """What is asked, and how it is to be answered."""

    prompt: Annotated[str, Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None


class InferenceRequest(Question):
    """The body: a question, and pictures that go before it."""

    images: Annotated[list[str], Field(default_factory=list, max_length=_MOST_PICTURES)]
    """Files as base64: PNG, JPEG, WebP or GIF."""


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


def _form_schema() -> dict[str, Any]:
    """Of the form by which a question with pictures is uploaded."""
    schema = Question.model_json_schema()
    file = {"type": "string", "format": "binary"}
    schema["properties"]["images"] = {"type": "array", "items": file, "maxItems": _MOST_PICTURES}
    return schema


@router.post(PATH, response_model=None, responses=answers_documented(InferenceAnswer))
async def create_inference(body: InferenceRequest, request: Request, caller: CallerDep) -> Response:
    """One answer to a question, with pictures or without."""
    images = tuple(read_base64(image, f"images[{i}]") for i, image in enumerate(body.images))
    return await _inference(body, images, request, caller)


@router.post(
    UPLOAD_PATH,
    response_model=None,
    responses=answers_documented(InferenceAnswer),
    openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _form_schema()}}}},
)
async def create_inference_by_upload(request: Request, caller: CallerDep) -> Response:
    """The same for a form (`multipart/form-data`): pictures are its files, all called `images`."""
    images, fields = [], {}
    async with request.form(max_files=_MOST_PICTURES, max_fields=_FORM_FIELDS, max_part_size=_FORM_FIELD_BYTES) as form:
        for name, value in form.multi_items():
            if isinstance(value, str):
                if name in fields:
                    raise InvalidRequestError(f"{name!a} is there twice; the form takes one of it", param=name)
                fields[name] = value
            elif name == "images":
                images.append(await value.read())
            else:
                raise InvalidRequestError(f"{name!a} is no file of this form; pictures are called images", param=name)
    try:
        question = Question.model_validate_strings(fields, strict=False)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False), body=fields) from None
    return await _inference(question, tuple(images), request, caller)


async def _inference(question: Question, images: tuple[bytes, ...], request: Request, caller: Caller) -> Response:
    state = request.app.state
    caller.check_model(state.settings.model)
    names = ("max_tokens", "temperature", "top_p", "seed")
    options = {name: value for name in names if (value := getattr(question, name)) is not None}
    asked = GenerationRequest(
        id=request_id(request),
        model=state.settings.model,
        prompt=question.prompt,
        images=images,
        options=options | question.wicore_options(caller),
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
