"""What tests of the queue of those who wait share: items, and queues of them."""

from dataclasses import dataclass

from wicore_backend.engine.waiting import WaitingQueue

REALTIME, INTERACTIVE, BATCH = -10, 0, 10


@dataclass
class Item:
    """Compares by value and has no hash, so that a queue which did not go by identity would show."""

    priority: int = INTERACTIVE
    tenant: str = ""
    arrival: float = 0.0
    cost: int = 10


def queue_of(*items, ageing_s=1e9, aged_share=10, weights=None) -> WaitingQueue[Item]:
    queue: WaitingQueue[Item] = WaitingQueue(ageing_s=ageing_s, aged_share=aged_share, weights=weights)
    for item in items:
        queue.push(item)
    return queue


def drain(queue, now=0.0) -> list[Item]:
    return [queue.pop(now).item for _ in range(len(queue))]


def same(items, expected) -> bool:
    """Whether they are the very same objects."""
    return [id(x) for x in items] == [id(x) for x in expected]
