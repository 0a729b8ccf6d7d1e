"""Which tiling is taken for how many rows."""

from __future__ import annotations

import pytest

from wicore_backend.executor.tile_choice import TileChoice


@pytest.mark.parametrize(
    ("rows", "taken"), [(1, 12), (2, 20), (16, 20), (17, None), (64, None), (65, 40), (128, 40), (129, None)]
)
def test_the_first_that_fits_of_those_for_as_few_rows_as_there_can_be(rows, taken):
    """For 17 to 64 rows none fits: what is for more was measured with more, and is not taken."""
    choice = TileChoice({16: (20, 24), 1: (11, 12, 14), 128: (40,), 64: (31, 33)}, lambda tile: tile % 2 == 0)
    assert choice(rows) == taken


def test_without_tilings_none_is_taken():
    assert TileChoice[int]({}, lambda _: True)(1) is None
