"""Paged attention in plain PyTorch: the twin that GPU kernels are compared with, and quick on a CPU.

A step is split into pieces: a few decodes of similar length, or a tile of one sequence's prefill. A piece gathers its
keys and values from the pool into scratch memory, one kernel for both, and runs one scaled-dot-product attention. What
a piece does not depend on the layer for is worked out once, in `plan`.

On a CPU the gather is a third of a decode's attention; reading blocks in place, one small attention a block, was
slower by 10% (4,096 keys, 2 heads of 64), since a block's rows are not contiguous with the next block's. Pieces are
kept small enough to stay in a core's cache: 16 sequences of 4,096 keys take 5.7 ms one by one and 18 ms at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from wicore_backend.attention.base import PackedStep
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.pool import KVPools

_DECODE_SCRATCH_BYTES = 4 * 2**20
_QUERY_TILE = 512

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """Queries that one call of scaled-dot-product attention serves, and how to gather their keys.

    B sequences with one query each, or one sequence (B = 1) with several.
    """

    rows: slice | Tensor
    """Of the packed step."""
    decode: bool
    sources: tuple[Tensor, ...]
    """For each layer of the group, rows [2 B n] of its keys, then its values, in the pool seen as [rows, block]."""
    gathered: Tensor
    """Scratch [2 B n, block] that the gather fills, ..."""
    keys: Tensor
    values: Tensor
    """... and the S keys and values [B, KV heads, S, d] in it."""
    mask: Tensor | None
    """[B, 1, queries or 1, S], added to the scores; None if every key is visible, or `causal`."""
    causal: bool
    """Query i sees keys 0 to i."""


@dataclass(frozen=True, slots=True, eq=False)
class _GroupPlan:
    key_rows: tuple[Tensor, ...]
    """For each layer of the group, where the step's keys [T] go in the pool seen as [rows, token]; ..."""
    value_rows: tuple[Tensor, ...]
    """... the same for its values."""
    pieces: tuple[_Piece, ...]


Plan = Mapping[LayerGroup, _GroupPlan]


