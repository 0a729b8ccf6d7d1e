"""What the OpenAPI document says of answers that the routes write themselves."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    """The field that is to blame."""
    code: str | None


class ErrorAnswer(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "The request can never succeed as it stands; `param` is to blame."},
    401: {"model": ErrorAnswer, "description": "No valid key."},
    403: {"model": ErrorAnswer, "description": "The key is for something else."},
    404: {"model": ErrorAnswer, "description": "There is no such model."},
    413: {"model": ErrorAnswer, "description": "The body is too large."},
    429: {"model": ErrorAnswer, "description": "The caller has had his share; `Retry-After` says when there is more."},
    500: {"model": ErrorAnswer, "description": "A fault of the server's."},
    503: {"model": ErrorAnswer, "description": "Overloaded, restarting or draining; `Retry-After` says when to come."},
    504: {"model": ErrorAnswer, "description": "The request's deadline has passed."},
}


def refusals_documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that FastAPI documents but for its errors."""
    return {status: ERRORS[status] for status in statuses}


def answers_documented(whole: type[BaseModel], chunk: type[BaseModel] | None = None) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that answers with `whole`, or with a stream of events that hold `chunk`."""
    answers: dict[int | str, dict[str, Any]] = {200: {"model": whole, "description": "The answer."}, **ERRORS}
    if chunk is not None:
        answers[200] = answers[200] | {
            "description": f"The answer, or with `stream` events whose data are {chunk.__name__} objects.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        }
    return answers
