"""The bounds that an evaluation of codecs gives."""

import pytest

from scripts.eval_codecs import upper_bound


def test_of_what_never_happened_the_bound_is_that_of_the_definition():
    for trials in (1, 20, 3000):
        assert upper_bound(0, trials) == pytest.approx(1 - 0.05 ** (1 / trials))
    assert upper_bound(3, 10) == pytest.approx(0.60662, abs=1e-5)  # Clopper and Pearson's table


def test_of_what_always_happened_there_is_no_bound():
    assert upper_bound(20, 20) == pytest.approx(1)


def test_of_what_happened_often_in_thousands_of_trials_there_is_one():
    """There are more ways to choose so many of them than a float can hold."""
    assert upper_bound(700, 2000) == pytest.approx(0.35 + 1.645 * (0.35 * 0.65 / 2000) ** 0.5, abs=1e-3)
