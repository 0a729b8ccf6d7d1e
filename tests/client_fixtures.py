"""Fixtures of the client's tests: a scripted server and its clients. Test modules name this one in `pytest_plugins`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from wicore_client import Client

from tests.client_kit import QUICK, Blocking
from tests.fake_triton import FakeTriton


@pytest.fixture
def server() -> Iterator[FakeTriton]:
    with FakeTriton() as fake:
        yield fake


@pytest.fixture(params=["grpc", "http", "grpc-async", "http-async"])
def connect(request, server):
    """Makes a client of the fake server."""
    protocol, _, flavour = request.param.partition("-")
    with contextlib.ExitStack() as stack:

        def make(*, port=None, **settings):
            settings = {"retry": QUICK, "metrics_port": server.ports["http"]} | settings
            url = f"127.0.0.1:{port or server.ports[protocol]}"
            client = (Blocking if flavour else Client)(url, protocol, **settings)
            stack.callback(client.close)
            return client

        yield make
