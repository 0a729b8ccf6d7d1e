"""What OpenAI's endpoints have in common: models, errors, bodies of any form, and a document that describes them."""

import json

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.gateway_kit import CHAT, ScriptedBackend, gateway
from tests.openai_kit import Said, error_of, events, post
from wicore_backend.gateway.backend import Delta
from wicore_backend.gateway.errors import InternalError, InvalidRequestError, UnavailableError
from wicore_backend.gateway.openai.chat_schema import ChatRequest
from wicore_backend.gateway.openai.completions_schema import CompletionRequest
from wicore_backend.gateway.openai.fields import WicoreFields
from wicore_backend.gateway.openai.responses_schema import ResponsesRequest


def test_an_unknown_model_is_not_found():
    assert error_of(post(ScriptedBackend(), model="gpt-9"), 404)["code"] == "model_not_found"


def test_an_alias_is_the_model_under_another_name():
    with gateway(ScriptedBackend(), aliases=("gpt-4o",)) as client:
        assert client.post("/v1/chat/completions", json={**CHAT, "model": "gpt-4o"}).json()["model"] == "gpt-4o"
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["wicore", "gpt-4o"]
        assert client.get("/v1/models/gpt-4o").json()["id"] == "gpt-4o"
        assert client.get("/v1/models/other").status_code == 404


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


def test_embeddings_are_refused_clearly():
    assert error_of(post(ScriptedBackend(), "/v1/embeddings", {"input": "x"}))["code"] == "unsupported_endpoint"


def test_what_is_no_json_or_not_sent_as_such_is_told_apart():
    with gateway() as client:
        sent = client.post("/v1/chat/completions", content=b"{", headers={"content-type": "application/json"})
        assert error_of(sent)["code"] == "invalid_json"
        assert error_of(client.post("/v1/chat/completions", content=b"{}"), 415)["code"] == "unsupported_media_type"
        half = json.dumps({**CHAT, "model": "\ud800", "\ud800": 1})
        error_of(client.post("/v1/chat/completions", content=half, headers={"content-type": "application/json"}))
        refused = error_of(client.get("/v1/chat/completions"), 405)
        assert refused["code"] == "method_not_allowed"
        assert refused["message"] == "/v1/chat/completions takes POST, not GET"
        assert error_of(client.get("/nowhere"), 404)["code"] == "not_found"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
MESSAGES = st.lists(st.dictionaries(st.sampled_from(["role", "content", "name", "tool_calls", "x"]), JSON), max_size=3)
PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/inference"]


@pytest.fixture(scope="module")
def shared_client():
    with gateway(ScriptedBackend(), limits={}) as client:
        yield client


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
