"""The demo model served on ONNX Runtime by one setting: the torch engine's answers, and words for broken files."""

import json
import shutil
import threading
import time
import urllib.error
import urllib.request

import pytest

from scripts.serving import ServerOptions, ServerStartError, TritonServer
from scripts.serving.installation import ROOT
from tests.integration.conftest import FREE_PORTS
from tests.integration.test_cancel import FREED_WITHIN_S, freed_within, leave_grpc_bare, leave_grpc_ensemble, leave_http
from tests.integration.wire import assert_stopped_by_itself, client, metric, post
from wicore_backend import Engine, EngineConfig, SamplingParams

DEMO = ROOT / "models" / "wicore-demo"
PICTURE = ROOT / "client" / "wicore_client" / "assets" / "shapes.png"
GREEDY = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True}


def options_of(engines, **more) -> ServerOptions:
    settings = {"model": str(DEMO), "device": "cpu", "executor": "onnx", "engines": str(engines)}
    return ServerOptions(settings=settings, **FREE_PORTS, **more)


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def onnx_server(installation, engines):
    with TritonServer(options_of(engines), installation) as server:
        yield server


@pytest.fixture(scope="module")
def on_torch():
    with Engine(EngineConfig(model=DEMO, device="cpu", executor="torch")) as engine:
        yield engine


def test_text_and_pictures_are_answered_as_on_torch_streamed_and_whole(onnx_server, on_torch):
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Hello! How can I help?"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in this picture?"}]},
    ]
    sampled = {"temperature": 1.0, "seed": 7, "top_k": 50, "max_tokens": 12}
    picture = PICTURE.read_bytes()
    with client(onnx_server) as c:
        for prompt, images, options in [
            ("What is in this picture?", [picture], GREEDY),
            ("What is 12 + 7?", [], GREEDY),
            ("The code of Anna is 4821. " * 60 + "What is the code of Anna?", [], GREEDY),
            (messages, [picture], GREEDY),
            ("Tell me a story.", [], sampled),
        ]:
            expected = on_torch.generate(prompt, SamplingParams(**options), images=images)
            chunks = list(c.stream(prompt, images=images, **options))
            whole = c.generate(prompt, images=images, **options)
            assert [t for chunk in chunks for t in chunk.token_ids] == expected.token_ids
            assert (list(whole.token_ids), whole.text) == (expected.token_ids, expected.text)
            assert len(chunks) > 1


def test_many_at_once_get_their_own_answers(onnx_server, on_torch):
    prompts = [f"Say {index} and {index * index}." for index in range(24)]
    images = [[PICTURE.read_bytes()] if index % 4 == 0 else [] for index in range(24)]
    expected = on_torch.generate(prompts, SamplingParams(**GREEDY), images=images)
    answers = [[] for _ in prompts]

    def run(index):
        for chunk in c.stream(prompts[index], images=images[index], **GREEDY):
            answers[index] += chunk.token_ids

    with client(onnx_server) as c:
        threads = [threading.Thread(target=run, args=(index,)) for index in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert answers == [result.token_ids for result in expected]


@pytest.mark.parametrize("leave", [leave_grpc_ensemble, leave_grpc_bare, leave_http("hello")])
def test_a_client_that_leaves_frees_its_blocks_within_a_second(onnx_server, leave):
    assert freed_within(FREED_WITHIN_S, onnx_server, leave)


def test_the_server_says_what_computes_and_why(onnx_server):
    labels = {"model": "wicore_gemma3", "executor": "onnx", "reason": "executor = 'onnx'"}
    assert metric(onnx_server, "wicore_executor_info", **labels) == 1
    assert "the executor is onnx: executor = 'onnx'" in onnx_server.log.read_text()


def test_graphs_are_found_again_and_broken_ones_are_a_clear_error(onnx_server, engines, installation, tmp_path):
    """The same server is not ready, and lives; by default it does not start."""
    assert metric(onnx_server, "wicore_engine_healthy") == 1
    shutil.copytree(engines, tmp_path / "engines")
    (tmp_path / "engines" / "fp32" / "mid_003.onnx").write_bytes(b"no graph")
    said = "mid_003.onnx and its data have"
    server = TritonServer(options_of(tmp_path / "engines", extra_arguments=("--exit-on-error=false",)), installation)
    try:
        server.start()
        assert said in reason_of(server, "wicore_gemma3")
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(f"{server.urls.http}/v2/health/ready", timeout=10)
        assert urllib.request.urlopen(f"{server.urls.http}/v2/health/live", timeout=10).status == 200
    finally:
        server.stop()
    assert_stopped_by_itself(server)
    with pytest.raises(ServerStartError, match=said), TritonServer(options_of(tmp_path / "engines"), installation):
        pass


def reason_of(server, model):
    """Why a model is not ready, as the server's index of models has it."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            status, text = post(server, "/v2/repository/index", {})
        except ConnectionError:
            status, text = 0, ""
        found = [entry for entry in json.loads(text or "[]") if entry["name"] == model and entry.get("reason")]
        if status == 200 and found:
            return found[0]["reason"]
        time.sleep(0.1)
    raise AssertionError(f"nothing is said of {model}")
