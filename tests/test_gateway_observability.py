"""What shows of requests: metrics with few labels, traces that go on to Triton, log lines without what was said."""

import logging
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.testclient import TestClient

from tests.gateway_kit import CHAT, Keys, ScriptedBackend, bearer, gateway, metric
from wicore_backend.gateway.access.extension import AccessExtension
from wicore_backend.gateway.app import create_app
from wicore_backend.gateway.errors import UnavailableError
from wicore_backend.gateway.limits.extension import LimitsExtension
from wicore_backend.gateway.observability.extension import ObservabilityExtension
from wicore_backend.gateway.observability.metrics import GatewayMetrics, class_name
from wicore_backend.gateway.observability.request_ids import request_id
from wicore_backend.gateway.observability.tracing import Traced, incoming_context
from wicore_backend.gateway.settings import GatewaySettings

PATH = "/v1/chat/completions"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
LOG = "wicore_backend.gateway.access_log"


def test_every_answer_is_counted_and_timed_by_model_class_and_outcome():
    backend = ScriptedBackend(tokens=5, prompt_tokens=40, pause_s=0.01)
    with gateway(backend) as client:
        assert client.post(PATH, json=CHAT).status_code == 200
        assert client.post(PATH, json={**CHAT, "stream": True, "priority": "batch"}).status_code == 200
        backend.error = UnavailableError("full", code="queue_full")
        assert client.post(PATH, json=CHAT).status_code == 503
        page = client.get("/metrics").text
    prefix = "wicore_gateway"
    labels = {"endpoint": PATH, "model": "wicore"}
    assert metric(page, f"{prefix}_generations_total", outcome="completed", **{"class": "interactive"}) == 1
    assert metric(page, f"{prefix}_generations_total", outcome="completed", **labels) == 2
    assert metric(page, f"{prefix}_generations_total", outcome="completed", **{"class": "batch"}) == 1
    assert metric(page, f"{prefix}_generations_total", outcome="refused", **labels) == 1
    assert metric(page, f"{prefix}_tokens_total", kind="prompt") == 80
    assert metric(page, f"{prefix}_tokens_total", kind="answer") == 10
    assert metric(page, f"{prefix}_ttft_seconds_count") == 2
    for stream in ("interactive", "batch"):  # The whole answer by the engine's clock, the stream by what was seen.
        assert 0.01 <= metric(page, f"{prefix}_ttft_seconds_sum", **{"class": stream}) < 10
        assert 0.01 <= metric(page, f"{prefix}_tpot_seconds_sum", **{"class": stream}) < 10
    assert metric(page, f"{prefix}_ttft_seconds_sum", **{"class": "interactive"}) == pytest.approx(0.02)
    assert metric(page, f"{prefix}_tpot_seconds_sum", **{"class": "interactive"}) == pytest.approx(0.01)
    assert metric(page, f"{prefix}_queue_seconds_sum") == pytest.approx(0.002)
    assert metric(page, f"{prefix}_request_seconds_count") == 3
    assert metric(page, f"{prefix}_running_generations") == 0
    assert metric(page, f"{prefix}_http_requests_total", route=PATH, method="POST", status="200") == 2
    assert metric(page, f"{prefix}_http_requests_total", route=PATH, status="503") == 1


def test_what_clients_make_up_makes_no_labels():
    with gateway() as client:
        for i in range(50):
            client.get(f"/made/up/{i}")
            client.request(f"VERB{i}", f"/v1/{i}")
            client.post(PATH, json={**CHAT, "model": f"model-{i}"})
            client.post(PATH, json={**CHAT, "priority": i})
        page = client.get("/metrics").text
    assert page.count("\n") < 500
    for made_up in ("made/up", "VERB", "model-1"):
        assert made_up not in page
    assert set(re.findall(r'class="(\w+)"', page)) <= {"realtime", "interactive", "batch"}


