"""What `GpuPagedAttention` takes of the device beside the pools, told before there are any: books, without tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from wicore_backend.attention.gpu.masses import MASS_TAIL, MEASUREMENT_FIELDS
from wicore_backend.attention.gpu.schedule import ITEM_FIELDS, TILE_FIELDS, decode_capacity
from wicore_backend.attention.gpu.tuning import MASS_KEYS, Tuning
from wicore_backend.hmt.layout import KVLayout, LayerGroup

_INT = torch.int32.itemsize
_FLOAT = torch.float32.itemsize


@dataclass(frozen=True, slots=True)
class AttentionNeeds:
    """In bytes, of attention with these properties, its steps all measured.

    Parameters
    ----------
    value_bytes
        Of a number that is computed with.
    tuning, processors
        Those of the device.
    """

    layout: KVLayout
    query_heads: int
    value_bytes: int
    tuning: Tuning
    processors: int

    def decode_bucket(self, *, sequences: int, max_keys: int) -> int:
        """Of such a `decode_bucket`, without the memory for masses that it shares with others."""
        measured = self._global_layers * sequences * _INT
        return self._results(sequences) + self._decodes(sequences, max_keys) + measured

    def masses(self, *, sequences: int, max_keys: int) -> int:
        """What the buckets for up to so many decodes share for their masses."""
        return sequences * self._measurement(max_keys)

    def prompt_bucket(self, *, tokens: int, max_keys: int) -> int:
        """Of such a `prompt_bucket`, without the results, which are the caller's."""
        tiles = len(self.layout.groups) * -(-tokens // self.tile_tokens) * TILE_FIELDS * _INT
        measured = self._global_layers * (MEASUREMENT_FIELDS * _INT + self._measurement(max_keys))
        return self._prefilled(tokens) + tiles + self._tables(1, max_keys, new=tokens) + measured

    def step(self, *, tokens: int, sequences: int, max_keys: int) -> int:
        """Of the plan of a step without a bucket, until its masses have been collected.

        Of many sequences one ends a prompt of so many keys, and is measured in all layers; the others are decodes.
        """
        shared_out = 2 * max(1, self.processors * self.tuning.prefill.fill // self.layout.kv_heads)
        tiles = len(self.layout.groups) * (shared_out + tokens // self.tile_tokens + sequences)
        of_item = self.layout.kv_heads * self.tuning.prefill.rows * (self.layout.head_dim + 2) * _FLOAT
        partial = len(self.layout.groups) * shared_out * of_item
        # The totals of all rows, and the shares that come of them, are as large as what was measured.
        masses = 3 * (sequences + self._global_layers) * self._measurement(max_keys)
        decodes = self._decodes(sequences, max_keys, new=tokens)
        return self._results(tokens) + self._prefilled(tokens) + tiles * TILE_FIELDS * _INT + partial + decodes + masses

    @property
    def _global_layers(self) -> int:
        return self.layout.layers_in[LayerGroup.GLOBAL]

    @property
    def _group(self) -> int:
        """Query heads of a KV head."""
        return self.query_heads // self.layout.kv_heads

    @property
    def tile_tokens(self) -> int:
        """Of a tile of a prompt's queries, ..."""
        return max(1, self.tuning.prefill.rows // self.group_rows)

    @property
    def group_rows(self) -> int:
        """... and the rows that each of them has in it."""
        return 1 << (self._group - 1).bit_length()

    def _measurement(self, keys: int) -> int:
        """Of a sequence in a layer."""
        size = self.layout.block_size
        cell = min(size & -size, self.tuning.decode.keys, MASS_KEYS)
        return (-(-keys // cell) + MASS_TAIL) * self.query_heads * _FLOAT

    def _results(self, tokens: int) -> int:
        return tokens * self.query_heads * self.layout.head_dim * self.value_bytes

    def _prefilled(self, tokens: int) -> int:
        """Bounds and places of all tokens in each group, and the logarithms of their sums."""
        return tokens * (3 * len(self.layout.groups) * _INT + self.query_heads * _FLOAT)

    def _tables(self, sequences: int, max_keys: int, *, new: int = 0) -> int:
        return sum(
            sequences * (-(-self._seen(g, max_keys, new) // self.layout.block_size) + 1) * _INT
            for g in self.layout.groups
        )

    def _decodes(self, sequences: int, max_keys: int, *, new: int = 0) -> int:
        """Work items and block tables, and what programs that share a sequence leave for the last of them."""
        heads, total = self.layout.kv_heads, self._tables(sequences, max_keys, new=new)
        for group in self.layout.groups:
            items = decode_capacity(
                sequences=sequences,
                most_keys=self._seen(group, max_keys),
                keys=self.tuning.decode.keys,
                items=max(1, self.processors * self.tuning.decode.fill // heads),
            )
            partial = heads * self._group * (self.layout.head_dim + 2) * _FLOAT
            total += items * (ITEM_FIELDS * _INT + partial) + sequences * heads * _INT
        return total

    def _seen(self, group: LayerGroup, max_keys: int, new: int = 0) -> int:
        """Keys of a sequence, of which a step adds `new`."""
        return min(max_keys, self.layout.window + new) if group is LayerGroup.LOCAL else max_keys
