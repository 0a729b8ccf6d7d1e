"""Faults of the device, of a step, of a token or of the books: who ends, who does not notice, and what health says."""

import threading
import time
from dataclasses import replace

import pytest
import torch

from tests.engine_kit import PROMPTS, assert_nothing_left, config, greedy
from wicore_backend import Engine, SamplingParams
from wicore_backend.engine.generation import Generation
from wicore_backend.engine.request import FinishReason
from wicore_backend.errors import EngineError

pytest_plugins = ["tests.engine_fixtures"]


def breaking(engine: Engine, monkeypatch, broken) -> list:
    """Let the model fail wherever `broken(number of the call, plan)`; returns the calls."""
    run, calls = engine._model.runner.run, []

    def failing(plan, ahead=None):
        calls.append(plan)
        if broken(len(calls), plan):
            raise RuntimeError("the device is on fire")
        return run(plan, ahead)

    monkeypatch.setattr(engine._model.runner, "run", failing)
    return calls


def assert_recovers(engine: Engine) -> None:
    end = time.monotonic() + 15
    while not engine.health().ok:
        assert time.monotonic() < end, "it finds out by itself that all is well"
        time.sleep(0.05)


def test_a_step_that_fails_once_is_tried_again_and_nobody_notices(engine, alone, monkeypatch):
    retried = engine.statistics().retried
    breaking(engine, monkeypatch, lambda call, _: call % 3 == 0)
    results = engine.generate([p for p, _ in PROMPTS], greedy(), images=[i for _, i in PROMPTS])
    assert [result.token_ids for result in results] == alone
    assert engine.statistics().retried > retried + 5


def test_a_step_that_fails_because_of_one_request_ends_that_one_alone(engine, alone, monkeypatch):
    def bad(_, plan) -> bool:
        return any(c.sequence.tokens[0] == 300 for c in plan.chunks) or any(s.tokens[0] == 300 for s in plan.decodes)

    breaking(engine, monkeypatch, bad)
    culprit = engine.stream([300, 301], greedy(50))
    others = [engine.stream(p, greedy(), images=i) for p, i in PROMPTS]
    with pytest.raises(EngineError, match="on fire"):
        culprit.collect()
    assert [stream.collect().token_ids for stream in others] == alone
    assert_nothing_left(engine)


def test_when_nothing_can_be_computed_the_running_end_and_the_next_ones_run(monkeypatch):
    with Engine(config()) as engine:
        expected = engine.generate("hello", greedy(4)).token_ids
        fire = threading.Event()
        breaking(engine, monkeypatch, lambda *_: fire.is_set())
        streams = [engine.stream([2, 300 + n], greedy(5000)) for n in range(2)]
        for stream in streams:
            next(stream)
        fire.set()
        for stream in streams:
            with pytest.raises(EngineError, match="on fire"):
                stream.collect()
        assert engine.statistics().restarts == 1
        health = engine.health()
        assert not health.ok
        assert "on fire" in health.reason
        time.sleep(1.3)
        assert not engine.health().ok, "it has tried, and failed"
        fire.clear()
        assert_recovers(engine)
        assert_nothing_left(engine)
        assert all(usage.cached == 0 for usage in engine.statistics().blocks.values()), "the cache is in doubt"
        assert engine.generate("hello", greedy(4)).token_ids == expected
        assert engine.health().ok
        assert_nothing_left(engine)


def test_what_sampling_cannot_do_for_all_at_once_it_does_one_by_one_with_the_same_tokens(engine, monkeypatch):
    params = SamplingParams(temperature=0, max_tokens=12, repetition_penalty=1.3, frequency_penalty=0.5, logprobs=2)
    prompts = [[2, 300 + n] for n in range(3)]
    expected = [engine.generate(prompt, params) for prompt in prompts]
    together = []

    def greatest(logits, *dims):
        if dims and len(logits) > 1:
            together.append(len(logits))
            raise torch.OutOfMemoryError("no room for so many")
        return torch.max(logits, *dims)

    monkeypatch.setattr(torch.Tensor, "max", greatest)
    results = engine.generate(prompts, params)
    assert together
    assert [result.token_ids for result in results] == [result.token_ids for result in expected]
    for result, alone in zip(results, expected, strict=True):
        assert [one.logprob for one in result.logprobs] == pytest.approx(
            [one.logprob for one in alone.logprobs], abs=1e-4
        )
    assert_nothing_left(engine)


