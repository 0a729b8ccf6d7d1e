"""Replacement policies: the books of every one of them, and what is particular to each."""

import random
from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wicore_backend.hmt.policy import POLICIES, Access, Policy
from wicore_backend.hmt.policy.arc import ARC
from wicore_backend.hmt.policy.lfu import LFU
from wicore_backend.hmt.policy.s3fifo import S3FIFO
from wicore_backend.hmt.policy.victim_heap import VictimHeap
from wicore_backend.hmt.policy.w_tinylfu import FrequencySketch, WTinyLFU

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
    books = Books(POLICIES[name](capacity))
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
    for length in (4_000, 16_000):
        books = Books(POLICIES[name](100))
        for key in range(length):
            books.policy.advance(float(key))
            books.ask(key)
            if key % 3 == 0:
                books.ask(key // 2)
        sizes.append(reachable(books.policy))
    assert sizes[1] < 1.5 * sizes[0] + 500


@every_policy
def test_a_block_in_use_is_never_a_victim(name):
    policy = POLICIES[name](4)
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
    books, draw = Books(POLICIES[name](50)), random.Random(1)
    hits = 0
    for number in range(20_000):
        books.policy.advance(number / 10)
        popular = draw.random() < 0.5
        hits += books.ask(draw.randrange(25) if popular else 1000 + draw.randrange(5_000)) and popular
    assert hits > 0.6 * 10_000


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
        books = Books(POLICIES[name](100))
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
    sketch = FrequencySketch(64)
    for _ in range(5):
        sketch.add("often")
    assert sketch.count("often") >= 5
    for number in range(FrequencySketch.SAMPLE * 64 - 5):
        sketch.add(number % 7)
    assert sketch.count("often") < 5


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
