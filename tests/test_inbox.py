"""The road into an engine's loop: calls in their order, doors that let nobody in to wait for ever, who is still in."""

import threading
import time

import pytest

from wicore_backend.engine.inbox import Doors, Inbox
from wicore_backend.engine.plan import RejectReason
from wicore_backend.engine.statistics import StatisticsRecorder
from wicore_backend.errors import EngineError, OverloadedError


@pytest.fixture
def recorder():
    return StatisticsRecorder()


@pytest.fixture
def inbox(recorder):
    return Inbox(recorder)


def test_calls_are_made_in_their_order_by_who_takes_them(inbox):
    made: list[int] = []
    for number in range(3):
        inbox.put(lambda number=number: made.append(number))
    assert inbox.take_one(timeout_s=0.0)
    assert made == [0]
    inbox.put(lambda: inbox.put(lambda: made.append(4)))
    inbox.take_all()
    assert made == [0, 1, 2, 4]
    began = time.monotonic()
    assert not inbox.take_one(timeout_s=0.02)
    assert time.monotonic() - began >= 0.02


def test_a_call_that_comes_late_is_awaited(inbox):
    threading.Timer(0.02, inbox.put, [lambda: None]).start()
    assert inbox.take_one()


def test_shut_doors_turn_requests_away_and_count_them(inbox, recorder):
    inbox.admit(lambda: None)
    inbox.shut()
    assert inbox.doors is Doors.SHUT
    for of_request in (inbox.check, lambda: inbox.admit(pytest.fail)):
        with pytest.raises(OverloadedError, match=r"shutting down .*retry after 5 s"):
            of_request()
    with pytest.raises(OverloadedError):
        inbox.ask(pytest.fail)
    assert recorder.rejected[RejectReason.DRAINING] == 2, "what is asked is no request"
    assert inbox.unfinished == 1
    inbox.take_all()


def test_a_broken_loop_is_said_to_be_broken_whatever_comes_after(inbox, recorder):
    inbox.shut()
    inbox.break_down()
    inbox.shut()
    assert inbox.doors is Doors.BROKEN
    for come_in in (inbox.check, lambda: inbox.admit(pytest.fail), lambda: inbox.ask(pytest.fail)):
        with pytest.raises(EngineError, match="broken down"):
            come_in()
    assert not recorder.rejected[RejectReason.DRAINING]


def test_calls_that_a_broken_loop_has_left_are_made_whatever_comes_of_them(inbox):
    made: list[str] = []

    def fail() -> None:
        made.append("fails")
        raise RuntimeError("a block is in two tables")

    inbox.admit(fail)
    inbox.admit(lambda: made.append("ends"))
    inbox.break_down()
    assert made == ["fails", "ends"]


def test_who_waits_for_all_to_leave_hears_of_the_last_and_of_a_broken_loop(inbox):
    assert inbox.wait_until_all_left(0.0)
    for _ in range(2):
        inbox.admit(lambda: None)
    inbox.leave()
    assert not inbox.wait_until_all_left(0.02)
    for end in (inbox.leave, inbox.break_down):
        threading.Timer(0.02, end).start()
        assert inbox.wait_until_all_left(10.0)
        inbox._unfinished += 1  # As one that a broken loop has lost.


def test_no_request_is_behind_the_last_call():
    """It would wait for ever: whoever was let in while the doors were being shut is ahead of what ends the loop."""
    for _ in range(50):
        inbox, order = Inbox(StatisticsRecorder()), list[str]()
        begin, came_in = threading.Barrier(4), list[bool]()

        def come_in(inbox=inbox, order=order, begin=begin, came_in=came_in) -> None:
            begin.wait()
            while True:
                try:
                    inbox.admit(lambda: order.append("request"))
                except OverloadedError:
                    return
                came_in.append(True)

        callers = [threading.Thread(target=come_in) for _ in range(3)]
        for caller in callers:
            caller.start()
        begin.wait()
        inbox.shut()
        inbox.put(lambda order=order: order.append("end"))
        for caller in callers:
            caller.join()
        inbox.take_all()
        assert order == ["request"] * len(came_in) + ["end"]
