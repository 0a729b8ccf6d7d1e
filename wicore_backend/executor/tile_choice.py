"""Which tiling a product takes: by how many rows there are, one that the matrix has whole tiles of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Generic, TypeVar

TileT = TypeVar("TileT")


class TileChoice(Generic[TileT]):
    """Called with a number of rows, the tiling for them; None to leave the product to cuBLAS.

    Parameters
    ----------
    tiles
        By the largest number of rows that they are for, tilings in the order in which they are preferred. Where none of
        them fits, those for more rows are not tried.
    fits
        Whether a tiling fits the matrix.
    """

    def __init__(self, tiles: Mapping[int, Iterable[TileT]], fits: Callable[[TileT], bool]) -> None:
        self._by_most = {most: next(filter(fits, tiles[most]), None) for most in sorted(tiles)}

    def __call__(self, rows: int) -> TileT | None:
        return next((tile for most, tile in self._by_most.items() if rows <= most), None)
