"""Requests that wait for their grammars: not too many, and none longer than somebody waits for its answer."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from tests.test_pictures import DEMO_MODEL
from tests.waiting import wait_until
from wicore_backend.engine.grammar import compiler as compiling
from wicore_backend.engine.grammar.compiler import GrammarCompiler
from wicore_backend.engine.grammar.spec import Grammar
from wicore_backend.engine.request import Deadlines, FinishReason
from wicore_backend.errors import InvalidArgumentError, OverloadedError
from wicore_backend.processor.tokenizer import Tokenizer
from wicore_backend.triton.grammar_queue import GrammarQueue, WaitingRequest

wait_for = partial(wait_until, within_s=30)


class Client:
    """One who asked, with a grammar that takes as long to compile as it is made to."""

    def __init__(self, queue: GrammarQueue, **deadlines) -> None:
        self.events: list = []
        self.compiled = threading.Event()
        self.submitted = threading.Event()
        self.began = threading.Event()
        self.request = WaitingRequest(
            self.events.append, prompt_tokens=5, arrival=time.monotonic(), deadlines=Deadlines(**deadlines)
        )
        queue.check_room()
        queue.add(self.request, compile_it=self._compile, submit=self.submitted.set)

    def _compile(self) -> None:
        self.began.set()
        assert self.compiled.wait(30)

    @property
    def ends(self) -> list:
        return [(event.reason, event.error.code, event.usage.prompt_tokens) for event in self.events]


@pytest.fixture
def queue():
    queue = GrammarQueue(threads=2, most_waiting=3)
    yield queue
    queue.close()


def test_one_more_than_may_wait_is_told_when_to_come_again(queue):
    clients = [Client(queue) for _ in range(3)]
    with pytest.raises(OverloadedError, match="3 requests wait for their grammars to be compiled; retry after 2 s"):
        Client(queue)
    for client in clients:
        client.compiled.set()
    for client in clients:
        assert client.submitted.wait(30)
        assert client.events == []
    wait_for(lambda: not queue._waiting)
    late = Client(queue)
    late.compiled.set()
    assert late.submitted.wait(30)


def test_who_cancels_hears_at_once_and_computes_nothing(queue):
    compiling_now, in_turn, queued = (Client(queue) for _ in range(3))
    assert compiling_now.began.wait(30)
    assert in_turn.began.wait(30)
    for client in (compiling_now, queued):
        assert client.request.cancel()
        assert client.ends == [(FinishReason.CANCELLED, "cancelled", 5)]
        assert not client.request.cancel()
    for client in (compiling_now, in_turn, queued):
        client.compiled.set()
    assert in_turn.submitted.wait(30)
    wait_for(lambda: not queue._waiting)
    assert not compiling_now.submitted.is_set()
    assert not queued.submitted.is_set()
    assert not queued.began.is_set()  # Nobody waits for its grammar.
    assert not in_turn.request.cancel()  # It is the engine's, to be cancelled there.
    assert in_turn.events == []


@pytest.mark.parametrize("kind", ["queue_s", "first_token_s", "total_s"])
def test_a_deadline_ends_the_wait_when_it_passes(queue, kind):
    patient = Client(queue)
    began = time.monotonic()
    hasty = Client(queue, **{kind: 0.1})
    wait_for(lambda: hasty.events)
    assert time.monotonic() - began >= 0.09
    assert hasty.ends == [(FinishReason.DEADLINE, "deadline_exceeded", 5)]
    assert "0.100 s has passed" in str(hasty.events[0].error)
    assert patient.events == []
    for client in (patient, hasty):
        client.compiled.set()
    assert patient.submitted.wait(30)
    assert not hasty.submitted.is_set()


def test_what_cannot_be_compiled_or_submitted_ends_with_its_error(queue):
    def refuse():
        raise InvalidArgumentError("grammar.regex is not supported")

    def break_down():
        raise KeyError("a fault")

    for fails, code in ((refuse, "invalid_argument"), (break_down, "internal")):
        for compile_it, submit in ((fails, lambda: None), (lambda: None, fails)):
            client = Client.__new__(Client)
            client.events = []
            request = WaitingRequest(client.events.append, prompt_tokens=5, arrival=0.0, deadlines=Deadlines())
            queue.add(request, compile_it=compile_it, submit=submit)
            wait_for(lambda events=client.events: events)
            assert client.ends == [(FinishReason.ERROR, code, 5)]


def test_many_who_ask_for_one_grammar_have_it_compiled_once(monkeypatch):
    tokenizer = Tokenizer.from_checkpoint(DEMO_MODEL)
    compiler = GrammarCompiler(tokenizer, vocab_size=2048, eos_token_ids={1, 6})
    compile_it, sources = compiling.LLMatcher, []

    def slowly(vocabulary, source, **more):
        sources.append(source)
        time.sleep(0.2)
        return compile_it(vocabulary, source, **more)

    monkeypatch.setattr(compiling, "LLMatcher", slowly)
    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(lambda _: compiler.begin(Grammar(choice=["yes", "no"]), 1), range(8)))
    assert len(sources) <= 2  # As many as compile at the same time.
