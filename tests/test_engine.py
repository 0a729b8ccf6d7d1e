"""The engine in one process: its answers, its ends, and that neither depends on what else is running."""

import io
import random
import threading
import time
from dataclasses import replace
from pathlib import Path
from queue import Queue

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from wicore_backend import Engine, EngineConfig, SamplingParams
from wicore_backend.engine import loading
from wicore_backend.engine.generation import Generation
from wicore_backend.engine.grammar.spec import Grammar
from wicore_backend.engine.loading import LoadedModel
from wicore_backend.engine.plan import RejectReason
from wicore_backend.engine.request import Deadlines, FinishedEvent, FinishReason, PriorityClass, TokensEvent
from wicore_backend.engine.results import EventStream
from wicore_backend.errors import (
    CancelledError,
    CheckpointError,
    DeadlineExceededError,
    EngineError,
    InvalidArgumentError,
    OverloadedError,
)
from wicore_backend.hmt.blocks import BlockManager
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.policy import POLICIES

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "wicore-demo"
PICTURE = (ROOT / "client" / "wicore_client" / "assets" / "shapes.png").read_bytes()


def config(**settings):
    return EngineConfig(**{"model": MODEL, "device": "cpu", "dtype": "float32"} | settings)


def greedy(tokens=16, **params):
    return SamplingParams(**{"max_tokens": tokens, "temperature": 0.0, "ignore_eos": True} | params)


@pytest.fixture(scope="module", params=[False, True], ids=["", "tokens_read_a_step_late"])
def engine(request):
    """Reading tokens a step late is for devices that compute beside the host; a CPU gives the same answers with it."""
    with Engine(config()) as engine:
        engine._model = replace(engine._model, overlaps=request.param)
        yield engine
        assert_nothing_left(engine)


def assert_nothing_left(engine: Engine) -> None:
    end = time.monotonic() + 5
    while True:
        now = engine.statistics()
        if not now.running and not now.waiting and not any(usage.active for usage in now.blocks.values()):
            break
        assert time.monotonic() < end, now
        time.sleep(0.01)
    engine._scheduler.check_integrity()


PROMPTS: list = [
    ("Describe this picture.", [PICTURE]),
    ("What is 12 + 7?", []),
    (
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many things?"}]},
            {"role": "assistant", "content": "There are 2 things."},
            {"role": "user", "content": [{"type": "text", "text": "And here?"}, {"type": "image"}]},
        ],
        [PICTURE, PICTURE],
    ),
    ([2, 300, 301, 302], []),
    ("The code of Anna is 4821. " * 60 + "What is the code of Anna?", []),
]


def assert_recovers(engine: Engine) -> None:
    end = time.monotonic() + 15
    while not engine.health().ok:
        assert time.monotonic() < end, "it finds out by itself that all is well"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def alone(engine):
    """Each prompt's answer when nothing else runs."""
    return [engine.generate(prompt, greedy(), images=images).token_ids for prompt, images in PROMPTS]


def test_a_batch_gives_what_single_requests_give(engine, alone):
    prompts = [prompt for prompt, _ in PROMPTS] * 3
    images = [images for _, images in PROMPTS] * 3
    results = engine.generate(prompts, greedy(), images=images)
    assert [result.token_ids for result in results] == alone * 3


@pytest.mark.parametrize(
    "settings",
    [
        {"max_batch_tokens": 72, "max_running": 8},  # An image is 64: chunks around images.
        {"block_size": 7, "max_batch_tokens": 200},
        {"max_running": 2, "max_batch_tokens": 66},
        {"kv_cache_bytes": 11 * 2**20, "max_model_len": 2048},  # Little memory: requests wait for one another.
    ],
)
def test_chunks_blocks_and_memory_do_not_change_an_answer(alone, settings):
    with Engine(config(**settings)) as engine:
        prompts, images = [p for p, _ in PROMPTS], [i for _, i in PROMPTS]
        results = engine.generate(prompts * 2, greedy(), images=images * 2)
        assert [result.token_ids for result in results] == alone * 2
        assert_nothing_left(engine)


