"""Who is next: priorities that age, tenants that share, items that come back, and books that stay small."""

import gc
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from wicore_backend.engine.waiting import IDLE_ACCOUNTS, Backlog, WaitingQueue

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


# Order


def test_a_tenants_items_go_in_order_of_arrival_whatever_the_order_of_pushes():
    items = [Item(arrival=t) for t in (3, 1, 2, 0)]
    assert [i.arrival for i in drain(queue_of(*items))] == [0, 1, 2, 3]


def test_items_of_one_instant_go_in_order_of_pushes():
    items = [Item() for _ in range(20)]
    assert same(drain(queue_of(*items)), items)


def test_a_higher_class_goes_first_however_late_it_comes():
    items = [Item(p, arrival=t) for t, p in enumerate([BATCH, INTERACTIVE, REALTIME, BATCH, INTERACTIVE, REALTIME])]
    order = [(i.priority, i.arrival) for i in drain(queue_of(*items))]
    assert order == [(-10, 2), (-10, 5), (0, 1), (0, 4), (10, 0), (10, 3)]


def test_a_thousand_tenants_of_one_request_each_go_in_order_of_arrival():
    items = [Item(tenant=f"t{i}", arrival=i, cost=1 + i % 7) for i in range(1000)]
    assert same(drain(queue_of(*reversed(items))), items)


def test_peek_says_what_pop_takes_and_changes_nothing():
    queue = queue_of(*(Item(p, t, a) for a in range(9) for p in (REALTIME, BATCH) for t in "xyz"), ageing_s=5)
    now = 0.0
    while queue:
        now += 1
        seen = [queue.peek(now) for _ in range(3)]
        taken = queue.pop(now)
        assert all(s.item is taken.item and s.promoted == taken.promoted for s in seen)
    assert queue.peek(now) is None


# Ageing


def test_every_so_manyth_pop_is_promoted_once_the_oldest_has_waited_long_enough_and_none_before():
    old = [Item(BATCH) for _ in range(20)]
    queue = queue_of(*old, ageing_s=10, aged_share=4)
    promoted = []
    for n in range(1, 61):
        queue.push(Item(REALTIME, arrival=n / 2))
        taken = queue.pop(now=n / 2)
        assert taken.promoted == (taken.item.priority == BATCH)
        if taken.promoted:
            promoted.append(n)
    assert promoted == list(range(20, 61, 4)), "waited 10 s from the 20th pop on"


def test_a_class_becomes_of_age_to_the_instant():
    for now, promoted in ((9.999, False), (10.0, True)):
        queue = queue_of(Item(BATCH), Item(REALTIME), ageing_s=10, aged_share=1)
        assert queue.pop(now).promoted is promoted


def test_nothing_starves_under_a_saturating_higher_class():
    low = [
        Item(priority, tenant, cost=1 + 99 * (tenant == "big")) for priority in (5, 10) for tenant in ("big", "small")
    ]
    queue = queue_of(*low, ageing_s=3, aged_share=5)
    served = []
    for now in range(100):
        queue.push(Item(REALTIME, arrival=now))
        queue.push(Item(REALTIME, arrival=now))
        if (item := queue.pop(now).item).priority != REALTIME:
            served.append((now, item.priority))
    assert served == [(4, 5), (9, 5), (14, 10), (19, 10)]


def test_a_tenant_in_debt_does_not_starve_under_ever_new_tenants_of_its_own_class():
    queue = queue_of(Item(tenant="big", cost=10**9), Item(tenant="big"), ageing_s=5, aged_share=10)
    for now in range(100):
        for n in range(2):
            queue.push(Item(tenant=f"new {now} {n}", arrival=now))
        taken = queue.pop(now)
        assert not taken.promoted, "it goes before its own class, and preempts nobody"
        if taken.item.tenant == "big" and now:
            break
    assert now <= 10
    assert "big" not in {i.tenant for i in queue}


def test_a_long_backlog_of_one_tenant_does_not_keep_the_turns_by_age_from_others():
    queue = queue_of(*(Item(BATCH, "flood") for _ in range(1000)), ageing_s=10, aged_share=2)
    turns: Counter[str] = Counter()
    for now in range(100, 200):
        queue.push(Item(REALTIME, arrival=now))
        if now % 4 == 0:
            queue.push(Item(BATCH, "modest", arrival=now))
        taken = queue.pop(now)
        if taken.promoted:
            turns[taken.item.tenant] += 1
    assert turns == {"flood": 25, "modest": 25}


# Tenants


def shares(queue, *, pops: int) -> Counter[str]:
    """Tokens served to each tenant."""
    tokens: Counter[str] = Counter()
    for _ in range(pops):
        item = queue.pop(0.0).item
        tokens[item.tenant] += item.cost
    return tokens


