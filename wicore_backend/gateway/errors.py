"""Errors as clients see them: OpenAI's shape, one status each."""

from __future__ import annotations

import math
from typing import Any


class ApiError(Exception):
    """An error that goes to the client as `{"error": {"message", "type", "param", "code"}}`.

    Attributes
    ----------
    status
        Of HTTP.
    kind
        OpenAI's `type`: `invalid_request_error`, `authentication_error`, `rate_limit_error`, `server_error`, ...
    code
        One word for programs, None where OpenAI has none.
    param
        The field that is to blame, in the form `messages[0].content`.
    retry_after_s
        When it makes sense to try again; becomes the header `Retry-After`.
    headers
        More headers of the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        kind: str,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.kind = kind
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))

    @property
    def body(self) -> dict[str, Any]:
        """What the client reads."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class InvalidRequestError(ApiError):
    """400: the request can never succeed as it stands."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = "invalid_value", status: int = 400
    ) -> None:
        super().__init__(message, status=status, kind="invalid_request_error", code=code, param=param)


class UnsupportedError(InvalidRequestError):
    """400: a parameter of OpenAI's that this server does not have, or a value of it."""

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message, param=param, code="unsupported_parameter")


class NotFoundError(ApiError):
    """404."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "not_found") -> None:
        super().__init__(message, status=404, kind="invalid_request_error", code=code, param=param)


class UnavailableError(ApiError):
    """503: not now; the same request may succeed later."""

    def __init__(self, message: str, *, code: str = "unavailable", retry_after_s: float = 1.0) -> None:
        super().__init__(message, status=503, kind="server_error", code=code, retry_after_s=retry_after_s)


class DeadlineError(ApiError):
    """504: the deadline that the request had has passed."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=504, kind="timeout_error", code="deadline_exceeded")


class InternalError(ApiError):
    """500: a fault of the server's; its log has the rest."""

    def __init__(self, message: str = "the server made a mistake; its log says which") -> None:
        super().__init__(message, status=500, kind="server_error", code="internal")


class ClientGoneError(ApiError):
    """499: the client left, or cancelled. Nobody reads it but the log."""

    def __init__(self, message: str = "the client went away") -> None:
        super().__init__(message, status=499, kind="client_error", code="cancelled")
