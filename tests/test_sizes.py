"""Sizes as people read them: small ones are not nothing."""

import pytest

from wicore_backend.sizes import disk_size, gib


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (35.2e6, "35 MB"),
        (17.02e9, "17.02 GB"),
        (1_234.5e9, "1,234.50 GB"),
    ],
)
def test_a_size_on_a_disk_is_in_the_unit_that_shows_it(size: float, said: str) -> None:
    assert disk_size(size) == said


def test_memory_is_in_gib() -> None:
    assert gib(5 * 2**29) == "2.5"
