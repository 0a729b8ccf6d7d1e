"""The engine over all tiers: what left for the disk comes back, also after a restart, and never as anything else."""

import io
import json
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from scripts.leak_test import leak_test
from wicore_backend import Engine, EngineConfig, SamplingParams
from wicore_backend.engine import loading
from wicore_backend.engine.results import EventStream
from wicore_backend.errors import InvalidArgumentError
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.nvme import StoreInUseError
from wicore_backend.hmt.pool import KVPools
from wicore_backend.models.gemma3.fingerprint import checkpoint_fingerprint

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "wicore-demo"
PICTURE = (ROOT / "client" / "wicore_client" / "assets" / "shapes.png").read_bytes()
SMALL = {"kv_cache_bytes": 9_000_000, "max_model_len": 1024, "max_running": 2}


def config(**settings):
    base = {"model": MODEL, "device": "cpu", "dtype": "float32", "threads": 1, "nvme_cache_bytes": 100_000_000}
    return EngineConfig(**base | settings)


def greedy(tokens=16, **params):
    return SamplingParams(**{"max_tokens": tokens, "temperature": 0.0, "ignore_eos": True} | params)


@contextmanager
def engine_on(directory, **settings):
    with Engine(config(nvme_cache_path=directory, **{"nvme_codec": "exact"} | settings)) as engine:
        yield engine
        proved: Future[None] = Future()

        def prove() -> None:  # On the thread that owns the books.
            engine._scheduler.check_integrity()
            engine._model.mover._cold.tier.check_integrity()
            proved.set_result(None)

        engine._inbox.put(prove)
        proved.result(10)


def talk(question="What is 12 + 7?"):
    first = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this? " * 120}]}
    return [first, {"role": "assistant", "content": "A picture."}, {"role": "user", "content": question}]


@pytest.fixture(scope="module")
def expected():
    with Engine(config(prefix_cache=False)) as engine:
        return engine.generate(talk(), greedy(), images=[PICTURE])


def test_a_restarted_engine_goes_on_where_the_last_one_ended(tmp_path, expected, caplog):
    caplog.set_level("INFO")
    with engine_on(tmp_path) as engine:
        first = engine.generate(talk(), greedy(), images=[PICTURE])
    with engine_on(tmp_path) as engine:
        again = engine.generate(talk(), greedy(), images=[PICTURE])
        counts = engine._scheduler.counts
    assert first.token_ids == again.token_ids == expected.token_ids
    assert first.usage.cached_tokens == 0
    assert again.usage.cached_tokens >= again.usage.prompt_tokens - 32
    assert counts.restores == 1
    assert counts.restored_tokens == again.usage.cached_tokens
    assert first.usage.restore_s == 0 < again.usage.restore_s <= again.usage.queue_s
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("request ")]
    for result, line in zip((first, again), lines, strict=True):
        assert f" restore_s={result.usage.restore_s:.3f} " in line


