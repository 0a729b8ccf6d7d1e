"""Where attention masses are put by the kernels, and what blocks they are of: books, without tensors.

A measurement is of one sequence in one layer. Its rows are one for each cell of its keys, then one for a decode's new
key, then the total; see `kernels/decode.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wicore_backend.attention.base import MEASURED_QUERIES, PackedStep
from wicore_backend.attention.gpu.schedule import Ints

MASS_TAIL = 2
"""Rows of a measurement after its cells'."""
MEASUREMENT_FIELDS = 5
"""Of `Measurements.of_prefills`."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """`cells` rows from row `at` on, and the tail."""

    sequence: int
    at: int
    cells: int


@dataclass(frozen=True, slots=True)
class PrefillRun:
    """The measurements of one layer's prefills, by number among all prefills', and the most keys that one has."""

    first: int
    count: int
    most_keys: int


@dataclass(frozen=True, slots=True, eq=False)
class Measurements:
    """A step's.

    Attributes
    ----------
    of_decodes
        By layer int32 [decodes]: where each one's begins, or -1.
    of_prefills
        int32 [n, MEASUREMENT_FIELDS], layer after layer: the first query's row, counted from the first prefill's, and
        how many there are; the keys' end; where the block table begins; where the measurement begins.
    in_prefills
        By layer.
    """

    all: tuple[Measurement, ...]
    rows: int
    of_decodes: Mapping[int, Ints]
    of_prefills: Ints
    in_prefills: Mapping[int, PrefillRun]

    @classmethod
    def of(cls, step: PackedStep, table_at: Ints, *, cell: int) -> Measurements:
        """Those that the step, which is as the global group sees it, asks for."""
        ends = step.query_lens.cumsum().tolist()
        everything: list[Measurement] = []
        rows = 0
        of_decodes, in_prefills = {}, {}
        of_prefills: list[tuple[int, ...]] = []
        for layer, sequences in step.measured.items():
            places = np.full(step.decodes, -1, np.int32)
            first, most_keys = len(of_prefills), 0
            for sequence in sequences:
                end = ends[sequence]
                queries = min(int(step.query_lens[sequence]), MEASURED_QUERIES)
                num_keys = int(step.attend_limits[end - queries : end].max()) + 1
                cells = -(-num_keys // cell)
                if sequence < step.decodes:
                    places[sequence] = rows
                else:
                    most_keys = max(most_keys, num_keys)
                    place = (end - queries - step.decodes, queries, num_keys, int(table_at[sequence]), rows)
                    of_prefills.append(place)
                everything.append(Measurement(sequence, rows, cells))
                rows += cells + MASS_TAIL
            of_decodes[layer] = places
            if len(of_prefills) > first:
                in_prefills[layer] = PrefillRun(first, len(of_prefills) - first, most_keys)
        return cls(
            tuple(everything),
            rows,
            of_decodes,
            np.array(of_prefills, np.int32).reshape(-1, MEASUREMENT_FIELDS),
            in_prefills,
        )

    def totals(self) -> Ints:
        """int64 [rows], for each row that of its measurement's total."""
        return np.concatenate([np.full(one.cells + MASS_TAIL, one.at + one.cells + 1) for one in self.all])

    def by_block(self, shares: NDArray[np.float32], *, cells_in_block: int) -> dict[int, NDArray[np.float32]]:
        """By sequence the share of each of its blocks, mean over its layers, from the `shares` [rows] of the total."""
        of_layers: defaultdict[int, list[NDArray[np.float32]]] = defaultdict(list)
        for one in self.all:
            of_cells = shares[one.at : one.at + one.cells].copy()
            of_cells[-1] += shares[one.at + one.cells]
            edges = np.arange(0, one.cells, cells_in_block)
            of_layers[one.sequence].append(np.add.reduceat(of_cells, edges))
        return {sequence: np.mean(layers, 0, dtype=np.float32) for sequence, layers in of_layers.items()}
