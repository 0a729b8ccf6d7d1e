"""Requests, responses and errors in the JSON of Triton's generate extension, and server-sent events."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from wicore_client.endpoint import Endpoint
from wicore_client.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidArgument,
    ServerError,
    Unavailable,
    WicoreClientError,
    error_from_code,
)
from wicore_client.requests import GenerateRequest
from wicore_client.results import Health, ModelHealth, ModelStatistics, Response

STATISTICS_PATH = "/v2/models/stats"
LIVE_PATH = "/v2/health/live"
SERVER_PATH = "/v2"
INDEX_PATH = "/v2/repository/index"

_CODES = {
    400: InvalidArgument.code,
    404: InvalidArgument.code,
    413: InvalidArgument.code,
    429: Unavailable.code,
    499: Cancelled.code,
    503: Unavailable.code,
    504: DeadlineExceeded.code,
}


def generate_path(request: GenerateRequest, model: str) -> str:
    return f"/v2/models/{quote(model, safe='')}/{'generate_stream' if request.stream else 'generate'}"


def encode(request: GenerateRequest) -> bytes:
    """The body of a generate request; pictures go in base64."""
    body: dict[str, Any] = {"id": request.id, "stream": request.stream}
    if request.prompt is not None:
        body["text_input"] = request.prompt
    if request.messages is not None:
        body["messages"] = request.messages
    if request.images:
        body["images"] = [base64.b64encode(image).decode() for image in request.images]
    if request.options:
        body["sampling_parameters"] = request.options
    return json.dumps(body).encode()


def decode(text: str | bytes) -> Response:
    """The Response in the JSON of one response.

    Raises
    ------
    WicoreClientError
        If it is an error, or cannot be read.
    """
    try:
        values = json.loads(text)
        if "error" in values:
            raise error_from_code(ServerError.code, str(values["error"]))
        tokens = values.get("token_ids", ())
        values["token_ids"] = (tokens,) if isinstance(tokens, int) else tuple(tokens)  # Triton writes [7] as 7
        fields = {name: values[name] for name in Response.__dataclass_fields__ if name in values}
        for name, value in fields.items():
            if not _is_right(name, value):
                raise TypeError(f"{name} is {str(value)[:40]!r}")
        return Response(**fields)
    except (ValueError, TypeError, AttributeError) as error:
        raise ServerError(f"cannot read the server's response: {error!r}") from error


def _is_right(name: str, value: Any) -> bool:
    """Whether a field of a Response is of its type."""
    match name:
        case "token_ids":
            return all(isinstance(token, int) for token in value)
        case "index":
            return isinstance(value, int)
        case _:
            return isinstance(value, str)


def error_from_status(status: int, body: bytes, retry_after: str | None, endpoint: Endpoint) -> WicoreClientError:
    """The error of an HTTP response whose status is not 200.

    Parameters
    ----------
    retry_after
        The header of that name.
    """
    text = body.decode("utf-8", "replace").strip()
    for line in text.splitlines():
        try:
            message = str(json.loads(line.removeprefix("data:"))["error"])
        except (ValueError, KeyError, TypeError):
            continue
        seconds = float(retry_after) if retry_after and retry_after.isdecimal() else None
        return error_from_code(_CODES.get(status, ServerError.code), message, retry_after=seconds)
    return ServerError(f"{endpoint} answered HTTP {status} and no Triton error ({text[:80]!r}); check the address")


class EventParser:
    """Server-sent events out of the bytes of a stream, however they are cut."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The data of each event that `data` completes. Triton writes one `data:` line for an event."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def model_statistics(body: bytes) -> tuple[ModelStatistics, ...]:
    """What the statistics extension says."""
    with _expecting("statistics"):
        return tuple(map(ModelStatistics.from_json, json.loads(body)["model_stats"]))


def health(server: bytes, index: bytes, model: str) -> Health:
    """What the answers of SERVER_PATH and INDEX_PATH say to a client of `model`; the server is live if it gave them."""
    with _expecting("metadata"):
        about = json.loads(server)
        models = tuple(
            ModelHealth(entry["name"], entry.get("version", ""), entry.get("state", ""), entry.get("reason", ""))
            for entry in json.loads(index)
        )
        return Health.of(True, f"{about['name']} {about['version']}", models, model)


@contextlib.contextmanager
def _expecting(what: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ServerError(f"the server's {what} are not Triton's ({error!r}); check the address") from error
