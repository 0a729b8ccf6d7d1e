"""Server-sent events with OpenAI's chunks in them.

The bytes around a token's text are the same for every token of an answer, so they are made once.
"""

from __future__ import annotations

from typing import Any

import orjson

from wicore_backend.gateway.errors import ApiError

DONE = b"data: [DONE]\n\n"


def event(value: Any, name: str | None = None) -> bytes:
    """An event that carries `value` as JSON."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + orjson.dumps(value) + b"\n\n"


def error_event(error: ApiError) -> bytes:
    """The last event of a stream that broke."""
    return event(error.body)


class ChunkWriter:
    """The chunks of one stream.

    Parameters
    ----------
    head
        What is the same in all of them: id, object, created, model, system_fingerprint.
    with_usage
        Whether every chunk has a `usage`, null unless given, as OpenAI does where the usage is asked for.
    """

    def __init__(self, head: dict[str, Any], *, with_usage: bool) -> None:
        opened = orjson.dumps(head)[:-1]
        self._start = b"data: " + opened + b',"choices":['
        self._choice = self._start + b'{"index":'
        self._null_usage = b',"usage":null}\n\n' if with_usage else b"}\n\n"

    def text(self, before: bytes, text: str, after: bytes, usage: bytes | None = None) -> bytes:
        """A chunk with one choice: index, what goes before the text, the text, what goes after it."""
        return b"".join((self._choice, before, orjson.dumps(text), after, b"]", self._end(usage)))

    def choice(self, choice: dict[str, Any], usage: bytes | None = None) -> bytes:
        """A chunk with one choice of any form."""
        return b"".join((self._start, orjson.dumps(choice), b"]", self._end(usage)))

    def usage(self, usage: bytes) -> bytes:
        """The chunk without choices at the end."""
        return b"".join((self._start, b"]", self._end(usage)))

    def _end(self, usage: bytes | None) -> bytes:
        return self._null_usage if usage is None else b',"usage":' + usage + b"}\n\n"
