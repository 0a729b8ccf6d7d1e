"""Requests of an engine: who goes first, who is turned away, how each ends, and that this harms nobody else."""

import random
import threading
import time
from queue import Queue

import numpy as np
import pytest

from tests.engine_kit import PROMPTS, assert_nothing_left, config, greedy
from wicore_backend import Engine
from wicore_backend.engine.plan import RejectReason
from wicore_backend.engine.request import Deadlines, FinishedEvent, FinishReason, PriorityClass
from wicore_backend.engine.results import EventStream
from wicore_backend.errors import DeadlineExceededError, InvalidArgumentError, OverloadedError

pytest_plugins = ["tests.engine_fixtures"]


def test_closing_a_stream_cancels_its_request_and_no_other(engine):
    other = engine.stream("hello", greedy(60))
    with engine.stream("hello", greedy(5000)) as stream:
        next(stream)
    assert len(other.collect().token_ids) == 60
    assert_nothing_left(engine)


def test_an_interrupted_generate_cancels_its_request(engine, monkeypatch):
    def interrupted(_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(EventStream, "collect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate("hello", greedy(15_000))
    assert_nothing_left(engine)


def test_random_cancels_leave_the_books_balanced(engine):
    rng = random.Random(1)
    before = sum(engine.statistics().requests.values())
    streams = []
    for turn in range(120):
        params = greedy(rng.choice([1, 3, 30, 3000]))
        prompt, images = rng.choice(PROMPTS)
        streams.append(engine.stream(prompt, params, images=images))
        if rng.random() < 0.3:
            time.sleep(rng.random() * 0.02)
        if turn % 2:
            streams.pop(rng.randrange(len(streams))).close()
    for stream in streams:
        stream.close()
    assert_nothing_left(engine)
    assert sum(engine.statistics().requests.values()) - before == 120


def test_a_sink_that_fails_hurts_nobody_else(engine):
    def bad(_) -> None:
        raise ValueError("no")

    other = engine.stream("hello", greedy(20))
    engine.submit(engine.processor.process("hello"), greedy(20), sink=bad)
    assert len(other.collect().token_ids) == 20
    assert_nothing_left(engine)


def test_two_requests_with_one_id_are_not_mixed_up(engine):
    prompt = engine.processor.process("hello")
    events: list = []
    engine.submit(prompt, greedy(100), sink=events.append, request_id="twin")
    second: list = []
    engine.submit(prompt, greedy(100), sink=second.append, request_id="twin")
    assert_nothing_left(engine)
    assert sum(len(event.token_ids) for event in events[:-1]) == 100
    assert isinstance(second[-1].error, InvalidArgumentError)


def test_a_deadline_ends_a_request_with_what_it_has(engine):
    events: list = []
    ended = threading.Event()

    def sink(event) -> None:
        events.append(event)
        if isinstance(event, FinishedEvent):
            ended.set()

    prompt = engine.processor.process("hello")
    engine.submit(prompt, greedy(20_000), sink=sink, deadlines=Deadlines(total_s=1.0))
    assert ended.wait(20)
    assert events[-1].reason is FinishReason.DEADLINE
    assert isinstance(events[-1].error, DeadlineExceededError)
    assert "1.000 s" in str(events[-1].error)
    assert len(events) > 2
    assert 1.0 <= events[-1].usage.total_s < 3.0


def test_a_request_that_cannot_be_in_time_is_refused_before_it_runs(engine):
    for n in range(60):  # Let it learn how long steps take.
        engine.generate([2, 300 + n], greedy(3))
    engine.generate([2] * 3000, greedy(2))
    events: Queue = Queue()
    prompt = engine.processor.process([3] * 20_000)
    engine.submit(prompt, greedy(2), sink=events.put, deadlines=Deadlines(first_token_s=0.5))  # It takes seconds.
    last = events.get(timeout=10)
    assert isinstance(last, FinishedEvent)
    assert last.reason is FinishReason.REJECTED
    assert isinstance(last.error, DeadlineExceededError)
    assert "due after 0.500 s" in str(last.error)


@pytest.mark.parametrize(
    ("ids", "params", "said"),
    [
        ([], {}, "empty"),
        ([5000], {}, "5000"),
        ([-1], {}, "-1"),
        ([300] * 40_000, {}, "limit"),
        ([300], {"stop_token_ids": (99_999,)}, "99999"),
    ],
)
def test_what_the_model_cannot_compute_is_refused_at_once(engine, ids, params, said):
    with pytest.raises(InvalidArgumentError, match=said):
        engine.generate(np.array(ids, np.int64), greedy(**params))


def test_a_full_queue_refuses_with_a_time_to_retry():
    with Engine(config(max_running=1, max_waiting=1)) as engine:
        streams = [engine.stream([2, 300 + n], greedy(2000)) for n in range(2)]
        next(streams[0])
        with pytest.raises(OverloadedError, match="retry after") as caught:
            engine.generate("hello", greedy(1))
        assert caught.value.retry_after_s > 0
        assert engine.statistics().rejected[RejectReason.QUEUE_REQUESTS] == 1
        assert engine.statistics().requests[FinishReason.REJECTED] == 1
        for stream in streams:
            stream.close()
        assert_nothing_left(engine)
        assert len(engine.generate("hello", greedy(2)).token_ids) == 2


def test_smaller_priority_goes_first_also_before_one_that_runs():
    with Engine(config(max_running=1)) as engine:
        order: list[str] = []
        running, ended = threading.Event(), threading.Barrier(2)

        def sink(name: str):
            def take(event) -> None:
                running.set()
                if isinstance(event, FinishedEvent):
                    order.append(name)
                    if len(order) == 4:
                        ended.wait(5)

            return take

        prompt = engine.processor.process("hello")
        engine.submit(prompt, greedy(500), sink=sink("first"))
        assert running.wait(10)
        for name, priority in [("late", 5), ("usual", 0), ("urgent", -5)]:
            engine.submit(prompt, greedy(2), sink=sink(name), priority=priority)
        ended.wait(30)
        assert order == ["urgent", "first", "usual", "late"]


def test_statistics_say_why_requests_waited(engine):
    before = engine.statistics()
    stream = EventStream(lambda: None)
    prompt = engine.processor.process("hello")
    engine.submit(prompt, greedy(20), sink=stream.put, priority=PriorityClass.BATCH)
    stream.collect()
    after = engine.statistics()
    queue = after.queues[PriorityClass.BATCH]
    assert queue.started == before.queues[PriorityClass.BATCH].started + 1
    assert sum(queue.histogram) == queue.started
    assert after.step is not None
    assert after.step.predicted_s is not None
    assert after.step.coefficients is not None
    assert after.steps - before.steps in (20, 21)
