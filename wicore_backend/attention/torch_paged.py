"""Paged attention in plain PyTorch: the twin that GPU kernels are compared with, and quick on a CPU.

A step is split into pieces: a few decodes of similar length, or a tile of one sequence's prefill. A piece gathers its
keys and values from the pool into scratch memory, one kernel for both, and runs one scaled-dot-product attention. What
a piece does not depend on the layer for is worked out once, in `plan`.

On a CPU the gather is a third of a decode's attention; reading blocks in place, one small attention a block, was
slower by 10% (4,096 keys, 2 heads of 64), since a block's rows are not contiguous with the next block's. Pieces are
kept small enough to stay in a core's cache: 16 sequences of 4,096 keys take 5.7 ms one by one and 18 ms at once.

Fused attention gives no weights, so attention mass is worked out beside it, from the keys that were gathered for it:
a fifth of a layer's decode attention for one sequence, which is why it is asked of few steps and layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from wicore_backend.attention.base import MEASURED_QUERIES, PackedStep
from wicore_backend.attention.closing_up import ClosedUp, close_up
from wicore_backend.hmt.fp8 import FP8, to_fp8
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

    sequences: tuple[int, ...]
    """Of the step, those that the piece serves."""
    rows: slice | Tensor
    """Of the packed step."""
    decode: bool
    sources: tuple[Tensor, ...]
    """For each layer of the group, rows [2 B n] of its keys, then its values, in the pool seen as [rows, block]."""
    rounded: Tensor | None
    """Of a pool in FP8, scratch uint8 [2 B n, block] that the gather fills before `gathered` is made of it."""
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


@dataclass(frozen=True, slots=True, eq=False)
class _Measurement:
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


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A step's, and what has been measured so far, with the masses of the blocks that are there."""

    groups: Mapping[LayerGroup, _GroupPlan]
    measurements: Mapping[tuple[int, _Piece], Sequence[_Measurement]]
    """By layer and piece."""
    measured: list[tuple[_Measurement, Tensor]]
    closed_up: ClosedUp | None
    """The step as the global layers see it; None if no block has left."""


