"""Answers through the real server: the same as in process, in order, streamed or whole, over every road."""

import base64
import json
import threading
import time

import pytest
from wicore_client import DeadlineExceeded

from scripts.serving.installation import ROOT
from tests.integration.wire import BareStream, client, comes_to, generate, metric, post, wait_idle
from wicore_backend import Engine, EngineConfig, SamplingParams
from wicore_backend.engine.request import TokensEvent

PICTURE = ROOT / "client" / "wicore_client" / "assets" / "shapes.png"
GREEDY = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine():
    with Engine(EngineConfig(model=ROOT / "models" / "wicore-demo", device="cpu", dtype="float32")) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(engine):
    """The answer to one question about the picture, from the engine in this process."""
    images = [PICTURE.read_bytes()]
    return engine.generate("What is in this picture?", SamplingParams(**GREEDY), images=images)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_client_streams_what_the_engine_says(server, expected, protocol):
    url = server.urls.grpc if protocol == "grpc" else server.urls.http
    from wicore_client import Client

    with Client(url, protocol) as c:
        chunks = list(c.stream("What is in this picture?", images=[PICTURE], **GREEDY))
        whole = c.generate("What is in this picture?", images=[PICTURE], **GREEDY)
    assert [t for chunk in chunks for t in chunk.token_ids] == expected.token_ids
    assert "".join(chunk.text for chunk in chunks) == expected.text == whole.text
    assert len(chunks) > 1
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == whole.finish_reason == "length"
    assert list(whole.token_ids) == expected.token_ids
    assert whole.usage.prompt_tokens == expected.usage.prompt_tokens
    assert whole.usage.completion_tokens == 24


def test_generate_takes_plain_json_fields_and_answers_once(server, expected):
    picture = base64.b64encode(PICTURE.read_bytes()).decode()
    status, text = generate(server, text_input="What is in this picture?", images=[picture], **GREEDY)
    answer = json.loads(text)
    assert status == 200
    assert answer["text_output"] == expected.text
    assert answer["token_ids"] == expected.token_ids
    assert answer["finish_reason"] == "length"
    assert json.loads(answer["usage"])["completion_tokens"] == 24


def test_generate_stream_sends_events_in_order(server, engine):
    expected = engine.generate("hello", SamplingParams(**GREEDY))
    status, text = post(server, "/v2/models/wicore/generate_stream", {"text_input": "hello", "stream": True, **GREEDY})
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]
    assert status == 200
    assert "".join(event["text_output"] for event in events) == expected.text
    assert [event.get("finish_reason", "") for event in events][-1] == "length"
    assert all("finish_reason" not in event for event in events[:-1])


def test_messages_raw_text_stop_and_seed_mean_the_same_as_in_process(server, engine):
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Hello! How can I help?"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And this?"}]},
    ]
    sampled = {"temperature": 1.0, "seed": 7, "top_k": 50, "top_p": 0.9, "max_tokens": 12}
    with client(server) as c:
        for prompt, images, options in [
            (messages, [PICTURE.read_bytes()], GREEDY),
            ("hello", [], sampled),
            ("hello", [], {**sampled, "repetition_penalty": 1.3, "presence_penalty": 0.5, "stop": ["a", "e"]}),
        ]:
            ours = engine.generate(prompt, SamplingParams(**options), images=images)
            theirs = c.generate(prompt, images=images, **options)
            assert (list(theirs.token_ids), theirs.text) == (ours.token_ids, ours.text)
        raw = c.generate("<bos>one two", raw=True, **GREEDY)
    assert list(raw.token_ids) == engine.generate("<bos>one two", SamplingParams(**GREEDY), raw=True).token_ids


def test_logprobs_come_with_their_tokens(server, engine):
    ours = engine.generate("hello", SamplingParams(**GREEDY, logprobs=3, prompt_logprobs=1))
    with client(server) as c:
        theirs = c.generate("hello", logprobs=3, prompt_logprobs=1, **GREEDY)
    assert [t.token_id for t in theirs.logprobs] == ours.token_ids
    assert [t.logprob for t in theirs.logprobs] == pytest.approx([t.logprob for t in ours.logprobs], abs=1e-4)
    assert all(len(t.top) == 3 for t in theirs.logprobs)
    assert theirs.prompt_logprobs[0] is None
    assert len(theirs.prompt_logprobs) == ours.usage.prompt_tokens


def test_the_model_itself_streams_token_ids(server, engine):
    ids = [2, 300, 301, 302]
    expected = engine.generate(ids, SamplingParams(**GREEDY))
    stream = BareStream(server, ids, stream=True, **GREEDY)
    end = time.monotonic() + 20
    while not stream.ended:
        assert time.monotonic() < end
        time.sleep(0.01)
    stream.close()
    assert [int(t) for r in stream.results for t in r.as_numpy("token_ids")] == expected.token_ids


