"""Chat messages as clients send them, checked and brought into one form."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wicore_backend.errors import InvalidArgumentError
from wicore_backend.processor.image_decoding import ImageSource

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class TextPart:
    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """A place for an image.

    Attributes
    ----------
    source
        The image itself where the message carries it, None where it is the next of the images beside the messages.
    """

    source: ImageSource | None


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn, or the system's words before the first one."""

    role: str
    content: str | tuple[TextPart | ImagePart, ...]

    @property
    def texts(self) -> list[str]:
        """The message's texts, in order."""
        if isinstance(self.content, str):
            return [self.content]
        return [part.text for part in self.content if isinstance(part, TextPart)]

    @property
    def images(self) -> list[ImagePart]:
        """The places of its images, in order."""
        return [] if isinstance(self.content, str) else [part for part in self.content if isinstance(part, ImagePart)]


def parse_messages(messages: Sequence[Mapping[str, Any]]) -> list[ChatMessage]:
    """Messages in the form of Hugging Face or of OpenAI, as `ChatMessage`.

    A message is `{"role": ..., "content": ...}`; its content is a text or a list of parts: `{"type": "text", "text":
    ...}`, `{"type": "image"}` for the next of the images beside the messages, `{"type": "image", "image": ...}` or
    `{"type": "image_url", "image_url": {"url": "data:..."}}` for one that comes with the message. A system message's
    text parts become one text, a line each, because Gemma-3's template reads only the first part.

    Raises
    ------
    InvalidArgumentError
        Anything else, named by its place.
    """
    if not messages:
        raise InvalidArgumentError("the conversation is empty; send at least one message")
    parsed = [_parse_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    for index, message in enumerate(parsed[1:], start=1):
        if message.role == "system":
            raise InvalidArgumentError(f"messages[{index}].role is 'system', which only the first message may have")
    if all(message.role != "user" for message in parsed):
        raise InvalidArgumentError("the conversation has no user message; send what the model is to answer")
    return parsed


def _parse_message(message: Any, where: str) -> ChatMessage:
    fields = _object(message, where, known=("role", "content"))
    role = fields.get("role")
    if role not in ROLES:
        raise InvalidArgumentError(f"{where}.role is {reprlib.repr(role)}; there are: {', '.join(ROLES)}")
    content = fields.get("content")
    if isinstance(content, str):
        return ChatMessage(role, content)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise InvalidArgumentError(f"{where}.content is {reprlib.repr(content)}; it takes a text or a list of parts")
    parts = tuple(_parse_part(part, f"{where}.content[{index}]") for index, part in enumerate(content))
    if role != "system":
        return ChatMessage(role, parts)
    if any(isinstance(part, ImagePart) for part in parts):
        raise InvalidArgumentError(f"{where} is a system message with an image; images belong to user messages")
    return ChatMessage(role, "\n".join(part.text for part in parts if isinstance(part, TextPart)))


def _parse_part(part: Any, where: str) -> TextPart | ImagePart:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        text = _object(part, where, known=("type", "text")).get("text")
        if not isinstance(text, str):
            raise InvalidArgumentError(f"{where}.text is {reprlib.repr(text)}; it takes a text")
        return TextPart(text)
    if kind == "image":
        return ImagePart(_object(part, where, known=("type", "image")).get("image"))
    if kind == "image_url":
        url = _object(part, where, known=("type", "image_url")).get("image_url")
        url = url.get("url") if isinstance(url, Mapping) else url
        if not isinstance(url, str) or not url.startswith("data:"):
            raise InvalidArgumentError(
                f"{where}.image_url is {reprlib.repr(url)}; only data: URLs are taken, nothing is fetched"
            )
        return ImagePart(url)
    raise InvalidArgumentError(f"{where} is {reprlib.repr(part)}; a part's type is one of: text, image, image_url")


def _object(value: Any, where: str, *, known: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidArgumentError(f"{where} is {reprlib.repr(value)}; it takes an object with {', '.join(known)}")
    for key, field in value.items():
        if key not in known and field is not None:
            raise InvalidArgumentError(f"{where} has the field {reprlib.repr(key)}; there are: {', '.join(known)}")
    return value
