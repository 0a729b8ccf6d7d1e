"""What an engine computes once: prefixes that are found again on the device and in host memory, and by whom."""

import io
from queue import Queue

from PIL import Image, ImageChops

from tests.engine_kit import PICTURE, assert_nothing_left, config, greedy
from wicore_backend import Engine
from wicore_backend.engine import loading
from wicore_backend.engine.loading import LoadedModel
from wicore_backend.engine.request import FinishedEvent
from wicore_backend.hmt.blocks import BlockManager
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.policy import POLICIES

pytest_plugins = ["tests.engine_fixtures"]


def test_a_second_turn_goes_on_where_the_first_ended_and_says_the_same_as_without_a_cache(engine):
    talk: list = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this? " * 60}]},
    ]
    first = engine.generate(talk, greedy(40), images=[PICTURE])
    talk += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "What is 12 + 7?"}]
    second = engine.generate(talk, greedy(40), images=[PICTURE])
    again = engine.generate(talk, greedy(40), images=[PICTURE])
    with Engine(config(prefix_cache=False)) as fresh:
        expected = fresh.generate(talk, greedy(40), images=[PICTURE])
        assert fresh.generate(talk, greedy(40), images=[PICTURE]).usage.cached_tokens == 0
    assert second.token_ids == again.token_ids == expected.token_ids
    assert second.usage.cached_tokens > 300
    assert again.usage.cached_tokens >= second.usage.prompt_tokens - 16


def test_what_no_longer_fits_the_device_comes_back_from_host_memory():
    prompts = [[2, *range(300 + n, 1100 + n)] for n in range(4)]
    small = {"kv_cache_bytes": 9_000_000, "max_model_len": 1024, "max_running": 2}
    with Engine(config(**small, prefix_cache=False)) as engine:
        expected = [engine.generate(prompt, greedy(30)).token_ids for prompt in prompts]
    with Engine(config(**small, host_cache_bytes=100_000_000)) as engine:
        first = [engine.generate(prompt, greedy(30)) for prompt in prompts]
        again = [engine.generate(prompt, greedy(30)) for prompt in prompts]
        assert [r.token_ids for r in first] == [r.token_ids for r in again] == expected
        assert [r.usage.cached_tokens for r in first] == [0] * 4
        assert min(r.usage.cached_tokens for r in again) > 780
        tier = engine.statistics().host[LayerGroup.GLOBAL]
        assert 0 < tier.used <= tier.capacity
        assert tier.counts.loaded > 50
        assert_nothing_left(engine)


def test_with_a_policy_the_device_gives_up_what_it_sets_aside_and_no_token_changes(monkeypatch):
    prompts = [[2, *range(300 + n, 1100 + n)] for n in range(4)]
    small = {"kv_cache_bytes": 9_000_000, "max_model_len": 1024, "max_running": 2}
    with Engine(config(**small, prefix_cache=False)) as engine:
        expected = [engine.generate(prompt, greedy(30)).token_ids for prompt in prompts]

    def as_on_cuda(make, **given):
        return lambda *arguments, **others: make(*arguments, **others | given)

    monkeypatch.setattr(loading, "BlockManager", as_on_cuda(BlockManager, policy=POLICIES["a2cr"]))
    monkeypatch.setattr(loading, "LoadedModel", as_on_cuda(LoadedModel, overlaps=True))
    set_aside = []
    with Engine(config(**small)) as engine:
        tend = engine._model.blocks.tend

        def watched(now):
            tend(now)
            set_aside.append(len(engine._model.blocks.pools[LayerGroup.GLOBAL].victims._aside))

        monkeypatch.setattr(engine._model.blocks, "tend", watched)
        for _ in range(3):
            assert [engine.generate(prompt, greedy(30)).token_ids for prompt in prompts] == expected
        assert max(set_aside) > 0
        assert engine.statistics().blocks[LayerGroup.GLOBAL].recycled > 0
        assert_nothing_left(engine)


def test_another_picture_is_another_prefix(engine):
    def ask(shift: int):
        pixels = Image.open(io.BytesIO(PICTURE)).convert("RGB")
        pixels = ImageChops.offset(pixels, shift)
        stored = io.BytesIO()
        pixels.save(stored, "PNG")
        return engine.generate("Describe this picture.", greedy(20), images=[stored.getvalue()])

    ask(0)
    assert ask(40).usage.cached_tokens < 16


def test_tenants_share_no_blocks(engine):
    prompt = engine.processor.process("The quick brown fox jumps over the lazy dog. " * 20)
    cached = []
    for tenant in ("a", "b", "a"):
        ended: Queue = Queue()
        engine.submit(prompt, greedy(2), sink=ended.put, tenant=tenant)
        while not isinstance(event := ended.get(timeout=10), FinishedEvent):
            pass
        cached.append(event.usage.cached_tokens)
    assert cached[:2] == [0, 0]
    assert cached[2] > 100