def test_a_flooding_tenant_slows_itself_and_not_the_others():
    queue = queue_of(*(Item(tenant="flood") for _ in range(10_000)), *(Item(tenant="modest") for _ in range(100)))
    assert shares(queue, pops=200) == {"flood": 1000, "modest": 1000}


def test_service_is_shared_by_tokens_not_by_requests():
    queue = queue_of(*(Item(tenant="long", cost=90) for _ in range(100)), *(Item(tenant="short") for _ in range(900)))
    tokens = shares(queue, pops=500)
    assert abs(tokens["long"] - tokens["short"]) <= 90


def test_service_is_shared_by_weight():
    weights = {"three": 3.0, "one": 1.0}
    queue = queue_of(*(Item(tenant=t) for t in weights for _ in range(400)), weights=weights)
    assert shares(queue, pops=400) == {"three": 3000, "one": 1000}


def test_a_tenant_with_one_request_at_a_time_gets_its_half():
    queue = queue_of(*(Item(tenant="flood") for _ in range(1000)))
    served: Counter[str] = Counter()
    for now in range(100):
        if not any(i.tenant == "modest" for i in queue):
            queue.push(Item(tenant="modest", arrival=now))
        served[queue.pop(now).item.tenant] += 1
    assert served == {"flood": 50, "modest": 50}


def test_an_idle_tenant_saves_up_no_credit():
    queue = queue_of(Item(tenant="idler"), *(Item(tenant="busy", arrival=1) for _ in range(1000)))
    shares(queue, pops=500)
    for _ in range(100):
        queue.push(Item(tenant="idler", arrival=2))
    assert shares(queue, pops=100) == {"idler": 500, "busy": 500}


def test_going_idle_for_a_moment_cancels_no_debt():
    queue = queue_of(Item(tenant="big", cost=1000), *(Item(tenant="small", arrival=1) for _ in range(200)))
    assert queue.pop(0.0).item.tenant == "big"
    queue.push(Item(tenant="big", arrival=0.5))
    assert shares(queue, pops=100) == {"small": 1000}
    assert queue.pop(0.0).item.tenant == "big"


def test_classes_keep_separate_accounts():
    queue = queue_of(
        *(Item(REALTIME, "a", cost=1000) for _ in range(2)), Item(INTERACTIVE, "a"), Item(INTERACTIVE, "b", arrival=1)
    )
    assert [(i.priority, i.tenant) for i in drain(queue)] == [(-10, "a"), (-10, "a"), (0, "a"), (0, "b")]


# Coming back and settling


def test_an_item_that_comes_back_goes_to_its_place_and_is_not_charged_twice():
    first, second = Item(tenant="a", cost=10), Item(tenant="a", cost=10)
    queue = queue_of(first, second, *(Item(tenant="b", cost=10, arrival=1) for _ in range(4)))
    assert queue.pop(0.0).item is first
    queue.push(first, charged=True)
    order = drain(queue)
    assert [i.tenant for i in order] == ["b", "a", "a", "b", "b", "b"], (
        "a owes 10 for `first`, and nothing more for its return"
    )
    assert order[1] is first
    assert order[2] is second


@pytest.mark.parametrize(("settled", "before_a"), [(0, 10), (100, 20), (-50, 5), (-100, 0)])
def test_charge_settles_what_an_item_really_took(settled, before_a):
    queue = queue_of(*(Item(tenant="a", cost=100) for _ in range(2)), *(Item(tenant="b", arrival=1) for _ in range(50)))
    assert queue.pop(0.0).item.tenant == "a"
    queue.charge(INTERACTIVE, "a", settled)
    tenants = [i.tenant for i in drain(queue)]
    assert abs(tenants.index("a") - before_a) <= 1


def test_estimates_that_are_ten_times_too_high_cost_a_tenant_nothing_once_settled():
    queue = queue_of(*(Item(tenant=t, cost=c) for t, c in (("over", 100), ("exact", 10)) for _ in range(1000)))
    served: Counter[str] = Counter()
    for _ in range(1000):
        tenant = queue.pop(0.0).item.tenant
        served[tenant] += 1
        if tenant == "over":
            queue.charge(INTERACTIVE, tenant, -90)
    assert served == {"over": 500, "exact": 500}


def test_a_refund_from_before_is_no_credit():
    queue = queue_of(Item(tenant="a", cost=10_000), *(Item(tenant="b", arrival=1) for _ in range(2000)))
    queue.pop(0.0)
    shares(queue, pops=900)
    for _ in range(100):
        queue.push(Item(tenant="a", arrival=2))
    queue.charge(INTERACTIVE, "a", -10_000)
    assert shares(queue, pops=100) == {"a": 500, "b": 500}