_KILLED = """
import os, signal, sys, time
from pathlib import Path
from wicore_backend import Engine, EngineConfig, SamplingParams

settings = {"model": Path(sys.argv[1]), "nvme_cache_path": Path(sys.argv[2]), "nvme_cache_bytes": 100_000_000}
engine = Engine(EngineConfig(**settings, device="cpu", dtype="float32", threads=1, nvme_codec="exact"))
engine.generate([2, *range(300, 1300)], SamplingParams(max_tokens=2, temperature=0.0))
end = time.monotonic() + 20
while time.monotonic() < end and not sum(engine.statistics().nvme.held.values()) >= 31 + 16:
    time.sleep(0.05)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_an_idle_engine_had_cached_outlives_a_kill(tmp_path):
    command = [sys.executable, "-c", _KILLED, str(MODEL), str(tmp_path)]
    killed = subprocess.run(command, cwd=ROOT, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    with engine_on(tmp_path) as engine:
        again = engine.generate([2, *range(300, 1300)], greedy())
        usage = {group: tier.counts for group, tier in engine.statistics().host.items()}
    assert again.usage.cached_tokens == 992
    assert all(counts.written_behind == 0 for counts in usage.values()), "what is on disk is not stored again"


def test_an_engine_told_so_writes_nothing_behind(tmp_path):
    with engine_on(tmp_path, nvme_write_behind_bytes_per_second=0) as engine:
        engine.generate(list(range(300, 700)), greedy(2))
        time.sleep(0.3)
        assert sum(engine.statistics().nvme.held.values()) == 0


def test_half_the_bytes_give_the_same_answer(tmp_path, expected):
    with engine_on(tmp_path, nvme_codec="q8") as engine:
        engine.generate(talk(), greedy(), images=[PICTURE])
    with engine_on(tmp_path, nvme_codec="q8") as engine:
        again = engine.generate(talk(), greedy(), images=[PICTURE])
    assert again.usage.cached_tokens > 500
    assert again.token_ids == expected.token_ids


def test_a_damaged_disk_is_a_miss(tmp_path, expected):
    with engine_on(tmp_path) as engine:
        engine.generate(talk(), greedy(), images=[PICTURE])
    for path in tmp_path.iterdir():
        data = bytearray(path.read_bytes())
        for place in range(4096, len(data), 4096):
            data[place + 100] ^= 1
        path.write_bytes(data)
    with engine_on(tmp_path) as engine:
        again = engine.generate(talk(), greedy(), images=[PICTURE])
        after = engine.generate(talk(), greedy(), images=[PICTURE])
    assert again.token_ids == after.token_ids == expected.token_ids
    assert again.usage.cached_tokens == 0
    assert after.usage.cached_tokens > 500


def test_another_picture_or_tenant_finds_nothing_on_the_disk(tmp_path):
    def cached(engine: Engine, tenant: str, picture: bytes = PICTURE) -> int:
        events = EventStream(lambda: None)
        prompt = engine.processor.process(talk(), images=[picture])
        engine.submit(prompt, greedy(2), sink=events.put, tenant=tenant)
        return events.collect().usage.cached_tokens

    image = Image.open(io.BytesIO(PICTURE)).convert("RGB")
    stored = io.BytesIO()
    ImageChops.offset(image, 1).save(stored, "PNG")
    with engine_on(tmp_path) as engine:
        assert cached(engine, "a") == 0
    with engine_on(tmp_path) as engine:
        assert cached(engine, "b") == 0
        assert cached(engine, "a", stored.getvalue()) < 300
        assert cached(engine, "a") > 500


def test_two_engines_do_not_share_a_directory(tmp_path):
    with engine_on(tmp_path), pytest.raises(StoreInUseError, match=tmp_path.name):
        Engine(config(nvme_cache_path=tmp_path))


def test_without_host_memory_there_is_no_way_to_the_disk(tmp_path):
    with pytest.raises(InvalidArgumentError, match="nvme_cache_path needs host memory"):
        Engine(config(nvme_cache_path=tmp_path, host_cache_bytes=0))


def test_what_three_tiers_hold_need_not_be_computed_again(tmp_path, monkeypatch):
    prompts = [[2, *random.Random(n).choices(range(300, 1500), k=800)] for n in range(8)]
    with Engine(config(**SMALL, prefix_cache=False)) as engine:
        expected = [engine.generate(prompt, greedy()).token_ids for prompt in prompts]
    with engine_on(tmp_path, **SMALL, host_cache_bytes=12_000_000, hmt_policy="lru") as engine:
        monkeypatch.setattr(engine._model.mover._cold.tier, "restore_seconds", lambda _: 0.0)
        results = [engine.generate(prompt, greedy()) for _ in range(3) for prompt in prompts]
        assert [result.token_ids for result in results] == expected * 3
        # A disk that cannot keep up may cost a block here and there.
        assert sum(result.usage.cached_tokens for result in results) > 0.7 * 2 * 8 * 800
        assert engine._scheduler.counts.restores > 8
        host = engine.statistics().host[LayerGroup.GLOBAL]
        assert host.used <= host.capacity


def test_requests_of_all_fates_leave_nothing(tmp_path):
    """A sample; `python -m scripts.leak_test` makes 10,000."""
    tally = leak_test(120, tmp_path, seed=0)
    assert tally["requests that ended: length"] > 20
    assert tally["requests that ended: cancelled"] > 10
    assert tally["waits for the disk"] > 5


def test_a_fingerprint_is_another_one_when_any_weight_is(tmp_path):
    def copy(name: str) -> Path:
        directory: Path = tmp_path / name
        directory.mkdir()
        for path in MODEL.iterdir():
            (directory / path.name).write_bytes(path.read_bytes())
        return directory

    same, trained, configured = copy("same"), copy("trained"), copy("configured")
    weights = trained / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1000] ^= 1
    weights.write_bytes(data)
    settings = json.loads((configured / "config.json").read_text())
    settings["text_config"]["rope_theta"] = 12345.0
    (configured / "config.json").write_text(json.dumps(settings))
    prints = [checkpoint_fingerprint(directory) for directory in (MODEL, same, trained, configured)]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


@pytest.mark.parametrize("part", ["make_runner", "generation_defaults", "BlockManager"])
def test_an_engine_that_fails_while_it_is_loaded_lets_go_of_host_memory_and_disk(part, tmp_path, monkeypatch):
    closed = []
    close = KVPools.close

    def noted(pools):
        closed.append(pools)
        close(pools)

    def fails(*_, **__):
        raise MemoryError(part)

    settings = config(nvme_cache_path=tmp_path, **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(KVPools, "close", noted)
        patch.setattr(loading, part, fails)
        with pytest.raises(MemoryError, match=part):
            Engine(settings)
    assert len(closed) == 1
    with Engine(settings) as engine:  # Nobody holds the directory's lock.
        assert len(engine.generate("hello", greedy(3)).token_ids) == 3
