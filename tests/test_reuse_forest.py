"""The forest of A2CR: what a block is worth at each age, found from when others came back, a part at a time."""

import numpy as np
import pytest

from wicore_backend.hmt.policy.reuse_forest import AGES, ForestSettings, ReuseForest, age_index, worth_by_age


def test_worth_of_a_constant_hazard_is_that_hazard():
    curve = worth_by_age(np.full(len(AGES), 0.02))
    assert curve == pytest.approx([0.02] * len(AGES), rel=1e-3)


def test_worth_looks_ahead_to_a_wave_and_falls_behind_it():
    wave = np.where((AGES >= 45) & (AGES < 100), 0.05, 1e-6)
    curve = worth_by_age(wave)
    early, close, past = (curve[age_index(age)] for age in (1.0, 40.0, 200.0))
    assert early > 1e-3
    assert close > 1.5 * early
    assert past == pytest.approx(1e-6, rel=0.01)


def test_the_forest_finds_the_feature_and_the_time_that_count():
    draw = np.random.default_rng(0)
    forest = ReuseForest(2, ForestSettings(samples=4_000))
    assert forest.worth([0, 0]) is None
    for number in range(3_000):
        features = [int(draw.integers(0, 8)), int(draw.integers(0, 8))]
        sample = forest.begin(features, 1, number * 1.0)
        if features[1] < 4:
            forest.end(sample, number + float(draw.exponential(20)), hit=True)
        forest.learn(number * 1.0)
    soon, never = forest.worth([3, 2]), forest.worth([3, 6])
    assert soon is not None
    assert never is not None
    assert soon[0] == pytest.approx(1 / 20, rel=0.3)
    assert all(never[age_index(age)] < 0.4 * soon[age_index(age)] for age in (0.0, 5.0, 30.0))


def test_a_tree_is_learnt_in_parts_each_much_smaller_than_a_tree():
    draw = np.random.default_rng(1)
    forest = ReuseForest(10, ForestSettings())
    for number in range(16_384):
        features = draw.integers(0, 24, 10).tolist()
        sample = forest.begin(features, 1, float(number))
        if features[0] < 12:
            forest.end(sample, number + float(draw.exponential(20)), hit=True)
    parts = 0
    while forest.learn(20_000.0):
        parts += 1
    assert forest.fits == 1
    assert parts > 10
    assert not forest.learn(20_000.0), "nothing is new"
