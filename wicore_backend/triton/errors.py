"""Errors as Triton knows them."""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as pb_utils

from wicore_backend.errors import ErrorCode, WicoreError

_CODES = {
    ErrorCode.INVALID_ARGUMENT: pb_utils.TritonError.INVALID_ARG,
    ErrorCode.UNAVAILABLE: pb_utils.TritonError.UNAVAILABLE,
    # Triton has no code for a deadline: what passed it is not to be had any more, which UNAVAILABLE says best.
    ErrorCode.DEADLINE_EXCEEDED: pb_utils.TritonError.UNAVAILABLE,
    ErrorCode.CANCELLED: pb_utils.TritonError.CANCELLED,
    ErrorCode.INTERNAL: pb_utils.TritonError.INTERNAL,
}


def triton_error(error: Exception) -> Any:
    """`error` as a TritonError. Its text begins with the code's name, which survives roads that lose Triton's code."""
    if isinstance(error, WicoreError):
        return pb_utils.TritonError(f"{error.code}: {error}", _CODES[error.code])
    return pb_utils.TritonError(f"internal: {type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)
