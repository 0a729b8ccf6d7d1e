"""Who is next: books that stay small, whoever comes and goes."""

import gc
import sys

from tests.queue_kit import BATCH, INTERACTIVE, REALTIME, Item, drain, queue_of
from wicore_backend.engine.waiting import IDLE_ACCOUNTS


def reachable(root: object) -> int:
    """Objects that hang on `root`: what it keeps in memory."""
    seen: set[int] = set()
    todo = [root]
    while todo:
        thing = todo.pop()
        if id(thing) not in seen and not isinstance(thing, type) and type(thing) is not type(sys):
            seen.add(id(thing))
            todo += gc.get_referents(thing)
    return len(seen)


def test_memory_stays_bounded_while_a_hundred_thousand_tenants_come_and_go():
    queue = queue_of(*(Item(tenant="always", cost=10**9) for _ in range(2)), aged_share=10**9)
    sizes = []
    for n in range(100_000):
        item = Item(tenant=f"t{n}", arrival=n)
        queue.push(item)
        if n % 3:
            queue.charge(INTERACTIVE, queue.pop(n).item.tenant, n % 5 - 2)
        else:
            queue.remove(item)
        if n in (10_000, 99_999):
            sizes.append(reachable(queue))
    assert len(queue) == 2
    assert sizes[1] <= sizes[0] * 1.1
    assert sizes[1] < 40 * IDLE_ACCOUNTS


def test_memory_does_not_grow_with_pops_and_pushes_of_the_same_items():
    queue = queue_of(
        *(Item(p, f"t{i % 10}", i) for i in range(50) for p in (REALTIME, BATCH)), ageing_s=0, aged_share=2
    )
    before = reachable(queue)
    for now in range(20_000):
        queue.push(queue.pop(now).item, charged=now % 2 == 0)
    assert reachable(queue) < 3 * before


def test_classes_are_forgotten_when_nobody_waits_in_them():
    queue = queue_of()
    empty = reachable(queue)
    for priority in range(1000):
        queue.push(Item(priority, f"t{priority}"))
    drain(queue)
    assert reachable(queue) <= empty + 100
