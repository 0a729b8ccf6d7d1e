"""What `GpuPagedAttention` takes of the device beside the pools, told before there are any: books, without memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from wicore_backend.attention.gpu.hopper_decode import Calls, Form
from wicore_backend.attention.gpu.masses import MASS_TAIL, MEASUREMENT_FIELDS
from wicore_backend.attention.gpu.schedule import ITEM_FIELDS, TILE_FIELDS
from wicore_backend.attention.gpu.tile_scheduler import TileScheduler
from wicore_backend.attention.gpu.tiling import Tiling
from wicore_backend.hmt.layout import KVLayout, LayerGroup

_INT = torch.int32.itemsize
_FLOAT = torch.float32.itemsize


@dataclass(frozen=True, slots=True)
class AttentionNeeds:
    """In bytes, of attention with these properties, its steps all measured.

    Parameters
    ----------
    tiling
        Of the model's heads on the card.
    value_bytes
        Of a number that is computed with.
    """

    tiling: Tiling
    value_bytes: int

    def kept(self) -> int:
        """Of what is there as long as attention is: that of `HopperDecode`, for which any card and pools are taken."""
        form = Form(self._layout.head_dim, self._layout.kv_heads, self.tiling.group, self._layout.block_size)
        if not form.fits:
            return 0
        blocks = self.tiling.processors * form.tuning.blocks
        calls = Calls(form, blocks=blocks, scale=1.0, device=torch.device("meta"))
        return calls.parts.nbytes + calls.stats.nbytes + calls.arrived.nbytes

    def decode_bucket(self, *, sequences: int, max_keys: int) -> int:
        """Of such a `decode_bucket`, without the memory for masses that it shares with others."""
        measured = self._global_layers * sequences * _INT
        return self._results(sequences) + self._decodes(sequences, max_keys) + measured

    def masses(self, *, sequences: int, max_keys: int) -> int:
        """What the buckets for up to so many decodes share for their masses."""
        return sequences * self._measurement(max_keys)

    def prompt_bucket(self, *, tokens: int, max_keys: int) -> int:
        """Of such a `prompt_bucket`, without the results, which are the caller's."""
        tiles = len(self._layout.groups) * -(-tokens // self.tiling.tile_tokens) * TILE_FIELDS * _INT
        measured = self._global_layers * (MEASUREMENT_FIELDS * _INT + self._measurement(max_keys))
        return self._prefilled(tokens) + tiles + self._tables(1, max_keys, new=tokens) + measured

    def step(self, *, tokens: int, sequences: int, max_keys: int) -> int:
        """Of the plan of a step without a bucket, until its masses have been collected.

        Of many sequences one ends a prompt of so many keys, and is measured in all layers; the others are decodes.
        """
        groups, shared_out = len(self._layout.groups), 2 * self.tiling.prefill_fill
        tiles = groups * (shared_out + tokens // self.tiling.tile_tokens + sequences)
        of_item = self._layout.kv_heads * self.tiling.tuning.prefill.rows * (self._layout.head_dim + 2) * _FLOAT
        partial = groups * shared_out * of_item
        # The totals of all rows, and the shares that come of them, are as large as what was measured.
        masses = 3 * (sequences + self._global_layers) * self._measurement(max_keys)
        decodes = self._decodes(sequences, max_keys, new=tokens)
        return self._results(tokens) + self._prefilled(tokens) + tiles * TILE_FIELDS * _INT + partial + decodes + masses

    @property
    def _layout(self) -> KVLayout:
        return self.tiling.layout

    @property
    def _scheduler(self) -> TileScheduler:
        return TileScheduler(self.tiling, window=self._layout.window)

    @property
    def _global_layers(self) -> int:
        return self._layout.layers_in[LayerGroup.GLOBAL]

    def _measurement(self, keys: int) -> int:
        """Of a sequence in a layer."""
        return (self.tiling.cells(keys) + MASS_TAIL) * self.tiling.query_heads * _FLOAT

    def _results(self, tokens: int) -> int:
        return tokens * self.tiling.query_heads * self._layout.head_dim * self.value_bytes

    def _prefilled(self, tokens: int) -> int:
        """Bounds and places of all tokens in each group, and the logarithms of their sums."""
        return tokens * (3 * len(self._layout.groups) * _INT + self.tiling.query_heads * _FLOAT)

    def _tables(self, sequences: int, max_keys: int, *, new: int = 0) -> int:
        blocks = (self._scheduler.table_blocks(g, max_keys=max_keys, tokens=new) for g in self._layout.groups)
        return sequences * sum(blocks) * _INT

    def _decodes(self, sequences: int, max_keys: int, *, new: int = 0) -> int:
        """Work items and block tables, and what programs that share a sequence leave for the last of them.

        Those of `decode_kernel`: a plan has less for `HopperDecode`, and whether that compiles is not known yet.
        """
        heads, total = self._layout.kv_heads, self._tables(sequences, max_keys, new=new)
        for group in self._layout.groups:
            items = self._scheduler.decode_capacity(group, sequences=sequences, max_keys=max_keys)
            partial = heads * self.tiling.group * (self._layout.head_dim + 2) * _FLOAT
            total += items * (ITEM_FIELDS * _INT + partial) + sequences * heads * _INT
        return total
