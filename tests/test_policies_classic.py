"""Replacement policies from the literature: what is particular to LRU, LFU, ARC, S3-FIFO and W-TinyLFU."""

import random
from collections import OrderedDict

from tests.policy_kit import Books, build
from wicore_backend.hmt.policy import POLICIES
from wicore_backend.hmt.policy.arc import ARC
from wicore_backend.hmt.policy.lfu import LFU
from wicore_backend.hmt.policy.s3fifo import S3FIFO
from wicore_backend.hmt.policy.w_tinylfu import FrequencySketch, WTinyLFU


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
