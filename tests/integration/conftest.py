"""A real tritonserver for the tests of this folder: one with the repository's own models, and throw-away ones."""

from pathlib import Path
from typing import Any

import pytest

from scripts.serving import Installation, ServerOptions, TritonServer
from scripts.serving.installation import ROOT

FREE_PORTS: dict[str, Any] = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session")
def installation():
    return Installation.of_this_environment()


@pytest.fixture(scope="session")
def server(installation):
    """The repository's models with the demo model, on the CPU; one server for all tests that only talk to it."""
    settings = {"model": str(ROOT / "models" / "wicore-demo"), "device": "cpu"}
    with TritonServer(ServerOptions(settings=settings, **FREE_PORTS), installation) as server:
        yield server


ECHO_CONFIG = """
name: "echo"
backend: "python"
max_batch_size: 0
model_transaction_policy { decoupled: true }
input [ { name: "text" data_type: TYPE_STRING dims: [ 1 ] } ]
output [ { name: "echo" data_type: TYPE_STRING dims: [ 1 ] } ]
instance_group [ { kind: KIND_CPU } ]
"""

ECHO_MODEL = """
import json
import os
import threading

import numpy
import triton_python_backend_utils as pb


class TritonPythonModel:
    def initialize(self, args):
        self.held = []
        if os.environ.get("WICORE_SETTINGS", "{}") != "{}":
            raise ValueError("settings: " + os.environ["WICORE_SETTINGS"])

    def execute(self, requests):
        for request in requests:
            text = pb.get_input_tensor_by_name(request, "text").as_numpy()[0].decode()
            sender = request.get_response_sender()
            if text == "hold":  # never answered, as a model that hangs
                self.held.append(sender)
                continue
            answer = f"{text} from numpy {numpy.__version__}".encode()
            response = pb.InferenceResponse([pb.Tensor("echo", numpy.array([answer], dtype=object))])
            sender.send(response, flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""


@pytest.fixture
def echo_repository(tmp_path):
    """A model repository with one small model: it echoes, hangs on "hold", and fails to load if it gets settings."""
    (tmp_path / "repository" / "echo" / "1").mkdir(parents=True)
    (tmp_path / "repository" / "echo" / "config.pbtxt").write_text(ECHO_CONFIG)
    (tmp_path / "repository" / "echo" / "1" / "model.py").write_text(ECHO_MODEL)
    return tmp_path / "repository"
