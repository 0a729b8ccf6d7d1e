"""The gateway in front of a real server with the demo model, through the official client, unmodified."""

import asyncio
import base64
import json
import os
import random
import signal
import threading
import time

import httpx
import openai
import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field
from tokenizers import Tokenizer
from websockets.sync.client import connect

from scripts.serving import ServerOptions, TritonServer
from scripts.serving.gateway import Gateway, GatewayOptions
from scripts.serving.installation import ROOT
from tests.integration.conftest import FREE_PORTS
from tests.integration.wire import wait_idle

PICTURE = ROOT / "client" / "wicore_client" / "assets" / "shapes.png"
SUM = [{"role": "user", "content": "What is 12 + 7?"}]
COUNT = [{"role": "user", "content": "Count from 1 to 400."}]


@pytest.fixture(scope="module")
def gateway(server, installation):
    options = GatewayOptions(port=0, drain_seconds=5)
    with Gateway(options, installation, server.urls, log=server.log.with_suffix(".gateway.log")) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def client(gateway):
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client, messages=SUM, **fields):
    return client.chat.completions.create(**{"model": "wicore", "messages": messages, "temperature": 0, **fields})


def test_a_chat_is_answered_whole_and_as_a_stream(client):
    whole = chat(client)
    assert whole.choices[0].message.content == "19"
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens > 0
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "19"
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert whole.system_fingerprint == chunks[0].system_fingerprint
    assert whole.system_fingerprint.startswith("fp_")


def test_a_prompt_that_came_before_is_counted_as_cached(client):
    long = [{"role": "user", "content": "Repeat: " + "one two three four " * 30}]
    chat(client, long, max_tokens=4)
    assert chat(client, long, max_tokens=4).usage.prompt_tokens_details.cached_tokens > 50


def test_a_picture_is_described(client):
    url = f"data:image/png;base64,{base64.b64encode(PICTURE.read_bytes()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Describe the picture."}]
    text = chat(client, [{"role": "user", "content": parts}]).choices[0].message.content
    assert "circle" in text
    answer = httpx.post(
        f"{str(client.base_url).removesuffix('/v1/')}/v1/inference",
        json={"prompt": "Describe the picture.", "images": [url.partition(",")[2]], "temperature": 0},
        timeout=60,
    ).json()
    assert "circle" in answer["content"]
    assert answer["token_count"] > 0
    assert answer["gpu_utilization"] is None


