"""OpenAI's endpoints in front of a scripted backend: what is asked of it, what is answered, what is refused by name."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from openai.types import completion_create_params
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.completion import Completion
from openai.types.responses import Response, response_create_params

from tests.gateway_kit import CHAT, ScriptedBackend, gateway
from wicore_backend.gateway.backend import Delta, Usage
from wicore_backend.gateway.call_format import call_text
from wicore_backend.gateway.errors import InternalError, InvalidRequestError, UnavailableError
from wicore_backend.gateway.openai.chat_schema import ChatRequest
from wicore_backend.gateway.openai.completions_schema import CompletionRequest
from wicore_backend.gateway.openai.fields import WicoreFields
from wicore_backend.gateway.openai.responses_schema import ResponsesRequest

PIXEL = "data:image/png;base64,iVBORw0KGgo="


class Said(ScriptedBackend):
    """Says laid-down deltas, or raises what stands among them."""

    def __init__(self, *items: Delta | Exception) -> None:
        super().__init__()
        self.items = items

    async def generate(self, request):
        self.requests.append(request)
        for item in self.items:
            if isinstance(item, Exception):
                raise item
            yield item


def said(*texts: str, reason: str = "stop", index: int = 0, usage: Usage | None = Usage(5, 2, 3)) -> list[Delta]:  # noqa: B008
    return [*(Delta(index, text, (7,)) for text in texts), Delta(index, "", (), None, reason, usage)]


def post(backend, path="/v1/chat/completions", body=None, **fields):
    with gateway(backend) as client:
        return client.post(path, json={**(CHAT if body is None else body), **fields})


def events(response) -> list[Any]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line.split("data: ")[-1]) for line in lines]


def options_of(**fields) -> dict[str, Any]:
    backend = ScriptedBackend()
    response = post(backend, **fields)
    assert response.status_code == 200, response.text
    return dict(backend.requests[0].options)


def error_of(response, status=400):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def test_a_whole_answer_is_what_the_official_client_reads():
    response = post(Said(*said("Hel", "lo")))
    answer = ChatCompletion.model_validate(response.json(), strict=True)
    assert answer.choices[0].message.content == "Hello"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 2, 7)
    assert answer.system_fingerprint == "fp"


def test_a_stream_begins_with_the_role_and_ends_with_the_reason_the_usage_and_done():
    response = post(Said(*said("Hel", "", 'l"o')), stream=True, stream_options={"include_usage": True})
    *chunks, done = events(response)
    assert done == "[DONE]"
    chunks = [ChatCompletionChunk.model_validate(chunk, strict=True) for chunk in chunks]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].delta.content for c in chunks[1:-2]] == ["Hel", 'l"o']
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 7
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_chunks_carry_the_tokens_so_far_where_that_is_asked_for():
    asked = {"continuous_usage_stats": True}
    *chunks, _ = events(post(Said(*said("a", "b")), stream=True, stream_options=asked))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk["usage"]] == [1, 2, 2, 2]


def test_answers_of_one_request_are_told_apart():
    deltas = [*said("a", "b", usage=None), *said("c", index=1, reason="length")]
    choices = post(Said(*deltas), n=2).json()["choices"]
    assert [(c["index"], c["message"]["content"], c["finish_reason"]) for c in choices] == [
        (0, "ab", "stop"),
        (1, "c", "length"),
    ]


def test_log_probabilities_have_the_tokens_text_and_bytes():
    def entry(piece, value, top=()):
        return {"token_id": 1, "token": piece, "logprob": value, "top": [entry(*t) | {"top": []} for t in top]}

    tokens = [entry("▁Wort", -0.5, [("▁Wort", -0.5), ("<0xE4>", -1.0)])]
    last = Delta(0, " Wort", (7,), {"tokens": tokens}, "stop", Usage(1, 1))
    for stream in (False, True):
        response = post(Said(last), logprobs=True, top_logprobs=2, stream=stream)
        choice = events(response)[1]["choices"][0] if stream else response.json()["choices"][0]
        (told,) = choice["logprobs"]["content"]
        assert told["token"] == " Wort"
        assert told["bytes"] == list(b" Wort")
        assert [(top["token"], top["bytes"]) for top in told["top_logprobs"]] == [
            (" Wort", list(b" Wort")),
            ("bytes:\\xe4", [0xE4]),
        ]


def test_the_token_that_ends_an_answer_is_no_part_of_its_log_probabilities():
    def entry(piece):
        return {"token_id": 1, "token": piece, "logprob": -0.5, "top": []}

    def script(*pieces):
        said = Delta(0, "Hi", (7, 8), {"tokens": [entry(piece) for piece in pieces]})
        return Said(said, Delta(0, "", (1,), {"tokens": [entry("<end_of_turn>")]}, "stop", Usage(1, 1)))

    whole = post(script("Hi"), logprobs=True).json()["choices"][0]["logprobs"]
    assert [told["token"] for told in whole["content"]] == ["Hi"]
    chunks = events(post(script("Hi"), logprobs=True, stream=True))
    choices = [chunk["choices"][0] for chunk in chunks if chunk != "[DONE]" and chunk["choices"]]
    told = [choice["logprobs"] for choice in choices if choice.get("logprobs")]
    assert [entry["token"] for part in told for entry in part["content"]] == ["Hi"]
    nothing = Said(Delta(0, "", (1,), {"tokens": [entry("<eos>")]}, "stop", Usage(1, 1)))
    assert post(nothing, logprobs=True).json()["choices"][0]["logprobs"]["content"] == []
    assert post(nothing).json()["choices"][0]["logprobs"] is None


def test_what_the_system_says_later_is_said_in_a_users_turn():
    backend = ScriptedBackend()
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "developer", "content": "It is night."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "And now?"}, {"type": "image_url", "image_url": {"url": PIXEL}}],
        },
        {"role": "system", "content": "Answer in German."},
    ]
    assert post(backend, messages=messages).status_code == 200
    (request,) = backend.requests
    assert [message["role"] for message in request.prompt] == ["system", "user", "assistant", "user"]
    assert request.prompt[0]["content"] == "Be brief."
    assert request.prompt[3]["content"] == [
        {"type": "text", "text": "It is night.\n\nAnd now?"},
        {"type": "image"},
        {"type": "text", "text": "Answer in German."},
    ]


HONOURED = {
    "temperature": (0.5, {"temperature": 0.5}),
    "top_p": (0.9, {"top_p": 0.9}),
    "n": (2, {"n": 2}),
    "seed": (-1, {"seed": 2**63 - 1}),
    "presence_penalty": (1.5, {"presence_penalty": 1.5}),
    "frequency_penalty": (-2, {"frequency_penalty": -2}),
    "logit_bias": ({"7": -100}, {"logit_bias": {"7": -100}}),
    "stop": ("end", {"stop": ["end"]}),
    "max_tokens": (5, {"max_tokens": 5}),
    "max_completion_tokens": (6, {"max_tokens": 6}),
    "logprobs": (True, {"logprobs": 0}),
    "prompt_cache_retention": ("24h", {"retain_seconds": 86_400.0}),
    "response_format": ({"type": "json_object"}, {"grammar": {"json_object": True}}),
    "top_k": (3, {"top_k": 3}),
    "min_p": (0.1, {"min_p": 0.1}),
    "repetition_penalty": (1.1, {"repetition_penalty": 1.1}),
    "stop_token_ids": ([1, 2], {"stop_token_ids": [1, 2]}),
    "ignore_eos": (True, {"ignore_eos": True}),
    "best_of": (3, {"best_of": 3}),
    "priority": ("batch", {"priority": 10}),
    "deadline_ms": (100, {"deadline_ms": 100}),
    "queue_deadline_ms": (100, {"queue_deadline_ms": 100}),
    "first_token_deadline_ms": (100, {"first_token_deadline_ms": 100}),
    "retain_seconds": (10, {"retain_seconds": 10}),
    "session_end": (True, {"session_end": True}),
}
BESIDE = {
    "model",
    "messages",
    "stream",
    "stream_options",
    "top_logprobs",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
}
BOOKKEEPING = {"user": "me", "safety_identifier": "me", "metadata": {"a": "b"}, "prompt_cache_key": "k"}
REFUSED = {
    "store": True,
    "service_tier": "flex",
    "modalities": ["text", "audio"],
    "audio": {"voice": "alloy", "format": "wav"},
    "prediction": {"type": "content", "content": "x"},
    "reasoning_effort": "high",
    "verbosity": "low",
    "web_search_options": {},
    "functions": [{"name": "f"}],
    "function_call": "auto",
    "moderation": {"model": "m"},
    "prompt_cache_options": {"mode": "implicit"},
}


@pytest.mark.parametrize("name", HONOURED)
def test_a_parameter_that_is_honoured_reaches_the_engine(name):
    value, wire = HONOURED[name]
    assert options_of(**{name: value}).items() >= wire.items()


@pytest.mark.parametrize("name", REFUSED)
def test_a_parameter_that_is_not_honoured_is_refused_by_name(name):
    error = error_of(post(ScriptedBackend(), **{name: REFUSED[name]}))
    assert error["param"] == name
    assert error["code"] == "unsupported_parameter"


def test_what_promises_nothing_about_the_answer_is_taken():
    assert options_of(**BOOKKEEPING, store=False, service_tier="auto", modalities=["text"]) == options_of()


def test_every_parameter_of_the_official_client_is_known_and_judged():
    judged = HONOURED.keys() | REFUSED.keys() | BOOKKEEPING.keys() | BESIDE
    assert judged == ChatRequest.model_fields.keys()
    assert chat_create_params.CompletionCreateParamsBase.__annotations__.keys() <= judged
    theirs = completion_create_params.CompletionCreateParamsBase.__annotations__.keys()
    assert theirs <= CompletionRequest.model_fields.keys()
    assert set(WicoreFields.model_fields) <= CompletionRequest.model_fields.keys()
    newest = {"access_programs", "background_options", "image", "prompt_cache_options", "moderation"}
    theirs = response_create_params.ResponseCreateParamsBase.__annotations__.keys() - newest
    assert theirs <= ResponsesRequest.model_fields.keys()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"foo": 1}, "foo"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 2}, None),
        ({"max_tokens": 5, "max_completion_tokens": 5}, None),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "x", "name": "Bob"}]}, "messages[0].name"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"metadata": {"a": 1}}, "metadata.a"),
    ],
)
def test_what_is_wrong_is_named(fields, param):
    backend = ScriptedBackend()
    error = error_of(post(backend, **fields))
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert not backend.requests


def test_an_unknown_model_is_not_found():
    assert error_of(post(ScriptedBackend(), model="gpt-9"), 404)["code"] == "model_not_found"


def test_an_alias_is_the_model_under_another_name():
    with gateway(ScriptedBackend(), aliases=("gpt-4o",)) as client:
        assert client.post("/v1/chat/completions", json={**CHAT, "model": "gpt-4o"}).json()["model"] == "gpt-4o"
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["wicore", "gpt-4o"]
        assert client.get("/v1/models/gpt-4o").json()["id"] == "gpt-4o"
        assert client.get("/v1/models/other").status_code == 404


def test_pictures_leave_their_place_in_the_messages_and_system_messages_become_one():
    backend = ScriptedBackend()
    content = [{"type": "text", "text": "See"}, {"type": "image_url", "image_url": {"url": PIXEL, "detail": "auto"}}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "system", "content": [{"type": "text", "text": "Be kind."}]},
        {"role": "user", "content": content},
        {"role": "assistant", "content": "Yes.", "refusal": None, "annotations": [], "audio": None},
        {"role": "user", "content": "And?"},
    ]
    assert post(backend, messages=messages).status_code == 200
    (request,) = backend.requests
    assert request.images == (b"\x89PNG\r\n\x1a\n",)
    assert request.prompt[0] == {"role": "system", "content": "Be brief.\nBe kind."}
    assert request.prompt[1]["content"] == [{"type": "text", "text": "See"}, {"type": "image"}]
    assert [message["role"] for message in request.prompt] == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize("url", ["data:image/png;base64,%%%", "data:image/png,abc", "ftp://x/y", "x", ""])
def test_a_picture_that_cannot_be_had_is_named(url):
    content = [{"type": "image_url", "image_url": {"url": url}}]
    error = error_of(post(ScriptedBackend(), messages=[{"role": "user", "content": content}]))
    assert error["param"] == "messages[0].content[0].image_url.url"


def test_a_call_of_a_tool_is_told_whole_and_in_parts():
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    fields = {"tools": [tool], "tool_choice": "required"}
    assert "grammar" in options_of(**fields)
    call = call_text("add", '{"a": 1}')
    whole = post(Said(*said(*call)), **fields).json()["choices"][0]
    assert whole["finish_reason"] == "tool_calls", whole
    (called,) = whole["message"]["tool_calls"]
    assert called["function"]["name"] == "add"
    assert json.loads(called["function"]["arguments"]) == {"a": 1}
    assert whole["message"]["content"] is None
    *chunks, _ = events(post(Said(*said(*call)), **fields, stream=True))
    parts = [c["choices"][0]["delta"]["tool_calls"][0] for c in chunks if "tool_calls" in c["choices"][0]["delta"]]
    assert parts[0]["id"]
    assert json.loads("".join(part["function"]["arguments"] for part in parts)) == {"a": 1}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [
        (InvalidRequestError("no"), 400, None),
        (UnavailableError("later", retry_after_s=2.3), 503, "3"),
        (InternalError("oops"), 500, None),
        (RuntimeError("a secret"), 500, None),
    ],
)
def test_an_error_before_the_first_token_has_its_status_streamed_or_not(error, status, retry):
    for stream in (False, True):
        response = post(Said(error), stream=stream)
        assert "secret" not in error_of(response, status)["message"]
        assert response.headers.get("retry-after") == retry


def test_a_stream_that_breaks_ends_with_an_error_event_and_without_done():
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", {"model": "wicore", "prompt": "x"})):
        broken = Said(Delta(0, "a", (1,)), UnavailableError("gone", code="backend_unavailable"))
        told = events(post(broken, path, body, stream=True))
        assert told[-1]["error"]["code"] == "backend_unavailable"
        assert "[DONE]" not in told


def test_a_mistake_in_the_midst_of_a_stream_is_told_without_its_details():
    torn = Delta(0, "", (1,), {"no": "tokens"})
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", {"model": "wicore", "prompt": "x"})):
        asked = {"stream": True, "logprobs": True if path.startswith("/v1/chat") else 0}
        told = events(post(Said(Delta(0, "a", (1,)), torn), path, body, **asked))
        assert told[-1]["error"]["code"] == "internal"


def test_text_completions_take_texts_and_token_ids_and_number_their_answers():
    backend = ScriptedBackend(tokens=1)
    body = {"model": "wicore", "prompt": ["a", "b"], "n": 2, "max_tokens": 4, "logit_bias": {"5": 1}}
    answer = Completion.model_validate(post(backend, "/v1/completions", body).json(), strict=True)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == 20
    assert [(r.prompt, r.raw, r.model) for r in backend.requests] == [("a", True, "wicore"), ("b", True, "wicore")]
    backend = ScriptedBackend()
    assert post(backend, "/v1/completions", {"model": "wicore", "prompt": [[5, 6], [7]]}).status_code == 200
    assert [(r.prompt, r.raw, r.model) for r in backend.requests] == [
        ([5, 6], False, "wicore_gemma3"),
        ([7], False, "wicore_gemma3"),
    ]


def test_text_completions_echo_the_prompt_with_its_log_probabilities():
    def entry(piece):
        return {"token_id": 1, "token": piece, "logprob": -1.0, "top": []}

    logprobs = {"tokens": [entry("▁c")], "prompt": [None, entry("a"), entry("▁b")]}
    delta = Delta(0, " c", (9,), logprobs, "length", Usage(3, 1))
    body = {"model": "wicore", "prompt": "a b", "echo": True, "logprobs": 0, "max_tokens": 1}
    choice = post(Said(delta), "/v1/completions", body).json()["choices"][0]
    assert choice["text"] == "a b c"
    assert choice["logprobs"]["tokens"] == ["a", " b", " c"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 3]
    nothing = post(Said(delta), "/v1/completions", {**body, "max_tokens": 0}).json()["choices"][0]
    assert nothing["text"] == "a b"
    assert nothing["logprobs"]["tokens"] == ["a", " b"]


def test_text_completions_stream_several_prompts_at_once():
    body = {"model": "wicore", "prompt": ["a", "b"], "stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage, done = events(post(ScriptedBackend(tokens=2), "/v1/completions", body))
    assert done == "[DONE]"
    assert usage["usage"]["prompt_tokens"] == 20
    for index in (0, 1):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == "word word "
        assert [choice["finish_reason"] for choice in mine] == [None, None, "stop"]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": []},
        {"prompt": ""},
        {"prompt": [1.5]},
        {"prompt": ["a", [1]]},
        {"prompt": [1], "echo": True},
        {"prompt": "a", "max_tokens": 0},
        {"prompt": "a", "suffix": "b"},
        {"prompt": "a", "best_of": 1, "n": 2},
        {"prompt": ["a"] * 65},
        {"prompt": ["a"] * 64, "n": 64},
    ],
)
def test_text_completions_refuse_what_they_cannot_do(fields):
    error_of(post(ScriptedBackend(), "/v1/completions", {"model": "wicore", **fields}))


def test_a_response_is_what_the_official_client_reads():
    body = {"model": "wicore", "input": "Hi", "instructions": "Be brief.", "max_output_tokens": 9, "store": False}
    backend = Said(*said("Hel", "lo"))
    response = Response.model_validate(post(backend, "/v1/responses", body).json())
    assert response.output_text == "Hello"
    assert response.status == "completed"
    assert response.usage.input_tokens_details.cached_tokens == 3
    assert backend.requests[0].prompt == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]
    assert backend.requests[0].options["max_tokens"] == 9
    cut = post(Said(*said("Hel", reason="length")), "/v1/responses", body).json()
    assert (cut["status"], cut["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


def test_a_streamed_response_numbers_its_events_and_ends_with_the_whole():
    told = events(post(Said(*said("Hel", "lo")), "/v1/responses", {"model": "wicore", "input": "Hi"}, stream=True))
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    assert [event["type"].removeprefix("response.") for event in told] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert told[-1]["response"]["output"][0]["content"][0]["text"] == "Hello"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"store": True}, "store"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
    ],
)
def test_a_response_that_needs_a_memory_is_refused(fields, param):
    error = error_of(post(ScriptedBackend(), "/v1/responses", {"model": "wicore", "input": "Hi", **fields}))
    assert error["param"].startswith(param)


def test_a_question_with_a_picture_through_wicores_own_endpoint():
    backend = Said(*said("Hel", "lo"))
    body = {"prompt": "What?", "images": ["iVBORw0KGgo="], "max_tokens": 5, "temperature": 0}
    answer = post(backend, "/v1/inference", body).json()
    assert answer.keys() == {"id", "content", "token_count", "finish_reason", "latency_ms", "gpu_utilization"}
    assert (answer["content"], answer["token_count"]) == ("Hello", 2)
    assert backend.requests[0].images == (b"\x89PNG\r\n\x1a\n",)
    assert error_of(post(backend, "/v1/inference", {**body, "images": ["%"]}))["param"] == "images[0]"


def test_a_question_with_pictures_by_upload():
    backend = Said(*said("Hel", "lo"))
    with gateway(backend) as client:
        files = [("images", ("a.png", b"one", "image/png")), ("images", ("b.png", b"two", "image/png"))]
        fields = {"prompt": "What?", "max_tokens": "5", "temperature": "0"}
        answer = client.post("/v1/inference/upload", data=fields, files=files)
        assert answer.status_code == 200, answer.text
        assert answer.json()["content"] == "Hello"
        asked = backend.requests[0]
        assert (asked.prompt, asked.images) == ("What?", (b"one", b"two"))
        assert (asked.options["max_tokens"], asked.options["temperature"]) == (5, 0)
        for wrong, param in (
            ({"max_tokens": "many"}, "max_tokens"),
            ({"prompt": ""}, "prompt"),
            ({"no_such": "1"}, "no_such"),
        ):
            sent = client.post("/v1/inference/upload", data={**fields, **wrong}, files=files)
            assert error_of(sent)["param"] == param
        named = client.post("/v1/inference/upload", data=fields, files=[("photo", ("a.png", b"one", "image/png"))])
        assert error_of(named)["param"] == "photo"
        assert error_of(client.post("/v1/inference/upload", json=fields))["param"] == "prompt"
        broken = client.post("/v1/inference/upload", content=b"x", headers={"content-type": "multipart/form-data"})
        assert error_of(broken)["code"] == "bad_request"
        assert len(backend.requests) == 1


def test_embeddings_are_refused_clearly():
    assert error_of(post(ScriptedBackend(), "/v1/embeddings", {"input": "x"}))["code"] == "unsupported_endpoint"


def test_what_is_no_json_or_not_sent_as_such_is_told_apart():
    with gateway() as client:
        sent = client.post("/v1/chat/completions", content=b"{", headers={"content-type": "application/json"})
        assert error_of(sent)["code"] == "invalid_json"
        assert error_of(client.post("/v1/chat/completions", content=b"{}"), 415)["code"] == "unsupported_media_type"
        half = json.dumps({**CHAT, "model": "\ud800", "\ud800": 1})
        error_of(client.post("/v1/chat/completions", content=half, headers={"content-type": "application/json"}))
        assert error_of(client.get("/v1/chat/completions"), 405)["code"] == "method_not_allowed"
        assert error_of(client.get("/nowhere"), 404)["code"] == "not_found"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
MESSAGES = st.lists(st.dictionaries(st.sampled_from(["role", "content", "name", "tool_calls", "x"]), JSON), max_size=3)
PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/inference"]


@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_body_whatever_breaks_the_gateway(shared_client, data):
    path = data.draw(st.sampled_from(PATHS))
    model = {
        "/v1/chat/completions": ChatRequest,
        "/v1/completions": CompletionRequest,
        "/v1/responses": ResponsesRequest,
        "/v1/inference": WicoreFields,
    }[path]
    good = {**CHAT, "prompt": "x", "input": "x"}
    wanted = {name: good[name] for name in model.model_fields if name in good}
    fields = data.draw(st.dictionaries(st.sampled_from(sorted(model.model_fields)), JSON | MESSAGES, max_size=3))
    response = shared_client.post(
        path, content=json.dumps({**wanted, **fields}), headers={"content-type": "application/json"}
    )
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        error_of(response, response.status_code)


@pytest.fixture(scope="module")
def shared_client():
    with gateway(ScriptedBackend(), limits={}) as client:
        yield client


def test_the_openapi_document_describes_every_body_and_answer(shared_client):
    document = shared_client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    for path in PATHS:
        operation = document["paths"][path]["post"]
        body = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        assert schemas[body]["additionalProperties"] is False
        assert {"200", "400", "401", "404", "429", "500", "503", "504"} <= operation["responses"].keys()
        assert "ErrorAnswer" in json.dumps(operation["responses"]["400"])
        assert "$ref" in json.dumps(operation["responses"]["200"])
    for path in ("/health", "/ready", "/status", "/v1/stats", "/v1/models"):
        assert "$ref" in json.dumps(document["paths"][path]["get"]["responses"]["200"])
