"""What a client's tensors and parameters mean, and that each one that means nothing is an error that names it."""

import numpy as np
import pytest

from wicore_backend.engine.request import Deadlines, Retention
from wicore_backend.errors import InvalidArgumentError
from wicore_backend.triton.wire import RequestOptions, arrival_of, prompt_from_tensors, prompt_source

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
    ("value", "priority"), [('"realtime"', -10), ('"interactive"', 0), ('"batch"', 10), ("-3", -3), ("100", 100)]
)
def test_a_priority_is_a_number_or_a_name(value, priority):
    assert parse(f'{{"priority": {value}}}').serving.priority == priority
    assert parse().serving.priority == 0


def test_deadlines_are_milliseconds_outside_and_seconds_inside():
    assert parse().serving.deadlines == Deadlines()
    given = parse('{"queue_deadline_ms": 50, "first_token_deadline_ms": 250, "deadline_ms": 1000, "tenant": "a:b@c"}')
    assert given.serving.deadlines == Deadlines(queue_s=0.05, first_token_s=0.25, total_s=1.0)
    assert given.serving.tenant == "a:b@c"


def test_wishes_about_the_cache():
    assert parse().serving.retention == Retention()
    assert parse('{"retain_seconds": 60.5, "session_end": true}').serving.retention == Retention(60.5, True)


def test_an_arrival_is_the_preprocessors_and_never_made_up_beyond_a_minute():
    def arrival(value: float) -> float:
        return arrival_of({"arrival": np.array([value])}, 1000.0)

    assert arrival_of({}, 1000.0) == 1000.0
    assert [arrival(value) for value in (999.5, 2000.0, -1e300)] == [999.5, 1000.0, 940.0]
    for bad in (np.array([np.nan]), np.array([np.inf]), np.array([1.0, 2.0]), np.array([])):
        with pytest.raises(InvalidArgumentError, match="arrival"):
            arrival_of({"arrival": bad}, 1000.0)


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
        ({"sampling_parameters": text(b'{"priority": "urgent"}')}, "priority = 'urgent'"),
        ({"sampling_parameters": text(b'{"priority": "urgent"}')}, "one of realtime, interactive, batch"),
        ({"sampling_parameters": text(b'{"priority": 101}')}, "priority = 101"),
        ({"sampling_parameters": text(b'{"priority": 1.0}')}, "priority = 1.0"),
        ({"sampling_parameters": text(b'{"priority": true}')}, "priority = True"),
        ({"sampling_parameters": text(b'{"tenant": 5}')}, "tenant = 5"),
        ({"sampling_parameters": text(b'{"tenant": "a b"}')}, "tenant = 'a b'"),
        ({"sampling_parameters": text(b'{"tenant": "a\\n"}')}, r"tenant = 'a\n'"),
        ({"sampling_parameters": text(b'{"tenant": "' + b"x" * 65 + b'"}')}, "tenant = 'xxx"),
        ({"sampling_parameters": text(b'{"queue_deadline_ms": 0}')}, "queue_deadline_ms = 0"),
        ({"sampling_parameters": text(b'{"retain_seconds": -1}')}, "retain_seconds = -1"),
        ({"sampling_parameters": text(b'{"retain_seconds": NaN}')}, "retain_seconds = nan"),
        ({"sampling_parameters": text(b'{"session_end": 1}')}, "session_end = 1"),
        ({"sampling_parameters": text(b'{"first_token_deadline_ms": "1"}')}, "first_token_deadline_ms = '1'"),
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


def test_places_of_pictures_without_pictures_are_refused():
    ids = np.arange(20, dtype=np.int32)
    given = {"image_spans": np.array([[0, 16]], np.int32), "image_digests": np.zeros((1, 16), np.uint8)}
    for name, tensor in given.items():
        with pytest.raises(InvalidArgumentError, match=rf"{name} is \[1, .*no pixels"):
            prompt_from_tensors({"input_ids": ids, name: tensor}, 896)
    none = {name: tensor[:0] for name, tensor in given.items()}
    assert prompt_from_tensors({"input_ids": ids, **none}, 896).images == ()
