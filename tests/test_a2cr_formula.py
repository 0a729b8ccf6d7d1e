"""A2CR as closed forms: attention, uses and age, as a product and as a weighted sum."""

import math
import random

import pytest

from wicore_backend.hmt.policy import Access
from wicore_backend.hmt.policy.a2cr_formula import FormulaSettings, ProductA2CR, WeightedA2CR
from wicore_backend.hmt.policy.w_tinylfu import WTinyLFU


def test_product_form_is_attention_times_uses_times_decay():
    policy = ProductA2CR(10, FormulaSettings(time_decay_factor=0.1))
    for key in ("once", "often", "often", "late"):
        if key == "late":
            policy.advance(10.0)  # exp(-1) makes two uses of "often" less than one of "late"
        policy.observe(Access(keys=[key]))
        if key == "often" and len(policy) == 2:
            policy.use(key)
        policy.add(key)
    assert [policy.evict() for _ in range(3)] == ["once", "often", "late"]


@pytest.mark.parametrize("form", [ProductA2CR, WeightedA2CR])
def test_closed_forms_count_attention_and_uses_beyond_eviction(form):
    policy = form(10)
    for _ in range(3):
        policy.observe(Access(keys=["known"]))
        policy.add("known")
        assert policy.evict() == "known"
    for key in ("attended", "ignored", "known"):
        policy.add(key)
    for _ in range(20):
        policy.attend("attended", 0.5)
        policy.attend("ignored", 0.001)
    for key in ("attended", "ignored"):
        policy.use(key)
        policy.add(key)
    assert policy.evict() == "ignored"


@pytest.mark.parametrize("form", [ProductA2CR, WeightedA2CR, WTinyLFU])
def test_a_prompt_is_one_use_of_a_block_however_often_that_goes_up_and_down(form):
    """A hit loads a block, and gives it back when the device lets go of it."""
    policy, moved, asked_for = form(4), 1, 2  # Numbers: a string's place in the sketch differs from run to run.
    for key, prompts in ((moved, 1), (asked_for, 2)):
        for _ in range(prompts):
            policy.observe(Access(keys=[key]))
        policy.add(key)
    for _ in range(3):
        policy.use(moved)
        policy.add(moved)
    if isinstance(policy, WTinyLFU):
        assert (policy._sketch.count(moved), policy._sketch.count(asked_for)) == (1, 2)
    else:
        assert policy.evict() == moved


def test_weighted_form_orders_by_the_sum():
    settings = FormulaSettings(attention_weight=0, frequency_weight=0.3, recency_weight=0.3, time_decay_factor=0.05)
    policy, draw = WeightedA2CR(100, settings), random.Random(3)
    last: dict[int, float] = {}
    uses: dict[int, int] = {}
    for number in range(400):
        key = draw.randrange(60)
        policy.advance(float(number))
        policy.observe(Access(keys=[key]))
        if key in last:
            policy.use(key)
        policy.add(key)
        last[key], uses[key] = float(number), uses.get(key, 0) + 1

    def score(key: int) -> float:
        return 0.3 * uses[key] / (1 + uses[key]) + 0.3 * math.exp(-0.05 * (399 - last[key]))

    victim = policy.evict()
    assert score(victim) <= min(map(score, last)) + 1 / WeightedA2CR.STEPS
