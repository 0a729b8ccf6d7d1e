"""Steps that guess: the same answers as without, whatever is guessed; no guesses that do not pay."""

import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from wicore_backend import Engine, EngineConfig, SamplingParams
from wicore_backend.attention.mass_sampling import MassSampling
from wicore_backend.engine import emission
from wicore_backend.engine.request import TokensEvent
from wicore_backend.engine.runner import ModelRunner
from wicore_backend.engine.sampler import sample
from wicore_backend.engine.speculation import Lookup, Speculator
from wicore_backend.engine.step_time import Coefficients, StepShape
from wicore_backend.hmt.blocks import SequenceBlocks

MODEL = Path(__file__).resolve().parent.parent / "models" / "wicore-demo"

# Guesses of an engine.


class Guesser(Speculator):
    """Guesses in every step: what will come, as far as a coin shows heads, and else anything."""

    def __init__(self, answers: dict[tuple[int, ...], list[int]], seed: int) -> None:
        super().__init__(8)
        self._answers = answers
        self._rng = random.Random(seed)
        self.tokens = self.steps = 0

    def wants(self, decodes, _keys):
        return bool(decodes)

    def guess(self, sequence, most):
        rng = self._rng
        key = tuple(sequence.tokens[: sequence.prompt_len])
        known = self._answers.get(key, [])[sequence.answered :]
        tokens = [token if rng.random() < 0.8 else rng.randrange(300, 1500) for token in known]
        return tuple(tokens[: max(0, min(most, rng.randrange(9)))])

    def observe(self, *, decodes, keys, tokens, seconds, guessing):
        assert guessing
        assert seconds > 0
        assert keys >= decodes
        self.steps += decodes
        self.tokens += tokens


def prompts(count: int) -> list[list[int]]:
    return [[2, *random.Random(n).choices(range(300, 1500), k=20 + 37 * n)] for n in range(count)]


@pytest.mark.parametrize("guesses", [0, 5])
def test_steps_with_guesses_tell_where_attention_fell_as_often_as_those_without(guesses, monkeypatch):
    """A step of five guesses passes by most positions at which decodes are measured."""
    told: list[tuple[int, float]] = []
    monkeypatch.setattr(SequenceBlocks, "attended", lambda blocks, mass: told.append((blocks.stop, float(mass.sum()))))
    [question] = prompts(1)

    class Right(Guesser):
        def guess(self, sequence, most):
            known = self._answers[tuple(question)][sequence.answered :]
            return tuple(known[: min(most, guesses)])

    params = SamplingParams(max_tokens=64, ignore_eos=True)
    [(answer, *_)] = run({"max_guessed_tokens": 0}, [question], [params])
    guesser = Right({tuple(question): answer}, seed=0)
    with engine_that_guesses_by(guesser) as engine:
        engine._model.runner.sampling = MassSampling.of(engine._model.pools.layout, interval=8)
        assert engine.generate(question, params).token_ids == answer
    assert (guesser.tokens > 5 * guesser.steps) == bool(guesses)
    assert 64 // 8 <= len(told) <= 64 // 8 + 2  # And once at the prompt's end.
    assert [share for _, share in told] == pytest.approx([1.0] * len(told), abs=1e-3)


def engine_that_guesses_by(speculator: Speculator | None, **settings) -> Engine:
    """None is as ever."""
    config = EngineConfig(model=MODEL, device="cpu", dtype="float32", threads=1, **settings)
    make = Speculator if speculator is None else lambda _: speculator
    with mock.patch("wicore_backend.engine.engine.Speculator", make):
        return Engine(config)


def run(settings: dict, questions: list[list[int]], params: list[SamplingParams], guesser=None, *, overlaps=False):
    with engine_that_guesses_by(guesser, **settings) as engine:
        engine._model = replace(engine._model, overlaps=overlaps)
        streams = [engine.stream(question, own) for question, own in zip(questions, params, strict=True)]
        results = [stream.collect() for stream in streams]
        engine._scheduler.check_integrity()
        engine._model.blocks.check_integrity()
        assert not engine._scheduler.has_work
    return [(result.token_ids, result.text, result.finish_reason, result.usage.completion_tokens) for result in results]


