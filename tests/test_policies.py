"""Replacement policies: the books of every one of them, and what holds for all."""

import random
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.policy_kit import Books, build, every_policy
from wicore_backend.config import EngineConfig
from wicore_backend.hmt.codecs.base import CodecName
from wicore_backend.hmt.policy import POLICIES, Access, Policy


def reachable(policy: Policy) -> int:
    """Entries in all containers of a policy, whatever they are for."""
    seen: set[int] = set()

    def count(value: object) -> int:
        if id(value) in seen:
            return 0
        seen.add(id(value))
        if isinstance(value, dict):
            return len(value) + sum(count(item) for item in value.values())
        if isinstance(value, list | set | tuple):
            return len(value) + sum(count(item) for item in value)
        if type(value).__module__.startswith("wicore_backend"):
            names = [*getattr(value, "__dict__", {}), *getattr(type(value), "__slots__", ())]
            return sum(count(getattr(value, name)) for name in names)
        return 0

    return count(policy)


@every_policy
@settings(max_examples=60, deadline=None)
@given(
    capacity=st.integers(1, 12),
    calls=st.lists(st.tuples(st.sampled_from(["ask", "add", "use", "evict", "discard"]), st.integers(0, 20))),
)
def test_any_order_of_calls_keeps_the_books(name, capacity, calls):
    books = Books(build(name, capacity))
    for number, (call, key) in enumerate(calls):
        books.policy.advance(float(number))
        if call == "ask" and key not in books.in_use:
            books.ask(key)
        elif call == "add" and key in books.in_use:
            books.policy.add(key)
            books.in_use.remove(key)
            books.evictable.add(key)
        elif call == "use" and key in books.evictable:
            books.policy.use(key)
            books.evictable.remove(key)
            books.in_use.add(key)
        elif call == "discard":
            books.policy.discard(key)
            books.evictable.discard(key)
            books.in_use.discard(key)
        elif call == "evict":
            if books.evictable:
                books.evict()
            else:
                with pytest.raises(KeyError, match="no evictable block"):
                    books.policy.evict()
        books.check()
    while books.evictable:
        books.evict()


@every_policy
def test_memory_is_bounded_by_a_multiple_of_the_capacity(name):
    sizes = []
    for length in (3_000, 9_000):
        books = Books(build(name, 100))
        for key in range(length):
            books.policy.advance(float(key))
            books.ask(key)
            if key % 3 == 0:
                books.ask(key // 2)
        sizes.append(reachable(books.policy))
    assert sizes[1] < 1.5 * sizes[0] + 500


@every_policy
def test_a_block_in_use_is_never_a_victim(name):
    policy = build(name, 4)
    for key in range(8):
        policy.add(key)
    policy.use(3)
    victims = [policy.evict() for _ in range(7)]
    assert sorted(victims) == [0, 1, 2, 4, 5, 6, 7]
    policy.add(3)
    assert policy.evict() == 3


@every_policy
def test_a_capacity_of_nothing_is_refused(name):
    with pytest.raises(ValueError, match="capacity = 0"):
        POLICIES[name](0)


@every_policy
def test_popular_blocks_are_hit(name):
    books, draw = Books(build(name, 50)), random.Random(1)
    hits = 0
    for number in range(8_000):
        books.policy.advance(number / 10)
        popular = draw.random() < 0.5
        hits += books.ask(draw.randrange(25) if popular else 1000 + draw.randrange(5_000)) and popular
    assert hits > 0.6 * 4_000


@every_policy
def test_adopted_blocks_leave_before_what_is_used_and_are_found_like_others(name):
    policy = build(name, 200)
    policy.advance(1.0)
    policy.adopt(list(range(150)))
    assert len(policy) == 150
    policy.advance(100.0)
    for _ in range(3):
        policy.observe(Access(keys=[7, 8, 9]))
        for key in (9, 8, 7):
            policy.use(key)
            policy.add(key)
        policy.advance(policy.now + 60)
    victims = [policy.evict() for _ in range(100)]
    assert len(set(victims)) == 100
    assert name == "w_tinylfu" or not {7, 8, 9} & set(victims)
    policy.discard(7)
    assert len(policy) in (49, 50)


@every_policy
def test_the_dearest_are_all_that_may_leave_and_leave_late(name):
    policy = build(name, 40)
    draw = random.Random(3)
    for time in range(60):
        policy.advance(float(time))
        keys = [10 * draw.randrange(6) + depth for depth in range(5)]
        policy.observe(Access(keys=keys))
        cached = set(policy.dearest())
        for key in reversed(keys):
            if key in cached:
                policy.use(key)
            policy.add(key)
    order = list(policy.dearest())
    assert len(order) == len(set(order)) == len(policy)
    victims = [policy.evict() for _ in range(len(policy))]
    assert set(victims) == set(order)
    late = sum(order.index(victim) for victim in victims[: len(victims) // 2])
    assert late >= sum(order.index(victim) for victim in victims[len(victims) // 2 :])
    if name in ("lru", "lfu", "a2cr_product"):
        assert victims == order[::-1]


def test_the_settings_offer_every_policy_and_codec_there_is():
    def offered(setting: str) -> set[str]:
        allowed = EngineConfig.model_fields[setting].annotation
        return {choice for part in get_args(allowed) for choice in get_args(part) or [part]} - {type(None)}

    assert offered("hmt_policy") == set(POLICIES)
    assert offered("nvme_codec") == set(get_args(CodecName))
