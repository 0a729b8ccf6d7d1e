"""The heap that victims come from: a sorted list's order, and no memory of what was pushed again."""

from hypothesis import given, settings
from hypothesis import strategies as st

from wicore_backend.hmt.policy.victim_heap import VictimHeap


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
