"""Wicore's Python client: `Client` for threads, `AsyncClient` for event loops, over gRPC or HTTP.

from wicore_client import Client

with Client("localhost:8001") as client:
    for chunk in client.stream("Describe this picture.", images=["shapes.png"], max_tokens=64):
        print(chunk.text, end="", flush=True)
"""

from wicore_client.async_client import AsyncClient, AsyncStream
from wicore_client.client import Client, Stream
from wicore_client.errors import (
    Cancelled,
    ConnectionFailed,
    DeadlineExceeded,
    InvalidArgument,
    ServerError,
    Unavailable,
    WicoreClientError,
)
from wicore_client.requests import SamplingOptions
from wicore_client.results import (
    Alternative,
    Chunk,
    Completion,
    Health,
    Metric,
    ModelHealth,
    ModelStatistics,
    Statistics,
    TokenLogprob,
    Usage,
)
from wicore_client.retry import RetryPolicy

__all__ = [
    "Alternative",
    "AsyncClient",
    "AsyncStream",
    "Cancelled",
    "Chunk",
    "Client",
    "Completion",
    "ConnectionFailed",
    "DeadlineExceeded",
    "Health",
    "InvalidArgument",
    "Metric",
    "ModelHealth",
    "ModelStatistics",
    "RetryPolicy",
    "SamplingOptions",
    "ServerError",
    "Statistics",
    "Stream",
    "TokenLogprob",
    "Unavailable",
    "Usage",
    "WicoreClientError",
]