def test_charging_a_class_in_which_nobody_waits_or_a_stranger_is_no_error():
    queue = queue_of(Item(tenant="a"), Item(tenant="new", arrival=1), Item(tenant="a", arrival=2))
    queue.charge(BATCH, "a", 100)
    queue.charge(INTERACTIVE, "stranger", -100)
    queue.charge(INTERACTIVE, "stranger", 15)
    queue.push(Item(tenant="stranger"))
    assert [i.tenant for i in drain(queue)] == ["a", "new", "a", "stranger"]


# Leaving


def test_an_item_can_be_removed_from_anywhere():
    for place in range(18):
        items = [Item(p, t, a) for p in (REALTIME, BATCH) for t in "abc" for a in range(3)]
        queue = queue_of(*items)
        queue.remove(items[place])
        order = sorted(drain(queue), key=lambda i: (i.priority, i.tenant))
        assert same(order, items[:place] + items[place + 1 :])


def test_only_what_waits_can_be_removed_and_only_by_identity():
    item = Item()
    queue = queue_of(item)
    with pytest.raises(KeyError, match="does not wait"):
        queue.remove(Item())
    queue.remove(item)
    with pytest.raises(KeyError):
        queue.remove(item)
    assert queue.peek(0.0) is None
    with pytest.raises(IndexError, match="empty"):
        queue.pop(0.0)


def test_a_removed_item_costs_its_tenant_nothing():
    gone = [Item(tenant="a", cost=1000) for _ in range(5)]
    queue = queue_of(*gone, Item(tenant="a", arrival=1), Item(tenant="b", arrival=2))
    for item in gone:
        queue.remove(item)
    assert [i.tenant for i in drain(queue)] == ["a", "b"]


def test_the_newest_of_the_lowest_class_is_the_one_to_turn_away():
    queue = queue_of(Item(BATCH, "a", 1), Item(BATCH, "b", 3), Item(BATCH, "c", 2), Item(REALTIME, "a", 9))
    turned_away = []
    while (item := queue.newest_of_lowest()) is not None:
        queue.remove(item)
        turned_away.append((item.priority, item.arrival))
    assert turned_away == [(10, 3), (10, 2), (10, 1), (-10, 9)]


def test_nothing_that_has_been_served_is_turned_away():
    item, other = Item(BATCH, arrival=5), Item(INTERACTIVE, arrival=1)
    queue = queue_of(item)
    queue.pop(5.0)
    queue.push(item, charged=True)
    assert queue.newest_of_lowest() is None
    queue.push(other)
    assert queue.newest_of_lowest() is other


# Books


def test_what_waits_is_counted_by_class():
    items = [Item(BATCH, "a", 3.0, 5), Item(BATCH, "b", 2.0, 7), Item(REALTIME, "a", 9.0, 11)]
    queue = queue_of(*items)
    assert queue.backlogs() == {REALTIME: Backlog(1, 11, 9.0), BATCH: Backlog(2, 12, 2.0)}
    assert (len(queue), queue.tokens) == (3, 23)
    assert same(queue, items)
    drain(queue)
    assert (queue.backlogs(), len(queue), queue.tokens) == ({}, 0, 0)


def test_an_item_is_read_once_so_that_it_may_change_while_it_waits():
    item = Item(BATCH, "a", 1.0, 10)
    queue = queue_of(item, Item(INTERACTIVE))
    item.priority, item.tenant, item.arrival, item.cost = REALTIME, "z", 0.0, 99
    assert queue.tokens == 20
    assert drain(queue)[1] is item
    assert queue.tokens == 0


