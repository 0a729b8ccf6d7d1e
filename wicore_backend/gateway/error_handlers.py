"""Whatever goes wrong becomes an error in OpenAI's shape."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from wicore_backend.gateway.errors import ApiError, InternalError, InvalidRequestError, NotFoundError, UnsupportedError
from wicore_backend.gateway.openai.fields import REFUSED

_log = logging.getLogger(__name__)


def error_response(error: ApiError) -> JSONResponse:
    """The answer that says `error`."""
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


def told(error: Exception) -> ApiError:
    """What a client is told of an error: its own words, or of a mistake of ours that the log has the rest."""
    if isinstance(error, ApiError):
        return error
    _log.error("an answer broke", exc_info=error)
    return InternalError()


def add_error_handlers(app: FastAPI) -> None:
    """Make every exception of a route an ApiError's answer."""

    @app.exception_handler(ApiError)
    async def _api_error(_request: Request, error: ApiError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(invalid_request(error.errors(), error.body))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(_from_http(request, error))

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> JSONResponse:
        _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return error_response(InternalError())


def _from_http(request: Request, error: HTTPException) -> ApiError:
    if error.status_code == 404:
        return NotFoundError(f"there is no {request.method} {ascii(request.url.path)[1:-1]}")
    if (unread := _why_unread(error.__cause__)) is not None:
        return InvalidRequestError(unread, code="invalid_json")
    headers = error.headers or {}
    if error.status_code == 405:
        said = f"{ascii(request.url.path)[1:-1]} takes {headers.get('Allow', 'another method')}, not {request.method}"
        api_error = InvalidRequestError(said, code="method_not_allowed", status=405)
    else:
        api_error = InvalidRequestError(str(error.detail), code="bad_request", status=error.status_code)
    api_error.headers.update(headers)
    return api_error


def _why_unread(cause: BaseException | None) -> str | None:
    """What kept FastAPI from reading a body as JSON, for which it has no words of its own; None if nothing did."""
    match cause:
        case RecursionError():
            return "the body is JSON that is nested too deeply; flatten it"
        case UnicodeDecodeError():
            return f"the body is not UTF-8: {cause}"
        case ValueError():
            return f"the body is not JSON that can be read: {str(cause).partition('; use sys.')[0]}"
    return None


def invalid_request(problems: Sequence[Any], body: Any) -> InvalidRequestError:
    """The error that names the most telling of pydantic's problems with what the first of them is about, and says how
    many other values there are problems with."""
    problem = _most_telling(problems, body)
    place = _inside_body(problem)
    param = _name(problem, body)
    others = {name for other in problems if not _overlap(name := _name(other, body), param)}
    more = f" (and {len(others)} more)" if others else ""
    if problem["type"] == "extra_forbidden":
        return InvalidRequestError(
            f"{param} is not a parameter of this endpoint{more}", param=param, code="unknown_parameter"
        )
    if problem["type"] == "missing":
        return InvalidRequestError(
            f"{param or 'the body'} is missing{more}", param=param or None, code="missing_parameter"
        )
    if problem["type"] == REFUSED:
        return UnsupportedError(f"{param} is not supported{more}: {problem['msg']}", param=param)
    if problem["type"] == "json_invalid":
        return InvalidRequestError(f"the body is not JSON: {problem['ctx']['error']}", code="invalid_json")
    if not place and isinstance(problem.get("input"), bytes):
        return InvalidRequestError(
            "the body is taken as JSON only; send it with the header Content-Type: application/json",
            code="unsupported_media_type",
            status=415,
        )
    if not param and problem["type"] == "value_error":  # of fields that do not go together, which it names
        return InvalidRequestError(_said(problem))
    seen = ascii(problem.get("input"))
    seen = seen if len(seen) <= 80 else f"{seen[:77]}..."
    return InvalidRequestError(f"{param or 'the body'} is {seen}: {_said(problem)}{more}", param=param or None)


def _said(problem: Any) -> str:
    """What pydantic says of a value, without its own words for what Python's types are called."""
    match problem["type"]:
        case "model_attributes_type" | "dict_type" | "mapping_type":
            return "Input should be an object"
        case "union_tag_not_found" if not isinstance(problem["input"], dict):
            return "Input should be an object"
        case "union_tag_not_found":
            return f"Input should have {problem['ctx']['discriminator']}"
    return str(problem["msg"].removeprefix("Value error, "))


def _inside_body(problem: Any) -> list[str | int]:
    """Where a problem is, as pydantic has it."""
    place = list(problem["loc"])
    return place[1:] if place[:1] == ["body"] else place


def _most_telling(problems: Sequence[Any], body: Any) -> Any:
    """Where a value may have several forms, pydantic has problems with each of them: the one that leads farthest into
    the value is of the form that was meant, and another than "this is no text" says more. A list that is too long
    was meant as one, whatever its items would be in another form."""

    first = _name(problems[0], body)

    def telling(problem: Any) -> tuple[bool, int, bool]:
        name = _name(problem, body)
        inside = _within(name, first)
        too_long = inside and problem["type"] == "too_long"
        return too_long, len(name) if inside else -1, not problem["type"].endswith("_type")

    return max(problems, key=telling)


def _within(name: str, outer: str) -> bool:
    return name == outer or name.startswith((f"{outer}.", f"{outer}["))


def _overlap(one: str, other: str) -> bool:
    return _within(one, other) or _within(other, one)


def _name(problem: Any, body: Any) -> str:
    """`messages[0].content` of ("messages", 0, "user", "content"): what does not lead anywhere in the body is the name
    that pydantic gives to one of several forms, but for the last of what is missing."""
    place = _inside_body(problem)
    name = ""
    inner = body
    for i, part in enumerate(place):
        missing = problem["type"] == "missing" and i == len(place) - 1
        if isinstance(inner, dict) and (part in inner or missing):
            name += f".{part}" if name else str(part)
            inner = inner.get(part)
        elif isinstance(inner, list) and isinstance(part, int) and part < len(inner):
            name += f"[{part}]"
            inner = inner[part]
    return ascii(name)[1:-1]