def test_the_same_seed_gives_the_same_answers_and_several_of_them(client):
    fields = {"temperature": 2, "seed": 11, "n": 3, "max_tokens": 40, "extra_body": {"ignore_eos": True}}
    talk = [{"role": "user", "content": "Tell me something."}]
    first = [choice.message.content for choice in chat(client, talk, **fields).choices]
    again = [choice.message.content for choice in chat(client, talk, **fields).choices]
    assert first == again
    assert len(set(first)) > 1
    texts = ["", "", ""]
    for chunk in chat(client, talk, **fields, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == first


def test_log_probabilities_are_told_with_their_bytes(client):
    (choice,) = chat(client, logprobs=True, top_logprobs=3, max_tokens=2).choices
    told = choice.logprobs.content
    assert [entry.token for entry in told] == ["1", "9"]
    assert told[0].bytes == [ord("1")]
    assert len(told[0].top_logprobs) == 3
    assert told[0].top_logprobs[0].logprob == told[0].logprob


def test_stop_texts_lengths_biases_and_penalties_have_their_effect(client):
    assert chat(client, COUNT, max_tokens=5).choices[0].finish_reason == "length"
    assert chat(client, COUNT, max_completion_tokens=5).usage.completion_tokens == 5
    stopped = chat(client, COUNT, stop=["5"], max_tokens=60).choices[0]
    assert stopped.finish_reason == "stop"
    assert "5" not in stopped.message.content
    token_id = Tokenizer.from_file(str(ROOT / "models" / "wicore-demo" / "tokenizer.json")).token_to_id("1")
    assert chat(client, max_tokens=1).choices[0].message.content == "1"
    biased = chat(client, max_tokens=1, logit_bias={str(token_id): -100}).choices[0].message.content
    assert biased != "1"


def test_a_schema_is_kept_and_a_tool_is_called(client):
    schema = {
        "type": "object",
        "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["sum"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema, "strict": True}}
    answer = chat(client, response_format=form, max_tokens=60).choices[0].message.content
    assert 0 <= json.loads(answer)["sum"] <= 99
    tool = {"type": "function", "function": {"name": "add", "parameters": schema}}
    called = chat(client, tools=[tool], tool_choice="required", max_tokens=120).choices[0]
    assert called.finish_reason == "tool_calls"
    assert called.message.tool_calls[0].function.name == "add"
    assert "sum" in json.loads(called.message.tool_calls[0].function.arguments)


def test_texts_and_token_ids_are_completed(client):
    two = client.completions.create(model="wicore", prompt=["One two", "Three"], max_tokens=3, temperature=0)
    assert [choice.index for choice in two.choices] == [0, 1]
    echoed = client.completions.create(model="wicore", prompt="One two", max_tokens=2, echo=True, logprobs=1)
    assert echoed.choices[0].text.startswith("One two")
    assert "".join(echoed.choices[0].logprobs.tokens[:-2]) == "One two"
    ids = client.completions.create(model="wicore", prompt=[2, 105, 106], max_tokens=3)
    assert ids.usage.prompt_tokens == 3


def test_a_response_is_given_whole_and_as_a_stream(client):
    response = client.responses.create(model="wicore", input="What is 12 + 7?", temperature=0)
    assert response.output_text == "19"
    with client.responses.stream(model="wicore", input="What is 12 + 7?", temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text == "19"


def test_langchain_asks_streams_calls_tools_and_gets_objects(gateway):
    model = ChatOpenAI(base_url=f"{gateway.url}/v1", api_key="none", model="wicore", temperature=0, max_retries=0)
    answer = model.invoke("What is 12 + 7?")
    assert answer.content == "19"
    assert answer.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in model.stream("What is 12 + 7?")) == "19"

    class Sum(BaseModel):
        """A sum."""

        sum: int = Field(ge=0, le=99)

    called = model.bind_tools([Sum], tool_choice="required").invoke("What is 12 + 7?", max_tokens=200)
    assert called.tool_calls[0]["name"] == "Sum"
    found = model.with_structured_output(Sum, method="json_schema").invoke("What is 12 + 7?", max_tokens=60)
    assert 0 <= found.sum <= 99


def test_errors_are_the_official_clients_own(client):
    with pytest.raises(openai.NotFoundError):
        chat(client, model="gpt-9")
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, temperature=9)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="embeddings"):
        client.embeddings.create(model="wicore", input="x")
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError):
            chat(client, [{"role": "assistant", "content": "x"}], stream=stream)
    with pytest.raises(openai.APIStatusError) as caught:
        chat(client, COUNT, extra_body={"deadline_ms": 1})
    assert caught.value.status_code == 504


def test_a_late_word_of_the_systems_is_no_error(client):
    assert chat(client, [*SUM, {"role": "system", "content": "Be brief."}]).choices[0].message.content


def test_a_thousand_bad_requests_leave_the_server_well(gateway, client):
    body = {"model": "wicore", "messages": [{"role": "assistant", "content": "x"}], "stream": True}

    async def send() -> list[int]:
        limits = httpx.Limits(max_connections=8)
        async with httpx.AsyncClient(base_url=gateway.url, limits=limits, timeout=60) as http:
            many = (http.post("/v1/chat/completions", json=body) for _ in range(1000))
            return [answer.status_code for answer in await asyncio.gather(*many)]

    assert set(asyncio.run(send())) == {400}
    assert chat(client).choices[0].message.content == "19"


def test_the_status_shows_models_load_and_memories(gateway, client):
    chat(client)
    status = httpx.get(f"{gateway.url}/status").json()
    assert status["ready"]
    assert {model["name"] for model in status["models"]} >= {"wicore", "wicore_gemma3", "wicore_preprocess"}
    reason = "executor = 'auto' takes it on a CPU"
    assert status["executors"] == [{"model": "wicore_gemma3", "name": "torch", "reason": reason}]
    assert status["load"]["generated_tokens_total"] > 0
    assert status["load"]["kv_blocks"]["global"]["total"] > 0
    assert status["cache"]["tiers"][0]["tier"] == "device"
    stats = httpx.get(f"{gateway.url}/v1/stats").json()
    assert stats["requests"]["stop"] > 0
    assert stats["started"]["interactive"] > 0
    assert httpx.get(f"{gateway.url}/").headers["content-type"].startswith("text/html")