def test_a_refusal_by_a_limit_is_an_outcome_too():
    with gateway(limits={"anybody": {"requests_per_minute": 1}}) as client:
        assert [client.post(PATH, json=CHAT).status_code for _ in range(3)] == [200, 429, 429]
        page = client.get("/metrics").text
    assert metric(page, "wicore_gateway_generations_total", outcome="refused") == 2
    assert metric(page, "wicore_gateway_http_requests_total", status="429") == 2


@pytest.mark.parametrize(
    ("priority", "name"), [(-100, "realtime"), (-10, "realtime"), (-9, "interactive"), (0, "interactive"), (1, "batch")]
)
def test_priorities_have_the_name_of_their_class(priority, name):
    assert class_name(priority) == name


def test_what_is_refused_before_it_is_routed_counts_for_its_route(tmp_path):
    keys = Keys(tmp_path / "keys.json")
    key = keys.add()
    with gateway(access={"keys_file": str(keys.path)}) as client:
        client.post(PATH, json=CHAT)
        page = client.get("/metrics", headers=bearer(key)).text
    assert metric(page, "wicore_gateway_http_requests_total", route=PATH, status="401") == 1


def test_gauges_are_there_where_they_mean_something():
    with gateway() as client:
        page = client.get("/metrics").text
    assert "keys_file_ok" not in page
    assert "shared_limits_up" not in page


def test_metrics_are_for_who_has_a_key_unless_they_are_open(tmp_path):
    keys = Keys(tmp_path / "keys.json")
    key = keys.add()
    access = {"keys_file": str(keys.path)}
    with gateway(access=access) as client:
        assert client.get("/metrics").status_code == 401
        assert client.get("/metrics", headers=bearer(key)).status_code == 200
    with gateway(access=access, observability={"metrics_open": True}) as client:
        assert client.get("/metrics").status_code == 200


def test_a_sane_request_id_goes_all_the_way_and_another_one_is_replaced(caplog):
    backend = ScriptedBackend()
    with gateway(backend) as client, caplog.at_level(logging.INFO, LOG):
        answer = client.post(PATH, json=CHAT, headers={"X-Request-Id": "abc-123"})
        assert answer.headers["x-request-id"] == "abc-123"
        assert backend.requests[0].id == "abc-123"
        assert caplog.text.count("id=abc-123") == 2, "the request's line and the answer's"
        for bad in ("a b", "x" * 101, 'a"b', "id=1", "-leading", ""):
            answer = client.post(PATH, json=CHAT, headers={"X-Request-Id": bad})
            assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


@given(st.text())
def test_no_text_makes_an_id_that_could_break_a_line(text):
    assert re.fullmatch(r"[A-Za-z0-9._:-]{1,100}", request_id(text))


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.name == LOG]


def test_the_log_says_who_and_how_long_and_nothing_of_what_was_said(tmp_path, caplog):
    keys = Keys(tmp_path / "keys.json")
    key = keys.add("acme")
    secret = "my secret plans"
    body = {**CHAT, "messages": [{"role": "user", "content": secret}]}
    with gateway(access={"keys_file": str(keys.path)}) as client, caplog.at_level(logging.DEBUG):
        client.post(PATH, json=body, headers=bearer(key))
        client.post(PATH, json={**body, "nonsense": secret}, headers=bearer(key))
        client.post(PATH, json=body, headers=bearer("wk_wrong"))
        client.get(f"/v1/models?key={key}")
    generation, *requests = lines(caplog)
    assert generation.startswith("generation id=")
    for field in ("tenant=acme", "outcome=completed", "prompt_tokens=10", "tokens=3", f"key={key.split('_')[1]}"):
        assert field in generation
    assert [line.split("status=")[1].split()[0] for line in requests] == ["200", "400", "401", "401"]
    gateway_log = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("wicore"))
    assert secret not in gateway_log
    assert key.split("_")[2] not in gateway_log


