"""Parameters of OpenAI's endpoints: honoured, noted or refused by name, and none is unknown."""

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from tests.gateway_kit import ScriptedBackend
from tests.openai_kit import error_of, options_of, post
from wicore_backend.gateway.openai.chat_schema import ChatRequest
from wicore_backend.gateway.openai.completions_schema import CompletionRequest
from wicore_backend.gateway.openai.fields import WicoreFields
from wicore_backend.gateway.openai.responses_schema import ResponsesRequest

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
        ({"stop": {"a": 1}}, "stop"),
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


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"temperature": 3, "top_p": 2}, "temperature is 3: Input should be less than or equal to 2 (and 1 more)"),
        ({"top_logprobs": 2}, "top_logprobs goes with logprobs = true"),
        # Of the forms that a value may have, those that were not meant are no further problems.
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages[0].content[0].image_url is 'x': Input should be an object",
        ),
    ],
)
def test_what_is_wrong_is_said_once(fields, said):
    assert error_of(post(ScriptedBackend(), **fields))["message"] == said