def test_the_answers_are_those_of_transformers(engine):
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    reference = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(MODEL)
    picture = Image.open(io.BytesIO(PICTURE)).convert("RGB")
    for question, pictures in [
        ("Describe this picture.", [picture]),
        ("What is 3 + 4?", []),
        ("描述这张图片", [picture]),
    ]:
        content = [{"type": "image", "image": p} for p in pictures] + [{"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        out = reference.generate(**inputs, max_new_tokens=48, do_sample=False)
        expected = out[0, inputs["input_ids"].shape[1] :].tolist()
        result = engine.generate(
            question, SamplingParams(max_tokens=48, temperature=0.0), images=[PICTURE] * len(pictures)
        )
        assert result.token_ids == expected


def test_sampling_depends_on_the_seed_alone(engine):
    params = SamplingParams(
        max_tokens=24, temperature=20.0, seed=11, ignore_eos=True
    )  # Hot, or the demo model is too sure.
    first = engine.generate("hello", params)
    crowd = engine.generate(["hello", "What is 1 + 1?", "hello", "你好"], params)
    assert crowd[0].token_ids == crowd[2].token_ids == first.token_ids
    other = engine.generate("hello", params.model_copy(update={"seed": 12}))
    assert other.token_ids != first.token_ids


def test_an_answer_ends_at_eos_length_stop_token_or_stop_string(engine):
    natural = engine.generate("What is 12 + 7?", SamplingParams(max_tokens=50, temperature=0.0))
    assert natural.finish_reason is FinishReason.STOP
    assert natural.text == "19"
    assert engine.processor.tokenizer.is_special(natural.token_ids[-1])

    sentence = engine.generate("Describe this picture.", SamplingParams(temperature=0.0), images=[PICTURE])
    cut = engine.generate("Describe this picture.", SamplingParams(temperature=0.0, stop=" red"), images=[PICTURE])
    assert cut.finish_reason is FinishReason.STOP
    assert " red" in sentence.text
    assert cut.text == sentence.text.split(" red")[0]

    short = engine.generate("Describe this picture.", SamplingParams(temperature=0.0, max_tokens=3), images=[PICTURE])
    assert short.finish_reason is FinishReason.LENGTH
    assert short.token_ids == sentence.token_ids[:3]

    stop_id = sentence.token_ids[4]
    stopped = engine.generate(
        "Describe this picture.", SamplingParams(temperature=0.0, stop_token_ids=(stop_id,)), images=[PICTURE]
    )
    assert stopped.token_ids == sentence.token_ids[:5]
    assert stopped.finish_reason is FinishReason.STOP


def test_an_answer_ends_with_the_context():
    with Engine(config(max_model_len=600)) as engine:
        prompt = list(range(300, 300 + 590))
        result = engine.generate(prompt, SamplingParams(temperature=0.0, ignore_eos=True))
        assert (len(result.token_ids), result.finish_reason) == (10, FinishReason.LENGTH)
        with pytest.raises(InvalidArgumentError, match=r"600 tokens.* limit of 599"):
            engine.generate(list(range(300, 900)))


def test_logprobs_are_those_of_the_prompt_computed_at_once(engine):
    """The prompt's logprobs of prompt + answer must be the answer's logprobs, chunk by chunk or token by token."""
    ids = [2, *range(300, 320)]
    result = engine.generate(ids, greedy(12, logprobs=2))
    again = engine.generate([*ids, *result.token_ids], greedy(1, prompt_logprobs=2))
    assert again.prompt_logprobs[0] is None
    assert len(again.prompt_logprobs) == len(ids) + 12
    for generated, prompted in zip(result.logprobs, again.prompt_logprobs[len(ids) :], strict=True):
        assert generated.token_id == prompted.token_id == generated.top[0][0]
        assert generated.logprob == pytest.approx(prompted.logprob, abs=1e-4)
        assert [t for t, _ in generated.top] == [t for t, _ in prompted.top]


def test_prompt_logprobs_do_not_depend_on_chunks(engine):
    ids = [2, *range(300, 500)]
    whole = engine.generate(ids, greedy(1, prompt_logprobs=0)).prompt_logprobs
    with Engine(config(max_batch_tokens=67, max_running=3)) as small:
        chunked = small.generate(ids, greedy(1, prompt_logprobs=0)).prompt_logprobs
    assert [t.logprob for t in chunked[1:]] == pytest.approx([t.logprob for t in whole[1:]], abs=1e-4)


def test_events_come_one_by_one_and_add_up(engine):
    events = list(engine.stream("Describe this picture.", SamplingParams(temperature=0.0), images=[PICTURE]))
    assert all(isinstance(event, TokensEvent) for event in events[:-1])
    assert isinstance(events[-1], FinishedEvent)
    whole = engine.generate("Describe this picture.", SamplingParams(temperature=0.0), images=[PICTURE])
    assert "".join(event.text for event in events[:-1]) == whole.text
    assert events[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert 0 <= events[-1].usage.queue_s <= events[-1].usage.ttft_s <= events[-1].usage.total_s


def test_closing_a_stream_cancels_its_request_and_no_other(engine):
    other = engine.stream("hello", greedy(60))
    with engine.stream("hello", greedy(5000)) as stream:
        next(stream)
    assert len(other.collect().token_ids) == 60
    assert_nothing_left(engine)


def test_a_deadline_ends_a_request_with_what_it_has(engine):
    events: list = []
    ended = threading.Event()

    def sink(event) -> None:
        events.append(event)
        if isinstance(event, FinishedEvent):
            ended.set()

    prompt = engine.processor.process("hello")
    engine.submit(prompt, greedy(20_000), sink=sink, deadlines=Deadlines(total_s=0.3))
    assert ended.wait(5)
    assert events[-1].reason is FinishReason.DEADLINE
    assert isinstance(events[-1].error, DeadlineExceededError)
    assert "0.300 s" in str(events[-1].error)
    assert len(events) > 2
    assert events[-1].usage.total_s < 1.0


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
        ended = threading.Barrier(2)

        def sink(name: str):
            def take(event) -> None:
                if isinstance(event, FinishedEvent):
                    order.append(name)
                    if len(order) == 4:
                        ended.wait(5)

            return take

        prompt = engine.processor.process("hello")
        engine.submit(prompt, greedy(200), sink=sink("first"))
        time.sleep(0.1)
        for name, priority in [("late", 5), ("usual", 0), ("urgent", -5)]:
            engine.submit(prompt, greedy(2), sink=sink(name), priority=priority)
        ended.wait(10)
        assert order == ["urgent", "first", "usual", "late"]


def test_two_requests_with_one_id_are_not_mixed_up(engine):
    prompt = engine.processor.process("hello")
    events: list = []
    engine.submit(prompt, greedy(100), sink=events.append, request_id="twin")
    second: list = []
    engine.submit(prompt, greedy(100), sink=second.append, request_id="twin")
    assert_nothing_left(engine)
    assert sum(len(event.token_ids) for event in events[:-1]) == 100
    assert isinstance(second[-1].error, InvalidArgumentError)


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

    def argmax(logits, *dims):
        if len(logits) > 1:
            together.append(len(logits))
            raise torch.OutOfMemoryError("no room for so many")
        return torch.argmax(logits, *dims)

    monkeypatch.setattr(torch.Tensor, "argmax", argmax)
    results = engine.generate(prompts, params)
    assert together
    assert [result.token_ids for result in results] == [result.token_ids for result in expected]
    for result, alone in zip(results, expected, strict=True):
        assert [one.logprob for one in result.logprobs] == pytest.approx(
            [one.logprob for one in alone.logprobs], abs=1e-4
        )
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
        end = time.monotonic() + 5
        while engine.health().ok:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert "running for" in engine.health().reason
        release.set()
        while not engine.health().ok:
            assert time.monotonic() < end
            time.sleep(0.02)
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
        assert engine.health().ok


def test_draining_lets_the_running_end_and_refuses_new_ones():
    with Engine(config()) as engine:
        stream = engine.stream("hello", greedy(40))
        next(stream)
        draining = threading.Thread(target=engine.drain, args=(30.0,))
        draining.start()
        while engine.health().ok:
            time.sleep(0.001)
        with pytest.raises(OverloadedError, match="retry after"):
            engine.generate("hello", greedy(1))
        grammar = Grammar(regex="[a-z]{4}")
        with pytest.raises(OverloadedError, match="retry after"):
            engine.generate("hello", SamplingParams(max_tokens=1, grammar=grammar))
        assert not engine.has_compiled(grammar)  # The stop would wait for it.
        assert len(stream.collect().token_ids) == 39
        draining.join(5)
        assert not draining.is_alive()


def test_after_the_grace_time_the_rest_is_ended():
    with Engine(config(max_running=1)) as engine:
        running, waiting = engine.stream([2, 300], greedy(20_000)), engine.stream([2, 301], greedy(20_000))
        next(running)
        began = time.monotonic()
        engine.drain(0.2)
        assert time.monotonic() - began < 5
        with pytest.raises(CancelledError, match="shutting down"):
            running.collect()
        with pytest.raises(OverloadedError, match="retry after"):
            waiting.collect()


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


# What is computed once


def test_a_second_turn_goes_on_where_the_first_ended_and_says_the_same_as_without_a_cache(engine):
    talk: list = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this? " * 60}]},
    ]
    first = engine.generate(talk, greedy(40), images=[PICTURE])
    talk += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "What is 12 + 7?"}]
    second = engine.generate(talk, greedy(40), images=[PICTURE])
    again = engine.generate(talk, greedy(40), images=[PICTURE])
    with Engine(config(prefix_cache=False)) as fresh:
        expected = fresh.generate(talk, greedy(40), images=[PICTURE])
        assert fresh.generate(talk, greedy(40), images=[PICTURE]).usage.cached_tokens == 0
    assert second.token_ids == again.token_ids == expected.token_ids
    assert second.usage.cached_tokens > 300
    assert again.usage.cached_tokens >= second.usage.prompt_tokens - 16


