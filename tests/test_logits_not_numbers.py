"""A model whose logits are not numbers: the request ends with an error that says so, and others do not notice."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine_kit import MODEL, PROMPTS, assert_nothing_left, config, greedy
from wicore_backend import Engine, SamplingParams
from wicore_backend.engine import emission
from wicore_backend.engine.request import FinishedEvent, FinishReason
from wicore_backend.errors import EngineError, ErrorCode

pytest_plugins = ["tests.engine_fixtures"]

CULPRIT = 777
"""The seed of the request that loses its numbers, or a token that does."""


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_are_not_numbers_end_every_request_with_an_error_that_says_what_to_check(tmp_path, temperature):
    shutil.copytree(MODEL, tmp_path, dirs_exist_ok=True)
    [path] = tmp_path.glob("*.safetensors")
    weights = load_file(path)
    [norm] = [name for name in weights if name.endswith("model.norm.weight")]
    weights[norm][0] = torch.nan
    save_file(weights, path)
    with Engine(config(model=tmp_path)) as engine:
        stream = engine.stream("What is 12 + 7?", SamplingParams(max_tokens=8, temperature=temperature))
        [end] = list(stream)
        assert isinstance(end, FinishedEvent)
        assert end.reason is FinishReason.ERROR
        assert end.error.code is ErrorCode.INTERNAL
        said = "the model's logits are not numbers .* at token 1 of the answer.*weights .* checksums"
        assert re.search(said, str(end.error)), end.error
        assert end.usage.completion_tokens == 0
        assert engine.health().ok
        assert_nothing_left(engine)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_keeps_what_came_before_and_the_error_names_the_token(engine, monkeypatch, temperature):
    sample = emission.sample

    def losing_numbers(logits, rows):
        for logit, row in zip(logits, rows, strict=True):
            if row.seed == CULPRIT and row.place == 5:
                logit[3] = torch.nan
        return sample(logits, rows)

    params = SamplingParams(max_tokens=30, temperature=temperature, ignore_eos=True, seed=1)
    expected = engine.generate("hello", params).token_ids
    monkeypatch.setattr(emission, "sample", losing_numbers)
    other = engine.stream("hello", params)
    culprit = engine.stream(
        [2, 300, 301], SamplingParams(max_tokens=30, temperature=temperature, ignore_eos=True, seed=CULPRIT)
    )
    *tokens, end = culprit
    assert sum(len(event.token_ids) for event in tokens) == end.usage.completion_tokens == 5
    assert "at token 6 of the answer" in str(end.error)
    assert other.collect().token_ids == expected
    assert_nothing_left(engine)


def test_keys_and_values_that_are_not_numbers_reach_nobody_through_blocks_that_others_have_next(
    engine, alone, monkeypatch
):
    executor, lost = engine._model.runner._executor, []
    embed = executor.embed

    def losing_numbers(ids, *pictures):
        culprits = ids == CULPRIT
        lost.append(int(culprits.sum()))
        return embed(ids, *pictures).masked_fill(culprits[:, None], torch.nan)

    monkeypatch.setattr(executor, "embed", losing_numbers)
    for _ in range(2):  # Again, with blocks that have been the culprits'.
        others = [engine.stream(prompt, greedy(), images=images) for prompt, images in PROMPTS]
        culprits = [engine.stream([2, CULPRIT, *[400] * n], greedy(40, seed=1)) for n in (1, 60, 400)]
        for culprit in culprits:
            with pytest.raises(EngineError, match="logits are not numbers"):
                culprit.collect()
        assert [stream.collect().token_ids for stream in others] == alone
    assert sum(lost) >= 3
    assert_nothing_left(engine)
