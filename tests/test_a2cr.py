"""A2CR: what it learns of blocks that come back, what it keeps because of it, and what it is asked to keep."""

import random

import pytest

from wicore_backend.hmt.policy import Access, Key
from wicore_backend.hmt.policy.a2cr import A2CR, A2CRSettings
from wicore_backend.hmt.policy.base import BLOCKS_AT_ONCE
from wicore_backend.hmt.policy.reuse_forest import ForestSettings


class Chats:
    """Prompts of two kinds, told apart by their length: the short come back after a minute, the long never."""

    def __init__(self, policy: A2CR, *, seed: int = 0) -> None:
        self.policy = policy
        self.draw = random.Random(seed)
        self.now = 0.0
        self.fresh = 0
        self.due: list[tuple[float, list[int]]] = []

    def serve(self, keys: list[int], cached: set[Key]) -> int:
        self.policy.advance(self.now)
        self.policy.observe(Access(keys=keys))
        hits = sum(key in cached for key in keys)
        for key in keys:
            if key in cached:
                self.policy.use(key)
        for key in reversed(keys):
            self.policy.add(key)
        cached.update(keys)
        while len(self.policy) > self.policy.capacity:
            cached.remove(self.policy.evict())
        return hits

    def run(self, prompts: int) -> float:
        """Share of the returning blocks of the second half that were hits."""
        cached: set[Key] = set()
        hits = asked = 0
        for number in range(prompts):
            self.now += 1.0
            if self.due and self.due[0][0] <= self.now:
                _, keys = self.due.pop(0)
                found = self.serve(keys, cached)
                if number > prompts // 2:
                    hits, asked = hits + found, asked + len(keys)
            length = self.draw.choice((2, 12))
            keys = list(range(self.fresh, self.fresh + length))
            self.fresh += length
            self.serve(keys, cached)
            if length == 2:
                self.due.append((self.now + 60, keys))
        return hits / asked


def test_a2cr_learns_which_blocks_come_back():
    # 60 s of both kinds are 420 blocks, of the kind that comes back 60.
    assert Chats(A2CR(100)).run(2_000) > 0.9


def test_a2cr_with_one_tree_and_a_short_memory_still_learns():
    settings = A2CRSettings(min_ghosts=1_000, ghost_multiple=1, forest=ForestSettings(trees=1, samples=500))
    assert Chats(A2CR(100, settings)).run(2_000) > 0.7


def test_a2cr_is_deterministic():
    assert Chats(A2CR(60)).run(1_000) == Chats(A2CR(60)).run(1_000)


def one_by_one(
    policy: A2CR, keys: list[str], *, retain_seconds: float | None = None, session_end: bool = False
) -> None:
    for key in keys:
        policy.observe(Access(keys=[key], retain_seconds=retain_seconds, session_end=session_end))
        policy.add(key)


def test_retained_blocks_leave_last_and_only_for_as_long_as_was_asked():
    policy = A2CR(10)
    one_by_one(policy, ["kept"], retain_seconds=100)
    policy.advance(50.0)
    one_by_one(policy, ["newer", "newest"])
    assert [policy.evict(), policy.evict()] == ["newer", "newest"]
    one_by_one(policy, ["last"])
    policy.advance(101.0)
    assert policy.evict() == "kept"


def test_retained_blocks_are_at_most_a_share_of_the_tier():
    policy = A2CR(10)
    for number in range(20):
        policy.advance(float(number))
        one_by_one(policy, [f"greedy {number}"], retain_seconds=1e6)
    retained = [number for number in range(20) if policy.explain(f"greedy {number}").retained]
    assert retained == [0, 1, 2, 3, 4]


def test_blocks_of_an_ended_session_leave_first():
    policy = A2CR(10)
    one_by_one(policy, ["old"])
    policy.advance(5.0)
    one_by_one(policy, ["ended"], session_end=True)
    assert policy.evict() == "ended"


def test_what_is_dear_to_recompute_is_kept():
    policy = A2CR(10, saving=lambda position: 1.0 + position)
    policy.observe(Access(keys=["root"]))
    policy.observe(Access(keys=["root", "deep"]))
    for key in ("deep", "root"):
        policy.add(key)
    dear, cheap = policy.explain("deep"), policy.explain("root")
    assert (dear.saving, cheap.saving) == (2.0, 1.0)
    assert dear.score == pytest.approx(dear.hits_per_second * dear.saving)


def test_a_full_tier_admits_what_is_worth_more_than_its_next_victim():
    policy = A2CR(1)
    policy.observe(Access(keys=["rare"]))
    assert policy.admit("rare")
    policy.add("rare")
    policy.advance(100.0)
    for _ in range(3):
        policy.observe(Access(keys=["popular"]))
    assert policy.admit("popular")
    assert not policy.admit("never seen")
    assert policy.explain("never seen") is None


def test_attention_tells_blocks_apart_that_look_the_same():
    def hit_rate(*, with_signal: bool) -> float:
        policy, draw, now = A2CR(40), random.Random(5), 0.0
        due: list[tuple[float, int]] = []
        cached: set[Key] = set()
        hits = asked = 0
        for number in range(2_500):
            now += 1.0
            policy.advance(now)
            prompts = [(number, draw.random() < 0.3)]
            while due and due[0][0] <= now:
                prompts.append((due.pop(0)[1], False))
            for key, returns in prompts:
                policy.observe(Access(keys=[key]))
                if with_signal:
                    policy.attend(key, 0.3 if returns else 0.05)
                if key in cached:
                    policy.use(key)
                if key != number and number > 1_250:
                    hits, asked = hits + (key in cached), asked + 1
                policy.add(key)
                cached.add(key)
                if returns:
                    due.append((now + 90, key))
            while len(policy) > policy.capacity:
                cached.remove(policy.evict())
        return hits / asked

    with_signal, without = hit_rate(with_signal=True), hit_rate(with_signal=False)
    assert with_signal > 0.9
    assert with_signal > without + 0.2


def test_clocks_that_round_do_not_hang():
    policy = A2CR(50)
    for number in range(3_000):
        policy.advance(number * 0.005 + 0.1)
        one_by_one(policy, [f"block {number % 200}"] if f"block {number % 200}" not in policy._home else [])
        if len(policy) > 50:
            policy.evict()


def test_what_was_adopted_teaches_nothing():
    policy = A2CR(20_000)
    policy.adopt(list(range(10_000)))
    policy.observe(Access(keys=list(range(10_000))))
    assert not policy.think()


def test_a_long_prompt_is_heard_in_parts_and_to_the_same_end():
    keys = list(range(4096))
    at_once, in_parts = A2CR(5_000), A2CR(5_000)
    for turn in range(3):
        access = Access(keys=keys[: 2_000 + 1_000 * turn], session_end=turn == 2)
        for policy in (at_once, in_parts):
            policy.advance(10.0 * turn)
        at_once.observe(access)
        parts = sum(1 for _ in in_parts.observing(access))
        assert parts > len(access.keys) // BLOCKS_AT_ONCE
    assert [at_once.explain(key) for key in keys] == [in_parts.explain(key) for key in keys]
