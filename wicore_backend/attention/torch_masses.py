"""Attention mass beside PyTorch's attention: what to measure in which piece, and what that comes to.

Fused attention gives no weights, so attention mass is worked out beside it, from the keys that were gathered for it:
a fifth of a layer's decode attention for one sequence, which is why it is asked of few steps and layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from wicore_backend.attention.base import MEASURED_QUERIES, PackedStep
from wicore_backend.attention.torch_pieces import Piece

Mask = Callable[[NDArray[np.bool_]], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Measurement:
    """Queries of one sequence in a piece whose weights are wanted."""

    sequence: int
    member: int
    """Of the piece's B sequences."""
    queries: slice
    """Of the piece's."""
    num_keys: int
    """That any of them sees, from the sequence's first on."""
    mask: Tensor | None
    """[queries, num_keys], added to the scores; None if all are visible."""
    share: float
    """In the sequence's mass."""


class MassMeasurements:
    """What is asked of a step's attention mass, and what has been measured so far.

    Parameters
    ----------
    wanted
        By layer and piece.
    """

    def __init__(self, wanted: Mapping[tuple[int, Piece], Sequence[Measurement]]) -> None:
        self._wanted = wanted
        self._measured: list[tuple[Measurement, Tensor]] = []

    def wanted(self, layer: int, piece: Piece) -> Sequence[Measurement]:
        """Of a piece in a layer."""
        return self._wanted.get((layer, piece), ())

    def add(self, measurement: Measurement, by_block: Tensor) -> None:
        """What was found: weights summed up by block [blocks], of those that are there."""
        self._measured.append((measurement, by_block))

    def by_sequence(self) -> dict[int, NDArray[np.float32]]:
        """Mass by block of each sequence, of all that has been measured."""
        masses: dict[int, NDArray[np.float32]] = {}
        for wanted, by_block in self._measured:
            mass = by_block.cpu().numpy() * np.float32(wanted.share)
            before = masses.get(wanted.sequence, mass[:0])
            longer, shorter = (mass, before) if len(mass) > len(before) else (before, mass)
            longer[: len(shorter)] += shorter
            masses[wanted.sequence] = longer
        return masses


def measurements(
    step: PackedStep, pieces: Sequence[Piece], mask: Mask
) -> Mapping[tuple[int, Piece], Sequence[Measurement]]:
    """What to measure, by layer and piece, of a step as the global layers see it, which is split into `pieces`."""
    layers_of: defaultdict[int, list[int]] = defaultdict(list)
    for layer, sequences in step.measured.items():
        for sequence in sequences:
            layers_of[sequence].append(layer)
    wanted: defaultdict[tuple[int, Piece], list[Measurement]] = defaultdict(list)
    for piece in pieces:
        for member, sequence in enumerate(piece.sequences):
            layers = layers_of.get(sequence, [])
            measurement = _measurement(step, piece, member, len(layers), mask) if layers else None
            if measurement is not None:
                for layer in layers:
                    wanted[layer, piece].append(measurement)
    return wanted


def _measurement(step: PackedStep, piece: Piece, member: int, layers: int, mask: Mask) -> Measurement | None:
    """Of those of the piece's queries that are among the last ones of its `member`, in each of `layers` layers."""
    sequence = piece.sequences[member]
    if piece.decode:
        num_keys = int(step.positions[sequence]) + 1
        return Measurement(sequence, member, slice(member, member + 1), num_keys, None, 1 / layers)
    assert isinstance(piece.rows, slice)
    end, count = int(step.query_lens[: sequence + 1].sum()), min(int(step.query_lens[sequence]), MEASURED_QUERIES)
    first = max(piece.rows.start, end - count)
    if first >= piece.rows.stop:
        return None
    limits = step.attend_limits[first : piece.rows.stop].astype(np.int64)
    num_keys = int(limits.max()) + 1
    visible = mask(np.arange(num_keys) <= limits[:, None])
    share = len(limits) / (count * layers)
    return Measurement(sequence, 0, slice(first - piece.rows.start, None), num_keys, visible, share)
