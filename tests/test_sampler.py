"""Choosing tokens: each parameter against its definition, and independence of the batch."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wicore_backend.engine.logprobs import logprobs_of
from wicore_backend.engine.sampler import SamplingRow, _mix, sample
from wicore_backend.engine.sampling_params import SamplingParams

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0, 1.5])


def draws(count: int = 4000, logits: torch.Tensor = LOGITS, answer=(), prompt=(), **params) -> Counter:
    """Tokens drawn with `count` seeds."""
    p = SamplingParams(**{"temperature": 1.0} | params)
    rows = [SamplingRow(p, seed, len(answer), prompt, answer) for seed in range(count)]
    return Counter(sample(logits.repeat(count, 1), rows).tokens.tolist())


def assert_distribution(counts: Counter, expected: torch.Tensor) -> None:
    total = sum(counts.values())
    for token, p in enumerate(expected.tolist()):
        sigma = math.sqrt(p * (1 - p) / total)
        assert abs(counts[token] / total - p) <= 4 * sigma, (token, p, counts[token] / total)


def test_temperature_zero_takes_the_likeliest():
    assert draws(10, temperature=0.0) == {0: 10}


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-38, 1e-6])
def test_the_least_temperatures_take_the_likeliest_too(temperature):
    logits = torch.tensor([3.0, 1.0, 5.0, -1.0])
    assert draws(10, logits, temperature=temperature) == {2: 10}
    assert draws(10, logits, temperature=temperature, top_k=3, top_p=0.9, min_p=0.1) == {2: 10}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_softmax(temperature):
    assert_distribution(draws(temperature=temperature), (LOGITS / temperature).softmax(0))


def test_top_k_keeps_the_k_likeliest():
    kept = torch.where(LOGITS >= 1.5, LOGITS, -torch.inf)
    assert_distribution(draws(top_k=2), kept.softmax(0))


def test_top_p_keeps_the_fewest_that_reach_it():
    # Probabilities in order: token 0 0.45, 5 0.27, 1 0.17, 2 0.06, ...
    assert set(draws(top_p=0.4)) == {0}
    assert set(draws(top_p=0.5)) == {0, 5}
    assert set(draws(top_p=0.75)) == {0, 5, 1}


def test_min_p_keeps_those_near_the_likeliest():
    assert set(draws(min_p=0.36)) == {0, 1, 5}
    assert set(draws(min_p=1.0)) == {0}


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_once():
    penalised = torch.tensor([1.0, 1.0, 0.0, -1.0, -4.0, 1.5])
    assert_distribution(draws(prompt=[0, 0], answer=[4], repetition_penalty=2.0), penalised.softmax(0))


def test_presence_and_frequency_look_at_the_answer_only():
    penalised = LOGITS - torch.tensor([0.0, 0.5 + 0.3 * 2, 0.5 + 0.3, 0.0, 0.0, 0.0])
    got = draws(prompt=[0, 0, 0], answer=[1, 2, 1], presence_penalty=0.5, frequency_penalty=0.3)
    assert_distribution(got, penalised.softmax(0))


def test_one_seed_gives_one_answer_and_places_differ():
    p = SamplingParams(temperature=1.0)
    flat = torch.zeros(64, 1000)
    first, again = (
        sample(flat.clone(), [SamplingRow(p, 7, place) for place in range(64)]).tokens.tolist() for _ in range(2)
    )
    assert first == again
    assert len(set(first)) > 50


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_row_does_not_depend_on_its_batch(data):
    params = st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.7, 1.3]),
        top_k=st.sampled_from([0, 3, 10]),
        top_p=st.sampled_from([1.0, 0.6]),
        min_p=st.sampled_from([0.0, 0.1]),
        repetition_penalty=st.sampled_from([1.0, 1.2]),
        presence_penalty=st.sampled_from([0.0, 0.5]),
    )
    batch = data.draw(st.lists(params, min_size=1, max_size=6))
    rows = [SamplingRow(p, seed, 2, [1, 2], [3, 4]) for seed, p in enumerate(batch)]
    logits = torch.randn(len(rows), 50, generator=torch.Generator().manual_seed(len(rows)))
    together = sample(logits.clone(), rows).tokens.tolist()
    assert together == [sample(logits[i : i + 1].clone(), [row]).tokens.item() for i, row in enumerate(rows)]


def test_logprobs_are_of_the_models_distribution():
    (first, second) = logprobs_of(torch.stack([LOGITS, -LOGITS]), torch.tensor([1, 4]), [2, 0])()
    assert first.logprob == pytest.approx(LOGITS.log_softmax(0)[1].item())
    assert [token for token, _ in first.top] == [0, 5]
    assert second.top == ()


def test_seeds_and_places_do_not_repeat():
    assert len({_mix(seed, place) for seed in range(100) for place in range(100)}) == 10_000


def test_the_last_bits_of_the_logits_do_not_change_what_is_drawn():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, 2048, generator=generator)
    rows = [SamplingRow(SamplingParams(temperature=5.0, top_p=0.95), seed, 0) for seed in range(2000)]
    noisy = logits + torch.randn(2000, 2048, generator=generator) * 1e-6
    drawn, again = sample(logits.clone(), rows).tokens, sample(noisy, rows).tokens
    assert (drawn != again).sum() <= 2


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("drawn", [(), (0, 1, 2), (1,)], ids=["greedy", "drawn", "both"])
def test_a_row_that_is_not_of_numbers_is_told_from_the_others_and_its_token_is_still_one(value, drawn):
    logits = torch.randn(3, 50)
    logits[1, slice(None) if value < 0 else 7] = value  # To be ruled out is no fault of one token.
    logits[0, 3] = -torch.inf
    params = SamplingParams(temperature=1.0, top_k=40, top_p=0.9, min_p=0.01)
    rows = [SamplingRow(params if n in drawn else SamplingParams(temperature=0.0), 1, 0) for n in range(3)]
    sampled = sample(logits, rows)
    assert sampled.peaks.isfinite().tolist() == [True, False, True]
    assert all(0 <= token < 50 for token in sampled.tokens.tolist())
