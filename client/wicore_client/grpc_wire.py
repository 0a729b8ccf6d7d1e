"""Requests, responses and errors in Triton's gRPC messages (KServe's open inference protocol)."""

from __future__ import annotations

import struct
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict
from tritonclient.grpc import service_pb2 as pb

from wicore_client.endpoint import Endpoint
from wicore_client.errors import (
    Cancelled,
    InvalidArgument,
    ServerError,
    Unavailable,
    WicoreClientError,
    cancelled_here,
    error_from_code,
    timed_out,
)
from wicore_client.requests import GenerateRequest
from wicore_client.results import Health, ModelHealth, ModelStatistics, Response

_CODES = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument.code,
    grpc.StatusCode.NOT_FOUND: InvalidArgument.code,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgument.code,
    grpc.StatusCode.UNAVAILABLE: Unavailable.code,
    grpc.StatusCode.RESOURCE_EXHAUSTED: InvalidArgument.code,  # gRPC's own: a message beyond the server's limit
    grpc.StatusCode.CANCELLED: Cancelled.code,
}

_NEVER_CONNECTED = ("failed to connect", "dns resolution failed", "name resolution", "empty address list")
_CONNECTION_LOST = (
    "socket closed",
    "connection reset",
    "broken pipe",
    "goaway",
    "transport",
    "keepalive",
    "endpoint closing",
    "cancelling all calls",
    "stream removed",
    "recvmsg",
)


def channel_options(connect_timeout: float) -> list[tuple[str, int]]:
    """A channel without size limits of its own (the server has one), without proxies (as the HTTP transport), and
    quick to find a server that comes back."""
    return [
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
        ("grpc.min_reconnect_backoff_ms", int(connect_timeout * 1000)),  # which gRPC also takes as connect timeout
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.enable_http_proxy", 0),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]


def encode(request: GenerateRequest, model: str) -> Any:
    """The ModelInferRequest of a request."""
    message = pb.ModelInferRequest(model_name=model, id=request.id)

    def add(name: str, datatype: str, count: int, raw: bytes) -> None:
        message.inputs.append(pb.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=[count]))
        message.raw_input_contents.append(raw)

    def add_texts(name: str, *texts: bytes) -> None:
        add(name, "BYTES", len(texts), b"".join(struct.pack("<I", len(text)) + text for text in texts))

    if request.prompt is not None:
        add_texts("text_input", request.prompt.encode())
    if request.messages is not None:
        add_texts("messages", request.messages.encode())
    if request.images:
        add_texts("images", *request.images)
    if request.options:
        add_texts("sampling_parameters", request.options.encode())
    add("stream", "BOOL", 1, struct.pack("?", request.stream))
    return message


def decode(message: Any) -> Response:
    """The Response in a ModelStreamInferResponse.

    Raises
    ------
    WicoreClientError
        If the message is an error, or cannot be read.
    """
    if message.error_message:
        raise error_from_code(ServerError.code, message.error_message)
    inferred = message.infer_response
    try:
        raws = zip(inferred.outputs, inferred.raw_output_contents, strict=True)
        values: dict[str, Any] = {output.name: _value(output.datatype, raw) for output, raw in raws}
        if "index" in values:
            (values["index"],) = values["index"]
        return Response(**{name: values[name] for name in Response.__dataclass_fields__ if name in values})
    except (ValueError, struct.error, IndexError) as error:
        raise ServerError(f"cannot read the server's response: {error!r}") from error


def _value(datatype: str, raw: bytes) -> str | tuple[int, ...]:
    if datatype == "INT32":
        return struct.unpack(f"<{len(raw) // 4}i", raw)
    (length,) = struct.unpack_from("<I", raw) if raw else (0,)
    if len(raw) not in (0, 4 + length):
        raise ValueError(f"a {datatype} output of {len(raw)} bytes holds a text of {length}")
    return raw[4:].decode()


def error_from_rpc(error: Any, endpoint: Endpoint, *, answered: bool = False) -> WicoreClientError:
    """The error of a grpc.RpcError (sync) or AioRpcError, which carry the same.

    gRPC gives its own failures the status codes that a server can send too. They are told apart by their text, and by
    `answered`: after a first response the server tells its errors in a last one, so that a status is the connection's.
    """
    status, details = error.code(), error.details() or ""
    if status is grpc.StatusCode.UNAVAILABLE:
        if details.lower().startswith(_NEVER_CONNECTED):
            if "http/2" in details.lower():
                return endpoint.unreachable("what answers there does not speak gRPC")
            reason = details.rpartition("Failed to connect to remote host: ")[2]
            return endpoint.unreachable(reason.removeprefix("connect: "))
        if answered or any(words in details.lower() for words in _CONNECTION_LOST):
            return endpoint.broken(details)
    if status is grpc.StatusCode.DEADLINE_EXCEEDED:  # of the call's own timeout: Triton has no such code
        return timed_out()
    if status is grpc.StatusCode.CANCELLED and not details:
        return cancelled_here()
    if status is grpc.StatusCode.UNIMPLEMENTED:
        return ServerError(f"the server at {endpoint} does not speak Triton's protocol: {details}; check the address")
    return error_from_code(_CODES.get(status, ServerError.code), details or f"gRPC status {status.name}")


def model_statistics(message: Any) -> tuple[ModelStatistics, ...]:
    """What a ModelStatisticsResponse says."""
    entries = MessageToDict(message, preserving_proto_field_name=True).get("model_stats", ())
    return tuple(map(ModelStatistics.from_json, entries))


def health(live: Any, server: Any, index: Any, model: str) -> Health:
    """What the answers of ServerLive, ServerMetadata and RepositoryIndex say to a client of `model`."""
    models = tuple(ModelHealth(entry.name, entry.version, entry.state, entry.reason) for entry in index.models)
    return Health.of(live.live, f"{server.name} {server.version}", models, model)
