"""Fixtures of the TensorRT executor's tests. Test modules name this one in `pytest_plugins`."""

import pytest

from tests import stand_in_tensorrt as stand_in
from tests.gemma3_random import write_random_checkpoint
from tests.tensorrt_kit import Model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(path, vision={})
    return path


@pytest.fixture(scope="session")
def model(checkpoint, tmp_path_factory):
    return Model(checkpoint, tmp_path_factory.mktemp("segments"))


@pytest.fixture
def told_anew():
    """What the library is told is counted from here."""
    stand_in.forget()
