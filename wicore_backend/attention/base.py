"""Attention over paged KV: the contract between the engine's step, the KV pools and an implementation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
        window, are 0: block 0 of every pool belongs to nobody, holds finite values and must be masked. A 0 among the
        global group's says that the block has left (bounded KV): its positions are visible to no token. The blocks
        that the step writes never have.
    measured
        For layers of the global group, by index: the sequences, 0 to B - 1, whose attention mass `Attention.mass` is
        asked for there.
    """

    positions: NDArray[np.int32]
    attend_limits: NDArray[np.int32]
    query_lens: NDArray[np.int32]
    decodes: int
    block_tables: Mapping[LayerGroup, NDArray[np.int32]]
    measured: Mapping[int, Sequence[int]] = field(default_factory=dict)


MEASURED_QUERIES = 32
"""Of a prefill's tokens, how many of the last ones count for its attention mass: about a question's length."""

PlanT = TypeVar("PlanT")


class Attention(Protocol[PlanT]):
    """Attention of all layers over one set of pools. Stateless between steps but for scratch memory."""

    def plan(self, step: PackedStep) -> PlanT:
        """What all layers of the step share: indices, masks, split of the work. Valid for that step only."""

    def attend(self, plan: PlanT, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Writes `k`, `v` [T, KV heads, d] of `layer` into the pools, then returns attention [T, query heads * d].

        `q` [T, query heads, d] comes unscaled; the softmax scale and soft-capping are the model config's. The result
        is good until the plan's next layer is attended to, which may overwrite it.
        """

    def mass(self, plan: PlanT) -> Mapping[int, NDArray[np.float32]]:
        """Where the attention of the sequences in `PackedStep.measured` fell; to be asked after the last layer.

        For each of them float32 [N]: the share of softmax attention that each block got, from the sequence's first
        block to the one with its last key, mean over the query heads and the measured layers. It is that of a decode's
        token, or the mean over up to `MEASURED_QUERIES` last tokens of a prefill. Shares sum to 1; blocks that have
        left get 0.

        Asking changes no attention. It waits for the device, so ask when the step's tokens are there. A kernel that
        splits a sequence's keys has the shares in the partial log-sum-exps of its splits.
        """

    def collect(self, plan: PlanT) -> Callable[[], Mapping[int, NDArray[np.float32]]]:
        """`mass` in two steps: the device is given what it takes now, and is waited for when the result is called.

        That does not wait for what the device is given in between.
        """
