"""Greedy answers of the demo model on a CUDA device against those of the CPU in float32: 200 held-out questions."""

import random
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.demo_data.drawing import encode_picture
from scripts.eval_demo import CHECKPOINT, mixed_cases, needle_cases, scattered_cases, skill_cases, wording_cases
from wicore_backend import Engine, EngineConfig, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]

ASKED, AT_LEAST = 200, 198


@pytest.fixture(scope="module")
def questions():
    """Messages, pictures as files: every skill in both languages, pictures, conversations, lists of 4K tokens."""
    seed = 11
    cases = [
        *chain(skill_cases(4, seed=seed), wording_cases(8, seed=seed), scattered_cases(8, seed=seed)),
        *chain(mixed_cases(24, seed=seed), needle_cases([4096], [0.1, 0.6], 2, seed=seed)),
    ]
    random.Random(seed).shuffle(cases)
    return [
        (case.messages, [encode_picture(scene, random.Random(seed)) for scene in case.pictures])
        for case in cases[:ASKED]
    ]


def answers(questions, device: str, dtype: Any, model: Path = CHECKPOINT) -> list[list[int]]:
    prompts, images = [prompt for prompt, _ in questions], [pictures for _, pictures in questions]
    settings = EngineConfig(model=model, device=device, dtype=dtype, kv_cache_bytes=4 * 2**30)
    with Engine(settings) as engine:
        results = engine.generate(prompts, SamplingParams(max_tokens=96, temperature=0.0), images=images)
    return [list(result.token_ids) for result in results]


@pytest.fixture(scope="module")
def on_cpu(questions):
    return answers(questions, "cpu", "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_tokens_are_those_of_the_cpu(questions, on_cpu, dtype):
    assert len(questions) == ASKED
    ours = answers(questions, "cuda", dtype)
    same = sum(a == b for a, b in zip(ours, on_cpu, strict=True))
    print(f"\n{dtype}: {same} of {ASKED} answers are the same, {sum(map(len, on_cpu)):,} tokens")
    assert same >= AT_LEAST
