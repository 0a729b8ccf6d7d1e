"""The server's Prometheus page."""

from __future__ import annotations

import re
from contextlib import suppress

from wicore_client.endpoint import Endpoint
from wicore_client.errors import ConnectionFailed
from wicore_client.http_transport import exchange
from wicore_client.results import Metric

PREFIX = "wicore_"
"""Of Wicore's own metrics, among Triton's."""

_SAMPLE = re.compile(r"(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)(?:\s+-?\d+)?")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_ESCAPES = {r"\\": "\\", r"\"": '"', r"\n": "\n"}


def parse(page: str) -> tuple[Metric, ...]:
    """The samples of Wicore's metrics in Prometheus' text format; other lines are passed over."""
    metrics = []
    for line in page.splitlines():
        sample = _SAMPLE.fullmatch(line.strip())
        if sample is None or not sample["name"].startswith(PREFIX):
            continue
        labels = {
            name: re.sub(r"\\.", lambda escape: _ESCAPES.get(escape[0], escape[0]), value)
            for name, value in _LABEL.findall(sample["labels"] or "")
        }
        with suppress(ValueError):
            metrics.append(Metric(sample["name"], labels, float(sample["value"])))
    return tuple(metrics)


def fetch(host: str, port: int, timeout: float) -> tuple[Metric, ...]:
    """Wicore's metrics, from the server's metrics port. Raises WicoreClientError."""
    endpoint = Endpoint("http", host, port)
    try:
        page = exchange(endpoint, "GET", "/metrics", timeout, timeout)
    except ConnectionFailed as error:
        raise ConnectionFailed(
            f"no metrics at {endpoint.address}; name the port that the server said when it started (metrics_port, "
            "--metrics-port; Triton's own is 8002)",
            sent=error.sent,
        ) from error
    return parse(page.decode("utf-8", "replace"))
