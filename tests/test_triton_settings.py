"""Settings of the Triton models: from config.pbtxt, from the environment, and strict."""

import os

import pytest

from wicore_backend.errors import EngineError, InvalidArgumentError
from wicore_backend.triton import settings


def pbtxt(**parameters: str) -> dict:
    return {"parameters": {name: {"string_value": value} for name, value in parameters.items()}}


def test_the_environment_goes_before_the_models_parameters():
    config = settings.engine_config(
        pbtxt(model="/a", max_running="8", device="cpu", block_size=""),
        {"WICORE_SETTINGS": '{"model": "/b", "limits": {"max_images": 2}}'},
    )
    assert (str(config.model), config.max_running, config.device) == ("/b", 8, "cpu")
    assert config.block_size == 32
    assert config.limits.max_images == 2


def test_one_cpu_is_left_to_the_server_unless_threads_are_set():
    cpus = len(os.sched_getaffinity(0))
    assert settings.engine_config(pbtxt(model="/a"), {}).threads == max(1, cpus - 1)
    assert settings.engine_config(pbtxt(model="/a", threads="7"), {}).threads == 7


@pytest.mark.parametrize(
    ("parameters", "environment", "said"),
    [
        ({}, "", "no model"),
        ({"model": "/a"}, "{", "WICORE_SETTINGS"),
        ({"model": "/a"}, "[1]", "WICORE_SETTINGS"),
        ({"model": "/a"}, "[]", "WICORE_SETTINGS must be a JSON object"),
        ({"model": "/a"}, '[["device", "cpu"]]', "WICORE_SETTINGS must be a JSON object"),
        ({"model": "/a"}, "[" * 100_000, "nested too deeply"),
        ({"model": "/a"}, '{"device": "cpu", "device": "cuda"}', "'device' twice"),
        ({"model": "/a", "speed": "11"}, "", "'speed' is not a setting"),
        ({"model": "/a"}, '{"max_runing": 3}', "'max_runing' is not a setting"),
        ({"model": "/a", "max_running": "many"}, "", "max_running = 'many'"),
        ({"model": "/a"}, '{"limits": {"max_images": -1}}', "limits.max_images = -1"),
    ],
)
def test_what_cannot_be_is_named(parameters, environment, said):
    with pytest.raises(InvalidArgumentError) as caught:
        settings.engine_config(pbtxt(**parameters), {"WICORE_SETTINGS": environment})
    assert said in str(caught.value)


def test_numpy_2_is_refused_before_it_corrupts_an_answer(monkeypatch):
    settings.check_numpy()
    monkeypatch.setattr(settings.np, "__version__", "2.5.2")
    with pytest.raises(EngineError, match=r"2\.5\.2"):
        settings.check_numpy()