def test_what_no_longer_fits_the_device_comes_back_from_host_memory():
    prompts = [[2, *range(300 + n, 1100 + n)] for n in range(4)]
    small = {"kv_cache_bytes": 9_000_000, "max_model_len": 1024, "max_running": 2}
    with Engine(config(**small, prefix_cache=False)) as engine:
        expected = [engine.generate(prompt, greedy(30)).token_ids for prompt in prompts]
    with Engine(config(**small, host_cache_bytes=100_000_000)) as engine:
        first = [engine.generate(prompt, greedy(30)) for prompt in prompts]
        again = [engine.generate(prompt, greedy(30)) for prompt in prompts]
        assert [r.token_ids for r in first] == [r.token_ids for r in again] == expected
        assert [r.usage.cached_tokens for r in first] == [0] * 4
        assert min(r.usage.cached_tokens for r in again) > 780
        tier = engine.statistics().host[LayerGroup.GLOBAL]
        assert 0 < tier.used <= tier.capacity
        assert tier.counts.loaded > 50
        assert_nothing_left(engine)


def test_with_a_policy_the_device_gives_up_what_it_sets_aside_and_no_token_changes(monkeypatch):
    prompts = [[2, *range(300 + n, 1100 + n)] for n in range(4)]
    small = {"kv_cache_bytes": 9_000_000, "max_model_len": 1024, "max_running": 2}
    with Engine(config(**small, prefix_cache=False)) as engine:
        expected = [engine.generate(prompt, greedy(30)).token_ids for prompt in prompts]

    def as_on_cuda(make, **given):
        return lambda *arguments, **others: make(*arguments, **others | given)

    monkeypatch.setattr(loading, "BlockManager", as_on_cuda(BlockManager, policy=POLICIES["a2cr"]))
    monkeypatch.setattr(loading, "LoadedModel", as_on_cuda(LoadedModel, overlaps=True))
    set_aside = []
    with Engine(config(**small)) as engine:
        tend = engine._model.blocks.tend

        def watched(now):
            tend(now)
            set_aside.append(len(engine._model.blocks.pools[LayerGroup.GLOBAL].victims._aside))

        monkeypatch.setattr(engine._model.blocks, "tend", watched)
        for _ in range(3):
            assert [engine.generate(prompt, greedy(30)).token_ids for prompt in prompts] == expected
        assert max(set_aside) > 0
        assert engine.statistics().blocks[LayerGroup.GLOBAL].recycled > 0
        assert_nothing_left(engine)


