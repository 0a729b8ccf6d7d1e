"""Settings from outside: whatever is wrong is named in full, with what was seen and what there is."""

import json
import time
from pathlib import Path

import pytest

from wicore_backend.config import EngineConfig
from wicore_backend.engine.sampling_params import SamplingParams
from wicore_backend.errors import InvalidArgumentError
from wicore_backend.gateway import server
from wicore_backend.gateway.server import read_settings
from wicore_backend.hmt.host_memory import HostMemory
from wicore_backend.settings import parse_json


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("access.keys_fil=k.json", "'access.keys_fil' is not a setting; there are: hosts, keys_file, open_to_network"),
        ("limits.redis_url=localhost", "limits.redis_url = 'localhost'"),
        ("cors.origins=*", "cors.origins = '*': Input should be a list"),
        ("connections.max_connections=0", "connections.max_connections = 0"),
        ("triton_url=http://gpu7:8001/", "has no scheme; write gpu7:8001"),
        ("triton_url=gpu7", "host:port"),
        ("triton_url=", "host:port"),
        ("triton_metrics_url=gpu7:8002/metrics", "begins with http://"),
        ("triton_metrics_url=http://[::1", "triton_metrics_url"),
        ("observability.otlp_endpoint=collector:4318", "begins with http://"),
        ("model=", "model = ''"),
    ],
)
def test_a_setting_of_the_gateway_is_named_with_its_section(assignment, said):
    with pytest.raises(InvalidArgumentError) as caught:
        read_settings("{}", [assignment])
    assert said in str(caught.value)


def test_an_empty_variable_is_none(monkeypatch, capsys):
    monkeypatch.setenv("WICORE_GATEWAY", "")
    assert server.main(["--set", "prot=1"]) == 2
    assert "'prot' is not a setting" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model", "engines", "nvme_cache_path"])
def test_a_path_may_begin_at_home_and_is_not_empty(name, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    values = {"model": "m"}
    assert getattr(EngineConfig(**values | {name: "~/there"}), name) == Path("/home/someone/there")
    for wrong in ("", "~no-such-user/there"):
        with pytest.raises(InvalidArgumentError, match=name):
            EngineConfig(**values | {name: wrong})


def test_a_list_that_is_too_long_is_called_a_list():
    with pytest.raises(InvalidArgumentError, match="List should have at most"):
        SamplingParams(stop=["x"] * 5000)


def test_what_is_missing_is_named():
    with pytest.raises(InvalidArgumentError, match="model is missing"):
        EngineConfig(device="cpu")


def test_a_name_that_is_there_twice_is_refused_whatever_its_depth():
    with pytest.raises(InvalidArgumentError, match="'b' twice"):
        parse_json('{"a": [{"b": 1, "b": 2}]}', "WICORE_SETTINGS")
    many = ",".join(f'"k{min(i, 99_998)}": 1' for i in range(100_000))
    began = time.perf_counter()
    with pytest.raises(InvalidArgumentError, match="'k99998' twice"):
        parse_json(f"{{{many}}}", "sampling_parameters")
    assert time.perf_counter() - began < 5  # Comparing each with each takes two minutes.
    assert parse_json(json.dumps({"a": {"b": 1}, "c": {"b": 2}}), "x") == {"a": {"b": 1}, "c": {"b": 2}}


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "cpu\n", ""])
def test_a_device_that_there_is_not_hears_which_there_are(device):
    with pytest.raises(InvalidArgumentError) as caught:
        EngineConfig(model="m", device=device)
    assert str(caught.value) == f"device = {device!r}: it is auto, cpu, cuda or cuda:N"
    assert [EngineConfig(model="m", device=fine).device for fine in ("auto", "cpu", "cuda", "cuda:12")][-1] == "cuda:12"


@pytest.mark.parametrize(("name", "value"), [("threads", 10**9), ("max_model_len", 1)])
def test_what_could_only_crash_or_never_answer_is_refused(name, value):
    with pytest.raises(InvalidArgumentError, match=f"{name} = {value}"):
        EngineConfig(model="m", **{name: value})


@pytest.mark.parametrize("size", [2**50, 2**70])
def test_host_memory_that_the_system_does_not_have_is_refused_by_its_setting(size):
    with pytest.raises(InvalidArgumentError, match="lower host_cache_bytes"):
        HostMemory(size, locked=False)
