"""What can go wrong: one type for each of the server's codes, on either protocol, before or after the first token."""

# ruff: noqa: N818 (named after the condition, like the codes of gRPC that they mirror)

from __future__ import annotations

import re
from typing import ClassVar


class WicoreClientError(Exception):
    """Base of every error that a request can end with. Its text is one readable line that names the remedy.

    Attributes
    ----------
    code
        The wire's error code.
    partial_text, partial_token_ids
        What had arrived of the answer; empty if nothing had.
    """

    code: ClassVar[str] = "internal"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.partial_text = ""
        self.partial_token_ids: tuple[int, ...] = ()


class InvalidArgument(WicoreClientError):
    """The request can never succeed as it stands."""

    code = "invalid_argument"


class Unavailable(WicoreClientError):
    """The server is there but cannot take the request now; the same request may succeed later.

    Attributes
    ----------
    retry_after
        Seconds after which the server suggests to try again; None if it did not say.
    """

    code = "unavailable"

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(WicoreClientError):
    """The request's deadline (`deadline_ms`, kept by the server) or its `timeout` (kept by the client) passed."""

    code = "deadline_exceeded"


class Cancelled(WicoreClientError):
    """The request was cancelled, from here or on the server."""

    code = "cancelled"


class ServerError(WicoreClientError):
    """A fault of the server's; its log has the rest."""


class ConnectionFailed(WicoreClientError):
    """No connection, or it broke before the answer was whole.

    Attributes
    ----------
    sent
        Whether the request may have reached the server.
    """

    code = "connection_failed"

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


_TRITON_MESSAGE = re.compile(
    r"(?:in ensemble '[^']*', )?"  # which Triton puts before what a step says
    r"(?:\[(?P<code>invalid_argument|unavailable|deadline_exceeded|cancelled|internal)\] )?(?P<text>.*)"
)


def error_from_code(code: str, message: str, *, retry_after: float | None = None) -> WicoreClientError:
    """The error that a server sent; an unknown code is a ServerError.

    Parameters
    ----------
    code
        The wire's code, as far as the protocol tells it. Triton's HTTP does not, so the code that Wicore puts
        before its message goes first.
    retry_after
        What the protocol said of it; otherwise a "retry after 1.5 s" in the message counts.
    """
    found = _TRITON_MESSAGE.fullmatch(" ".join(message.split()))
    assert found is not None, "the pattern ends with .*"
    code = found["code"] or code
    message = found["text"]
    if message.startswith("Request for unknown model"):  # Triton's, with a code on no protocol
        return InvalidArgument(f"{message}; `wicore health` lists the server's models")
    message = message or f"the server gave no message with its error code {code!r}"
    match code:
        case InvalidArgument.code:
            return InvalidArgument(message)
        case Unavailable.code:
            found = re.search(r"(?:retry|again) (?:after|in) (\d{1,6}(?:\.\d{1,6})?) ?s", message)
            if retry_after is None and found:
                retry_after = float(found[1])
            return Unavailable(message, retry_after=retry_after)
        case DeadlineExceeded.code:
            return DeadlineExceeded(message)
        case Cancelled.code:
            return Cancelled(message)
        case _:
            return ServerError(message)


def timed_out() -> DeadlineExceeded:
    """The error of the client's own `timeout`."""
    return DeadlineExceeded("the request's timeout passed; give it a longer one, or ask for fewer tokens")


def cancelled_here() -> Cancelled:
    """The error of a request that was cancelled from this side."""
    return Cancelled("cancelled by the client")
