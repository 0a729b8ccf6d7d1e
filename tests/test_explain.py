"""Explaining the cache: where each block of a prompt is, how far a sequence could go on, and a score in its terms."""

import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fake_cold_tier import FakeColdTier
from wicore_backend import Engine, EngineConfig, SamplingParams
from wicore_backend.engine.explain import CachedPrompt, CacheQuestion, Tier, explain
from wicore_backend.errors import OverloadedError
from wicore_backend.hmt.blocks import BlockManager
from wicore_backend.hmt.host_tier import HostTier, SlotBlock
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.lower_tiers import LowerTiers
from wicore_backend.hmt.names import BlockNames, NameScheme
from wicore_backend.hmt.policy import Policy
from wicore_backend.hmt.policy.a2cr import A2CR
from wicore_backend.hmt.policy.base import Access
from wicore_backend.hmt.policy.lru import LRU

L, G = LayerGroup.LOCAL, LayerGroup.GLOBAL
SIZE = 4
PROMPT = list(range(42))
"""Ten full blocks and a bit. The window of 24 tokens at its end is blocks 4 to 9."""


def names(tokens=PROMPT) -> BlockNames:
    return BlockNames(NameScheme(SIZE), list(tokens), (), "")


def manager(*, slots: int = 0, policy: Callable[[int], Policy] = LRU, cold: bool = False) -> BlockManager:
    layout = KVLayout.of((L, L, G), block_size=SIZE, kv_heads=2, head_dim=8, window=24, bytes_per_value=4)
    lower = None
    if slots:
        contents: dict[LayerGroup, list[Any]] = {group: [None] * slots for group in (L, G)}
        lower = LowerTiers(HostTier({L: slots, G: slots}, policy), FakeColdTier(contents) if cold else None)
    return BlockManager(layout, {L: 41, G: 41}, max_chunk=64, lower=lower)


