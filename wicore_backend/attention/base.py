"""Attention over paged KV: the contract between the engine's step, the KV pools and an implementation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from wicore_backend.hmt.layout import LayerGroup


@dataclass(frozen=True, slots=True, eq=False)
class PackedStep:
    """The T tokens that one step computes, sequence after sequence: decodes (one token each) first, then prefills.

    A key at position p is visible to token t if `p <= attend_limits[t]` and, in a local layer,
    `p > positions[t] - window`. The step's own tokens are keys too, so each layer writes its keys first.

    Attributes
    ----------
    positions
        int32 [T], absolute position of each token in its sequence. A sequence's tokens are consecutive.
    attend_limits
        int32 [T], the last position that the token sees: its own, or, inside an image, the image's last,
        which is in the same step.
    query_lens
        int32 [B], how many tokens each sequence has in this step.
    decodes
        How many of the B sequences, from the front, have one token that attends up to itself.
    block_tables
        For each group int32 [B, N]: the physical block of the sequence's n-th logical block, which holds positions
        n * block_size to (n + 1) * block_size - 1. Entries past a sequence's end, or wholly behind a local group's
        window, are 0: block 0 of every pool belongs to nobody, holds finite values and must be masked.
    """

    positions: NDArray[np.int32]
    attend_limits: NDArray[np.int32]
    query_lens: NDArray[np.int32]
    decodes: int
    block_tables: Mapping[LayerGroup, NDArray[np.int32]]


PlanT = TypeVar("PlanT")


class Attention(Protocol[PlanT]):
    """Attention of all layers over one set of pools. Stateless between steps but for scratch memory."""

    def plan(self, step: PackedStep) -> PlanT:
        """What all layers of the step share: indices, masks, split of the work. Valid for that step only."""

    def attend(self, plan: PlanT, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Writes `k`, `v` [T, KV heads, d] of `layer` into the pools, then returns attention [T, query heads * d].

        `q` [T, query heads, d] comes unscaled; the softmax scale and soft-capping are the model config's.
        """
