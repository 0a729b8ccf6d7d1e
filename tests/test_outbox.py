"""From events to responses: order kept, tokens grouped, one end each, lost clients noticed."""

import gc
import threading
import time
import weakref

import pytest

from tests.waiting import wait_until
from wicore_backend.engine.request import FinishedEvent, FinishReason, TokensEvent, Usage
from wicore_backend.errors import DeadlineExceededError, EngineError
from wicore_backend.triton.outbox import Channel, Outbox, Reply

USAGE = Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=0, queue_s=0.0, ttft_s=0.1, total_s=0.2)


class FakeWire:
    def __init__(self) -> None:
        self.sent: list[Reply | Exception] = []
        self.probes = 0
        self.accepting = True
        self.accepts_all_but_the_last = False
        self.gone = False
        self.slow = threading.Event()
        self.slow.set()
        self.broken = False

    def send(self, reply: Reply) -> None:
        self.slow.wait(5)
        if self.broken or "unsayable" in reply.text:
            raise RuntimeError("the pipe is gone")
        self.sent.append(reply)

    def fail(self, error: Exception) -> None:
        if self.broken:
            raise RuntimeError("the pipe is gone")
        self.sent.append(error)

    def probe(self) -> None:
        self.probes += 1

    def accepts(self, *, last: bool) -> bool:
        return self.accepting or (self.accepts_all_but_the_last and not last)

    def is_cancelled(self) -> bool:
        return self.gone


@pytest.fixture
def outbox():
    box = Outbox(patrol_s=(0.02, 0.02))
    yield box
    box.close()


def opened(outbox: Outbox, wire: FakeWire, *, stream: bool, answers: int = 1, cancel=pytest.fail) -> Channel:
    channel = outbox.channel(wire, stream=stream, answers=answers, cancel=cancel)
    outbox.begin(channel)
    return channel


def tokens(*ids: int) -> TokensEvent:
    return TokensEvent(ids, "".join(chr(97 + i) for i in ids))


END = FinishedEvent(FinishReason.STOP, USAGE)


def said(wire: FakeWire) -> list:
    """What was sent, without empty responses."""
    return [reply for reply in wire.sent if reply != Reply()]


def test_a_stream_sends_tokens_as_they_come_and_one_end(outbox):
    wire = FakeWire()
    channel = opened(outbox, wire, stream=True)
    channel.put(tokens(0))
    wait_until(lambda: len(wire.sent) == 1)
    channel.put(tokens(1))
    channel.put(END)
    wait_until(lambda: wire.sent[-1].reason is not None)
    assert "".join(reply.text for reply in wire.sent) == "ab"
    assert [reply.reason for reply in wire.sent].count(None) == len(wire.sent) - 1
    assert wire.sent[-1].usage == USAGE


def test_what_has_ended_is_freed_without_a_collection(outbox):
    def answered() -> weakref.ref[FakeWire]:
        wire, leads_back = FakeWire(), list[Channel]()
        leads_back.append(opened(outbox, wire, stream=True, cancel=leads_back.clear))
        leads_back[0].put(END)
        wait_until(lambda: said(wire))
        return weakref.ref(wire)

    gc.disable()
    try:
        freed = answered()
        outbox.post(lambda: None)  # What the thread did last, it holds until there is something else.
        wait_until(lambda: freed() is None)
    finally:
        gc.enable()


def test_tokens_that_come_while_the_wire_is_slow_leave_together(outbox):
    wire = FakeWire()
    channel = opened(outbox, wire, stream=True)
    wire.slow.clear()
    for token in range(20):
        channel.put(tokens(token))
    channel.put(END)
    wire.slow.set()
    wait_until(lambda: wire.sent and wire.sent[-1].reason is not None)
    assert len(said(wire)) <= 3
    assert [token for reply in wire.sent for token in reply.token_ids] == list(range(20))


