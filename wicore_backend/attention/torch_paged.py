"""Paged attention in plain PyTorch: the twin that GPU kernels are compared with, and quick on a CPU.

A step is split into pieces (`torch_pieces.py`): what of it does not depend on the layer is worked out once, in `plan`.
A layer then writes its keys and values, and attends piece by piece; attention mass is worked out beside that
(`torch_masses.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from wicore_backend.attention.base import PackedStep
from wicore_backend.attention.closing_up import ClosedUp, close_up
from wicore_backend.attention.torch_masses import MassMeasurements, measurements
from wicore_backend.attention.torch_pieces import GroupPlan, Piece, PiecePlanner
from wicore_backend.hmt.fp8 import FP8, to_fp8
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.pool import KVPools


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A step's, and what has been measured so far, with the masses of the blocks that are there."""

    groups: Mapping[LayerGroup, GroupPlan]
    masses: MassMeasurements
    closed_up: ClosedUp | None
    """The step as the global layers see it; None if no block has left."""


class TorchPagedAttention:
    """`Attention` over `pools`, on their device.

    Parameters
    ----------
    scale
        Factor of the scores.
    window
        Keys that a local layer's token sees, its own included.
    softcap
        Scores s become softcap * tanh(s / softcap), or stay as they are if it is None.
    dtype
        Of queries, new keys and values, and results; the pools' own if it is None. Pools in FP8 need one.
    """

    def __init__(
        self,
        pools: KVPools,
        *,
        scale: float,
        window: int,
        softcap: float | None,
        dtype: torch.dtype | None = None,
    ) -> None:
        layout = pools.layout
        self._layout = layout
        self._scale = scale
        self._softcap = softcap
        token = layout.kv_heads * layout.head_dim
        self._fp8 = pools.dtype == FP8
        held = {group: pool.view(torch.uint8) if self._fp8 else pool for group, pool in pools.tensors.items()}
        self._tokens = {group: held[group].view(-1, token) for group in layout.groups}
        self._blocks = {group: held[group].view(-1, layout.block_size * token) for group in layout.groups}
        self._planner = PiecePlanner(
            layout,
            window=window,
            device=next(iter(held.values())).device,
            dtype=pools.dtype if dtype is None else dtype,
            fp8=self._fp8,
            causal=softcap is None,
        )

    def plan(self, step: PackedStep) -> Plan:
        local = [layer for layer in step.measured if self._layout.layers[layer][0] is not LayerGroup.GLOBAL]
        if local:
            raise ValueError(f"attention mass is asked of layers {local}, which are local; ask global ones")
        closed_up = close_up(step, self._layout.block_size) if LayerGroup.GLOBAL in self._layout.groups else None
        in_global = step if closed_up is None else closed_up.step
        groups = {
            group: self._planner.plan(in_global if group is LayerGroup.GLOBAL else step, group)
            for group in self._layout.groups
        }
        pieces = groups[LayerGroup.GLOBAL].pieces if step.measured else ()
        return Plan(groups, MassMeasurements(measurements(in_global, pieces, self._planner.mask)), closed_up)

    def attend(self, plan: Plan, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group, index = self._layout.layers[layer]
        of_group = plan.groups[group]
        tokens, blocks = self._tokens[group], self._blocks[group]
        tokens.index_copy_(0, of_group.key_rows[index], self._stored(k.flatten(1)))
        tokens.index_copy_(0, of_group.value_rows[index], self._stored(v.flatten(1)))
        if len(of_group.pieces) == 1:
            piece = of_group.pieces[0]
            attended = self._attend_piece(piece, index, blocks, q)
            self._measure(plan, layer, piece, q)
            return attended
        attended = q.new_empty(q.shape[0], q.shape[1] * q.shape[2])
        for piece in of_group.pieces:
            of_piece = q[piece.rows]
            attended[piece.rows] = self._attend_piece(piece, index, blocks, of_piece)
            self._measure(plan, layer, piece, of_piece)
        return attended

    def mass(self, plan: Plan) -> Mapping[int, NDArray[np.float32]]:
        masses = plan.masses.by_sequence()
        if plan.closed_up is None:
            return masses
        return {sequence: plan.closed_up.spread(sequence, mass) for sequence, mass in masses.items()}

    def collect(self, plan: Plan) -> Callable[[], Mapping[int, NDArray[np.float32]]]:
        return partial(self.mass, plan)

    def _measure(self, plan: Plan, layer: int, piece: Piece, q: Tensor) -> None:
        """Measure what is asked of the piece, whose keys have just been gathered, by its `q` [queries, heads, d]."""
        for wanted in plan.masses.wanted(layer, piece):
            queries, keys = q[wanted.queries], piece.keys[wanted.member, :, : wanted.num_keys]
            grouped = queries.transpose(0, 1).reshape(self._layout.kv_heads, -1, self._layout.head_dim)
            # Keys on the left, since on the right they would be copied first: 1.2 ms instead of 0.7 at 16,384 keys.
            scores = self._cap((keys @ grouped.mT).mT.float() * self._scale)
            if wanted.mask is not None:
                scores = scores.reshape(len(scores), -1, *wanted.mask.shape) + wanted.mask
            weights = scores.softmax(-1).mean(tuple(range(scores.dim() - 1)))
            size = self._layout.block_size
            by_block = F.pad(weights, (0, -wanted.num_keys % size)).view(-1, size)
            plan.masses.add(wanted, by_block.sum(1))

    def _attend_piece(self, piece: Piece, index: int, blocks: Tensor, q: Tensor) -> Tensor:
        """Attention [queries, query heads * d] of `q` [queries, query heads, d]."""
        if piece.rounded is None:
            torch.index_select(blocks, 0, piece.sources[index], out=piece.gathered)
        else:
            torch.index_select(blocks, 0, piece.sources[index], out=piece.rounded)
            piece.gathered.copy_(piece.rounded.view(FP8))
        if piece.stale is not None:
            piece.gathered.view(-1, self._layout.kv_heads * self._layout.head_dim).index_fill_(0, piece.stale, 0)
        if piece.decode:  # The queries of one KV head are rows of one small matrix.
            grouped = q.reshape(len(q), self._layout.kv_heads, -1, self._layout.head_dim)
            return self._sdpa(piece, grouped).flatten(1)
        return self._sdpa(piece, q.transpose(0, 1).unsqueeze(0)).squeeze(0).transpose(0, 1).flatten(1)

    def _stored(self, numbers: Tensor) -> Tensor:
        """As the pools hold them."""
        return to_fp8(numbers).view(torch.uint8) if self._fp8 else numbers

    def _sdpa(self, piece: Piece, q: Tensor) -> Tensor:
        """Attention [B, heads, queries, d]; each KV head serves as many heads of `q` as there are."""
        if self._softcap is not None:
            return self._softcapped(piece, q)
        return F.scaled_dot_product_attention(
            q,
            piece.keys,
            piece.values,
            attn_mask=piece.mask,
            is_causal=piece.causal,
            scale=self._scale,
            enable_gqa=q.shape[1] != piece.keys.shape[1],
        )

    def _softcapped(self, piece: Piece, q: Tensor) -> Tensor:
        """Torch's fused attention cannot cap scores, so here it is in its parts, the softmax in float32."""
        grouped = q.reshape(len(q), self._layout.kv_heads, -1, *q.shape[2:])
        scores = self._cap(grouped @ piece.keys.unsqueeze(2).mT * self._scale)
        if piece.mask is not None:
            scores = scores + piece.mask.unsqueeze(1)
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        return (weights @ piece.values.unsqueeze(2)).flatten(1, 2)

    def _cap(self, scores: Tensor) -> Tensor:
        return scores if self._softcap is None else torch.tanh(scores / self._softcap) * self._softcap
