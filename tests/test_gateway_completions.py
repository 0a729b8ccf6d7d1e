"""Text completions in front of a scripted backend: several prompts, several answers, the prompt's echo."""

import pytest
from openai.types.completion import Completion

from tests.gateway_kit import ScriptedBackend
from tests.openai_kit import Said, error_of, events, post
from wicore_backend.gateway.backend import Delta, Usage


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


@pytest.mark.parametrize("prompt", [["a"] * 65, [[1]] * 65])
def test_too_many_prompts_are_called_that_and_not_prompts_of_another_form(prompt):
    error = error_of(post(ScriptedBackend(), "/v1/completions", {"model": "wicore", "prompt": prompt}))
    assert error["param"] == "prompt"
    assert "at most 64 items" in error["message"]