def test_clients_that_leave_leave_nothing_behind(gateway, server):
    random.seed(5)

    def leave() -> None:
        body = {"model": "wicore", "messages": COUNT, "max_tokens": 1500, "stream": random.random() < 0.7}
        timeout = httpx.Timeout(10, read=random.uniform(0.01, 0.6))
        try:
            with (
                httpx.Client(timeout=timeout) as http,
                http.stream("POST", f"{gateway.url}/v1/chat/completions", json=body) as answer,
            ):
                end = time.monotonic() + random.uniform(0, 0.6)
                for _ in answer.iter_raw():
                    if time.monotonic() > end:
                        return
        except httpx.TimeoutException:
            pass

    threads = [threading.Thread(target=leave) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_idle(server, timeout=10)


def test_a_cancel_on_a_socket_frees_its_blocks(gateway, server):
    with connect(f"{gateway.url.replace('http', 'ws')}/ws/chat") as socket:
        request = {"model": "wicore", "messages": COUNT, "max_tokens": 1500}
        for name in ("a", "b"):
            socket.send(json.dumps({"type": "generate", "id": name, "request": request}))
        while json.loads(socket.recv(timeout=10))["type"] != "delta":
            pass
        for name in ("a", "b"):
            socket.send(json.dumps({"type": "cancel", "id": name}))
        ended = set()
        while ended != {"a", "b"}:
            frame = json.loads(socket.recv(timeout=5))
            assert frame["type"] != "done"
            ended |= {frame["id"]} if frame["type"] == "cancelled" else set()
        wait_idle(server, timeout=10)


def test_a_gateway_that_dies_is_started_again_on_the_same_port(gateway, client):
    died = gateway.process_id
    os.kill(died, signal.SIGKILL)
    end = time.monotonic() + 20
    while gateway.process_id == died:
        assert time.monotonic() < end
        gateway.keep_running()
        time.sleep(0.1)
    assert chat(client).choices[0].message.content == "19"


@pytest.fixture
def own_server(installation):
    """A server to be killed, and one in its place."""
    settings = {"model": str(ROOT / "models" / "wicore-demo"), "device": "cpu"}
    return lambda **ports: TritonServer(
        ServerOptions(settings=settings, drain_seconds=0.5, **{**FREE_PORTS, **ports}), installation
    )


def test_a_server_that_dies_breaks_streams_with_an_error_and_is_found_again(own_server, installation):
    with own_server() as first:
        log = first.log.with_suffix(".gateway.log")
        with Gateway(GatewayOptions(port=0, drain_seconds=1), installation, first.urls, log=log) as gateway:
            client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)
            stream = chat(client, COUNT, stream=True, max_tokens=2000)
            next(iter(stream))
            os.kill(first.process_id, signal.SIGKILL)
            with pytest.raises(openai.APIError):
                for _ in stream:
                    pass
            with pytest.raises(openai.InternalServerError) as caught:
                chat(client)
            assert caught.value.status_code == 503
            assert caught.value.response.headers["retry-after"] == "1"
            refused = httpx.get(f"{gateway.url}/ready")
            assert (refused.status_code, refused.json()["ready"]) == (503, False)
            status = httpx.get(f"{gateway.url}/status").json()
            assert (status["ready"], status["models"]) == (False, [])
            first.stop()
            ports = first.same_ports()
            with own_server(http_port=ports.http_port, grpc_port=ports.grpc_port, metrics_port=ports.metrics_port):
                end = time.monotonic() + 10
                while httpx.get(f"{gateway.url}/ready").status_code != 200:
                    assert time.monotonic() < end, "the server was not found again"
                    time.sleep(0.05)
                assert chat(client).choices[0].message.content == "19"


def test_a_gateway_that_is_told_to_stop_lets_its_answers_end(server, installation):
    gateway = Gateway(
        GatewayOptions(port=0, drain_seconds=20), installation, server.urls, log=server.log.with_suffix(".gateway.log")
    )
    with gateway:
        client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)
        stream = iter(chat(client, COUNT, stream=True, max_tokens=100, extra_body={"ignore_eos": True}))
        next(stream)
        gateway.begin_to_stop()
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason == "length"
