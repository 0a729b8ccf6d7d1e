"""The client's parts without a server: addresses, requests, retries, events, and what hostile responses do."""

from __future__ import annotations

import io
import json
import signal
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tritonclient.grpc import service_pb2 as pb
from wicore_client import (
    Client,
    ConnectionFailed,
    DeadlineExceeded,
    InvalidArgument,
    RetryPolicy,
    ServerError,
    Unavailable,
    grpc_wire,
    http_wire,
)
from wicore_client.endpoint import Endpoint
from wicore_client.errors import error_from_code
from wicore_client.interrupts import interrupts_held
from wicore_client.requests import GenerateRequest, load_image
from wicore_client.results import Answer, Health, ModelHealth, Response
from wicore_client.timer import checked_timeout

USAGE = json.dumps({"prompt_tokens": 1, "completion_tokens": 1})


@pytest.mark.parametrize(
    ("url", "protocol", "seen"),
    [
        ("localhost", None, ("grpc", "localhost", 8001)),
        ("localhost", "http", ("http", "localhost", 8000)),
        ("http://gpu7", None, ("http", "gpu7", 8000)),
        ("grpc://gpu7:1234/", "grpc", ("grpc", "gpu7", 1234)),
        ("[::1]:9", None, ("grpc", "::1", 9)),
    ],
)
def test_an_address_has_a_protocol_and_a_port(url, protocol, seen):
    endpoint = Endpoint.parse(url, protocol)
    assert (endpoint.protocol, endpoint.host, endpoint.port) == seen
    assert Endpoint.parse(f"{endpoint.protocol}://{endpoint.address}", None) == endpoint


@pytest.mark.parametrize(
    ("url", "protocol"),
    [
        ("", None),
        ("localhost:port", None),
        ("localhost:99999", None),
        ("https://localhost", None),
        ("http://localhost/v2", None),
        ("http://user@localhost", None),
        ("http://localhost", "grpc"),
        ("localhost", "rest"),
    ],
)
def test_a_bad_address_is_named(url, protocol):
    with pytest.raises(InvalidArgument, match=r"http"):
        Client(url, protocol)


def test_a_misspelt_option_is_a_type_error_that_lists_the_options():
    with pytest.raises(TypeError, match=r"'max_token' is not an option.*max_tokens"):
        Client().generate("Hi", max_token=1)


@pytest.mark.parametrize("options", [{"temperature": float("nan")}, {"stop": b"x"}])
def test_what_json_cannot_hold_is_refused(options):
    (name,) = options
    with pytest.raises(InvalidArgument, match=f"{name} cannot be written as JSON"):
        GenerateRequest.build("Hi", [], options, stream=True, request_id=None)


@pytest.mark.parametrize(
    ("named", "prompt", "options", "request_id"),
    [
        ("prompt", "caf\udce9", {}, None),
        ("messages", [{"role": "user", "content": "caf\udce9"}], {}, None),
        ("stop", "Hi", {"stop": ["\ud800"]}, None),
        ("request_id", "Hi", {}, "\udcff"),
    ],
)
def test_a_text_that_is_not_unicode_is_refused_by_its_name(named, prompt, options, request_id):
    with pytest.raises(InvalidArgument, match=f"{named} is not Unicode.*send UTF-8"):
        GenerateRequest.build(prompt, [], options, stream=True, request_id=request_id)
    with pytest.raises(InvalidArgument, match="model is not Unicode"):
        Client(model="\udcff")


@pytest.mark.parametrize("prompt", [5, None, b"Hi", ["Hi"], [[]], {"role": "user", "content": "Hi"}])
def test_a_prompt_is_a_text_or_messages(prompt):
    with pytest.raises(InvalidArgument, match=r"prompt is .*give a text, or a list of messages"):
        GenerateRequest.build(prompt, [], {}, stream=True, request_id=None)


def test_a_timeout_is_a_number_and_an_endless_one_is_none():
    assert checked_timeout(1.5) == 1.5
    assert checked_timeout(float("inf")) is None
    assert checked_timeout(1e12) is None  # The server takes no deadline of that length.
    with pytest.raises(InvalidArgument, match="timeout is nan"):
        Client().generate("Hi", timeout=float("nan"))


def test_a_picture_that_cannot_be_read_is_named(tmp_path):
    for source, words in ((tmp_path / "none.png", "none.png"), (tmp_path, "not a file"), (7, "int"), ("a\0b", "null")):
        with pytest.raises(InvalidArgument, match=words):
            load_image(source)
    with pytest.raises(InvalidArgument, match="give a list"):
        Client().generate("Hi", images="one.png")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "F", "I;16"])
def test_a_pil_image_of_any_mode_travels(mode):
    assert Image.open(io.BytesIO(load_image(Image.new(mode, (4, 3))))).size == (4, 3)


def test_a_pil_image_keeps_its_orientation():
    picture = Image.new("RGB", (4, 3))
    picture.getexif()[0x0112] = 6
    assert Image.open(io.BytesIO(load_image(picture))).getexif()[0x0112] == 6


