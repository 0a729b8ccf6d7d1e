"""A server whose cache is on disk: what it knew before it was stopped, or killed, and that it says the same."""

import json
import os
import signal
from contextlib import contextmanager

from scripts.serving import ServerOptions, TritonServer
from scripts.serving.installation import ROOT
from tests.integration.conftest import FREE_PORTS
from tests.integration.test_server_lifecycle import wait_until
from tests.integration.wire import assert_stopped_by_itself, generate, metric

SETTINGS = {
    "model": str(ROOT / "models" / "wicore-demo"),
    "device": "cpu",
    "kv_cache_bytes": 9_000_000,
    "max_model_len": 1024,
    "block_size": 32,
    "max_running": 2,
    "host_cache_bytes": 12_000_000,
    "nvme_cache_bytes": 200_000_000,
    "nvme_codec": "exact",
}
PROMPTS = [
    f"{name} likes {thing}. " * 60 + "Who?" for name in ("Anna", "Ben", "Cara") for thing in ("tea", "rain", "red")
]


@contextmanager
def serving(installation, tmp_path):
    settings = {**SETTINGS, "nvme_cache_path": str(tmp_path / "cache")}
    with TritonServer(ServerOptions(settings=settings, **FREE_PORTS), installation, state=tmp_path / "state") as server:
        yield server


def ask(server):
    """Texts, how many tokens of each prompt had been computed before, and how many it has."""
    asked = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
    answers = [json.loads(generate(server, text_input=prompt, **asked)[1]) for prompt in PROMPTS]
    usages = [json.loads(answer["usage"]) for answer in answers]
    cached, tokens = ([usage[key] for usage in usages] for key in ("cached_tokens", "prompt_tokens"))
    return [answer["text_output"] for answer in answers], cached, tokens


def test_a_stopped_server_is_warm_when_it_is_back(installation, tmp_path):
    with serving(installation, tmp_path) as server:
        texts, cached, _ = ask(server)
        assert max(cached) < 64
    assert_stopped_by_itself(server)
    with serving(installation, tmp_path) as server:
        again, cached, _ = ask(server)
        assert again == texts
        assert min(cached) > 280
        assert metric(server, "wicore_engine_healthy") == 1


def test_a_server_that_is_killed_while_idle_is_warm_when_it_is_back(installation, tmp_path):
    with serving(installation, tmp_path) as server:
        texts, _, tokens = ask(server)
        blocks = sum(count // SETTINGS["block_size"] for count in tokens)
        stored = {"tier": "nvme", "group": "global"}
        wait_until(lambda: metric(server, "wicore_tier_blocks_used", **stored) >= blocks, within_s=60)
        os.kill(server.process_id, signal.SIGKILL)
        server.wait(10)
    with serving(installation, tmp_path) as server:
        again, cached, _ = ask(server)
        assert again == texts
        assert min(cached) > 280


def test_a_killed_server_says_the_same_when_it_is_back(installation, tmp_path):
    texts = None
    for _ in range(3):
        with serving(installation, tmp_path) as server:
            said, cached, _ = ask(server)
            assert texts in (None, said)
            os.kill(server.process_id, signal.SIGKILL)
            server.wait(10)
        texts = said
    assert max(cached) > 280, "what had left for the disk before the kill was not found after it"
