"""OpenAI's responses in front of a scripted backend: answered as the official client reads them, without a memory."""

import pytest
from openai.types.responses import Response

from tests.gateway_kit import ScriptedBackend
from tests.openai_kit import Said, error_of, events, post, said


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
