"""Settings from outside: everything known, typed and in range, or an error that names it."""

import json

import pytest

from wicore_backend.engine.sampling_params import SamplingParams, generation_defaults
from wicore_backend.errors import CheckpointError, InvalidArgumentError


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"temprature": 1}, "temprature"),
        ({"max_tokens": "5"}, "max_tokens = '5'"),
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"max_tokens": True}, "max_tokens = True"),
        ({"max_tokens": 1.5}, "max_tokens = 1.5"),
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"temperature": "hot"}, "temperature = 'hot'"),
        ({"top_p": 0}, "top_p = 0"),
        ({"top_k": -1}, "top_k = -1"),
        ({"min_p": 2}, "min_p = 2"),
        ({"repetition_penalty": 0}, "repetition_penalty = 0"),
        ({"presence_penalty": 3}, "presence_penalty = 3"),
        ({"frequency_penalty": -3}, "frequency_penalty = -3"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**64}, "seed ="),
        ({"stop": ""}, "stop.0 = ''"),
        ({"stop": [1]}, "stop.0 = 1"),
        ({"stop": {"a": 1}}, "stop ="),
        ({"stop": ["x"] * 17}, "stop ="),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0 = -1"),
        ({"ignore_eos": "yes"}, "ignore_eos = 'yes'"),
        ({"logprobs": 21}, "logprobs = 21"),
        ({"prompt_logprobs": -1}, "prompt_logprobs = -1"),
    ],
)
def test_a_bad_value_is_an_error_that_names_it(values, named):
    with pytest.raises(InvalidArgumentError) as caught:
        SamplingParams(**values)
    assert named in str(caught.value)


def test_all_problems_are_told_at_once():
    with pytest.raises(InvalidArgumentError) as caught:
        SamplingParams(top_k=-1, foo=1)
    assert "top_k" in str(caught.value)
    assert "'foo' is not a setting" in str(caught.value)


def test_one_stop_text_or_many():
    assert SamplingParams(stop="a").stop == ("a",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def write(tmp_path, config) -> None:
    (tmp_path / "generation_config.json").write_text(config if isinstance(config, str) else json.dumps(config))


def test_what_was_not_given_comes_from_the_checkpoint(tmp_path):
    write(tmp_path, {"do_sample": True, "top_k": 64, "top_p": 0.95, "eos_token_id": [1, 106]})
    defaults = generation_defaults(tmp_path)
    assert defaults == {"temperature": 1.0, "top_k": 64, "top_p": 0.95}
    params = SamplingParams(top_k=5, max_tokens=3).completed(defaults)
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (1.0, 5, 0.95, 3)


def test_a_checkpoint_that_does_not_sample_is_greedy(tmp_path):
    assert generation_defaults(tmp_path) == {}
    write(tmp_path, {"top_k": 64})
    assert SamplingParams().completed(generation_defaults(tmp_path)).temperature == 0


@pytest.mark.parametrize("config", ["{", "[]", {"do_sample": True, "top_p": 7}])
def test_a_broken_generation_config_names_the_file(tmp_path, config):
    write(tmp_path, config)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        generation_defaults(tmp_path)
