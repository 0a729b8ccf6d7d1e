"""Replacement policies: the books of every one of them, and what is particular to each."""

import math
import random
from collections import OrderedDict
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wicore_backend.config import EngineConfig
from wicore_backend.hmt.codecs.base import CodecName
from wicore_backend.hmt.policy import POLICIES, Access, Key, Policy
from wicore_backend.hmt.policy.a2cr import A2CR, A2CRSettings
from wicore_backend.hmt.policy.a2cr_formula import FormulaSettings, ProductA2CR, WeightedA2CR
from wicore_backend.hmt.policy.arc import ARC
from wicore_backend.hmt.policy.base import BLOCKS_AT_ONCE
from wicore_backend.hmt.policy.lfu import LFU
from wicore_backend.hmt.policy.reuse_forest import AGES, ForestSettings, ReuseForest, age_index, worth_by_age
from wicore_backend.hmt.policy.s3fifo import S3FIFO
from wicore_backend.hmt.policy.victim_heap import VictimHeap
from wicore_backend.hmt.policy.w_tinylfu import FrequencySketch, WTinyLFU

SMALL = A2CRSettings(min_ghosts=500, forest=ForestSettings(samples=1_000))


def build(name: str, capacity: int) -> Policy:
    """The policy, with the small memory that a small test can fill."""
    return A2CR(capacity, SMALL) if name == "a2cr" else POLICIES[name](capacity)


every_policy = pytest.mark.parametrize("name", POLICIES)


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