def test_an_item_waits_once():
    item = Item()
    with pytest.raises(ValueError, match="waits already"):
        queue_of(item, item)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"ageing_s": -1.0}, "ageing_s"),
        ({"ageing_s": float("nan")}, "ageing_s"),
        ({"aged_share": 0}, "aged_share"),
        ({"weights": {"a": 0.0}}, "'a'"),
        ({"weights": {"a": float("inf")}}, "'a'"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(options, name):
    with pytest.raises(ValueError, match=name):
        queue_of(**options)


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


# Against a naive twin


class Reference:
    """The same queue as one list that is searched from end to end."""

    def __init__(self, ageing_s, aged_share, weights):
        self.ageing_s, self.aged_share, self.weights = ageing_s, aged_share, weights
        self.waiting = []  # (item, charged, order)
        self.accounts = {}  # (priority, tenant) -> [counter, floor, served]
        self.pops = 0
        self.serial = count()

    def heads(self, priority):
        """The oldest of each tenant of a class, with its account."""
        first = {}
        for entry in sorted(self.waiting, key=lambda e: e[2], reverse=True):
            if entry[0].priority == priority:
                first[entry[0].tenant] = entry
        return [(entry, self.accounts[priority, tenant]) for tenant, entry in first.items()]

    def account(self, priority, tenant):
        least = min((a[0] for _, a in self.heads(priority)), default=0.0)
        return self.accounts.setdefault((priority, tenant), [least, least, float("-inf")]), least

    def push(self, item, charged):
        account, least = self.account(item.priority, item.tenant)
        if not any((e[0].priority, e[0].tenant) == (item.priority, item.tenant) for e in self.waiting):
            account[:2] = max(account[0], least), least
        self.waiting.append((item, charged, (item.arrival, not charged, next(self.serial))))

    def peek(self, now):
        if not self.waiting:
            return None
        oldest = min(self.waiting, key=lambda e: e[2])
        highest = min(e[0].priority for e in self.waiting)
        if (self.pops + 1) % self.aged_share == 0 and now - oldest[0].arrival >= self.ageing_s:
            heads = self.heads(oldest[0].priority)
            patient = min(heads, key=lambda h: (max(h[1][2], h[0][0].arrival), h[0][2]))[0]
            return patient, oldest[0].priority > highest
        heads = self.heads(highest)
        return min(heads, key=lambda h: (h[1][0], h[0][2]))[0], False

    def pop(self, now):
        entry, _ = self.peek(now)
        self.pops += 1
        self.accounts[entry[0].priority, entry[0].tenant][2] = now
        if not entry[1]:
            self.charge(entry[0].priority, entry[0].tenant, entry[0].cost)
        self.remove(entry[0])

    def remove(self, item):
        self.waiting = [e for e in self.waiting if e[0] is not item]
        if not any(e[0].priority == item.priority for e in self.waiting):
            self.accounts = {k: a for k, a in self.accounts.items() if k[0] != item.priority}

    def charge(self, priority, tenant, tokens):
        if any(e[0].priority == priority for e in self.waiting):
            account, _ = self.account(priority, tenant)
            account[0] = max(account[0] + tokens / self.weights.get(tenant, 1.0), account[1])

    def newest_of_lowest(self):
        fresh = [e for e in self.waiting if not e[1]]
        return max(fresh, key=lambda e: (e[0].priority, e[2]))[0] if fresh else None


class AgainstReference(RuleBasedStateMachine):
    """Any interleaving of operations gives the same as the naive twin."""

    priorities = st.sampled_from([REALTIME, INTERACTIVE, BATCH])
    tenants = st.sampled_from(["a", "b", "c"])

    def __init__(self):
        super().__init__()
        options = {"ageing_s": 3.0, "aged_share": 3, "weights": {"a": 2.0, "b": 0.5}}
        self.queue: WaitingQueue[Item] = WaitingQueue(**options)
        self.reference = Reference(**options)
        self.popped: list[Item] = []
        self.now = 0.0

    @rule(priority=priorities, tenant=tenants, delay=st.integers(0, 3), cost=st.integers(0, 20))
    def push(self, priority, tenant, delay, cost):
        item = Item(priority, tenant, self.now - delay, cost)
        self.queue.push(item)
        self.reference.push(item, charged=False)

    @rule(data=st.data())
    @precondition(lambda self: self.popped)
    def come_back(self, data):
        item = self.popped.pop(data.draw(st.integers(0, len(self.popped) - 1)))
        self.queue.push(item, charged=True)
        self.reference.push(item, charged=True)

    @rule()
    @precondition(lambda self: len(self.queue) > 0)
    def pop(self):
        self.popped.append(self.queue.pop(self.now).item)
        self.reference.pop(self.now)

    @rule(data=st.data())
    @precondition(lambda self: len(self.queue) > 0)
    def remove(self, data):
        item = list(self.queue)[data.draw(st.integers(0, len(self.queue) - 1))]
        self.queue.remove(item)
        self.reference.remove(item)

    @rule(priority=priorities, tenant=tenants, tokens=st.integers(-30, 30))
    def charge(self, priority, tenant, tokens):
        self.queue.charge(priority, tenant, tokens)
        self.reference.charge(priority, tenant, tokens)

    @rule(seconds=st.integers(1, 3))
    def time_passes(self, seconds):
        self.now += seconds

    @invariant()
    def agrees(self):
        expected, seen = self.reference.peek(self.now), self.queue.peek(self.now)
        if expected is None:
            assert seen is None
        else:
            assert seen is not None
            assert seen.item is expected[0][0]
            assert seen.promoted == expected[1]
        assert self.queue.newest_of_lowest() is self.reference.newest_of_lowest()
        waiting = [e[0] for e in self.reference.waiting]
        assert same(self.queue, waiting)
        assert self.queue.tokens == sum(i.cost for i in waiting)
        assert self.queue.backlogs() == {
            p: Backlog(len(of), sum(i.cost for i in of), min(i.arrival for i in of))
            for p in (REALTIME, INTERACTIVE, BATCH)
            if (of := [i for i in waiting if i.priority == p])
        }


TestAgainstReference = AgainstReference.TestCase
TestAgainstReference.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