def compute(books: BlockManager, tokens=PROMPT) -> None:
    """Have a prompt go through the cache."""
    chain = names(tokens)
    if books.lower is not None:
        books.lower.observe(Access(keys=chain.first(len(tokens) // SIZE)), now=1.0)
    blocks = books.open(
        chain, books.match(chain, (len(tokens) - 1) // SIZE), max_tokens=len(tokens), expected_tokens=len(tokens)
    )
    assert books.extend(blocks, 0, len(tokens))
    books.note(blocks, len(tokens))
    books.close(blocks)
    books.take_transfers()


def places(cached: CachedPrompt, group: LayerGroup) -> list[tuple[Tier, ...]]:
    """Where the blocks of one group are, in order."""
    found = [place for place in cached.blocks if place.group is group]
    assert [place.index for place in found] == list(range(len(found)))
    return [place.tiers for place in found]


def test_a_prompt_that_nobody_has_computed_is_nowhere():
    cached = explain(manager(slots=4), names(), len(PROMPT))
    assert (cached.tokens, cached.block_size) == (42, SIZE)
    assert (cached.resume_tokens, cached.known_tokens, cached.restorable_tokens) == (0, 0, 0)
    assert places(cached, G) == places(cached, L) == [()] * 10


def test_computed_blocks_are_on_the_device_and_of_the_local_group_the_window_alone():
    books = manager()
    compute(books)
    cached = explain(books, names(), len(PROMPT))
    assert cached.resume_tokens == cached.known_tokens == cached.restorable_tokens == 40
    assert places(cached, G) == [(Tier.DEVICE,)] * 10
    assert places(cached, L) == [()] * 4 + [(Tier.DEVICE,)] * 6


def test_a_prompt_that_ends_with_a_block_computes_its_last_one():
    books = manager()
    compute(books, PROMPT[:40])
    cached = explain(books, names(PROMPT[:40]), 40)
    assert len(cached.blocks) == 20
    assert cached.known_tokens == 36


def test_what_the_device_gave_up_is_in_host_memory():
    books = manager(slots=40)
    compute(books)
    books.pools[G].give_up(3)
    cached = explain(books, names(), len(PROMPT))
    assert cached.resume_tokens == 40
    assert places(cached, G).count((Tier.HOST,)) == 3
    assert places(cached, G).count((Tier.DEVICE,)) == 7


def test_without_its_window_a_prompt_is_known_and_cannot_go_on():
    books = manager()
    compute(books)
    books.pools[L].give_up(6)
    cached = explain(books, names(), len(PROMPT))
    assert (cached.resume_tokens, cached.known_tokens) == (0, 40)
    assert places(cached, L) == [()] * 10


def test_what_is_on_disk_alone_can_be_restored():
    books = manager(slots=40, cold=True)
    compute(books)
    assert books.lower is not None
    assert isinstance(books.lower.cold, FakeColdTier)
    window = names().first(10)[4:10]
    for name in window:
        books.lower.cold.records[SlotBlock(L, name, 0).key] = None
    books.pools[L].drop_all()
    cached = explain(books, names(), len(PROMPT))
    assert (cached.resume_tokens, cached.known_tokens, cached.restorable_tokens) == (0, 40, 40)
    assert places(cached, L) == [()] * 4 + [(Tier.NVME,)] * 6


def test_looking_changes_nothing():
    books = manager(slots=8, policy=A2CR, cold=True)
    compute(books)
    first = explain(books, names(), len(PROMPT))
    assert explain(books, names(), len(PROMPT)) == first
    assert not books.take_transfers()
    books.check_integrity()


def test_a_score_comes_in_its_terms_also_for_a_block_that_was_given_up():
    policies: list[A2CR] = []

    def policy(capacity: int) -> A2CR:
        policies.append(A2CR(capacity))
        return policies[-1]

    books = manager(slots=40, policy=policy)
    compute(books)
    books.pools[G].give_up(10)
    books.lower.host.forget_all()
    by_group = dict(zip((L, G), policies, strict=True))
    cached = explain(books, names(), len(PROMPT), lambda group, name: by_group[group].explain(name))
    place = next(place for place in cached.blocks if place.group is G)
    assert place.tiers == ()
    assert place.score is not None
    assert place.score.score == pytest.approx(place.score.hits_per_second * place.score.saving)
    assert place.score.features["uses"] >= 0
    other = explain(books, names(range(100, 142)), 42, lambda group, name: by_group[group].explain(name))
    assert not any(place.score for place in other.blocks)


def test_a_question_is_answered_on_another_thread_and_its_error_is_the_askers():
    books = manager()
    compute(books)
    question = CacheQuestion(books, names(), len(PROMPT))
    threading.Thread(target=question.answer).start()
    assert question.result().known_tokens == 40
    wrong = CacheQuestion(books, names(), 10_000)  # More tokens than there are names for.
    wrong.answer()
    with pytest.raises((ValueError, struct.error)):
        wrong.result()


def test_an_engine_explains_what_its_next_answer_then_finds():
    model = Path(__file__).resolve().parent.parent / "models" / "wicore-demo"
    settings = {"kv_cache_bytes": 9_000_000, "max_model_len": 1024, "max_running": 2, "host_cache_bytes": 50_000_000}
    prompts = [[2, *range(300 + n, 1000 + n)] for n in range(3)]
    once = SamplingParams(max_tokens=1, temperature=0.0)
    with Engine(EngineConfig(model=model, device="cpu", dtype="float32", threads=1, **settings)) as engine:
        for prompt in prompts:
            engine.generate(prompt, once)
        seen = set()
        for prompt in [prompts[2], prompts[0], [2, *range(350, 1100)]]:
            cached = engine.explain_cache(prompt)
            seen |= {place.tiers for place in cached.blocks}
            assert cached.resume_tokens == engine.generate(prompt, once).usage.cached_tokens
        assert {(Tier.DEVICE,), (Tier.HOST,), ()} <= seen
        assert engine.explain_cache(prompts[0], tenant="another").resume_tokens == 0
        known = [place for place in engine.explain_cache(prompts[0]).blocks if place.tiers]
        assert all(place.score is not None for place in known)
    with pytest.raises(OverloadedError):
        engine.explain_cache(prompts[0])
    assert sum(engine.statistics().rejected.values()) == 0, "a question is no request"
    assert engine.statistics().hit_tokens[Tier.HOST] > 0
