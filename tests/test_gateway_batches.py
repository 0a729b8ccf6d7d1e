"""Several prompts in one request are let through, or refused, together."""

import pytest

from tests.gateway_kit import ScriptedBackend, gateway

PATH = "/v1/completions"


def prompts(count, text="x", **fields):
    return {"model": "wicore", "prompt": [text] * count, "max_tokens": 3, **fields}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("limit", [{"requests_per_minute": 6.0}, {"tokens_per_minute": 1000.0}])
def test_a_request_of_many_prompts_fits_where_one_does_and_is_paid_for(limit, stream):
    backend = ScriptedBackend()
    with gateway(backend, limits={"anybody": limit}) as client:
        first = client.post(PATH, json=prompts(20, stream=stream))
        assert first.status_code == 200
        assert len(backend.requests) == 20
        again = client.post(PATH, json=prompts(20, stream=stream))
        assert again.status_code == 429
        assert again.json()["error"]["code"] == "rate_limit_exceeded"
        assert len(backend.requests) == 20, "nothing of a refused request is asked for"
        if "tokens_per_minute" in limit:  # 20 prompts of 13 tokens, of which 1.2 s had saved up 20.
            assert 10 < float(again.headers["retry-after-ms"]) / 1000 < 16


def test_a_refused_request_of_many_prompts_costs_nothing():
    with gateway(limits={"anybody": {"requests_per_minute": 6.0, "tokens_per_minute": 60_000.0}}) as client:
        assert client.post(PATH, json=prompts(1)).status_code == 200
        left = client.app.state.rate_limits.store._levels["{anybody}:key::tokens"][0].value
        assert client.post(PATH, json=prompts(20)).status_code == 429
        assert client.app.state.rate_limits.store._levels["{anybody}:key::tokens"][0].value >= left


def test_prompts_that_together_exceed_the_minutes_tokens_are_refused_for_good():
    backend = ScriptedBackend(pause_s=0.05)
    with gateway(backend, limits={"anybody": {"tokens_per_minute": 500.0}}) as client:
        answer = client.post(PATH, json=prompts(20, text="word " * 40))
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "request_too_large")
    assert answer.headers["x-should-retry"] == "false"
    assert backend.running == 0