def test_64_streams_at_once_get_their_own_answers(server, engine):
    prompts = [f"Say {index} and {index * index}." for index in range(64)]
    expected = engine.generate(prompts, SamplingParams(**GREEDY))
    answers: list[list[int]] = [[] for _ in prompts]
    responses = [0] * len(prompts)

    def run(index: int) -> None:
        for chunk in c.stream(prompts[index], **GREEDY):
            answers[index] += chunk.token_ids
            responses[index] += 1

    with client(server) as c:
        threads = [threading.Thread(target=run, args=(index,)) for index in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert answers == [result.token_ids for result in expected]
    assert sum(responses) < 64 * 24, "with this many streams, tokens share responses"
    wait_idle(server, 5)


def test_a_deadline_keeps_what_was_produced(server):
    with client(server) as c, pytest.raises(DeadlineExceeded) as caught:
        c.generate("hello", max_tokens=15_000, temperature=0.0, ignore_eos=True, deadline_ms=2000)
    assert len(caught.value.partial_token_ids) > 5
    with client(server) as c, pytest.raises(DeadlineExceeded):
        c.generate("hello", max_tokens=3000, temperature=0.0, ignore_eos=True, deadline_ms=1)
    wait_idle(server, 5)


def test_metrics_count_what_was_served(server):
    wait_idle(server, 5)
    before = {
        name: metric(server, name, **labels)
        for name, labels in {
            "wicore_requests_total": {"outcome": "length"},
            "wicore_generated_tokens_total": {},
            "wicore_ttft_seconds_count": {},
            "wicore_tpot_seconds_count": {},
            "wicore_queue_seconds_count": {},
        }.items()
    }
    with client(server) as c:
        for _ in range(3):
            c.generate("hello", **GREEDY)
    ended = before["wicore_requests_total"] + 3
    assert comes_to(ended, lambda: metric(server, "wicore_requests_total", outcome="length"))
    assert metric(server, "wicore_generated_tokens_total") - before["wicore_generated_tokens_total"] == 72
    for name in ("wicore_ttft_seconds_count", "wicore_tpot_seconds_count", "wicore_queue_seconds_count"):
        assert comes_to(before[name] + 3, lambda name=name: metric(server, name))


def test_class_tenant_and_deadlines_are_a_requests_own(server):
    labels = {"class": "batch"}
    before = metric(server, "wicore_queue_seconds_count", **labels)
    options = {**GREEDY, "priority": "batch", "tenant": "a", "queue_deadline_ms": 60_000, "deadline_ms": 60_000}
    status, text = generate(server, text_input="hello", **options)
    assert (status, json.loads(text)["finish_reason"]) == (200, "length")
    assert comes_to(before + 1, lambda: metric(server, "wicore_queue_seconds_count", **labels))
    for name in ("queue_deadline_ms", "first_token_deadline_ms"):
        # Pictures take the preprocessor more than a millisecond, and deadlines count from the arrival there.
        picture = base64.b64encode(PICTURE.read_bytes()).decode()
        status, text = generate(server, text_input="hello", images=[picture], **GREEDY, **{name: 1})
        assert status == 400
        assert "[deadline_exceeded]" in json.loads(text)["error"]
    wait_idle(server, 5)


def test_a_prompt_asked_twice_is_computed_once(server):
    body = {"text_input": "Tell me of the red circle, the blue square and the green triangle. " * 3, **GREEDY}
    answers = [json.loads(generate(server, **body)[1]) for _ in range(2)]
    usages = [json.loads(answer["usage"]) for answer in answers]
    assert answers[0]["token_ids"] == answers[1]["token_ids"]
    assert usages[1]["cached_tokens"] >= 16
    assert comes_to(True, lambda: metric(server, "wicore_prefix_hit_tokens_total") >= usages[1]["cached_tokens"])
    assert metric(server, "wicore_engine_healthy") == 1


def test_several_answers_are_those_of_the_engine_streamed_or_whole(server, engine):
    options = {"temperature": 1.0, "seed": 11, "max_tokens": 12, "n": 3}
    expected: list[list[int]] = [[], [], []]
    for event in engine.stream("hello", SamplingParams(**options)):
        if isinstance(event, TokensEvent):
            expected[event.index] += event.token_ids
    whole = json.loads(json.loads(generate(server, text_input="hello", **options)[1])["answers"])
    assert [answer["token_ids"] for answer in whole] == expected
    body = {"text_input": "hello", "stream": True, **options}
    _, text = post(server, "/v2/models/wicore/generate_stream", body)
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]
    streamed: list[list[int]] = [[] for _ in expected]
    for event in events[:-1]:
        if "index" in event:
            ids = event["token_ids"]
            streamed[event["index"]] += ids if isinstance(ids, list) else [ids]
    assert streamed == expected
    assert [answer["finish_reason"] for answer in json.loads(events[-1]["answers"])] == [
        answer["finish_reason"] for answer in whole
    ]
