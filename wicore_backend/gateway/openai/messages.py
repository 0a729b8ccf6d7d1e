"""Chat messages as clients send them, and as the model's processor takes them."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from wicore_backend.gateway.errors import InvalidRequestError
from wicore_backend.gateway.openai.fields import MOST_PARTS, Body, refused

FetchImage = Callable[[str], Awaitable[bytes]]
"""Gets the picture behind an http(s) URL. Raises ApiError."""


class TextPart(Body):
    """Text."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: refused("prompts that begin alike are found without it") = None  # type: ignore[valid-type]


class ImageUrl(Body):
    """A picture: a data: URL, or an http(s) one where the server allows that."""

    url: str
    detail: refused("pictures have one resolution, the model's", "auto", "high") = None  # type: ignore[valid-type]


class ImagePart(Body):
    """A picture in its place."""

    type: Literal["image_url"]
    image_url: ImageUrl
    prompt_cache_breakpoint: refused("prompts that begin alike are found without it") = None  # type: ignore[valid-type]


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Parts = Annotated[list[Part], Field(max_length=MOST_PARTS, fail_fast=True)]
TextParts = Annotated[list[TextPart], Field(max_length=MOST_PARTS, fail_fast=True)]
Name = refused("the model's template has no names; put it into the content")


class SystemMessage(Body):
    """What the model is told before the conversation."""

    role: Literal["system", "developer"]
    content: str | TextParts
    name: Name = None  # type: ignore[valid-type]


class UserMessage(Body):
    """What a person says."""

    role: Literal["user"]
    content: str | Parts
    name: Name = None  # type: ignore[valid-type]


class FunctionArguments(Body):
    """A call's function and its arguments, as JSON text."""

    name: str
    arguments: str


class ToolCall(Body):
    """A call that the model made."""

    id: str
    type: Literal["function"]
    function: FunctionArguments
    index: int | None = None


class AssistantMessage(Body):
    """What the model said, as an answer has it."""

    role: Literal["assistant"]
    content: str | TextParts | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_PARTS, fail_fast=True)] | None = None
    refusal: refused("the model does not refuse in a field of its own") = None  # type: ignore[valid-type]
    annotations: refused("there are no annotations", []) = None  # type: ignore[valid-type]
    audio: refused("there is no audio") = None  # type: ignore[valid-type]
    function_call: refused("deprecated; use tool_calls") = None  # type: ignore[valid-type]
    name: Name = None  # type: ignore[valid-type]


class ToolMessage(Body):
    """What a call gave."""

    role: Literal["tool"]
    content: str | TextParts
    tool_call_id: str
    name: str | None = None
    """Of the function; the call has it, too."""


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages with plain texts and places of pictures, and the pictures in their order."""

    messages: list[dict[str, Any]]
    images: tuple[bytes, ...]


async def read_messages(messages: Sequence[Message], fetch: FetchImage | None) -> Conversation:
    """The conversation in the terms of the wire. Calls and results of tools are left as they are.

    Parameters
    ----------
    fetch
        None if pictures are not fetched.

    Raises
    ------
    InvalidRequestError
        For a picture that cannot be had.
    """
    read: list[dict[str, Any]] = []
    images: list[tuple[str, str]] = []  # URL, and where it stands
    for i, message in enumerate(messages):
        content: str | list[dict[str, Any]] | None
        if message.content is None or isinstance(message.content, str):
            content = message.content
        elif isinstance(message, UserMessage):
            content = []
            for j, part in enumerate(message.content):
                if isinstance(part, TextPart):
                    content.append({"type": "text", "text": part.text})
                else:
                    images.append((part.image_url.url, f"messages[{i}].content[{j}].image_url.url"))
                    content.append({"type": "image"})
        else:
            content = "\n".join(part.text for part in message.content)
        role = "system" if message.role == "developer" else message.role
        entry: dict[str, Any] = {"role": role, "content": content}
        if isinstance(message, AssistantMessage) and message.tool_calls:
            entry["tool_calls"] = [call.model_dump(exclude={"index"}) for call in message.tool_calls]
        if isinstance(message, ToolMessage):
            entry["tool_call_id"] = message.tool_call_id
        if role == "system" and len(read) == 1 and read[0]["role"] == "system":
            read[0]["content"] = f"{read[0]['content']}\n{content}"  # The template has one place for them.
        else:
            read.append(entry)
    return Conversation(read, await _read_images(images, fetch))


async def _read_images(places: Sequence[tuple[str, str]], fetch: FetchImage | None) -> tuple[bytes, ...]:
    """The pictures' files, those that are fetched at the same time; the first that cannot be had ends the others."""
    reading = [asyncio.create_task(read_image(url, fetch, param)) for url, param in places]
    try:
        return tuple(await asyncio.gather(*reading))
    finally:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)


async def read_image(url: str, fetch: FetchImage | None, param: str) -> bytes:
    """The picture's file."""
    scheme, _, rest = url[:16].partition(":")
    if scheme.lower() == "data":
        head, comma, data = url.partition(",")
        if not comma or not head.endswith(";base64"):
            raise InvalidRequestError("a data: URL of a picture has the form data:image/png;base64,...", param=param)
        return read_base64(data, param)
    if scheme.lower() in ("http", "https") and rest:
        if fetch is None:
            raise InvalidRequestError(
                "this server does not fetch pictures; send it as a data: URL", param=param, code="image_url_not_allowed"
            )
        return await fetch(url)
    raise InvalidRequestError("a picture is a data: URL or, where that is allowed, an http(s) one", param=param)


def read_base64(data: str, param: str) -> bytes:
    """The bytes of a picture's file. Raises InvalidRequestError."""
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequestError(f"the picture's base64 is damaged: {error}", param=param) from None
