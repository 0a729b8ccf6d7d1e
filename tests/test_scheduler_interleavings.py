"""Interleavings (`tests/interleavings.py`) that once broke a promise, by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from tests.callers import Caller, prompt_of
from tests.hand_turned import G, L, Setting
from tests.interleavings import Interleaving
from wicore_backend.engine.request import Deadlines, FinishReason, PriorityClass
from wicore_backend.engine.sampling_params import SamplingParams

USUAL = Setting(
    groups=(L, L, G),
    block_size=4,
    window=8,
    running=1,
    spare_tokens=10,
    spare_blocks=40,
    host_slots=0,
    cold=None,
    waiting=100,
    waiting_tokens=10_000,
    ageing_s=30.0,
    target_ms=None,
    prefix_cache=True,
    expected_answer=None,
    taught=False,
)
REALTIME, BATCH = PriorityClass.REALTIME, PriorityClass.BATCH


@contextmanager
def interleaving(**setting: Any) -> Iterator[Interleaving]:
    """An interleaving by hand; in the end all must have ended as they should."""
    machine = Interleaving()
    machine.set_up(setting=replace(USUAL, **setting))
    yield machine
    machine.the_books_are_right()
    machine.teardown()


def submit(
    machine: Interleaving, *, length: int = 13, priority: int = BATCH, queue_s: float | None = None, **params: Any
):
    """Submit a request; its events."""
    prompt, asked = (
        prompt_of(0, length, 0, 0),
        SamplingParams(**{"max_tokens": 16, "seed": 0, "ignore_eos": True} | params),
    )
    caller = Caller(prompt, asked, Deadlines(queue_s=queue_s), raises=False)
    machine._submit(caller, priority=priority)
    return caller


def test_two_answers_of_one_request_are_turned_away_at_once():
    with interleaving(waiting_tokens=100) as machine:
        submit(machine, length=8)
        machine.step(1)
        low = submit(machine, n=3)
        machine.step(1)
        high = submit(machine, length=37, priority=REALTIME)
        machine.step(1)
        assert low.last
        assert low.last.reason is FinishReason.REJECTED
    assert high.last
    assert high.last.reason is FinishReason.LENGTH


def test_a_prompt_computed_twice_has_its_logprobs_once():
    with interleaving(spare_tokens=0) as machine:
        submit(machine, length=37, prompt_logprobs=1)
        machine.step(2)
        machine.preempt(0)


def test_an_answer_that_begins_with_a_fork_has_waited_until_then():
    with interleaving(running=2) as machine:
        callers = [submit(machine, max_tokens=tokens) for tokens in (1, 1, 8)]
        machine.step(1)
    usages = [caller.last.usage for caller in callers if caller.last]
    assert [usage.queue_s for usage in usages[:2]] == [0.0, 0.0]


def test_a_request_that_runs_is_not_rejected_for_one_of_its_answers_that_waits():
    with interleaving(waiting=3) as machine:
        low = submit(machine, n=3, prompt_logprobs=0)
        machine.step(3)
        for _ in range(2):
            submit(machine, priority=REALTIME)
        machine.step(1)
        assert low.last
        assert low.last.reason is FinishReason.CANCELLED
        assert "the queue is full" in str(low.last.error)
        assert any(low.answers())


def test_a_queue_deadline_is_for_the_first_of_the_answers():
    with interleaving() as machine:
        caller = submit(machine, n=3, prompt_logprobs=0, queue_s=0.01)
        machine.step(1)
    assert caller.last
    assert caller.last.reason is FinishReason.LENGTH


def test_one_that_gives_way_to_a_promoted_one_does_not_come_back_in_the_same_step():
    with interleaving(running=4, spare_tokens=40, spare_blocks=8, ageing_s=0.0, prefix_cache=False) as machine:
        for _ in range(6):
            submit(machine, length=1, priority=REALTIME, max_tokens=1)
            machine.step(2)
        for priority, length in ((BATCH, 8), (REALTIME, 37), (REALTIME, 16)):
            submit(machine, length=length, priority=priority)
            machine.time_passes(0.002)
        machine.step(1)
