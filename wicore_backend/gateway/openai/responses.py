"""/v1/responses, without what needs a memory of answers."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from wicore_backend.gateway.backend import Delta
from wicore_backend.gateway.caller import CallerDep
from wicore_backend.gateway.delivery import EventStream, json_response, unless_gone
from wicore_backend.gateway.error_handlers import told
from wicore_backend.gateway.errors import NotFoundError
from wicore_backend.gateway.generation import Generation
from wicore_backend.gateway.openai.chat_plan import ChatPlan
from wicore_backend.gateway.openai.documentation import ERRORS, answers_documented
from wicore_backend.gateway.openai.responses_input import chat_request
from wicore_backend.gateway.openai.responses_output import ResponseWriter
from wicore_backend.gateway.openai.responses_schema import ResponseObject, ResponsesRequest

router = APIRouter(tags=["OpenAI"])

PATH = "/v1/responses"


@router.post(PATH, response_model=None, responses=answers_documented(ResponseObject, ResponseObject))
async def create_response(body: ResponsesRequest, request: Request, caller: CallerDep) -> Response:
    """An answer to a conversation, whole or as a stream of events."""
    planning = ChatPlan.of(chat_request(body), request, caller, endpoint=PATH)
    plan = await unless_gone(request.receive, planning)
    writer = ResponseWriter(body, plan)
    deltas = request.app.state.generations.run(plan.generation)
    if body.stream:
        first = await unless_gone(request.receive, anext(deltas))
        return EventStream(
            _events(writer, plan.generation, first, deltas),
            behind=deltas,
            stalled_after_s=request.app.state.settings.stalled_reader_timeout_s,
        )
    return json_response(await unless_gone(request.receive, _whole(writer, plan.generation, deltas)))


@router.get(PATH + "/{response_id}", responses=ERRORS)
async def get_response(response_id: str, _caller: CallerDep) -> None:
    """Refused: answers are not kept."""
    raise NotFoundError(f"there is no response {ascii(response_id)[:80]}: answers are not kept", param="response_id")


async def _whole(writer: ResponseWriter, generation: Generation, deltas: AsyncGenerator[Delta, None]) -> dict[str, Any]:
    async with aclosing(deltas):
        async for delta in deltas:
            for _ in writer.read(delta):
                pass
    assert generation.usage is not None  # or the stream of deltas would have raised
    for _ in writer.end(generation.usage):
        pass
    return writer.whole(generation.usage)


async def _events(
    writer: ResponseWriter, generation: Generation, first: Delta, deltas: AsyncGenerator[Delta, None]
) -> AsyncGenerator[bytes, None]:
    async with aclosing(deltas):
        try:
            for event in writer.begin():
                yield event
            delta: Delta | None = first
            while delta is not None:
                for event in writer.read(delta):
                    yield event
                delta = await anext(deltas, None)
            assert generation.usage is not None
            for event in writer.end(generation.usage):
                yield event
        except Exception as error:
            yield writer.failed(told(error))
