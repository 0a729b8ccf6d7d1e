"""Chat completions in front of a scripted backend: what is asked of it, and what the official client reads."""

import json

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.gateway_kit import ScriptedBackend
from tests.openai_kit import PIXEL, Said, error_of, events, options_of, post, said
from wicore_backend.gateway.backend import Delta, Usage
from wicore_backend.gateway.call_format import call_text


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
