"""What a caller can ask for, and its form on the wire."""

from __future__ import annotations

import io
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

from wicore_client.errors import InvalidArgument

if TYPE_CHECKING:
    from PIL.Image import Image


ImageSource: TypeAlias = "bytes | str | os.PathLike[str] | Image"
"""An encoded picture (PNG, JPEG, WebP, GIF), a path to one, or a PIL image."""

Message = Mapping[str, Any]
"""A chat message: {"role": "user", "content": "..."}; content is text or a list of {"type": "text", "text": "..."} and
{"type": "image"}."""


class SamplingOptions(TypedDict, total=False):
    """How the answer is chosen and when it ends. What is left out, or None, is the server's default."""

    max_tokens: int | None
    """Longest answer in tokens."""
    min_tokens: int | None
    """Before so many tokens the model does not end its answer."""
    temperature: float | None
    """0 takes the most likely token."""
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    """Added to these tokens' logits: from -100, which as good as rules a token out, to 100."""
    grammar: Mapping[str, Any] | None
    """The form of the answer: {"json_schema": {...}}, {"json_object": True}, {"regex": "..."}, {"choice": [...]},
    {"lark": "..."} or {"tags": {...}}; see docs/structured-output.md."""
    n: int | None
    """How many answers; their prompt is computed once. All of them are in `Completion.answers`."""
    best_of: int | None
    """How many answers are made, of which the `n` likeliest come, at the end."""
    seed: int | None
    """The same seed, prompt and settings give the same answer."""
    stop: str | Sequence[str] | None
    """Texts that end the answer and do not appear in it."""
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    """Go on after the model's own end of the answer."""
    logprobs: int | None
    """Report each token's log-probability and those of this many alternatives."""
    prompt_logprobs: int | None
    """The same for the prompt's tokens."""
    priority: int | None
    """Smaller goes first."""
    deadline_ms: int | None
    """Time after which the server ends the request, whatever it has."""
    raw: bool | None
    """Take the prompt as it is, without the chat template."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One request, checked as far as a client can, ready for either protocol."""

    id: str
    prompt: str | None
    """Exactly one of `prompt` and `messages` is there."""
    messages: str | None
    """JSON."""
    images: tuple[bytes, ...]
    options: str
    """SamplingOptions as a JSON object; empty if the server's defaults are wanted."""
    stream: bool

    @classmethod
    def build(
        cls,
        prompt: str | Sequence[Message],
        images: Sequence[ImageSource],
        options: Mapping[str, Any],
        *,
        stream: bool,
        request_id: str | None,
    ) -> GenerateRequest:
        """A request out of what a caller gave.

        Raises
        ------
        InvalidArgument
            For a prompt that is neither text nor messages, a picture that cannot be read and for values that JSON
            cannot hold.
        TypeError
            For an option that does not exist.
        """
        if isinstance(images, bytes | str | os.PathLike):
            raise InvalidArgument("images is one picture; give a list of pictures")
        if not isinstance(prompt, str) and not _are_messages(prompt):
            raise InvalidArgument(
                f"prompt is {ascii(prompt)[:80]}; give a text, or a list of messages, which are dicts"
            )
        unknown = options.keys() - SamplingOptions.__annotations__.keys()
        if unknown:
            known = ", ".join(SamplingOptions.__annotations__)
            raise TypeError(f"{', '.join(map(repr, sorted(unknown)))} is not an option; there are: {known}")
        given = [f"{json.dumps(name)}: {_to_json(name, v)}" for name, v in options.items() if v is not None]
        request = cls(
            id=request_id or uuid.uuid4().hex,
            prompt=prompt if isinstance(prompt, str) else None,
            messages=None if isinstance(prompt, str) else _to_json("messages", [dict(m) for m in prompt]),
            images=tuple(load_image(image, position) for position, image in enumerate(images, start=1)),
            options=f"{{{', '.join(given)}}}" if given else "",
            stream=stream,
        )
        check_text("request_id", request.id)
        check_text("prompt", request.prompt or "")
        return request


def _are_messages(prompt: object) -> bool:
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, bytes)
        and all(isinstance(message, Mapping) for message in prompt)
    )


def check_text(name: str, text: str) -> None:
    """Raise InvalidArgument for a text that UTF-8 cannot carry, such as what Python makes of an argument in another
    encoding."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(
            f"{name} is not Unicode: {text[error.start]!a}, character {error.start + 1}, is half a surrogate pair; "
            "send UTF-8"
        ) from None


def load_image(source: ImageSource, position: int = 1) -> bytes:
    """An encoded picture's bytes. A PIL image becomes a PNG and keeps its EXIF orientation.

    Parameters
    ----------
    position
        Its place in the request, from 1, for the error.

    Raises
    ------
    InvalidArgument
        If there is no such file, it cannot be read, or the source is of another kind.
    """
    if isinstance(source, bytes):
        return source
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        try:
            if path.exists() and not path.is_file():
                raise InvalidArgument(f"image {position}: {path} is not a file")
            return path.read_bytes()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise InvalidArgument(f"image {position}: cannot read {os.fspath(source)!r}: {reason}") from error
    if not hasattr(source, "save"):
        raise InvalidArgument(f"image {position} is a {type(source).__name__}; give bytes, a path or a PIL image")
    picture = source if source.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else source.convert("RGB")
    encoded = io.BytesIO()
    picture.save(encoded, format="PNG", exif=source.getexif())
    return encoded.getvalue()


def _to_json(name: str, value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"{name} cannot be written as JSON: {error}") from None
    check_text(name, text)
    return text
