"""/v1/chat/completions."""

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
from wicore_backend.gateway.openai.answers import Answer, AnswerPart
from wicore_backend.gateway.openai.chat_plan import ChatPlan
from wicore_backend.gateway.openai.chat_schema import ChatCompletion, ChatCompletionChunk, ChatRequest
from wicore_backend.gateway.openai.documentation import answers_documented
from wicore_backend.gateway.openai.sse import DONE, ChunkWriter, error_event
from wicore_backend.gateway.openai.usage import completion_usage, usage_json, usage_so_far

router = APIRouter(tags=["OpenAI"])

PATH = "/v1/chat/completions"


@router.post(PATH, response_model=None, responses=answers_documented(ChatCompletion, ChatCompletionChunk))
async def create_chat_completion(body: ChatRequest, request: Request, caller: CallerDep) -> Response:
    """An answer to a conversation, whole or as a stream of events."""
    plan = await unless_gone(request.receive, ChatPlan.of(body, request, caller, endpoint=PATH))
    deltas = request.app.state.generations.run(plan.generation)
    if body.stream:
        first = await unless_gone(request.receive, anext(deltas))
        return EventStream(
            _events(plan, first, deltas),
            behind=deltas,
            stalled_after_s=request.app.state.settings.stalled_reader_timeout_s,
        )
    return json_response(await unless_gone(request.receive, _whole(plan, deltas)))


async def _whole(plan: ChatPlan, deltas: AsyncGenerator[Delta, None]) -> dict[str, Any]:
    answers = plan.answers()
    async with aclosing(deltas):
        async for delta in deltas:
            answers[delta.index].add(delta)
    usage = plan.generation.usage
    assert usage is not None  # or the stream of deltas would have raised
    return {
        **plan.head("chat.completion"),
        "choices": [_choice(answer) for answer in answers],
        "usage": completion_usage(usage).model_dump(),
        "service_tier": "default",
    }


def _choice(answer: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
    if answer.tool_calls:
        message["tool_calls"] = answer.tool_calls
    return {
        "index": answer.index,
        "message": message,
        "logprobs": answer.logprobs,
        "finish_reason": answer.finish_reason,
    }


async def _events(plan: ChatPlan, first: Delta, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[bytes, None]:
    """The events of a stream: each answer's role, its parts, why it ended; then the usage, if asked for."""
    options = plan.body.stream_options
    continuous = bool(options and options.continuous_usage_stats)
    with_usage = continuous or bool(options and options.include_usage)
    writer = ChunkWriter(plan.head("chat.completion.chunk"), with_usage=with_usage)
    readers = plan.readers()
    befores = [b'%d,"delta":{"content":' % i for i in range(len(readers))]
    after = b'},"logprobs":null,"finish_reason":null}'
    generation = plan.generation

    async with aclosing(deltas):
        try:
            for i in range(len(readers)):
                yield writer.choice(_chunk(i, {"role": "assistant", "content": "", "refusal": None}))
            delta: Delta | None = first
            while delta is not None:
                usage = usage_so_far(generation) if continuous else None
                reader = readers[delta.index]
                if reader.plain and delta.finish_reason is None:
                    if delta.text or usage:
                        yield writer.text(befores[delta.index], delta.text, after, usage)
                else:
                    for part in reader.read(delta):
                        yield writer.choice(_part_chunk(delta.index, part), usage)
                delta = await anext(deltas, None)
            assert generation.usage is not None
            if with_usage:
                yield writer.usage(usage_json(generation.usage))
            yield DONE
        except Exception as error:
            yield error_event(told(error))


def _chunk(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _part_chunk(index: int, part: AnswerPart) -> dict[str, Any]:
    return {
        "index": index,
        "delta": part.delta,
        "logprobs": part.logprobs,
        "finish_reason": part.finish_reason,
    }
