"""How a step is split for PyTorch's attention, and what of that does not depend on the layer.

A piece is a few decodes of similar length, or a tile of one sequence's prefill. It gathers its keys and values from the
pool into scratch memory, one kernel for both, and is then one scaled-dot-product attention.

On a CPU the gather is a third of a decode's attention; reading blocks in place, one small attention a block, was
slower by 10% (4,096 keys, 2 heads of 64), since a block's rows are not contiguous with the next block's. Pieces are
kept small enough to stay in a core's cache: 16 sequences of 4,096 keys take 5.7 ms one by one and 18 ms at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wicore_backend.attention.base import PackedStep
from wicore_backend.hmt.layout import KVLayout, LayerGroup

_DECODE_SCRATCH_BYTES = 4 * 2**20
_QUERY_TILE = 512

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
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
    stale: Tensor | None
    """Of it seen as [rows, token], rows behind a sequence's end, which nobody sees. What others left there may be no
    number, and neither a score of -inf nor a weight of 0 takes that away. None if no such rows are gathered."""
    keys: Tensor
    values: Tensor
    """... and the S keys and values [B, KV heads, S, d] in it."""
    mask: Tensor | None
    """[B, 1, queries or 1, S], added to the scores; None if every key is visible, or `causal`."""
    causal: bool
    """Query i sees keys 0 to i."""


@dataclass(frozen=True, slots=True, eq=False)
class GroupPlan:
    """A step's work in one group of layers."""

    key_rows: tuple[Tensor, ...]
    """For each layer of the group, where the step's keys [T] go in the pool seen as [rows, token]; ..."""
    value_rows: tuple[Tensor, ...]
    """... the same for its values."""
    pieces: tuple[Piece, ...]


class PiecePlanner:
    """Splits steps into pieces, which share the scratch memory that it owns: one is attended to at a time.

    Parameters
    ----------
    window
        Keys that a local layer's token sees, its own included.
    dtype
        That is computed in.
    fp8
        Whether the pools hold e4m3 numbers.
    causal
        Whether a piece may leave a causal mask to the attention.
    """

    def __init__(
        self,
        layout: KVLayout,
        *,
        window: int,
        device: torch.device,
        dtype: torch.dtype,
        fp8: bool,
        causal: bool,
    ) -> None:
        self._layout = layout
        self._window = window
        self._causal = causal
        self._block_values = layout.block_size * layout.kv_heads * layout.head_dim
        self._scratch = torch.empty(0, dtype=dtype, device=device)
        self._rounded = torch.empty(0, dtype=torch.uint8, device=device) if fp8 else None
        self._decode_blocks = max(1, _DECODE_SCRATCH_BYTES // (2 * self._block_values * dtype.itemsize))

    def plan(self, step: PackedStep, group: LayerGroup) -> GroupPlan:
        """The pieces of a step, which is as the group sees it, and where its own keys and values go."""
        size, layers = self._layout.block_size, self._layout.layers_in[group]
        sequence = np.repeat(np.arange(len(step.query_lens)), step.query_lens)
        block = step.block_tables[group][sequence, step.positions // size].astype(np.int64)
        first_layer = block * (layers * 2 * size) + step.positions % size
        rows = self._tensor(first_layer + np.arange(0, layers * 2 * size, size)[:, None]).unbind()
        pieces = (*self._decode_pieces(step, group), *self._prefill_pieces(step, group))
        return GroupPlan(rows[0::2], rows[1::2], pieces)

    def mask(self, visible: NDArray[np.bool_]) -> Tensor:
        """What is added to scores [as `visible`], so that only those of visible keys count."""
        return self._mask(self._tensor(visible))

    def _decode_pieces(self, step: PackedStep, group: LayerGroup) -> Iterator[Piece]:
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
            held = nth < counts[members, None]
            columns = first_block[members, None] + np.where(held, nth, 0)  # Padded with what is the sequence's own.
            blocks = table[members[:, None], columns]
            positions = (columns[:, :, None] * size + np.arange(size)).reshape(len(members), -1)
            written = positions <= last[members, None]
            visible = written & (positions >= first[members, None]) & held.repeat(size, axis=1)
            yield self._piece(
                group,
                sequences,
                rows,
                blocks,
                0,
                positions.shape[1],
                decode=True,
                mask=self.mask(visible)[:, None, None],
                stale=self._tensor(np.flatnonzero(np.broadcast_to(~written, (2, *written.shape)))),
            )

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

    def _prefill_pieces(self, step: PackedStep, group: LayerGroup) -> Iterator[Piece]:
        size = self._layout.block_size
        ends = step.query_lens.cumsum()
        for sequence in range(step.decodes, len(ends)):
            for start in range(ends[sequence] - step.query_lens[sequence], ends[sequence], _QUERY_TILE):
                rows = slice(start, min(start + _QUERY_TILE, ends[sequence]))
                positions, limits = step.positions[rows].astype(np.int64), step.attend_limits[rows].astype(np.int64)
                first, end = int(self._first_visible(group, positions[:1])[0]), int(limits.max()) + 1
                blocks = step.block_tables[group][sequence, None, first // size : -(-end // size)]
                causal = (
                    self._causal
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
        stale: Tensor | None = None,
        causal: bool = False,
    ) -> Piece:
        """A piece that attends to `num_keys` keys of `blocks` [B, n] from key `first` of the first block on."""
        layers = self._layout.layers_in[group]
        sources = blocks.astype(np.int64) * (2 * layers) + np.arange(2 * layers).reshape(layers, 2, 1, 1)
        gathered, rounded = self._scratch_blocks(2 * blocks.size)
        shape = (2, len(blocks), -1, self._layout.kv_heads, self._layout.head_dim)
        keys, values = gathered.view(shape)[:, :, first : first + num_keys].transpose(2, 3).unbind()
        return Piece(
            sequences=sequences,
            rows=rows,
            decode=decode,
            sources=self._tensor(sources).flatten(1).unbind(),
            rounded=rounded,
            gathered=gathered,
            stale=stale,
            keys=keys,
            values=values,
            mask=mask,
            causal=causal,
        )

    def _scratch_blocks(self, count: int) -> tuple[Tensor, Tensor | None]:
        """The first `count` blocks [count, block] of the scratch memory, which grows to the largest piece seen.

        And, for a pool in FP8, as many bytes of the memory that it is gathered into.
        """
        width = self._block_values
        if self._scratch.numel() < count * width:
            self._scratch = self._scratch.new_empty(count * width)
            self._rounded = None if self._rounded is None else self._rounded.new_empty(count * width)
        rounded = None if self._rounded is None else self._rounded[: count * width].view(count, width)
        return self._scratch[: count * width].view(count, width), rounded

    def _mask(self, visible: Tensor) -> Tensor:
        hidden = torch.full((), -torch.inf, dtype=self._scratch.dtype, device=self._scratch.device)
        return torch.where(visible, hidden.new_zeros(()), hidden)

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._scratch.device)
