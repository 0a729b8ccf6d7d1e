"""Errors as Triton knows them."""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as pb_utils

from wicore_backend.errors import ErrorCode, WicoreError

_TRITON_NAMES = {
    ErrorCode.INVALID_ARGUMENT: "INVALID_ARG",
    ErrorCode.UNAVAILABLE: "UNAVAILABLE",
    # Triton has no code for a deadline: what passed it is not to be had any more, which UNAVAILABLE says best.
    ErrorCode.DEADLINE_EXCEEDED: "UNAVAILABLE",
    ErrorCode.CANCELLED: "CANCELLED",
    ErrorCode.INTERNAL: "INTERNAL",
}


def triton_error(error: Exception) -> Any:
    """`error` as a TritonError whose text begins with its code in brackets.

    HTTP answers 400 whatever Triton's code, and a gRPC stream carries the text alone, so the text has to say it.
    """
    if not isinstance(error, WicoreError):
        return pb_utils.TritonError(f"[{ErrorCode.INTERNAL}] {type(error).__name__}: {error}")
    return pb_utils.TritonError(f"[{error.code}] {error}", getattr(pb_utils.TritonError, _TRITON_NAMES[error.code]))
