"""Who is next: order of arrival, priorities that age, items that leave, and what is counted of those who wait."""

from collections import Counter

import pytest

from tests.queue_kit import BATCH, INTERACTIVE, REALTIME, Item, drain, queue_of, same
from wicore_backend.engine.waiting import Backlog

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