def test_without_streaming_there_is_exactly_one_response(outbox):
    wire = FakeWire()
    channel = opened(outbox, wire, stream=False)
    channel.put(tokens(0))
    time.sleep(0.05)
    assert wire.sent == []
    channel.put(tokens(1))
    channel.put(END)
    wait_until(lambda: wire.sent)
    assert [(reply.text, reply.reason) for reply in wire.sent] == [("ab", FinishReason.STOP)]


def test_an_error_before_the_first_token_is_an_error_and_after_it_a_last_response(outbox):
    early, late = FakeWire(), FakeWire()
    error = EngineError("broke")
    opened(outbox, early, stream=True).put(FinishedEvent(FinishReason.ERROR, USAGE, error))
    channel = opened(outbox, late, stream=True)
    channel.put(tokens(0))
    wait_until(lambda: said(late))
    channel.put(FinishedEvent(FinishReason.ERROR, USAGE, error))
    wait_until(lambda: early.sent and len(said(late)) == 2)
    assert said(early) == [error]
    assert (said(late)[1].reason, said(late)[1].error) == (FinishReason.ERROR, error)


def test_what_was_produced_before_a_deadline_is_kept_without_streaming_too(outbox):
    wire = FakeWire()
    channel = opened(outbox, wire, stream=False)
    channel.put(tokens(0))
    channel.put(FinishedEvent(FinishReason.DEADLINE, USAGE, DeadlineExceededError("late")))
    wait_until(lambda: wire.sent)
    assert (wire.sent[0].text, wire.sent[0].reason) == ("a", FinishReason.DEADLINE)


def test_a_client_that_goes_away_is_noticed_once_also_without_tokens(outbox):
    wire = FakeWire()
    cancels: list[int] = []
    opened(outbox, wire, stream=False, cancel=lambda: cancels.append(1))
    wait_until(lambda: wire.probes)
    wire.gone = True
    wait_until(lambda: cancels)
    time.sleep(0.1)
    assert cancels == [1]


def test_a_broken_wire_cancels_its_request_and_leaves_the_others_alone(outbox):
    broken, sound = FakeWire(), FakeWire()
    broken.broken = True
    cancels: list[int] = []
    bad = opened(outbox, broken, stream=True, cancel=lambda: cancels.append(1))
    good = opened(outbox, sound, stream=True)
    bad.put(tokens(0))
    good.put(tokens(0))
    good.put(END)
    wait_until(lambda: cancels and sound.sent and sound.sent[-1].reason is not None)
    bad.put(FinishedEvent(FinishReason.CANCELLED, USAGE))
    time.sleep(0.05)
    assert cancels == [1]


@pytest.mark.parametrize("with_the_end", [False, True])
def test_a_response_that_cannot_be_made_still_ends_its_request_with_an_error(outbox, with_the_end):
    wire = FakeWire()
    cancels: list[int] = []
    channel = opened(outbox, wire, stream=True, cancel=lambda: cancels.append(1))
    channel.put(tokens(0))
    wait_until(lambda: said(wire))
    wire.accepting, wire.accepts_all_but_the_last = False, True
    channel.put(TokensEvent((1,), "unsayable"))
    if not with_the_end:
        wait_until(lambda: cancels)
        channel.put(tokens(2))
    channel.put(FinishedEvent(FinishReason.CANCELLED, USAGE))
    time.sleep(0.05)
    assert len(said(wire)) == 1, "the end waits for its turn as any other"
    wire.accepting = True
    outbox.post(channel.flush)
    wait_until(lambda: len(said(wire)) == 2)
    assert "could not be sent: the pipe is gone" in str(wire.sent[-1])
    assert cancels == [1]
    assert not channel.open


def test_every_end_is_told_whatever_road_it_took():
    ends: list[FinishedEvent] = []
    box = Outbox(on_end=ends.append)
    broken = FakeWire()
    broken.broken = True
    error = EngineError("broke")
    opened(box, FakeWire(), stream=True).put(END)
    opened(box, FakeWire(), stream=True).put(FinishedEvent(FinishReason.ERROR, USAGE, error))
    opened(box, broken, stream=True, cancel=lambda: None).put(END)
    box.close()
    assert sorted(end.reason for end in ends) == ["error", "stop", "stop"]


