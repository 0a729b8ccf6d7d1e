"""Fixtures of the tests of a whole engine. Test modules name this one in `pytest_plugins`."""

from dataclasses import replace

import pytest

from tests.engine_kit import PROMPTS, assert_nothing_left, config, greedy
from wicore_backend import Engine


@pytest.fixture(scope="module", params=[False, True], ids=["", "tokens_read_a_step_late"])
def engine(request):
    """Reading tokens a step late is for devices that compute beside the host; a CPU gives the same answers with it."""
    with Engine(config()) as engine:
        engine._model = replace(engine._model, overlaps=request.param)
        yield engine
        assert_nothing_left(engine)


@pytest.fixture(scope="session")
def alone():
    """What each of PROMPTS is answered when nothing else runs."""
    with Engine(config()) as engine:
        return [engine.generate(prompt, greedy(), images=images).token_ids for prompt, images in PROMPTS]