@pytest.mark.parametrize("overlaps", [False, True], ids=["", "tokens_read_a_step_late"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"block_size": 5, "max_batch_tokens": 72, "max_running": 8},
        {"kv_cache_bytes": 9 * 2**20, "max_model_len": 1024, "max_running": 8},  # Some give way to others.
        {"kv_budget_tokens": 256, "block_size": 16},
    ],
    ids=["plenty", "small_blocks", "little_memory", "bounded"],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_what_they_are_without_guesses(settings, overlaps, temperature):
    questions = prompts(8)
    drawn = {"temperature": temperature, "top_p": 0.95, "seed": 5, "ignore_eos": True}
    params = [SamplingParams(max_tokens=10 + 9 * n, **drawn) for n in range(8)]
    expected = run(settings | {"max_guessed_tokens": 0}, questions, params)
    answers = {tuple(question): list(tokens) for question, (tokens, *_) in zip(questions, expected, strict=True)}
    guesser = Guesser(answers, seed=1)
    assert run(settings, questions, params, guesser, overlaps=overlaps) == expected
    if "kv_budget_tokens" in settings:
        assert guesser.tokens == guesser.steps  # Which tokens are seen hangs on the step: nothing is guessed.
    else:
        assert guesser.tokens > 1.5 * guesser.steps


def test_choosing_that_fails_with_guesses_goes_on_without_them(monkeypatch):
    [question] = prompts(1)
    params = [SamplingParams(max_tokens=40, ignore_eos=True)]
    expected = run({"max_guessed_tokens": 0}, [question], params)

    def sample_alone(logits, rows):
        if len(rows) > 1:
            raise RuntimeError("out of memory")
        return sample(logits, rows)

    monkeypatch.setattr(emission, "sample", sample_alone)
    answers = {tuple(question): list(expected[0][0])}
    assert run({}, [question], params, Guesser(answers, seed=1)) == expected


def test_steps_that_fail_with_guesses_are_tried_ever_more_rarely(monkeypatch):
    question = [2, *[400, 401, 402, 403, 404] * 12]
    params = SamplingParams(max_tokens=200, ignore_eos=True, logit_bias={"402": 6.0, "403": 6.0})
    run_step, failed = ModelRunner.run, []

    def without_memory_for_guesses(runner, plan, ahead=None):
        if plan.guesses:
            failed.append(plan)
            raise RuntimeError("out of memory")
        return run_step(runner, plan, ahead)

    expected = run({"max_guessed_tokens": 0}, [question], [params])
    monkeypatch.setattr(ModelRunner, "run", without_memory_for_guesses)
    assert run({}, [question], [params]) == expected
    assert 2 <= len(failed) <= 10  # Two each time: after 16 steps without, then 32, 64, 128.


def test_an_answer_ends_in_the_midst_of_what_was_guessed_right():
    [question] = prompts(1)
    [(tokens, text, _, _)] = run(
        {"max_guessed_tokens": 0}, [question], [SamplingParams(max_tokens=40, ignore_eos=True)]
    )
    ends = [{"stop_token_ids": [tokens[17]]}, {"stop": [text[30:34]]}, {"max_tokens": 23}]
    for end in ends:
        params = [SamplingParams(**{"max_tokens": 40, "ignore_eos": True} | end)]
        expected = run({"max_guessed_tokens": 0}, [question], params)
        for seed in range(4):
            assert run({}, [question], params, Guesser({tuple(question): list(tokens)}, seed)) == expected


class Repeater(Speculator):
    """Wants guesses in every step."""

    def wants(self, decodes, _keys):
        return bool(decodes)

    def observe(self, **_):
        pass


