"""Engines of one model with different executors: their answers, and how fast they are."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from wicore_backend import Engine, EngineConfig, SamplingParams

_PROMPTS = (
    "What is 12 + 7?",
    "Repeat: the quick brown fox jumps over the lazy dog.",
    "Name three colours and three animals.",
    "用中文介绍一下你自己。",
)
_FIRST_ID = 300
"""Of ids that are words of the published tokenizer's, and of the demo model's."""


@dataclass(frozen=True, slots=True)
class Speeds:
    """Of an engine.

    Attributes
    ----------
    step_ms
        Of a step of decodes, by how many there are.
    prefill
        Tokens of a prompt in a second.
    """

    step_ms: Mapping[int, float]
    prefill: float


@dataclass(frozen=True, slots=True)
class Run:
    """What an engine answered, greedily, and how fast it is."""

    answers: tuple[tuple[int, ...], ...]
    speeds: Speeds


def run(settings: EngineConfig, *, batches: Sequence[int], prompt: int, new: int, rounds: int) -> Run:
    """Load an engine, ask it, time it, and give the device back."""
    with Engine(settings) as engine:
        greedy = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
        answers = tuple(tuple(engine.generate(text, greedy).token_ids) for text in _PROMPTS)
        steps = {batch: _median(partial(_step_ms, engine, batch, new), rounds) for batch in batches}
        seconds = _median(partial(_first_token_s, engine, prompt), rounds)
    return Run(answers, Speeds(steps, prompt / seconds))


def _median(measure: Callable[[int], float], rounds: int) -> float:
    measure(0)
    return statistics.median(measure(round_) for round_ in range(1, rounds + 1))


def _step_ms(engine: Engine, batch: int, new: int, round_: int) -> float:
    params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
    streams = [engine.stream(_ids(24, seed=100 * round_ + i), params) for i in range(batch)]
    times = [stream.collect().usage.tpot_s for stream in streams]
    return 1e3 * max(time for time in times if time is not None)


def _first_token_s(engine: Engine, prompt: int, round_: int) -> float:
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    ttft = engine.stream(_ids(prompt, seed=7000 + round_), params).collect().usage.ttft_s
    assert ttft is not None, "an answer that is whole has a first token"
    return ttft


def _ids(count: int, *, seed: int) -> list[int]:
    """A prompt that begins like no other."""
    return [_FIRST_ID + (seed * 7919 + i * 104_729) % 200 for i in range(count)]


def equal_tokens(found: Run, expected: Run) -> tuple[int, int]:
    """Tokens up to the first that differs, over all answers; and tokens in all."""
    equal = total = 0
    for answer, right in zip(found.answers, expected.answers, strict=True):
        total += len(right)
        equal += next((i for i, pair in enumerate(zip(answer, right, strict=True)) if pair[0] != pair[1]), len(right))
    return equal, total