class TorchPagedAttention:
    """`Attention` over `pools`, on their device.

    Parameters
    ----------
    dtype
        Of queries, new keys and values, and results; the pools' own if it is None. Pools in FP8 need one.
    scale
        Factor of the scores.
    window
        Keys that a local layer's token sees, its own included.
    softcap
        Scores s become softcap * tanh(s / softcap), or stay as they are if it is None.
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
        self._window = window
        self._softcap = softcap
        token = layout.kv_heads * layout.head_dim
        self._fp8 = pools.dtype == FP8
        held = {group: pool.view(torch.uint8) if self._fp8 else pool for group, pool in pools.tensors.items()}
        self._tokens = {group: held[group].view(-1, token) for group in layout.groups}
        self._blocks = {group: held[group].view(-1, layout.block_size * token) for group in layout.groups}
        any_pool = next(iter(self._blocks.values()))
        self._rounded = any_pool.new_empty(0)
        self._scratch = torch.empty(0, dtype=pools.dtype if dtype is None else dtype, device=any_pool.device)
        block_bytes = 2 * any_pool[0].numel() * self._scratch.itemsize
        self._decode_blocks = max(1, _DECODE_SCRATCH_BYTES // block_bytes)

    def plan(self, step: PackedStep) -> Plan:
        closed_up = close_up(step, self._layout.block_size) if LayerGroup.GLOBAL in self._layout.groups else None
        in_global = step if closed_up is None else closed_up.step
        groups = {
            group: self._plan_group(in_global if group is LayerGroup.GLOBAL else step, group)
            for group in self._layout.groups
        }
        measurements = self._plan_measurements(in_global, groups) if step.measured else {}
        return Plan(groups, measurements, [], closed_up)

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
        masses: dict[int, NDArray[np.float32]] = {}
        for wanted, by_block in plan.measured:
            mass = by_block.cpu().numpy() * np.float32(wanted.share)
            before = masses.get(wanted.sequence, mass[:0])
            longer, shorter = (mass, before) if len(mass) > len(before) else (before, mass)
            longer[: len(shorter)] += shorter
            masses[wanted.sequence] = longer
        if plan.closed_up is None:
            return masses
        return {sequence: plan.closed_up.spread(sequence, mass) for sequence, mass in masses.items()}

    def collect(self, plan: Plan) -> Callable[[], Mapping[int, NDArray[np.float32]]]:
        return partial(self.mass, plan)

    def _measure(self, plan: Plan, layer: int, piece: _Piece, q: Tensor) -> None:
        """Measure what is asked of the piece, whose keys have just been gathered, by its `q` [queries, heads, d]."""
        for wanted in plan.measurements.get((layer, piece), ()):
            queries, keys = q[wanted.queries], piece.keys[wanted.member, :, : wanted.num_keys]
            grouped = queries.transpose(0, 1).reshape(self._layout.kv_heads, -1, self._layout.head_dim)
            # Keys on the left, since on the right they would be copied first: 1.2 ms instead of 0.7 at 16,384 keys.
            scores = self._cap((keys @ grouped.mT).mT.float() * self._scale)
            if wanted.mask is not None:
                scores = scores.reshape(len(scores), -1, *wanted.mask.shape) + wanted.mask
            weights = scores.softmax(-1).mean(tuple(range(scores.dim() - 1)))
            size = self._layout.block_size
            by_block = F.pad(weights, (0, -wanted.num_keys % size)).view(-1, size)
            plan.measured.append((wanted, by_block.sum(1)))

    def _attend_piece(self, piece: _Piece, index: int, blocks: Tensor, q: Tensor) -> Tensor:
        """Attention [queries, query heads * d] of `q` [queries, query heads, d]."""
        if piece.rounded is None:
            torch.index_select(blocks, 0, piece.sources[index], out=piece.gathered)
        else:
            torch.index_select(blocks, 0, piece.sources[index], out=piece.rounded)
            piece.gathered.copy_(piece.rounded.view(FP8))
        if piece.decode:  # The queries of one KV head are rows of one small matrix.
            grouped = q.reshape(len(q), self._layout.kv_heads, -1, self._layout.head_dim)
            return self._sdpa(piece, grouped).flatten(1)
        return self._sdpa(piece, q.transpose(0, 1).unsqueeze(0)).squeeze(0).transpose(0, 1).flatten(1)

    def _stored(self, numbers: Tensor) -> Tensor:
        """As the pools hold them."""
        return to_fp8(numbers).view(torch.uint8) if self._fp8 else numbers

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
        grouped = q.reshape(len(q), self._layout.kv_heads, -1, *q.shape[2:])
        scores = self._cap(grouped @ piece.keys.unsqueeze(2).mT * self._scale)
        if piece.mask is not None:
            scores = scores + piece.mask.unsqueeze(1)
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        return (weights @ piece.values.unsqueeze(2)).flatten(1, 2)

    def _cap(self, scores: Tensor) -> Tensor:
        return scores if self._softcap is None else torch.tanh(scores / self._softcap) * self._softcap

    def _plan_measurements(
        self, step: PackedStep, groups: Mapping[LayerGroup, _GroupPlan]
    ) -> Mapping[tuple[int, _Piece], Sequence[_Measurement]]:
        """What to measure in which layer and piece."""
        local = [layer for layer in step.measured if self._layout.layers[layer][0] is not LayerGroup.GLOBAL]
        if local:
            raise ValueError(f"attention mass is asked of layers {local}, which are local; ask global ones")
        layers_of: defaultdict[int, list[int]] = defaultdict(list)
        for layer, sequences in step.measured.items():
            for sequence in sequences:
                layers_of[sequence].append(layer)
        measurements: defaultdict[tuple[int, _Piece], list[_Measurement]] = defaultdict(list)
        for piece in groups[LayerGroup.GLOBAL].pieces:
            for member, sequence in enumerate(piece.sequences):
                layers = layers_of.get(sequence, [])
                wanted = self._measurement(step, piece, member, len(layers)) if layers else None
                if wanted is not None:
                    for layer in layers:
                        measurements[layer, piece].append(wanted)
        return measurements

    def _measurement(self, step: PackedStep, piece: _Piece, member: int, layers: int) -> _Measurement | None:
        """Of those of the piece's queries that are among the last ones of its `member`, in each of `layers` layers."""
        sequence = piece.sequences[member]
        if piece.decode:
            num_keys = int(step.positions[sequence]) + 1
            return _Measurement(sequence, member, slice(member, member + 1), num_keys, None, 1 / layers)
        assert isinstance(piece.rows, slice)
        end, count = int(step.query_lens[: sequence + 1].sum()), min(int(step.query_lens[sequence]), MEASURED_QUERIES)
        first = max(piece.rows.start, end - count)
        if first >= piece.rows.stop:
            return None
        limits = step.attend_limits[first : piece.rows.stop].astype(np.int64)
        num_keys = int(limits.max()) + 1
        mask = self._mask(self._tensor(np.arange(num_keys) <= limits[:, None]))
        share = len(limits) / (count * layers)
        return _Measurement(sequence, 0, slice(first - piece.rows.start, None), num_keys, mask, share)

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
            sequences = tuple(members.tolist())
            if len(members) == 1:
                m = members[0]
                blocks = table[m, None, first_block[m] : first_block[m] + counts[m]]
                yield self._piece(group, sequences, rows, blocks, first[m] % size, last[m] + 1 - first[m], decode=True)
                continue
            nth = np.arange(counts[members].max())
            columns = first_block[members, None] + nth
            held = nth < counts[members, None]
            blocks = np.where(held, table[members[:, None], np.where(held, columns, 0)], 0)
            positions = (columns[:, :, None] * size + np.arange(size)).reshape(len(members), -1)
            visible = (positions <= last[members, None]) & (positions >= first[members, None])
            mask = self._mask(self._tensor(visible))[:, None, None]
            yield self._piece(group, sequences, rows, blocks, 0, positions.shape[1], decode=True, mask=mask)

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
                    group, (sequence,), rows, blocks, first % size, end - first, decode=False, mask=mask, causal=causal
                )

    def _first_visible(self, group: LayerGroup, positions: Ints) -> Ints:
        """The first key that each position sees."""
        if group is LayerGroup.GLOBAL:
            return np.zeros_like(positions)
        return np.maximum(positions - self._window + 1, 0)

    def _piece(
        self,
        group: LayerGroup,
        sequences: tuple[int, ...],
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
        gathered, rounded = self._scratch_blocks(group, 2 * blocks.size)
        shape = (2, len(blocks), -1, self._layout.kv_heads, self._layout.head_dim)
        keys, values = gathered.view(shape)[:, :, first : first + num_keys].transpose(2, 3).unbind()
        return _Piece(
            sequences=sequences,
            rows=rows,
            decode=decode,
            sources=self._tensor(sources).flatten(1).unbind(),
            rounded=rounded,
            gathered=gathered,
            keys=keys,
            values=values,
            mask=mask,
            causal=causal,
        )

    def _scratch_blocks(self, group: LayerGroup, count: int) -> tuple[Tensor, Tensor | None]:
        """The first `count` blocks [count, block] of the scratch memory, which grows to the largest piece seen.

        And, for a pool in FP8, as many bytes of the memory that it is gathered into.
        """
        width = self._blocks[group].shape[1]
        if self._scratch.numel() < count * width:
            self._scratch = self._scratch.new_empty(count * width)
            self._rounded = self._rounded.new_empty(count * width if self._fp8 else 0)
        rounded = self._rounded[: count * width].view(count, width) if self._fp8 else None
        return self._scratch[: count * width].view(count, width), rounded

    def _mask(self, visible: Tensor) -> Tensor:
        hidden = torch.full((), -torch.inf, dtype=self._scratch.dtype, device=self._scratch.device)
        return torch.where(visible, hidden.new_zeros(()), hidden)

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._scratch.device)
