"""Who is next, in any interleaving: the queue against a naive twin."""

from itertools import count

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.queue_kit import BATCH, INTERACTIVE, REALTIME, Item, same
from wicore_backend.engine.waiting import Backlog, WaitingQueue


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
