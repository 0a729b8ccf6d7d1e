"""Who is next of several tenants: service shared by tokens and weights, debts, returns, and costs that are settled."""

from collections import Counter

import pytest

from tests.queue_kit import BATCH, INTERACTIVE, REALTIME, Item, drain, queue_of


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