@pytest.mark.parametrize(
    ("params", "guessed"),
    [
        ({"repetition_penalty": 1.3}, False),
        ({"presence_penalty": 0.5}, False),
        ({"frequency_penalty": 0.5}, False),
        ({"logprobs": 2}, False),
        ({"min_tokens": 24}, False),
        ({"grammar": {"regex": "[a-z ]{4,20}"}}, False),
        ({"n": 1, "best_of": 2, "temperature": 1.0}, False),
        ({"logit_bias": {"400": 3.0}}, True),
        ({"n": 3, "temperature": 1.0}, True),
    ],
    ids=str,
)
def test_only_tokens_that_depend_on_no_token_before_them_are_guessed(params, guessed):
    question = [2, *[400, 401, 402, 403, 404] * 12]
    own = SamplingParams(**{"max_tokens": 24, "seed": 3, "logit_bias": {"402": 6.0, "403": 6.0}} | params)
    results = []
    for speculator in (Speculator(0), Repeater(4)):
        with engine_that_guesses_by(speculator) as engine:
            answers = defaultdict(list)
            for event in engine.stream(question, own):
                if isinstance(event, TokensEvent):
                    answers[event.index] += event.token_ids
            results.append(answers)
            engine._scheduler.check_integrity()
            counted = engine.statistics().scheduler
    assert results[0] == results[1]
    assert bool(counted.guessed_tokens) == guessed
    assert counted.guessed_right <= counted.guessed_tokens


# What is guessed.


def test_the_guess_follows_the_longest_match_that_is_latest():
    lookup = Lookup()
    assert lookup.guess([1, 2, 3, 4, 9, 1, 2, 3], 3) == (4, 9, 1)
    assert lookup.guess([1, 2, 3, 4, 9, 1, 2, 3, 5, 1, 2, 3], 1) == (5,)
    assert Lookup().guess([7, 1, 2, 3, 4, 9, 1, 2, 3, 5, 7, 1, 2, 3], 1) == (4,)


@pytest.mark.parametrize("tokens", [[1], [1, 1], [1, 2, 3], [5, 2, 3, 9, 4, 2, 3], list(range(3000))])
def test_without_a_match_nothing_is_guessed(tokens):
    assert Lookup().guess(tokens, 4) == ()


def test_guesses_are_those_of_a_plain_search():
    rng = random.Random(0)
    for _ in range(200):
        lookup, tokens = Lookup(), []
        for _ in range(rng.randrange(1, 60)):
            tokens += [rng.randrange(3) for _ in range(rng.randrange(1, 5))]
            guess = lookup.guess(tokens, 4)
            matches = {
                end: next((n for n in range(min(8, end)) if tokens[end - 1 - n] != tokens[-1 - n]), min(8, end))
                for end in range(max(1, len(tokens) - 500), len(tokens))
            }
            best = max(matches.values(), default=0)
            follows = max((end for end, length in matches.items() if length == best), default=0)
            if len([end for end, length in matches.items() if length]) <= 64:
                assert guess == (tuple(tokens[follows : follows + 4]) if best >= 3 else ())


def test_a_guess_that_is_right_is_followed_by_a_longer_one_and_a_wrong_one_by_a_shorter():
    text = list(range(100, 160)) + list(range(100, 120))
    lookup = Lookup()
    assert len(lookup.guess(text, 64)) == 4
    lookup.learn(4, 4)
    assert len(lookup.guess(text, 64)) == 8
    lookup.learn(1, 8)
    assert len(lookup.guess(text, 64)) == 2
    assert len(lookup.guess(text, 1)) == 1


# Whether to guess.

KEYS = 1000


def steps(speculator: Speculator, count: int, *, gain: float) -> int:
    """So many steps of 1 ms without guesses, and as many tokens more a second with them; how many had guesses."""
    guessing = 0
    for _ in range(count):
        wants = speculator.wants(4, KEYS)
        guessing += wants
        told, seconds = (round(4 * 2 * gain), 2e-3) if wants else (4, 1e-3)
        speculator.observe(decodes=4, keys=KEYS, tokens=told, seconds=seconds, guessing=wants)
    return guessing