def test_an_engine_that_cannot_start_its_watchdog_says_so(monkeypatch):
    def no_thread(**_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("wicore_backend.engine.engine.HealthMonitor", no_thread)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        Engine(config())


def test_an_engine_with_nothing_to_do_says_so_once():
    idle = Queue()
    with Engine(config(), when_idle=lambda: idle.put(threading.current_thread().name)) as engine:
        for _ in range(2):
            engine.generate("hello", greedy(2))
            assert idle.get(timeout=20) == "wicore-engine"
            time.sleep(1.5)
            assert idle.empty()


def test_another_picture_is_another_prefix(engine):
    def ask(shift: int):
        pixels = Image.open(io.BytesIO(PICTURE)).convert("RGB")
        pixels = ImageChops.offset(pixels, shift)
        stored = io.BytesIO()
        pixels.save(stored, "PNG")
        return engine.generate("Describe this picture.", greedy(20), images=[stored.getvalue()])

    ask(0)
    assert ask(40).usage.cached_tokens < 16


def test_tenants_share_no_blocks(engine):
    prompt = engine.processor.process("The quick brown fox jumps over the lazy dog. " * 20)
    cached = []
    for tenant in ("a", "b", "a"):
        ended: Queue = Queue()
        engine.submit(prompt, greedy(2), sink=ended.put, tenant=tenant)
        while not isinstance(event := ended.get(timeout=10), FinishedEvent):
            pass
        cached.append(event.usage.cached_tokens)
    assert cached[:2] == [0, 0]
    assert cached[2] > 100


def answers(engine: Engine, prompt, params: SamplingParams) -> tuple[list[list[int]], FinishedEvent]:
    tokens: list[list[int]] = [[] for _ in range(params.n)]
    for event in engine.stream(prompt, params):
        if isinstance(event, FinishedEvent):
            return tokens, event
        tokens[event.index] += event.token_ids
    raise AssertionError("no last event")


def test_n_answers_are_those_of_n_requests_and_their_prompt_is_computed_once(engine):
    prompt = [2, *range(300, 437)]
    params = greedy(12, temperature=3.0, seed=7, n=4)
    before = engine.statistics()
    tokens, last = answers(engine, prompt, params)
    after = engine.statistics()
    assert after.scheduler.shared_prefill_tokens - before.scheduler.shared_prefill_tokens == 3 * 138
    expected = [engine.generate(prompt, greedy(12, temperature=3.0, seed=7 + n)).token_ids for n in range(4)]
    assert tokens == expected
    assert len({tuple(t) for t in tokens}) == 4
    assert last.usage.completion_tokens == 48
    assert_nothing_left(engine)


def test_best_of_gives_the_likeliest(engine):
    prompt = [2, *range(300, 337)]
    each = [engine.generate(prompt, greedy(12, temperature=3.0, seed=7 + n, logprobs=0)) for n in range(5)]
    ranked = sorted(each, key=lambda r: -sum(p.logprob for p in r.logprobs))
    tokens, last = answers(engine, prompt, greedy(12, temperature=3.0, seed=7, n=2, best_of=5))
    assert tokens == [ranked[0].token_ids, ranked[1].token_ids]
    assert last.usage.completion_tokens == 60
    assert_nothing_left(engine)


def test_little_memory_and_higher_classes_preempt_and_change_no_token(alone):
    with Engine(config(kv_cache_bytes=9_000_000, max_model_len=1024, max_running=1)) as engine:
        streams = []

        def submit(number: int, priority: int, tokens: int) -> None:
            prompt, images = PROMPTS[number % len(PROMPTS)]
            stream = EventStream(lambda: None)
            processed = engine.processor.process(prompt, images=images)
            engine.submit(processed, greedy(tokens), sink=stream.put, priority=priority)
            streams.append((number % len(PROMPTS), stream))

        for number in range(6):
            submit(number, PriorityClass.BATCH, 300)
        while not engine.statistics().running:
            time.sleep(0.001)
        for number in range(5):
            submit(number, PriorityClass.REALTIME, 16)
        for number, stream in streams:
            assert stream.collect().token_ids[:16] == alone[number]
        assert engine.statistics().scheduler.preemptions > 0
        assert_nothing_left(engine)


def test_a_request_that_cannot_be_in_time_is_refused_before_it_runs(engine):
    for n in range(60):  # Let it learn how long steps take.
        engine.generate([2, 300 + n], greedy(3))
    engine.generate([2] * 3000, greedy(2))
    events: Queue = Queue()
    prompt = engine.processor.process([3] * 20_000)
    engine.submit(prompt, greedy(2), sink=events.put, deadlines=Deadlines(first_token_s=0.05))
    last = events.get(timeout=10)
    assert isinstance(last, FinishedEvent)
    assert last.reason is FinishReason.REJECTED
    assert isinstance(last.error, DeadlineExceededError)
    assert "due after 0.050 s" in str(last.error)


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


def test_an_interrupted_generate_cancels_its_request(engine, monkeypatch):
    def interrupted(_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(EventStream, "collect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate("hello", greedy(15_000))
    assert_nothing_left(engine)


def test_a_sink_that_fails_hurts_nobody_else(engine):
    def bad(_) -> None:
        raise ValueError("no")

    other = engine.stream("hello", greedy(20))
    engine.submit(engine.processor.process("hello"), greedy(20), sink=bad)
    assert len(other.collect().token_ids) == 20
    assert_nothing_left(engine)


def test_closing_ends_every_request_and_refuses_new_ones():
    engine = Engine(config(max_running=2))
    streams = [engine.stream("hello", greedy(5000)) for _ in range(5)]
    engine.close()
    for stream in streams:
        with pytest.raises((CancelledError, OverloadedError), match="closing"):
            stream.collect()
    with pytest.raises(OverloadedError, match="shutting down"):
        engine.generate("hello")
    engine.close()


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


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": "/nowhere"}, "not a directory"),
        ({"max_batch_tokens": 70}, "max_batch_tokens = 70"),
        ({"max_model_len": 10**6}, "max_model_len"),
        ({"kv_cache_bytes": 1000}, "kv_cache_bytes is 1,000"),
        ({"block_size": 0}, "block_size = 0"),
        ({"device": "tpu"}, "device = 'tpu'"),
        ({"dtype": "int8"}, "dtype = 'int8'"),
        ({"speed": 11}, "'speed' is not a setting"),
    ],
)
def test_settings_that_cannot_be_are_errors_that_say_so(settings, said):
    with pytest.raises(InvalidArgumentError) as caught:
        Engine(config(**settings))
    assert said in str(caught.value)


def test_a_directory_without_a_model_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Engine(config(model=tmp_path))