def test_whoever_is_told_of_the_ends_cannot_end_the_sending():
    def broken(_end: FinishedEvent) -> None:
        raise RuntimeError("no metrics")

    box = Outbox(on_end=broken)
    for _ in range(2):
        wire = FakeWire()
        opened(box, wire, stream=True).put(END)
        wait_until(lambda wire=wire: said(wire))
    box.close()


def test_no_event_is_lost_between_the_threads(outbox):
    wires = [FakeWire() for _ in range(8)]
    channels = [opened(outbox, wire, stream=True) for wire in wires]

    def put() -> None:
        for token in range(500):
            for channel in channels:
                channel.put(TokensEvent((token,), ""))
        for channel in channels:
            channel.put(END)

    thread = threading.Thread(target=put)
    thread.start()
    wait_until(lambda: all(wire.sent and wire.sent[-1].reason is not None for wire in wires))
    thread.join()
    for wire in wires:
        assert [token for reply in wire.sent for token in reply.token_ids] == list(range(500))


def test_what_the_wire_does_not_accept_yet_waits_and_leaves_whole(outbox):
    wire = FakeWire()
    wire.accepting = False
    channel = opened(outbox, wire, stream=True)
    channel.put(tokens(0))
    channel.put(END)
    wait_until(lambda: wire.probes)
    time.sleep(0.05)
    assert wire.sent == []
    probes = wire.probes
    time.sleep(0.1)
    assert wire.probes == probes, "a request that is ending is not probed any more"
    wire.accepting = True
    outbox.post(channel.flush)
    wait_until(lambda: wire.sent)
    assert [(reply.text, reply.reason) for reply in wire.sent] == [("a", FinishReason.STOP)]


def test_tokens_pass_while_only_the_end_has_to_wait(outbox):
    wire = FakeWire()
    wire.accepting, wire.accepts_all_but_the_last = False, True
    channel = opened(outbox, wire, stream=True)
    channel.put(tokens(0))
    wait_until(lambda: wire.sent)
    channel.put(tokens(1))
    channel.put(END)
    time.sleep(0.05)
    assert all(reply.reason is None for reply in wire.sent)
    wire.accepting = True
    outbox.post(channel.flush)
    wait_until(lambda: wire.sent[-1].reason)
    assert "".join(reply.text for reply in wire.sent) == "ab"


def test_closing_sends_what_is_left_even_where_the_wire_does_not_accept():
    box = Outbox()
    wire = FakeWire()
    wire.accepting = False
    opened(box, wire, stream=False).put(END)
    box.close()
    assert [reply.reason for reply in wire.sent] == [FinishReason.STOP]


def test_an_end_that_no_road_opens_for_is_sent_in_the_end():
    box = Outbox(patrol_s=(0.02, 0.02), longest_wait_s=0.2)
    wire = FakeWire()
    wire.accepting = False
    channel = opened(box, wire, stream=False)
    channel.put(tokens(0))
    began = time.monotonic()
    channel.put(END)
    wait_until(lambda: wire.sent)
    assert time.monotonic() - began >= 0.2
    assert [(reply.text, reply.reason) for reply in wire.sent] == [("a", FinishReason.STOP)]
    box.close()
    assert len(wire.sent) == 1


def test_events_that_come_before_the_channel_begins_are_sent_once(outbox):
    wire = FakeWire()
    channel = outbox.channel(wire, stream=True, cancel=pytest.fail)
    channel.put(tokens(0))
    channel.put(END)
    outbox.begin(channel)
    wait_until(lambda: wire.sent and wire.sent[-1].reason)
    time.sleep(0.05)
    assert "".join(reply.text for reply in wire.sent) == "a"


