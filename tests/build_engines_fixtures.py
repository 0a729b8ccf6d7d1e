"""A small model to build engines of. Test modules name this one in `pytest_plugins`."""

from pathlib import Path

import pytest

from tests.build_engines_kit import CONFIG
from tests.gemma3_random import write_random_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory: Path = tmp_path_factory.mktemp("model")
    write_random_checkpoint(directory, text=CONFIG, vision={})
    return directory
