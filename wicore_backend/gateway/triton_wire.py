"""Requests, responses and errors in Triton's gRPC messages (KServe's open inference protocol)."""

from __future__ import annotations

import json
import re
import struct
from typing import Any

import grpc
import orjson
from tritonclient.grpc import service_pb2 as pb

from wicore_backend.errors import ErrorCode
from wicore_backend.gateway.backend import Delta, GenerationRequest, Usage
from wicore_backend.gateway.errors import (
    ApiError,
    ClientGoneError,
    DeadlineError,
    InternalError,
    InvalidRequestError,
    UnavailableError,
)

# The header `triton_grpc_error` would have Triton end a stream with its error's status. It is not sent: tritonserver
# 2.51 crashes in it ("HandleCancellation called even when the context was not cancelled") after a hundred errors or so,
# and the engine's codes are in its texts.

_CODED = re.compile(r"\[(?P<code>[a-z_]+)\] (?P<text>.*)", re.DOTALL)
_RETRY_AFTER = re.compile(r"retry after (?P<seconds>\d+(?:\.\d+)?(?:e[+-]?\d+)?) s")
_NO_MODEL = re.compile(r"unknown model|is not found|not ready|no available versions|is not available")
"""In Triton's own words."""
_WHOLE = ("stop", "length")


def encode(request: GenerationRequest) -> Any:
    """The ModelInferRequest of a request.

    Raises
    ------
    InvalidRequestError
        If a text cannot be written as UTF-8.
    """
    message = pb.ModelInferRequest(model_name=request.model, id=request.id)

    def add(name: str, datatype: str, count: int, raw: bytes) -> None:
        message.inputs.append(pb.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=[count]))
        message.raw_input_contents.append(raw)

    def add_texts(name: str, *texts: bytes) -> None:
        add(name, "BYTES", len(texts), b"".join(struct.pack("<I", len(text)) + text for text in texts))

    options = dict(request.options)
    if request.raw:
        options["raw"] = True
    try:
        if isinstance(request.prompt, str):
            add_texts("text_input", request.prompt.encode())
        elif request.prompt and isinstance(request.prompt[0], int):
            ids = request.prompt
            add("input_ids", "INT32", len(ids), struct.pack(f"<{len(ids)}i", *ids))
        else:
            add_texts("messages", json.dumps(request.prompt, ensure_ascii=False).encode())
        if request.images:
            add_texts("images", *request.images)
        if isinstance(request.prompt, list) and request.prompt and isinstance(request.prompt[0], int):
            # The model without the ensemble's first step has no input of its own for `stream`.
            add_texts("request", json.dumps(options | {"stream": request.stream}, ensure_ascii=False).encode())
        else:
            if options:
                add_texts("sampling_parameters", json.dumps(options, ensure_ascii=False).encode())
            add("stream", "BOOL", 1, struct.pack("?", request.stream))
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"the request has text that is not Unicode: {error.object[error.start : error.end]!a} is half a "
            "surrogate pair"
        ) from None
    return message


def decode(message: Any, *, answers: int) -> tuple[Delta, ...]:
    """What a ModelStreamInferResponse adds to the answers, unless it is an error (`error_from_text`).

    Raises
    ------
    ApiError
        If it says that the request failed.
    """
    inferred = message.infer_response
    text = ""
    token_ids: tuple[int, ...] = ()
    values: dict[str, str] | None = None
    index = 0
    for output, raw in zip(inferred.outputs, inferred.raw_output_contents, strict=True):
        name = output.name
        if name == "text_output":
            text = raw[4:].decode()
        elif name == "token_ids":
            token_ids = struct.unpack(f"<{len(raw) // 4}i", raw)
        elif name == "index":
            (index,) = struct.unpack("<i", raw)
        elif raw:
            values = values or {}
            values[name] = raw[4:].decode()
    if values is None:
        return (Delta(index, text, token_ids),) if text or token_ids else ()
    logprobs = orjson.loads(values["logprobs"]) if "logprobs" in values else None
    reason = values.get("finish_reason")
    if reason is None:
        return (Delta(index, text, token_ids, logprobs),)
    if "error_code" in values or reason not in _WHOLE:
        raise error_of(values.get("error_code", ErrorCode.INTERNAL), values.get("error_message", f"it ended: {reason}"))
    usage = Usage(**orjson.loads(values["usage"]))
    if "answers" not in values:
        if answers > 1:
            raise InternalError(f"the server gave one answer instead of {answers}")
        return (Delta(index, text, token_ids, logprobs, reason, usage),)
    entries = orjson.loads(values["answers"])
    return tuple(
        Delta(
            entry["index"],
            entry["text"],
            tuple(entry["token_ids"]),
            entry.get("logprobs"),
            entry["finish_reason"],
            usage if position == len(entries) else None,
        )
        for position, entry in enumerate(entries, start=1)
    )


def error_from_text(text: str) -> ApiError:
    """The error that a model's text says, which begins with a code in brackets."""
    coded = _CODED.search(text)
    if coded is not None:
        return error_of(coded["code"], coded["text"])
    if _NO_MODEL.search(text):
        return UnavailableError(text, code="model_unavailable", retry_after_s=5.0)
    return error_of(ErrorCode.INTERNAL, text)


def error_of(code: str, text: str) -> ApiError:
    """The error of one of the engine's codes."""
    if code == ErrorCode.INVALID_ARGUMENT:
        return InvalidRequestError(text)
    if code == ErrorCode.UNAVAILABLE:
        said = _RETRY_AFTER.search(text)
        return UnavailableError(text, code="overloaded", retry_after_s=float(said["seconds"]) if said else 1.0)
    if code == ErrorCode.DEADLINE_EXCEEDED:
        return DeadlineError(text)
    if code == ErrorCode.CANCELLED:
        return ClientGoneError(text)
    return InternalError(text)


def error_from_rpc(error: Any) -> ApiError:
    """The error of a grpc.aio.AioRpcError. Where the server is, which gRPC's words may say, is no client's business."""
    status, details = error.code(), error.details() or ""
    if (coded := _CODED.search(details)) is not None:
        return error_of(coded["code"], coded["text"])
    if status is grpc.StatusCode.UNAVAILABLE:
        return UnavailableError("the inference server cannot be reached", code="backend_unavailable")
    if status is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineError("the inference server did not answer in time")
    if status is grpc.StatusCode.CANCELLED:
        return UnavailableError("the inference server ended the request", code="backend_unavailable")
    if status in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.OUT_OF_RANGE):
        if _NO_MODEL.search(details):
            return UnavailableError(details, code="model_unavailable", retry_after_s=5.0)
        return InvalidRequestError(details)
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED:  # gRPC's own: a message beyond the server's limit
        return InvalidRequestError(details, code="request_too_large", status=413)
    return InternalError(f"the inference server failed ({status.name.lower()}); the gateway's log says how")