def test_an_answer_that_ended_before_the_channel_begins_still_opens_its_road(outbox):
    wire = FakeWire()
    wire.accepting = False  # As an ensemble's, until a probe has come back.
    channel = outbox.channel(wire, stream=False, cancel=pytest.fail)
    channel.put(tokens(0))
    channel.put(END)
    outbox.begin(channel)
    wait_until(lambda: wire.probes)
    wire.accepting = True
    outbox.post(channel.flush)
    wait_until(lambda: wire.sent)
    assert [(reply.text, reply.reason) for reply in wire.sent] == [("a", FinishReason.STOP)]


def test_an_action_that_fails_does_not_end_the_sending_of_others(outbox):
    def broken() -> None:
        raise RuntimeError("the sender is gone")

    wire = FakeWire()
    outbox.post(broken)
    opened(outbox, wire, stream=False).put(END)
    wait_until(lambda: wire.sent)


def test_a_stream_without_tokens_gets_empty_responses_and_may_still_fail_as_a_whole(outbox):
    wire, whole = FakeWire(), FakeWire()
    channel = opened(outbox, wire, stream=True)
    opened(outbox, whole, stream=False)
    wait_until(lambda: len(wire.sent) >= 2)
    assert all(reply == Reply() for reply in wire.sent)
    error = EngineError("broke")
    channel.put(FinishedEvent(FinishReason.ERROR, USAGE, error))
    wait_until(lambda: wire.sent[-1] is error)
    assert whole.sent == []


def several(channel: Channel) -> None:
    """Two answers, token by token in turn; the second ends earlier."""
    for event in (
        TokensEvent((0,), "a", index=0),
        TokensEvent((10,), "k", index=1),
        TokensEvent((1,), "b", index=0),
        TokensEvent((11,), "l", index=1, reason=FinishReason.LENGTH),
        TokensEvent((2,), "c", index=0, reason=FinishReason.STOP),
    ):
        channel.put(event)


def test_several_answers_in_a_stream_are_kept_apart_and_have_an_end_each(outbox):
    wire = FakeWire()
    channel = opened(outbox, wire, stream=True, answers=2)
    several(channel)
    channel.put(END)
    wait_until(lambda: wire.sent and wire.sent[-1].reason is not None)
    parts = [reply for reply in said(wire) if reply.reason is None]
    for index, text, tokens_ in ((0, "abc", [0, 1, 2]), (1, "kl", [10, 11])):
        mine = [reply for reply in parts if reply.index == index]
        assert "".join(reply.text for reply in mine) == text
        assert [token for reply in mine for token in reply.token_ids] == tokens_
    last = wire.sent[-1]
    assert (last.reason, last.usage, last.text) == (FinishReason.STOP, USAGE, "")
    assert [(a.index, a.reason, a.text) for a in last.answers] == [
        (0, FinishReason.STOP, ""),
        (1, FinishReason.LENGTH, ""),
    ]


def test_several_answers_without_streaming_come_in_one_response(outbox):
    wire = FakeWire()
    channel = opened(outbox, wire, stream=False, answers=3)
    several(channel)
    channel.put(FinishedEvent(FinishReason.DEADLINE, USAGE, DeadlineExceededError("late")))
    wait_until(lambda: wire.sent)
    (reply,) = wire.sent
    assert (reply.index, reply.text, reply.token_ids, reply.reason) == (None, "abc", (0, 1, 2), FinishReason.DEADLINE)
    assert [(a.index, a.text, a.token_ids, a.reason) for a in reply.answers] == [
        (0, "abc", (0, 1, 2), FinishReason.STOP),
        (1, "kl", (10, 11), FinishReason.LENGTH),
        (2, "", (), FinishReason.DEADLINE),
    ]


def test_several_answers_that_never_began_fail_as_a_whole(outbox):
    wire = FakeWire()
    error = EngineError("broke")
    opened(outbox, wire, stream=False, answers=2).put(FinishedEvent(FinishReason.ERROR, USAGE, error))
    wait_until(lambda: wire.sent)
    assert wire.sent == [error]
