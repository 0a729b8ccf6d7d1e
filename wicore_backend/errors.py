"""Every error that a user can see, with the one code it carries on every road (Python, Triton, OpenAI)."""

from __future__ import annotations

from enum import StrEnum


class ErrorCode(StrEnum):
    """What went wrong, in the terms of gRPC and of Triton's error codes."""

    INVALID_ARGUMENT = "invalid_argument"
    """The request can never succeed as it stands."""
    UNAVAILABLE = "unavailable"
    """The server cannot take the request now; the same request may succeed later."""
    DEADLINE_EXCEEDED = "deadline_exceeded"
    CANCELLED = "cancelled"
    INTERNAL = "internal"
    """A fault of the server's; its log has the rest."""


class WicoreError(Exception):
    """Base of every error that reaches a user. Its text names the thing, the value seen and the remedy."""

    code = ErrorCode.INTERNAL


class InvalidArgumentError(WicoreError):
    """An input, a setting or a checkpoint that cannot be used as it stands."""

    code = ErrorCode.INVALID_ARGUMENT


class CheckpointError(InvalidArgumentError):
    """A model directory that is incomplete, inconsistent or of an unknown kind."""


class SegmentError(InvalidArgumentError):
    """Exported segments that are incomplete, damaged or of another kind, or a model that cannot be exported so."""


class ExecutorError(InvalidArgumentError):
    """An executor that cannot be had: of a library, engines, a card or its memory, something is missing or unfit."""


class OverloadedError(WicoreError):
    """The queue is full, or the engine is draining.

    Parameters
    ----------
    retry_after_s
        When it makes sense to try again, in seconds.
    """

    code = ErrorCode.UNAVAILABLE

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(f"{message}; retry after {retry_after_s:g} s")
        self.retry_after_s = retry_after_s


class DeadlineExceededError(WicoreError):
    code = ErrorCode.DEADLINE_EXCEEDED


class CancelledError(WicoreError):
    """The caller went away or asked for the end."""

    code = ErrorCode.CANCELLED


class EngineError(WicoreError):
    """A fault inside the engine: the request is lost, the engine's own log says why."""

    code = ErrorCode.INTERNAL
