"""Who is turned away: deadlines, a queue that is full, what can not be in time, and tenants that flood."""

import pytest

from tests.scheduler_bench import BATCH, REALTIME, Bench, sequence
from wicore_backend.engine.plan import RejectReason
from wicore_backend.engine.request import DeadlineKind, Deadlines


def test_a_deadline_is_missed_once_and_only_while_it_matters():
    b = Bench(running=1)
    all_of_them = Deadlines(queue_s=3, first_token_s=5, total_s=9)
    running, waiting = sequence(4, 50, deadlines=all_of_them), sequence(4, first=50, deadlines=all_of_them)
    b.add(running, waiting)
    missed = []
    for _ in range(12):
        for s, kind in list(b.scheduler.expire(b.now)):
            missed.append((s, kind, b.now))
            b.scheduler.remove(s)
        if b.scheduler.has_work:
            b.step()
    assert missed == [(waiting, DeadlineKind.QUEUE, 3), (running, DeadlineKind.TOTAL, 9)]


def test_deadlines_of_those_who_ended_are_forgotten():
    b = Bench()
    for n in range(2000):
        a = sequence(2, first=10 * n, deadlines=Deadlines(total_s=10**6))
        b.add(a)
        b.scheduler.remove(a)
    assert len(b.scheduler._deadlines._heap) < 200


def test_a_full_queue_turns_away_the_newest_of_the_lowest_class():
    b = Bench(running=1, max_waiting=2)
    b.add(sequence(4, 50))
    b.step()
    low, middle = sequence(4, first=50, priority=BATCH), sequence(4, first=100)
    assert b.add(low, middle) == []
    (refused,) = b.add(sequence(4, first=150, priority=BATCH))
    assert refused.sequence.priority == BATCH
    assert refused.sequence is not low
    assert refused.reason is RejectReason.QUEUE_REQUESTS
    assert refused.retry_after_s > 0
    (refused,) = b.add(sequence(4, first=200, priority=REALTIME))
    assert refused.sequence is low
    b.scheduler.check_integrity()


def test_the_queue_is_bounded_in_tokens_too_but_takes_one_of_any_length():
    b = Bench(running=1, max_waiting_tokens=500)
    b.add(sequence(4, 50))
    b.step()
    assert b.add(sequence(1000, first=50)) == []
    (refused,) = b.add(sequence(4, first=5000))
    assert refused.reason is RejectReason.QUEUE_TOKENS


def test_what_cannot_be_in_time_is_turned_away_before_it_costs_anything():
    b = Bench(budget=100)
    b.teach(step=0.01, token=0.001)
    (late,) = b.add(sequence(1000, deadlines=Deadlines(first_token_s=0.5)))
    assert late.reason is RejectReason.TOO_LATE
    assert late.expected_s == pytest.approx(1.1, rel=0.15)
    assert b.add(sequence(1000, deadlines=Deadlines(first_token_s=2.0))) == []
    b.run()


def test_who_waited_too_long_to_be_in_time_is_given_up_at_the_head_of_the_queue():
    b = Bench(running=1, budget=100)
    b.teach(step=0.01, token=0.001)
    b.add(sequence(4, 50))
    b.step()
    doomed = sequence(1000, first=50, deadlines=Deadlines(first_token_s=5.0), arrival=b.now)
    b.add(doomed)
    b.now += 3
    assert list(b.scheduler.give_up(b.now)) == []
    b.now += 1.5
    (late,) = b.scheduler.give_up(b.now)
    assert late.sequence is doomed
    b.scheduler.check_integrity()


def test_the_time_to_retry_follows_the_rate_at_which_the_queue_moves():
    b = Bench(running=1, budget=64, max_waiting_tokens=700)
    for n in range(30):
        b.add(sequence(10, 10, first=100 * n, arrival=n / 100))
    while (backlog := sum(q.tokens for q in b.scheduler.backlogs().values())) > 80:
        b.step()
    (refused,) = b.add(sequence(690, first=5000))
    assert refused.reason is RejectReason.QUEUE_TOKENS
    # A request of about 20 tokens takes 10 steps of a second.
    assert refused.retry_after_s == pytest.approx(backlog / 2, rel=0.3)


def test_the_queue_before_it_counts_against_a_deadline():
    b = Bench(running=1, budget=64)
    for n in range(30):
        b.add(sequence(10, 10, first=100 * n, arrival=n / 100))
    while (backlog := sum(q.tokens for q in b.scheduler.backlogs().values())) > 80:
        b.step()
    soon = Deadlines(first_token_s=5.0)
    (refused,) = b.add(sequence(10, first=5000, deadlines=soon, arrival=b.now))
    assert refused.reason is RejectReason.TOO_LATE
    assert refused.expected_s == pytest.approx(backlog / 2, rel=0.3)
    assert b.add(sequence(10, first=6000, deadlines=soon, arrival=b.now, priority=REALTIME)) == []


def test_a_tenant_that_floods_slows_itself():
    b = Bench(running=2, budget=64)
    flood = [sequence(10, 10, first=100 * n, tenant="flood", arrival=n / 1000) for n in range(50)]
    modest = [sequence(10, 10, first=10_000 + 100 * n, tenant="modest", arrival=0.1 + n / 1000) for n in range(5)]
    b.add(*flood, *modest)
    while not all(s.answered == 10 for s in modest):
        b.step()
    assert sum(s.answered == 10 for s in flood) <= 8
