"""A server that is told to stop, or to unload its model, or whose engine is in trouble: what its clients see of it."""

import json
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
from wicore_client import Cancelled, Unavailable

from scripts.serving import ServerOptions, TritonServer
from scripts.serving.installation import ROOT
from tests.integration.conftest import FREE_PORTS
from tests.integration.test_server_lifecycle import is_clean, wait_until
from tests.integration.wire import assert_stopped_by_itself, client, generate, metric, post

SETTINGS = {"model": str(ROOT / "models" / "wicore-demo"), "device": "cpu"}
EXPLICIT = ("--model-control-mode=explicit", "--load-model=*")


@contextmanager
def serving(installation, tmp_path, *, settings=None, **options):
    options = {"settings": {**SETTINGS, **(settings or {})}, **FREE_PORTS, **options}
    with TritonServer(ServerOptions(**options), installation, state=tmp_path / "state") as server:
        yield server


class Answer(threading.Thread):
    """A stream that is being read; `tokens` grows, `error` is there if it ended with one."""

    def __init__(self, server, **options) -> None:
        super().__init__(daemon=True)
        self.tokens = 0
        self.error: Exception | None = None
        self.reason: str | None = None
        self._server = server
        self._options = options
        self.start()
        wait_until(lambda: self.tokens)

    def run(self) -> None:
        try:
            with client(self._server, retry=None) as c:
                for chunk in c.stream("hello", temperature=0.0, ignore_eos=True, **self._options):
                    self.tokens += len(chunk.token_ids)
                    self.reason = chunk.finish_reason
        except Exception as error:
            self.error = error


def ready(server, path: str = "/v2/health/ready") -> bool:
    try:
        with urllib.request.urlopen(server.urls.http + path, timeout=5) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError:
        return False


def test_a_stop_lets_running_answers_end_and_refuses_new_ones(installation, tmp_path):
    with serving(installation, tmp_path, drain_seconds=30.0) as server:
        answers = [Answer(server, max_tokens=900) for _ in range(3)]
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        wait_until(lambda: metric(server, "wicore_engine_healthy") == 0)
        with client(server, retry=None) as c, pytest.raises(Unavailable, match=r"retry after \d") as refused:
            c.generate("hello", max_tokens=3)
        assert refused.value.retry_after
        assert any(answer.is_alive() for answer in answers), "the answers are too short to show anything"
        wait_until(lambda: not ready(server))
        for answer in answers:
            answer.join(30)
            assert (answer.tokens, answer.reason, answer.error) == (900, "length", None)
        stopping.join(30)
        assert_stopped_by_itself(server)
        assert is_clean(server.run)


def test_what_has_not_ended_by_then_gets_its_end_all_the_same(installation, tmp_path):
    with serving(installation, tmp_path, drain_seconds=1.0) as server:
        answers = [Answer(server, max_tokens=15_000) for _ in range(3)]
        whole: list[tuple[int, str]] = []
        body = {"text_input": "hello", "max_tokens": 15_000, "ignore_eos": True}
        asking = threading.Thread(target=lambda: whole.append(generate(server, **body)))
        asking.start()
        began = time.monotonic()
        wait_until(lambda: metric(server, "wicore_running_requests") == 4)
        server.stop()
        assert time.monotonic() - began < 20
        for answer in answers:
            answer.join(5)
            assert isinstance(answer.error, Cancelled), answer.error
            assert "shutting down" in str(answer.error)
        asking.join(5)
        assert json.loads(whole[0][1])["finish_reason"] == "cancelled"
        assert_stopped_by_itself(server)
        assert is_clean(server.run)


def test_whoever_is_in_a_hurry_does_not_wait_for_the_drain(installation, tmp_path):
    with serving(installation, tmp_path, drain_seconds=600.0) as server:
        Answer(server, max_tokens=15_000)
        began = time.monotonic()
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        time.sleep(0.5)
        server.hurry()
        stopping.join(30)
        assert time.monotonic() - began < 20
        assert is_clean(server.run)


def test_an_engine_that_hangs_makes_the_server_not_ready_until_it_is_well_again(installation, tmp_path):
    settings = {"step_timeout_s": 0.2, "max_batch_tokens": 16_384}
    with serving(installation, tmp_path, settings=settings) as server:
        assert ready(server)
        wait_until(lambda: metric(server, "wicore_engine_healthy") == 1)
        long = "tell me of the red circle and the blue square " * 1200
        asking = threading.Thread(target=generate, args=(server,), kwargs={"text_input": long, "max_tokens": 1})
        asking.start()
        wait_until(lambda: not ready(server))
        assert asking.is_alive(), "the step is too short to show anything"
        assert metric(server, "wicore_engine_healthy") == 0
        assert [engine.healthy for engine in server.engines()] == [False]
        _, index = post(server, "/v2/repository/index", {})
        assert any("a step has been running" in model.get("reason", "") for model in json.loads(index))
        asking.join(60)
        wait_until(lambda: ready(server))
        assert [engine.healthy for engine in server.engines()] == [True]
        assert json.loads(generate(server, text_input="hello", max_tokens=3)[1])["finish_reason"]
    assert_stopped_by_itself(server)
    assert is_clean(server.run)


def test_an_unload_lets_running_answers_end_and_a_load_brings_the_model_back(installation, tmp_path):
    with serving(installation, tmp_path, extra_arguments=EXPLICIT) as server:
        answer = Answer(server, max_tokens=900)
        assert post(server, "/v2/repository/models/wicore_gemma3/unload", {})[0] == 200
        assert generate(server, text_input="hello")[0] == 404
        answer.join(30)
        assert (answer.tokens, answer.reason, answer.error) == (900, "length", None)
        wait_until(lambda: not server.engines())
        assert post(server, "/v2/repository/models/wicore_gemma3/load", {})[0] == 200
        wait_until(lambda: ready(server, "/v2/models/wicore/ready") and ready(server))
        with client(server, retry=None) as c:
            assert c.generate("What is 12 + 7?", temperature=0.0, max_tokens=10).text == "19"
    assert_stopped_by_itself(server)
    assert is_clean(server.run)


def test_nothing_stays_of_a_server_whose_guard_gets_sigterm_amid_work(installation, tmp_path):
    with serving(installation, tmp_path, drain_seconds=600.0) as server:
        Answer(server, max_tokens=15_000)
        server.hurry()
        assert server.wait(30) is not None
    assert is_clean(server.run)
