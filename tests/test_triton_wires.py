"""The order in which an ensemble's request must end, with Triton's own objects played by recorders."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from wicore_backend.engine.request import FinishReason, TokenLogprob, Usage
from wicore_backend.errors import EngineError

USAGE = Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=0, queue_s=0.0, ttft_s=0.1, total_s=0.2)


class Sender:
    """A response sender that keeps what it is given, in one book for all senders."""

    def __init__(self, name: str, book: list) -> None:
        self.name, self.book, self.ended = name, book, False

    def send(self, response=None, flags: int = 0) -> None:
        assert not self.ended, f"{self.name} was ended before"
        self.ended = bool(flags)
        self.book.append((self.name, response, flags))


@pytest.fixture
def wires(monkeypatch):
    """The module `triton.wires`, imported over a `pb_utils` of plain objects."""
    pb_utils = ModuleType("triton_python_backend_utils")
    pb_utils.Tensor = lambda name, values: (name, values.tolist())
    pb_utils.InferenceResponse = lambda tensors=(), error=None: error or dict(tensors)
    codes = {"INVALID_ARG": 1, "UNAVAILABLE": 2, "CANCELLED": 3, "INTERNAL": 4}
    pb_utils.TritonError = type("TritonError", (Exception,), codes)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", pb_utils)
    for name in ("errors", "wires"):
        monkeypatch.delitem(sys.modules, f"wicore_backend.triton.{name}", raising=False)
    from wicore_backend.triton import wires

    yield wires
    for name in ("errors", "wires"):
        sys.modules.pop(f"wicore_backend.triton.{name}", None)


@pytest.fixture
def road(wires):
    """An ensemble's wire with an attach, its senders, and the book of what they sent."""
    book: list = []
    submit, client = Sender("submit", book), Sender("client", book)
    wire = wires.EnsembleWire(b"key", submit, wires.ReplySender(lambda _token: 1 / 0))
    wire.probe()
    wire.attach(client, cancelled=False)
    book.clear()
    return SimpleNamespace(wire=wire, submit=submit, client=client, book=book)


def reply(wires, **content):
    return wires.Reply(**content)


def test_the_submit_ends_before_the_answer_does(wires, road):
    road.wire.send(reply(wires, text="a", reason=FinishReason.STOP, usage=USAGE))
    assert [(name, flags) for name, _, flags in road.book] == [("submit", 1), ("client", 1)]


def test_an_end_that_cannot_be_made_ends_nothing_and_the_error_then_ends_both(wires, road):
    unsayable = reply(wires, logprobs=(TokenLogprob(1, -0.5),), reason=FinishReason.STOP, usage=USAGE)
    with pytest.raises(ZeroDivisionError):
        road.wire.send(unsayable)
    assert road.book == []
    road.wire.fail(EngineError("no such luck"))
    assert [(name, flags) for name, _, flags in road.book] == [("submit", 1), ("client", 1)]
    assert "[internal] no such luck" in str(road.book[-1][1])


def test_an_error_after_half_an_end_ends_the_other_half(wires, road):
    def gone(*_arguments, **_flags) -> None:
        raise RuntimeError("the client is gone")

    sends, road.client.send = road.client.send, gone
    with pytest.raises(RuntimeError):
        road.wire.send(reply(wires, reason=FinishReason.STOP, usage=USAGE))
    road.client.send = sends
    road.wire.fail(EngineError("no such luck"))
    assert [name for name, _, _ in road.book] == ["submit", "client"]


def test_one_tick_at_a_time_and_none_outstanding_at_the_end(road):
    road.wire.probe()
    road.wire.probe()
    assert [name for name, _, _ in road.book] == ["submit"]
    assert road.wire.accepts(last=False)
    assert not road.wire.accepts(last=True)
    road.wire.attach(Sender("newest", road.book), cancelled=False)
    assert road.wire.accepts(last=True)
    assert road.client.ended


def test_a_tick_that_does_not_come_back_is_followed_by_a_few_more(wires):
    book: list = []
    now = [100.0]
    wire = wires.EnsembleWire(b"key", Sender("submit", book), wires.ReplySender(str), clock=lambda: now[0])
    for _ in range(100):
        wire.probe()
        now[0] += 1.0
    assert len(book) == 4  # One, and three at 5 s each; then the server has enough of them.
    for _ in range(4):
        wire.attach(Sender("client", book), cancelled=True)
    assert wire.is_cancelled()
    assert wire.accepts(last=True)


def test_without_an_attach_the_submit_itself_is_the_road(wires):
    book: list = []
    wire = wires.EnsembleWire(b"key", Sender("submit", book), wires.ReplySender(str))
    assert not wire.accepts(last=False)
    wire.fail(EngineError("closing"))
    assert [(name, flags) for name, _, flags in book] == [("submit", 1)]