def test_prompts_are_logged_where_that_is_asked_for(caplog):
    settings = {"observability": {"log_content": True, "log_content_chars": 40}}
    with gateway(**settings) as client, caplog.at_level(logging.INFO, LOG):
        client.post(PATH, json={**CHAT, "messages": [{"role": "user", "content": "Hello\nthere " * 100}]})
    (line,) = [line for line in lines(caplog) if line.startswith("generation")]
    assert "Hello" in line
    assert "\n" not in line
    assert len(line) < 500


def test_trace_context_goes_on_to_triton_as_it_came_when_nothing_is_traced_here():
    backend = ScriptedBackend()
    with gateway(backend) as client:
        client.post(PATH, json=CHAT, headers={"traceparent": PARENT, "tracestate": "vendor=1"})
        client.post(PATH, json=CHAT)
        client.post(PATH, json=CHAT, headers={"traceparent": "00-00-00-00"})
    assert dict(backend.requests[0].metadata) == {"traceparent": PARENT, "tracestate": "vendor=1"}
    assert [dict(request.metadata) for request in backend.requests[1:]] == [{}, {}]


@pytest.mark.parametrize(
    "value",
    [
        "00-" + "0" * 32 + "-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-" + "0" * 16 + "-01",
        "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        PARENT.upper(),
        PARENT + "-extra",
        PARENT + "\n",
    ],
)
def test_malformed_trace_context_is_left_out(value):
    assert incoming_context({"headers": [(b"traceparent", value.encode())]}) == {}


def traced_gateway(backend, exporter, **observability):
    settings = GatewaySettings(observability={"otlp_endpoint": "http://localhost:1/v1/traces", **observability})
    metrics = GatewayMetrics(["wicore"])
    access = AccessExtension(settings, metrics)
    limits = LimitsExtension(
        settings, limits_of_key=access.limits_of_key, limits_of_tenant=access.limits_of_tenant, listener=metrics
    )
    tracing = Traced(settings.observability, exporter=exporter)
    watching = ObservabilityExtension(settings, metrics, tracing=tracing)
    app = create_app(settings, backend, extensions=(limits, access, watching))
    return TestClient(app, base_url="http://localhost", raise_server_exceptions=False)


def test_spans_lie_below_the_clients_and_above_tritons():
    backend, exporter = ScriptedBackend(), InMemorySpanExporter()
    with traced_gateway(backend, exporter) as client:
        assert client.post(PATH, json=CHAT, headers={"traceparent": PARENT}).status_code == 200
        assert client.get("/nothing").status_code == 404
    generate, request, missing = exporter.get_finished_spans()
    assert request.name == f"POST {PATH}"
    assert f"{request.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{request.parent.span_id:016x}" == PARENT.split("-")[2]
    assert generate.parent.span_id == request.context.span_id
    sent = dict(backend.requests[0].metadata)["traceparent"]
    assert sent == f"00-{generate.context.trace_id:032x}-{generate.context.span_id:016x}-01"
    assert generate.attributes["gen_ai.usage.input_tokens"] == 10
    assert generate.attributes["gen_ai.usage.output_tokens"] == 3
    assert [event.name for event in generate.events] == ["first_token"]
    assert request.attributes["http.response.status_code"] == 200
    assert missing.name == "GET other"
    said = CHAT["messages"][0]["content"]
    assert all(said not in str(span.attributes) for span in exporter.get_finished_spans())


def test_what_the_client_does_not_sample_is_not_sampled_here():
    backend, exporter = ScriptedBackend(), InMemorySpanExporter()
    with traced_gateway(backend, exporter) as client:
        client.post(PATH, json=CHAT, headers={"traceparent": PARENT[:-1] + "0"})
    assert not exporter.get_finished_spans()
    assert dict(backend.requests[0].metadata)["traceparent"].endswith("-00")


def test_a_failed_answer_is_an_error_in_its_spans():
    exporter = InMemorySpanExporter()
    with traced_gateway(ScriptedBackend(error=UnavailableError("no")), exporter) as client:
        client.post(PATH, json=CHAT)
    assert [span.status.is_ok for span in exporter.get_finished_spans()] == [False, False]