class Books:
    """A cache of single blocks in front of a policy that checks each of its answers."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.evictable: set[int] = set()
        self.in_use: set[int] = set()

    def ask(self, key: int) -> bool:
        hit = key in self.evictable
        self.policy.observe(Access(keys=[key]))
        if hit:
            self.policy.use(key)
        self.policy.add(key)
        self.evictable.add(key)
        while len(self.policy) > self.policy.capacity:
            self.evict()
        return hit

    def evict(self) -> None:
        victim = self.policy.evict()
        assert victim in self.evictable
        self.evictable.remove(victim)
        self.check()

    def check(self) -> None:
        assert len(self.policy) == len(self.evictable)


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


def test_lru_is_an_ordered_dict():
    books, draw = Books(POLICIES["lru"](30)), random.Random(2)
    reference: OrderedDict[int, None] = OrderedDict()
    for _ in range(5_000):
        key = draw.randrange(60)
        assert books.ask(key) == (key in reference)
        reference[key] = None
        reference.move_to_end(key)
        if len(reference) > 30:
            reference.popitem(last=False)


def test_lfu_counts_uses_and_forgets_them_with_the_block():
    policy = LFU(3)
    for key in "abc":
        policy.add(key)
    for key in "aac":
        policy.use(key)
        policy.add(key)
    assert [policy.evict(), policy.evict()] == ["b", "c"]
    policy.add("c")
    assert policy.evict() == "c"


def test_arc_keeps_what_was_used_twice_through_a_scan_that_lru_does_not():
    hits = {}
    for name in ("arc", "lru"):
        books = Books(build(name, 100))
        for _ in range(2):
            for key in range(50):
                books.ask(key)
        for key in range(1_000, 2_000):
            books.ask(key)
        hits[name] = sum(books.ask(key) for key in range(50))
    assert hits == {"arc": 50, "lru": 0}


def test_arc_moves_its_target_towards_the_list_whose_ghosts_are_hit():
    policy = ARC(4)
    books = Books(policy)
    for key in (1, 2, 1, 2, 3, 4, 5, 6):
        books.ask(key)
    before = policy.target
    books.ask(3)  # a ghost of those seen once
    assert policy.target > before


def test_s3fifo_lets_one_hit_wonders_go_from_the_small_queue():
    books = Books(S3FIFO(100))
    for key in range(100):
        books.ask(key)
    for key in range(60):
        books.ask(key)
        books.ask(key)
    for key in range(1_000, 3_000):
        books.ask(key)
    assert sum(key in books.evictable for key in range(60)) == 60


def test_s3fifo_takes_a_ghost_back_into_the_main_queue():
    books = Books(S3FIFO(10))
    for key in range(11):
        books.ask(key)
    gone = next(key for key in range(11) if key not in books.evictable)
    books.ask(gone)
    for key in range(100, 104):
        books.ask(key)
    assert gone in books.evictable


def test_w_tinylfu_turns_rare_newcomers_away():
    books = Books(WTinyLFU(100))
    for _ in range(3):
        for key in range(90):
            books.ask(key)
    for key in range(1_000, 1_600):
        books.ask(key)
    assert sum(books.ask(key) for key in range(90)) >= 75


def test_the_sketch_never_counts_too_low_and_halves():
    sketch, often = FrequencySketch(64), 1000  # A number: the hash of a string differs from run to run.
    for _ in range(5):
        sketch.add(often)
    assert sketch.count(often) >= 5
    for number in range(FrequencySketch.SAMPLE * 64 - 5):
        sketch.add(number % 7)
    assert sketch.count(often) < 5


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["push", "remove", "pop"]), st.integers(0, 9), st.integers(0, 5))))
def test_victim_heap_agrees_with_a_sorted_list(calls):
    heap, reference, order = VictimHeap(), {}, 0
    for call, key, score in calls:
        if call == "push":
            order += 1
            heap.push(key, score)
            reference[key] = (score, order)
        elif call == "remove" and key in reference:
            heap.remove(key)
            del reference[key]
        elif call == "pop" and reference:
            lowest = min(reference, key=lambda item: reference[item])
            assert heap.peek() == (reference[lowest][0], lowest)
            assert heap.pop() == lowest
            del reference[lowest]
        assert len(heap) == len(reference)


def test_victim_heap_does_not_keep_what_was_pushed_again():
    heap = VictimHeap()
    for number in range(10_000):
        heap.push(number % 10, number)
    assert len(heap._heap) < 100


def test_product_form_is_attention_times_uses_times_decay():
    policy = ProductA2CR(10, FormulaSettings(time_decay_factor=0.1))
    for key in ("once", "often", "often", "late"):
        if key == "late":
            policy.advance(10.0)  # exp(-1) makes two uses of "often" less than one of "late"
        policy.observe(Access(keys=[key]))
        if key == "often" and len(policy) == 2:
            policy.use(key)
        policy.add(key)
    assert [policy.evict() for _ in range(3)] == ["once", "often", "late"]


@pytest.mark.parametrize("form", [ProductA2CR, WeightedA2CR])
def test_closed_forms_count_attention_and_uses_beyond_eviction(form):
    policy = form(10)
    for _ in range(3):
        policy.observe(Access(keys=["known"]))
        policy.add("known")
        assert policy.evict() == "known"
    for key in ("attended", "ignored", "known"):
        policy.add(key)
    for _ in range(20):
        policy.attend("attended", 0.5)
        policy.attend("ignored", 0.001)
    for key in ("attended", "ignored"):
        policy.use(key)
        policy.add(key)
    assert policy.evict() == "ignored"


@pytest.mark.parametrize("form", [ProductA2CR, WeightedA2CR, WTinyLFU])
def test_a_prompt_is_one_use_of_a_block_however_often_that_goes_up_and_down(form):
    """A hit loads a block, and gives it back when the device lets go of it."""
    policy, moved, asked_for = form(4), 1, 2  # Numbers: a string's place in the sketch differs from run to run.
    for key, prompts in ((moved, 1), (asked_for, 2)):
        for _ in range(prompts):
            policy.observe(Access(keys=[key]))
        policy.add(key)
    for _ in range(3):
        policy.use(moved)
        policy.add(moved)
    if isinstance(policy, WTinyLFU):
        assert (policy._sketch.count(moved), policy._sketch.count(asked_for)) == (1, 2)
    else:
        assert policy.evict() == moved


def test_weighted_form_orders_by_the_sum():
    settings = FormulaSettings(attention_weight=0, frequency_weight=0.3, recency_weight=0.3, time_decay_factor=0.05)
    policy, draw = WeightedA2CR(100, settings), random.Random(3)
    last: dict[int, float] = {}
    uses: dict[int, int] = {}
    for number in range(400):
        key = draw.randrange(60)
        policy.advance(float(number))
        policy.observe(Access(keys=[key]))
        if key in last:
            policy.use(key)
        policy.add(key)
        last[key], uses[key] = float(number), uses.get(key, 0) + 1

    def score(key: int) -> float:
        return 0.3 * uses[key] / (1 + uses[key]) + 0.3 * math.exp(-0.05 * (399 - last[key]))

    victim = policy.evict()
    assert score(victim) <= min(map(score, last)) + 1 / WeightedA2CR.STEPS


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


def test_worth_of_a_constant_hazard_is_that_hazard():
    curve = worth_by_age(np.full(len(AGES), 0.02))
    assert curve == pytest.approx([0.02] * len(AGES), rel=1e-3)


def test_worth_looks_ahead_to_a_wave_and_falls_behind_it():
    wave = np.where((AGES >= 45) & (AGES < 100), 0.05, 1e-6)
    curve = worth_by_age(wave)
    early, close, past = (curve[age_index(age)] for age in (1.0, 40.0, 200.0))
    assert early > 1e-3
    assert close > 1.5 * early
    assert past == pytest.approx(1e-6, rel=0.01)


def test_the_forest_finds_the_feature_and_the_time_that_count():
    draw = np.random.default_rng(0)
    forest = ReuseForest(2, ForestSettings(samples=4_000))
    assert forest.worth([0, 0]) is None
    for number in range(3_000):
        features = [int(draw.integers(0, 8)), int(draw.integers(0, 8))]
        sample = forest.begin(features, 1, number * 1.0)
        if features[1] < 4:
            forest.end(sample, number + float(draw.exponential(20)), hit=True)
        forest.learn(number * 1.0)
    soon, never = forest.worth([3, 2]), forest.worth([3, 6])
    assert soon is not None
    assert never is not None
    assert soon[0] == pytest.approx(1 / 20, rel=0.3)
    assert all(never[age_index(age)] < 0.4 * soon[age_index(age)] for age in (0.0, 5.0, 30.0))


@pytest.mark.parametrize("name", POLICIES)
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


@pytest.mark.parametrize("name", POLICIES)
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


def test_what_was_adopted_teaches_nothing():
    policy = A2CR(20_000)
    policy.adopt(list(range(10_000)))
    policy.observe(Access(keys=list(range(10_000))))
    assert not policy.think()


def test_a_tree_is_learnt_in_parts_each_much_smaller_than_a_tree():
    draw = np.random.default_rng(1)
    forest = ReuseForest(10, ForestSettings())
    for number in range(16_384):
        features = draw.integers(0, 24, 10).tolist()
        sample = forest.begin(features, 1, float(number))
        if features[0] < 12:
            forest.end(sample, number + float(draw.exponential(20)), hit=True)
    parts = 0
    while forest.learn(20_000.0):
        parts += 1
    assert forest.fits == 1
    assert parts > 10
    assert not forest.learn(20_000.0), "nothing is new"


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


def test_the_settings_offer_every_policy_and_codec_there_is():
    def offered(setting: str) -> set[str]:
        allowed = EngineConfig.model_fields[setting].annotation
        return {choice for part in get_args(allowed) for choice in get_args(part) or [part]} - {type(None)}

    assert offered("hmt_policy") == set(POLICIES)
    assert offered("nvme_codec") == set(get_args(CodecName))
