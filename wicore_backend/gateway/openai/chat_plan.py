"""From the body of a chat request to what the engine is asked, and how its answer is read."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from starlette.requests import HTTPConnection

from wicore_backend.gateway import structured, tools
from wicore_backend.gateway.backend import GenerationRequest
from wicore_backend.gateway.caller import Caller
from wicore_backend.gateway.generation import Generation, request_id
from wicore_backend.gateway.openai.answers import Answer, AnswerReader
from wicore_backend.gateway.openai.chat_schema import ChatRequest
from wicore_backend.gateway.openai.fields import retention
from wicore_backend.gateway.openai.messages import read_messages
from wicore_backend.gateway.openai.models import check_model
from wicore_backend.gateway.picture_urls import PictureFetcher


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """What is known of a chat request before it is sent."""

    body: ChatRequest
    generation: Generation
    tools: tools.ToolPlan | None
    id: str
    created: int
    fingerprint: str | None

    @classmethod
    async def of(cls, body: ChatRequest, connection: HTTPConnection, caller: Caller, *, endpoint: str) -> ChatPlan:
        """Check the request and read its messages.

        Raises
        ------
        ApiError
            If it cannot be answered as it stands.
        """
        state = connection.app.state
        check_model(body.model, state.settings)
        caller.check_model(body.model)
        options = body.sampling_options(caller) | retention(body)
        form = structured.wire_options(body.response_format)
        tool_plan = tools.plan(
            body.tools,
            body.tool_choice,
            body.parallel_tool_calls is not False,
            structured.content_schema(form),
        )
        options |= form | (tool_plan.options if tool_plan else {})
        limit = body.max_completion_tokens or body.max_tokens
        if limit is not None:
            options["max_tokens"] = limit
        if body.best_of is not None:
            options["best_of"] = body.best_of
        if body.logprobs:
            options["logprobs"] = body.top_logprobs or 0
        fetcher: PictureFetcher | None = getattr(state, "picture_fetcher", None)
        conversation = await read_messages(body.messages, fetcher.for_request() if fetcher else None)
        request = GenerationRequest(
            id=request_id(connection),
            model=state.settings.model,
            prompt=tools.render_messages(conversation.messages, tool_plan),
            images=conversation.images,
            options=options,
            stream=bool(body.stream),
        )
        return cls(
            body=body,
            generation=Generation(connection, caller, endpoint, body.model, request),
            tools=tool_plan,
            id=f"chatcmpl-{request.id}",
            created=int(time.time()),
            fingerprint=await state.backend.fingerprint(),
        )

    def head(self, kind: str) -> dict[str, Any]:
        """What every chunk, or the whole answer, begins with."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.body.model,
            "system_fingerprint": self.fingerprint,
        }

    def readers(self) -> list[AnswerReader]:
        """One for each answer."""
        return [
            AnswerReader(self.tools.parser() if self.tools else None, logprobs=bool(self.body.logprobs))
            for _ in range(self.body.answers)
        ]

    def answers(self) -> list[Answer]:
        """One for each answer, to be summed up."""
        return [Answer(i, reader) for i, reader in enumerate(self.readers())]
