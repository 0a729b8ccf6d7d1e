"""/v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from wicore_backend.gateway.backend import Delta, GenerationRequest
from wicore_backend.gateway.caller import Caller, CallerDep
from wicore_backend.gateway.delivery import EventStream, json_response, unless_gone
from wicore_backend.gateway.error_handlers import told
from wicore_backend.gateway.generation import Generation, request_id
from wicore_backend.gateway.merging import merged
from wicore_backend.gateway.openai.completions_schema import Completion, CompletionRequest
from wicore_backend.gateway.openai.documentation import answers_documented
from wicore_backend.gateway.openai.fields import retention
from wicore_backend.gateway.openai.logprobs import TextLogprobs
from wicore_backend.gateway.openai.models import check_model
from wicore_backend.gateway.openai.sse import DONE, ChunkWriter, error_event
from wicore_backend.gateway.openai.usage import completion_usage, usage_json

router = APIRouter(tags=["OpenAI"])

PATH = "/v1/completions"

Stream = AsyncGenerator[tuple[int, Delta], None]


@router.post(PATH, response_model=None, responses=answers_documented(Completion, Completion))
async def create_completion(body: CompletionRequest, request: Request, caller: CallerDep) -> Response:
    """Texts that go on where the prompts end."""
    state = request.app.state
    check_model(body.model, state.settings)
    caller.check_model(body.model)
    generations = _generations(body, request, caller)
    head = {
        "id": f"cmpl-{generations[0].request.id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": body.model,
        "system_fingerprint": await state.backend.fingerprint(),
    }
    deltas = merged([state.generations.run(generation) for generation in generations])
    if body.stream:
        first = await unless_gone(request.receive, anext(deltas))
        events = _events(body, head, generations, first, deltas)
        return EventStream(events, behind=deltas, stalled_after_s=state.settings.stalled_reader_timeout_s)
    choices = await unless_gone(request.receive, _whole(body, deltas))
    usages = [generation.usage for generation in generations if generation.usage is not None]
    return json_response({**head, "choices": choices, "usage": completion_usage(*usages).model_dump()})


def _generations(body: CompletionRequest, request: Request, caller: Caller) -> list[Generation]:
    """One for each prompt."""
    settings = request.app.state.settings
    options = body.sampling_options(caller) | retention(body)
    if body.max_tokens is not None:
        options["max_tokens"] = max(1, body.max_tokens)  # The engine gives no answer without a token.
    for name in ("best_of", "logprobs"):
        if (value := getattr(body, name)) is not None:
            options[name] = value
    if body.echo and body.logprobs is not None:
        options["prompt_logprobs"] = body.logprobs
    name = request_id(request)
    return [
        Generation(
            request,
            caller,
            PATH,
            body.model,
            GenerationRequest(
                id=name if place == 0 else f"{name}-{place}",
                model=settings.model if isinstance(prompt, str) else settings.token_model,
                prompt=prompt,
                raw=isinstance(prompt, str),
                options=options,
                stream=bool(body.stream),
            ),
        )
        for place, prompt in enumerate(body.prompts)
    ]


@dataclass(slots=True)
class _Choice:
    """One answer as it grows."""

    index: int
    logprobs: TextLogprobs
    texts: list[str] = field(default_factory=list)
    told: dict[str, list[Any]] | None = None
    finish_reason: str | None = None

    def tell(self, entries: list[dict[str, Any] | None]) -> None:
        for name, values in self.logprobs.part(entries).items():
            self.told = self.told or {}
            self.told.setdefault(name, []).extend(values)

    @property
    def content(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "text": "".join(self.texts),
            "logprobs": self.told,
            "finish_reason": self.finish_reason,
        }


async def _whole(body: CompletionRequest, deltas: Stream) -> list[dict[str, Any]]:
    choices = [_Choice(i, TextLogprobs()) for i in range(len(body.prompts) * body.answers)]
    if body.echo:
        for choice in choices:
            choice.texts.append(str(body.prompts[choice.index // body.answers]))
    prompt_entries: dict[int, list[dict[str, Any] | None]] = {}
    async with aclosing(deltas):
        async for place, delta in deltas:
            choice = choices[place * body.answers + delta.index]
            choice.finish_reason = delta.finish_reason or choice.finish_reason
            if delta.logprobs is not None and "prompt" in delta.logprobs:
                prompt_entries[place] = delta.logprobs["prompt"]
            if body.max_tokens == 0:
                continue  # The one token that was made is not part of what was asked for.
            choice.texts.append(delta.text)
            if delta.logprobs is not None:
                if body.echo and choice.told is None:
                    choice.tell(prompt_entries.get(place, []))
                choice.tell(delta.logprobs["tokens"])
    for choice in choices:
        if body.max_tokens == 0:
            choice.tell(prompt_entries.get(choice.index // body.answers, []))
            choice.finish_reason = "length"
    return [choice.content for choice in choices]


async def _events(
    body: CompletionRequest,
    head: dict[str, Any],
    generations: list[Generation],
    first: tuple[int, Delta],
    deltas: Stream,
) -> AsyncGenerator[bytes, None]:
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    writer = ChunkWriter(head, with_usage=with_usage)
    count = len(body.prompts) * body.answers
    logprobs = [TextLogprobs(len(str(body.prompts[i // body.answers])) if body.echo else 0) for i in range(count)]
    async with aclosing(deltas):
        try:
            if body.echo:
                for i in range(count):
                    yield writer.choice(_Choice(i, logprobs[i], [str(body.prompts[i // body.answers])]).content)
            item: tuple[int, Delta] | None = first
            while item is not None:
                place, delta = item
                index = place * body.answers + delta.index
                if delta.finish_reason is None and delta.logprobs is None:
                    if delta.text:
                        yield writer.text(b'%d,"text":' % index, delta.text, b',"logprobs":null,"finish_reason":null}')
                else:
                    choice = _Choice(index, logprobs[index], [delta.text], finish_reason=delta.finish_reason)
                    if delta.logprobs is not None:
                        choice.tell(delta.logprobs["tokens"])
                    yield writer.choice(choice.content)
                item = await anext(deltas, None)
            if with_usage:
                yield writer.usage(usage_json(*(g.usage for g in generations if g.usage is not None)))
            yield DONE
        except Exception as error:
            yield error_event(told(error))