class TorchPagedAttention:
    """`Attention` over `pools`, on their device and in their type.

    Parameters
    ----------
    scale
        Factor of the scores.
    window
        Keys that a local layer's token sees, its own included.
    softcap
        Scores s become softcap * tanh(s / softcap), or stay as they are if it is None.
    """

    def __init__(self, pools: KVPools, *, scale: float, window: int, softcap: float | None) -> None:
        layout = pools.layout
        self._layout = layout
        self._scale = scale
        self._window = window
        self._softcap = softcap
        token = layout.kv_heads * layout.head_dim
        self._tokens = {group: pools.tensors[group].view(-1, token) for group in layout.groups}
        self._blocks = {group: pools.tensors[group].view(-1, layout.block_size * token) for group in layout.groups}
        any_pool = next(iter(self._blocks.values()))
        self._scratch = any_pool.new_empty(0)
        block_bytes = 2 * any_pool[0].nbytes
        self._decode_blocks = max(1, _DECODE_SCRATCH_BYTES // block_bytes)

    def plan(self, step: PackedStep) -> Plan:
        return {group: self._plan_group(step, group) for group in self._layout.groups}

    def attend(self, plan: Plan, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group, index = self._layout.layers[layer]
        of_group = plan[group]
        tokens, blocks = self._tokens[group], self._blocks[group]
        tokens.index_copy_(0, of_group.key_rows[index], k.flatten(1))
        tokens.index_copy_(0, of_group.value_rows[index], v.flatten(1))
        if len(of_group.pieces) == 1:
            return self._attend_piece(of_group.pieces[0], index, blocks, q)
        attended = q.new_empty(q.shape[0], q.shape[1] * q.shape[2])
        for piece in of_group.pieces:
            attended[piece.rows] = self._attend_piece(piece, index, blocks, q[piece.rows])
        return attended

    def _attend_piece(self, piece: _Piece, index: int, blocks: Tensor, q: Tensor) -> Tensor:
        """Attention [queries, query heads * d] of `q` [queries, query heads, d]."""
        torch.index_select(blocks, 0, piece.sources[index], out=piece.gathered)
        if piece.decode:  # The queries of one KV head are rows of one small matrix.
            grouped = q.reshape(len(q), self._layout.kv_heads, -1, self._layout.head_dim)
            return self._sdpa(piece, grouped).flatten(1)
        return self._sdpa(piece, q.transpose(0, 1).unsqueeze(0)).squeeze(0).transpose(0, 1).flatten(1)

    def _sdpa(self, piece: _Piece, q: Tensor) -> Tensor:
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

    def _softcapped(self, piece: _Piece, q: Tensor) -> Tensor:
        """Torch's fused attention cannot cap scores, so here it is in its parts, the softmax in float32."""
        assert self._softcap is not None
        grouped = q.reshape(len(q), self._layout.kv_heads, -1, *q.shape[2:])
        scores = grouped @ piece.keys.unsqueeze(2).mT * self._scale
        scores = torch.tanh(scores / self._softcap) * self._softcap
        if piece.mask is not None:
            scores = scores + piece.mask.unsqueeze(1)
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        return (weights @ piece.values.unsqueeze(2)).flatten(1, 2)

    def _plan_group(self, step: PackedStep, group: LayerGroup) -> _GroupPlan:
        size, layers = self._layout.block_size, self._layout.layers_in[group]
        sequence = np.repeat(np.arange(len(step.query_lens)), step.query_lens)
        block = step.block_tables[group][sequence, step.positions // size].astype(np.int64)
        first_layer = block * (layers * 2 * size) + step.positions % size
        rows = self._tensor(first_layer + np.arange(0, layers * 2 * size, size)[:, None]).unbind()
        pieces = (*self._decode_pieces(step, group), *self._prefill_pieces(step, group))
        return _GroupPlan(rows[0::2], rows[1::2], pieces)

    def _decode_pieces(self, step: PackedStep, group: LayerGroup) -> Iterator[_Piece]:
        if not step.decodes:
            return
        size, table = self._layout.block_size, step.block_tables[group]
        last = step.positions[: step.decodes].astype(np.int64)
        first = self._first_visible(group, last)
        first_block = first // size
        counts = last // size + 1 - first_block
        for members in self._alike(counts):
            rows: slice | Tensor = slice(0, step.decodes)
            if len(members) < step.decodes:
                rows = self._tensor(members)
            if len(members) == 1:
                m = members[0]
                blocks = table[m, None, first_block[m] : first_block[m] + counts[m]]
                yield self._piece(group, rows, blocks, first[m] % size, last[m] + 1 - first[m], decode=True)
                continue
            nth = np.arange(counts[members].max())
            columns = first_block[members, None] + nth
            held = nth < counts[members, None]
            blocks = np.where(held, table[members[:, None], np.where(held, columns, 0)], 0)
            positions = (columns[:, :, None] * size + np.arange(size)).reshape(len(members), -1)
            visible = (positions <= last[members, None]) & (positions >= first[members, None])
            mask = self._mask(self._tensor(visible))[:, None, None]
            yield self._piece(group, rows, blocks, 0, positions.shape[1], decode=True, mask=mask)

    def _alike(self, counts: Ints) -> Iterator[Ints]:
        """Split sequences into sets of similar block counts, so that little is padded and a set stays in cache."""
        order = np.argsort(-counts, kind="stable")
        start = 0
        for end in range(1, len(order) + 1):
            longest = counts[order[start]]
            if (
                end == len(order)
                or counts[order[end]] * 2 < longest
                or (end + 1 - start) * longest > self._decode_blocks
            ):
                yield np.sort(order[start:end])
                start = end

    def _prefill_pieces(self, step: PackedStep, group: LayerGroup) -> Iterator[_Piece]:
        size = self._layout.block_size
        ends = step.query_lens.cumsum()
        for sequence in range(step.decodes, len(ends)):
            for start in range(ends[sequence] - step.query_lens[sequence], ends[sequence], _QUERY_TILE):
                rows = slice(start, min(start + _QUERY_TILE, ends[sequence]))
                positions, limits = step.positions[rows].astype(np.int64), step.attend_limits[rows].astype(np.int64)
                first, end = int(self._first_visible(group, positions[:1])[0]), int(limits.max()) + 1
                blocks = step.block_tables[group][sequence, None, first // size : -(-end // size)]
                causal = (
                    self._softcap is None
                    and int(positions[0]) == first == int(self._first_visible(group, positions[-1:])[0])
                    and np.array_equal(limits, positions)
                )
                mask = None
                if not causal:
                    keys = torch.arange(first, end, device=self._scratch.device)
                    visible = keys <= self._tensor(limits[:, None])
                    if group is LayerGroup.LOCAL:
                        visible &= keys >= self._tensor(self._first_visible(group, positions)[:, None])
                    mask = self._mask(visible)[None, None]
                yield self._piece(
                    group, rows, blocks, first % size, end - first, decode=False, mask=mask, causal=causal
                )

    def _first_visible(self, group: LayerGroup, positions: Ints) -> Ints:
        """The first key that each position sees."""
        if group is LayerGroup.GLOBAL:
            return np.zeros_like(positions)
        return np.maximum(positions - self._window + 1, 0)

    def _piece(
        self,
        group: LayerGroup,
        rows: slice | Tensor,
        blocks: NDArray[np.integer[Any]],
        first: int,
        num_keys: int,
        *,
        decode: bool,
        mask: Tensor | None = None,
        causal: bool = False,
    ) -> _Piece:
        """A piece that attends to `num_keys` keys of `blocks` [B, n] from key `first` of the first block on."""
        layers = self._layout.layers_in[group]
        sources = blocks.astype(np.int64) * (2 * layers) + np.arange(2 * layers).reshape(layers, 2, 1, 1)
        gathered = self._scratch_blocks(group, 2 * blocks.size)
        shape = (2, len(blocks), -1, self._layout.kv_heads, self._layout.head_dim)
        keys, values = gathered.view(shape)[:, :, first : first + num_keys].transpose(2, 3).unbind()
        return _Piece(
            rows=rows,
            decode=decode,
            sources=self._tensor(sources).flatten(1).unbind(),
            gathered=gathered,
            keys=keys,
            values=values,
            mask=mask,
            causal=causal,
        )

    def _scratch_blocks(self, group: LayerGroup, count: int) -> Tensor:
        """The first `count` blocks [count, block] of the scratch memory, which grows to the largest piece seen."""
        width = self._blocks[group].shape[1]
        if self._scratch.numel() < count * width:
            self._scratch = self._scratch.new_empty(count * width)
        return self._scratch[: count * width].view(count, width)

    def _mask(self, visible: Tensor) -> Tensor:
        hidden = torch.full((), -torch.inf, dtype=self._scratch.dtype, device=self._scratch.device)
        return torch.where(visible, hidden.new_zeros(()), hidden)

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._scratch.device)
