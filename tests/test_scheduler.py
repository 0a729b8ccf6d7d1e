"""What each step computes: decodes first, prompts in chunks, images whole, nobody overtaking."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wicore_backend.engine.request import Request, Sequence
from wicore_backend.engine.sampling_params import SamplingParams
from wicore_backend.engine.scheduler import Scheduler
from wicore_backend.hmt.blocks import BlockManager
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.processor.prompt import Prompt, PromptImage


def sequence(prompt: int, answer: int = 10, *, images=(), priority: int = 0, arrival: float = 0.0) -> Sequence:
    spans = tuple(PromptImage(start, length, np.zeros((3, 1, 1), np.uint8), b"") for start, length in images)
    tokens = Prompt(np.arange(prompt, dtype=np.int32), spans)
    request = Request("r", tokens, SamplingParams(), lambda _: None, arrival, priority)
    return Sequence(request, max_tokens=prompt + answer)


def scheduler(*, budget: int = 16, running: int = 4, blocks: int = 1000) -> tuple[Scheduler, BlockManager]:
    groups = [LayerGroup.LOCAL, LayerGroup.GLOBAL]
    layout = KVLayout.of(groups, block_size=4, kv_heads=1, head_dim=4, window=8, bytes_per_value=4)
    books = BlockManager(layout, dict.fromkeys(LayerGroup, blocks + 1), max_chunk=budget)
    return Scheduler(books, max_batch_tokens=budget, max_running=running), books


def step(s: Scheduler) -> list[tuple[Sequence, int, int]]:
    """One step; every sequence that the step completes gets a token."""
    chunks = s.plan()
    ready = [chunk.sequence for chunk in chunks if chunk.completes]
    s.complete(chunks)
    for seq in ready:
        seq.tokens.append(0)
    return [(c.sequence, c.start, c.end) for c in chunks]


def test_a_long_prompt_is_computed_in_chunks_of_the_budget():
    s, _ = scheduler()
    a = sequence(40)
    s.add(a)
    assert [step(s) for _ in range(4)] == [[(a, 0, 16)], [(a, 16, 32)], [(a, 32, 40)], [(a, 40, 41)]]


def test_decodes_come_first_and_prefill_takes_the_rest():
    s, _ = scheduler()
    a, b = sequence(3), sequence(40)
    s.add(a)
    step(s)
    s.add(b)
    assert step(s) == [(a, 3, 4), (b, 0, 15)]


def test_several_prompts_share_a_step():
    s, _ = scheduler()
    a, b, c = sequence(5), sequence(6), sequence(9)
    for x in (a, b, c):
        s.add(x)
    assert step(s) == [(a, 0, 5), (b, 0, 6), (c, 0, 5)]


def test_an_image_is_never_split():
    s, _ = scheduler(budget=16)
    a = sequence(40, images=[(10, 8), (20, 12)])
    s.add(a)
    assert [step(s)[0][1:] for _ in range(4)] == [(0, 10), (10, 20), (20, 36), (36, 40)]


def test_an_image_that_does_not_fit_beside_the_decodes_waits_for_the_next_step():
    s, _ = scheduler(budget=16, running=4)
    a, b = sequence(14), sequence(12, images=[(0, 12)])
    s.add(a)
    s.add(b)
    assert step(s) == [(a, 0, 14)]
    assert step(s) == [(a, 14, 15), (b, 0, 12)]


def test_the_queue_is_first_come_first_served_within_a_priority():
    s, _ = scheduler(running=1)
    late, early, urgent = sequence(2, arrival=2.0), sequence(2, arrival=1.0), sequence(2, arrival=3.0, priority=-1)
    for x in (late, early, urgent):
        s.add(x)
    assert s.waiting == [urgent, early, late]


def test_no_more_run_than_allowed_and_none_overtakes_one_that_does_not_fit():
    s, books = scheduler(running=2, blocks=20)
    big, bigger, small = sequence(40, answer=8), sequence(40, answer=8), sequence(2, answer=2)
    for x in (big, bigger, small):
        s.add(x)
    step(s)
    assert s.running == [big]
    assert s.waiting == [bigger, small]
    s.remove(big)
    for _ in range(3):
        step(s)
    assert s.running == [bigger, small]
    s.remove(small)
    s.remove(bigger)
    books.check_integrity()
    assert not s.has_work


@settings(max_examples=100, deadline=None)
@given(
    budget=st.integers(12, 40),
    running=st.integers(1, 6),
    requests=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 12), st.booleans()), max_size=12),
    removals=st.sets(st.integers(0, 11)),
)
def test_every_token_is_computed_once_in_order_whatever_the_mix(budget, running, requests, removals):
    budget += running
    s, books = scheduler(budget=budget, running=running, blocks=40)
    sequences = []
    for length, answer, image in requests:
        images = [(length // 3, min(12, length - length // 3))] if image else []
        sequences.append(sequence(length, answer, images=images))
        s.add(sequences[-1])
    computed = dict.fromkeys(range(len(sequences)), 0)
    for turn in range(2000):
        if not s.has_work:
            break
        if (
            turn in removals
            and turn < len(sequences)
            and (sequences[turn] in s.running or sequences[turn] in s.waiting)
        ):
            s.remove(sequences[turn])
            continue
        chunks = step(s)
        assert chunks, "work, but an empty step"
        assert sum(end - start for _, start, end in chunks) <= budget
        assert len(s.running) <= running
        for seq, start, end in chunks:
            index = sequences.index(seq)
            assert start == computed[index] < end
            computed[index] = end
            for image in seq.request.prompt.images:
                assert not image.start < end < image.end
            if len(seq.tokens) >= seq.max_tokens:
                s.remove(seq)
        books.check_integrity()
    assert not s.has_work
    assert all(pool.used == 0 for pool in books.pools.values())


def test_a_waiting_request_is_removed_without_a_trace():
    s, books = scheduler()
    a = sequence(4)
    s.add(a)
    s.remove(a)
    assert not s.has_work
    books.check_integrity()
    with pytest.raises(ValueError, match="not in list"):
        s.remove(a)