def test_a_token_that_cannot_be_taken_ends_its_request_alone(engine, monkeypatch):
    expected = engine.generate("hello", greedy(30)).token_ids
    push, ended = Generation.push, []

    def failing(self, token, logprob):
        if self.sequence.tokens[0] == 300 and self.sequence.answered == 5:
            raise RuntimeError("no such character")
        return push(self, token, logprob)

    monkeypatch.setattr(Generation, "push", failing)
    culprit, other = engine.stream([300, 301], greedy(30)), engine.stream("hello", greedy(30))
    with pytest.raises(EngineError, match="no such character"):
        culprit.collect()
    assert other.collect().token_ids == expected
    assert not ended
    assert_nothing_left(engine)


def test_a_device_that_fails_after_it_was_given_a_step_is_trouble_until_it_computes_one(monkeypatch):
    with Engine(config()) as engine:
        run, fire = engine._model.runner.run, threading.Event()

        def done() -> None:
            if fire.is_set():
                raise RuntimeError("the device is on fire")

        monkeypatch.setattr(engine._model.runner, "run", lambda *given: replace(run(*given), done=done))
        engine.generate("hello", greedy(2))
        assert engine.health().ok
        fire.set()
        engine.generate("hello", greedy(2))
        assert "on fire" in engine.health().reason
        time.sleep(1.3)
        assert not engine.health().ok, "it has tried, and failed"
        fire.clear()
        assert_recovers(engine)
        assert_nothing_left(engine)


def test_a_device_that_hangs_in_a_step_for_nobody_is_noticed(monkeypatch):
    with Engine(config(step_timeout_s=0.2)) as engine:
        engine._model = replace(engine._model, overlaps=True)
        first = engine.generate([2, 300], greedy(1)).token_ids[0]
        run, release, steps = engine._model.runner.run, threading.Event(), []

        def running(*given):
            steps.append(given)
            output = run(*given)
            return replace(output, done=lambda: release.wait(10)) if len(steps) == 2 else output

        monkeypatch.setattr(engine._model.runner, "run", running)
        answer = engine.generate([2, 300], greedy(9, stop_token_ids=[first]))
        assert answer.finish_reason == FinishReason.STOP, "the second step is for nobody"
        end = time.monotonic() + 20
        while engine.health().ok:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert "running for" in engine.health().reason
        release.set()
        while not engine.health().ok:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert_nothing_left(engine)


def test_a_step_that_hangs_makes_the_engine_unhealthy_until_it_returns(monkeypatch, caplog):
    with Engine(config(step_timeout_s=0.2)) as engine:
        engine.generate("hello", greedy(2))
        held, release = threading.Event(), threading.Event()

        def hanging(call, _) -> bool:
            if call == 3:
                held.set()
                release.wait(10)
            return False

        breaking(engine, monkeypatch, hanging)
        stream = engine.stream("hello", greedy(20))
        assert held.wait(10)
        end = time.monotonic() + 10
        while "in hanging" not in caplog.text:
            assert time.monotonic() < end, "the log says where the step stands"
            time.sleep(0.02)
        health = engine.health()
        assert not health.ok
        assert "step_timeout_s = 0.2" in health.reason
        release.set()
        assert len(stream.collect().token_ids) == 20
        assert_recovers(engine)  # The last token is told within its step.


def test_books_that_are_wrong_end_every_request_and_refuse_new_ones(monkeypatch):
    with Engine(config(max_running=2)) as engine:
        streams = [engine.stream("hello", greedy(5000)) for _ in range(4)]
        for stream in streams[:2]:
            next(stream)

        def broken(_) -> None:
            raise AssertionError("a block is in two tables")

        monkeypatch.setattr(engine._model.blocks, "close", broken)
        streams[0].close()
        for stream in streams[1:]:
            with pytest.raises(EngineError, match="broke down: a block is in two tables"):
                stream.collect()
        with pytest.raises(EngineError, match="broken down"):
            engine.generate("hello")