def test_guesses_that_pay_go_on_with_a_step_without_now_and_then():
    assert 0.9 < steps(Speculator(8), 1000, gain=1.5) / 1000 < 0.99


def test_guesses_that_do_not_pay_are_tried_ever_more_rarely():
    speculator = Speculator(8)
    assert 0 < steps(speculator, 1000, gain=1.0) <= 28
    assert steps(speculator, 5000, gain=1.0) <= 24


def test_what_begins_to_pay_is_found_and_what_ceases_to_is_left():
    speculator = Speculator(8)
    steps(speculator, 500, gain=0.75)
    assert steps(speculator, 3000, gain=1.5) > 1500
    assert steps(speculator, 1000, gain=0.75) < 60


def test_zero_guesses_none():
    assert steps(Speculator(0), 200, gain=9) == 0


def test_nothing_is_guessed_of_a_batch_whose_plain_steps_were_never_seen():
    speculator = Speculator(8)
    steps(speculator, 100, gain=1.5)
    assert speculator.wants(5, KEYS)
    assert not speculator.wants(20, KEYS)


def test_a_step_with_guesses_that_some_left_in_the_meantime_is_compared_with_its_like_alone():
    speculator = Speculator(8)
    steps(speculator, 16, gain=1.5)
    assert speculator.wants(4, KEYS)
    speculator.observe(decodes=1, keys=KEYS, tokens=3, seconds=1e-3, guessing=True)  # Steps of one were never seen.
    assert speculator.wants(4, KEYS)


DEVICE = Coefficients(step=5e-3, sequence=2e-5, prefill_token=1e-5, key=2e-8, pair=0.0, mixed=0.0)
"""Of plain steps: 800,000 keys are read in 16 ms. As pieces of prompt, whose keys may be shared out among fewer
programs than a decode's, they take `pieces` times as long."""


def shares_of_guessing(*phases: tuple[int, float], pieces: float = 6) -> tuple[list[float], float]:
    """Of phases of 1,500 steps of eight sequences, each with so many keys and such a share of guesses that are right,
    the share of the steps that had guesses; and all tokens a second over those without any."""
    speculator, decodes, guessed = Speculator(8), 8, 4
    told = seconds = plain_tokens = 0.0
    shares = []
    for each, right in phases:
        keys, guessing = decodes * each, 0
        plain_s = DEVICE.seconds(StepShape(decodes, decodes, keys, 0))
        with_guesses_s = DEVICE.seconds(StepShape((1 + guessed) * decodes, decodes, round(pieces * keys), 0))
        plain_tokens_a_second = decodes / plain_s
        for _ in range(1500):
            wants = speculator.wants(decodes, keys)
            guessing += wants
            tokens, took = (round(decodes * (1 + right * guessed)), with_guesses_s) if wants else (decodes, plain_s)
            speculator.observe(decodes=decodes, keys=keys, tokens=tokens, seconds=took, guessing=wants)
            told, seconds = told + tokens, seconds + took
            plain_tokens += took * plain_tokens_a_second
        shares.append(guessing / 1500)
    return shares, told / plain_tokens


def test_guesses_whose_attention_costs_more_than_they_bring_are_left_at_long_context():
    (short, long, short_again), gain = shares_of_guessing((1000, 0.5), (100_000, 0.5), (1000, 0.5))
    assert short > 0.9
    assert long < 0.1
    assert short_again > 0.9
    assert gain > 1.3


def test_what_long_contexts_took_does_not_make_guesses_look_good_at_short_ones():
    (long, short), gain = shares_of_guessing((100_000, 1.0), (1000, 0.0), pieces=2)
    assert long > 0.9
    assert short < 0.1
    assert gain > 1.5
