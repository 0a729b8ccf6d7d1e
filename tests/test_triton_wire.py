"""What a client's tensors and parameters mean, and that each one that means nothing is an error that names it."""

import numpy as np
import pytest

from wicore_backend.errors import InvalidArgumentError
from wicore_backend.triton.wire import RequestOptions, prompt_from_tensors, prompt_source

DEEP = b"[" * 100_000


def text(*values: bytes) -> np.ndarray:
    return np.array(values, object)


def parse(parameters: str = "{}", **tensors) -> RequestOptions:
    return RequestOptions.parse(parameters, tensors, json_tensor="sampling_parameters")


def test_parameters_go_before_tensors_and_those_before_the_json():
    options = parse(
        '{"seed": 3, "triton_x": 1, "id": "a"}',
        sampling_parameters=text(b'{"seed": 1, "top_k": 2, "stop": "a"}'),
        stop=text(b"b", "句".encode()),
        stream=np.array([True]),
    )
    assert (options.sampling.seed, options.sampling.top_k, options.sampling.stop) == (3, 2, ("b", "句"))
    assert options.serving.stream


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"sampling_parameters": text(b"{")}, "sampling_parameters is not JSON"),
        ({"sampling_parameters": text(b"\xff\xfe")}, "sampling_parameters is not JSON"),
        ({"sampling_parameters": text(DEEP)}, "sampling_parameters is JSON that is nested too deeply"),
        ({"sampling_parameters": text(b"[1]")}, "sampling_parameters must be a JSON object"),
        ({"sampling_parameters": text(b'{"self": 1}')}, "'self' is not a parameter"),
        ({"sampling_parameters": text(b'{"deadline_ms": 1' + b"0" * 400 + b"}")}, "deadline_ms = 1000"),
        ({"sampling_parameters": text(b'{"temperature": NaN}')}, "temperature = nan"),
        ({"stop": text(b"\xff")}, "stop is not UTF-8"),
    ],
)
def test_options_that_mean_nothing_are_named(tensors, said):
    with pytest.raises(InvalidArgumentError) as caught:
        parse(**tensors)
    assert said in str(caught.value)


def test_an_unknown_parameter_is_not_repeated_at_any_length():
    with pytest.raises(InvalidArgumentError) as caught:
        parse(sampling_parameters=text(b'{"' + b"x" * 100_000 + b'": 1}'))
    assert len(str(caught.value)) < 1000


def test_messages_nested_too_deeply_are_refused():
    with pytest.raises(InvalidArgumentError, match="messages is JSON that is nested too deeply"):
        prompt_source({"messages": text(DEEP)})


def test_a_request_without_ids_is_refused():
    with pytest.raises(InvalidArgumentError, match="no input_ids"):
        prompt_from_tensors({}, 896)