def test_retries_wait_longer_each_time_and_end():
    policy = RetryPolicy(attempts=5, initial_delay=1.0, max_delay=3.0)
    refused = ConnectionFailed("", sent=False)
    for failures, longest in ((1, 1.0), (2, 2.0), (3, 3.0), (4, 3.0)):
        delay = policy.delay(refused, failures)
        assert delay is not None
        assert longest / 2 <= delay <= longest
    assert policy.delay(refused, 5) is None
    assert policy.delay(Unavailable("", retry_after=2.5), 1) == 2.5
    assert policy.delay(Unavailable("", retry_after=60.0), 1) is None
    for other in (ConnectionFailed("", sent=True), ServerError(""), InvalidArgument(""), DeadlineExceeded("")):
        assert policy.delay(other, 1) is None


@pytest.mark.parametrize("settings", [{"attempts": 0}, {"initial_delay": -1}, {"initial_delay": 9, "max_delay": 1}])
def test_a_retry_policy_refuses_nonsense(settings):
    with pytest.raises(InvalidArgument):
        RetryPolicy(**settings)


def test_a_servers_message_is_read_for_code_and_time():
    error = error_from_code("internal", "in ensemble 'wicore', [unavailable] full,\n retry after 1.5 s")
    assert isinstance(error, Unavailable)
    assert (str(error), error.retry_after) == ("full, retry after 1.5 s", 1.5)
    assert isinstance(error_from_code("new_code", "[deadline_exceeded] late"), DeadlineExceeded)
    assert type(error_from_code("new_code", "x")) is ServerError
    unknown = error_from_code("internal", "Request for unknown model: 'x' is not found")
    assert isinstance(unknown, InvalidArgument)
    assert "wicore health" in str(unknown)
    assert "no message" in str(error_from_code("unavailable", ""))


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))), st.lists(st.integers(1, 40), min_size=1))
def test_events_survive_any_cut_of_the_stream(texts, cuts):
    stream = b"".join(b"data: " + json.dumps({"text_output": text}).encode() + b"\n\n" for text in texts)
    parser = http_wire.EventParser()
    events: list[bytes] = []
    while stream:
        size = cuts[len(events) % len(cuts)]
        events += parser.feed(stream[:size])
        stream = stream[size:]
    assert [http_wire.decode(event).text_output for event in events] == texts


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"7", b"null", b"{", b'{"token_ids": "x"}', b'{"token_ids": [1.5]}', b'{"text_output": 7}', b"\xff"],
)
def test_a_strange_http_response_is_a_server_error(body):
    with pytest.raises(ServerError, match="cannot read"):
        Answer().accept(http_wire.decode(body))


@pytest.mark.parametrize(
    ("datatype", "raw"),
    [("BYTES", b"\x05\0\0\0abc"), ("BYTES", b"\xff"), ("BYTES", b"\x01\0\0\0\xff"), ("INT32", b"abc")],
)
def test_a_strange_grpc_response_is_a_server_error(datatype, raw):
    inferred = pb.ModelInferResponse(raw_output_contents=[raw])
    inferred.outputs.add(name="token_ids" if datatype == "INT32" else "text_output", datatype=datatype, shape=[1])
    with pytest.raises(ServerError, match="cannot read"):
        grpc_wire.decode(pb.ModelStreamInferResponse(infer_response=inferred))
    del inferred.raw_output_contents[:]
    with pytest.raises(ServerError, match="cannot read"):
        grpc_wire.decode(pb.ModelStreamInferResponse(infer_response=inferred))


@pytest.mark.parametrize(
    "response",
    [
        Response("a", finish_reason="stop"),
        Response("a", finish_reason="stop", usage="{}"),
        Response("a", finish_reason="stop", usage="[]"),
        Response("a", logprobs="{"),
        Response("a", logprobs='{"tokens": [7]}'),
        Response("a", logprobs='{"tokens": [{}]}'),
    ],
)
def test_unreadable_fields_are_a_server_error_with_the_partial_answer(response):
    answer = Answer()
    answer.accept(Response("so far", (1,)))
    with pytest.raises(ServerError, match="cannot read") as caught:
        answer.accept(response)
    assert caught.value.partial_text == "so far"
    assert not answer.whole


def test_an_unknown_finish_reason_is_an_error_and_never_an_answer():
    answer = Answer()
    with pytest.raises(ServerError):
        answer.accept(Response("a", (1,), finish_reason="exploded", usage=USAGE))
    assert not answer.whole


def test_a_held_ctrl_c_cancels_at_once_and_raises_at_the_end():
    cancelled = threading.Event()
    seen = []

    def work():
        with interrupts_held(cancelled.set):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            seen.append(cancelled.wait(10))

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            work()
        signal.signal(signal.SIGINT, lambda *_: seen.append("the program's own"))
        work()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [True, "the program's own", "the program's own", True]


def test_an_engine_in_trouble_is_a_server_that_is_not_ready():
    well = ModelHealth("wicore", "1", "READY", "")
    for marker, ready in (("READY", True), ("UNAVAILABLE", False)):
        health = Health.of(True, "triton 2.51.0", (well, ModelHealth("wicore_health_1_1", "", marker, "")), "wicore")
        assert health.ready is ready
