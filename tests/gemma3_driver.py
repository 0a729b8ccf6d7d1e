"""A small step loop over executor and attention, for tests of the model without an engine.

Physical blocks are handed out in random order, local blocks are freed as soon as the window has passed them, and every
block that nobody owns is full of rubbish, so that reading what is not one's own shows.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wicore_backend.attention.base import PackedStep
from wicore_backend.attention.torch_paged import TorchPagedAttention
from wicore_backend.executor.torch_executor import TorchExecutor
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.pool import KVPools
from wicore_backend.models.gemma3.checkpoint import load_weights
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.models.gemma3.rope import RotaryTables

_RUBBISH = torch.nan
_CPU = torch.device("cpu")


@dataclass(eq=False)
class Sequence:
    """Token ids, and for each picture its first token and its pixels [3, S, S]."""

    ids: list[int]
    images: list[tuple[int, Tensor]] = field(default_factory=list)
    computed: int = 0
    tables: dict[LayerGroup, list[int]] = field(default_factory=lambda: {group: [] for group in LayerGroup})


class Driver:
    """Runs packed steps of several sequences over one checkpoint."""

    def __init__(
        self, checkpoint: Path, *, block_size: int = 8, blocks: int = 200, dtype: torch.dtype = torch.float32
    ) -> None:
        self.config = Gemma3Config.from_checkpoint(checkpoint)
        text = self.config.text
        self.layout = KVLayout.of(
            text.layer_groups,
            block_size=block_size,
            kv_heads=text.num_kv_heads,
            head_dim=text.head_dim,
            window=text.window,
            bytes_per_value=dtype.itemsize,
        )
        shapes = {group: (blocks, *self.layout.block_shape(group)) for group in LayerGroup}
        self.pools = KVPools(self.layout, {g: torch.full(s, _RUBBISH, dtype=dtype) for g, s in shapes.items()})
        self.executor = TorchExecutor(self.config, load_weights(checkpoint, self.config, device=_CPU, dtype=dtype))
        self.attention = TorchPagedAttention(
            self.pools, scale=text.attention_scale, window=text.window, softcap=text.attn_logit_softcapping
        )
        self.rotary = RotaryTables(self.config, max_positions=text.max_position_embeddings, device=_CPU, dtype=dtype)
        self._free = {group: random.Random(7).sample(range(1, blocks), blocks - 1) for group in LayerGroup}

    @torch.inference_mode()
    def step(self, chunks: list[tuple[Sequence, int]]) -> list[Tensor]:
        """Compute the next tokens of each sequence, as many as said, decodes first. Their logits [tokens, V]."""
        step = self._pack(chunks)
        plan = self.attention.plan(step)
        rope = self.rotary.lookup(torch.from_numpy(step.positions))
        ids = torch.tensor([i for s, count in chunks for i in s.ids[s.computed : s.computed + count]])
        layers = self.layout.layers
        hidden = self.executor.embed(ids, *self._soft_tokens(chunks))
        q, k, v = self.executor.first(hidden, *rope[layers[0][0]])
        for layer, (group, _) in enumerate(layers[1:]):
            attended = self.attention.attend(plan, layer, q, k, v)
            hidden, (q, k, v) = self.executor.mid(layer, hidden, attended, *rope[group])
        attended = self.attention.attend(plan, len(layers) - 1, q, k, v)
        logits = self.executor.last(hidden, attended, torch.arange(len(ids)))
        for sequence, count in chunks:
            sequence.computed += count
            self._free_behind_window(sequence)
        return list(logits.split([count for _, count in chunks]))

    def release(self, sequence: Sequence) -> None:
        """Give all blocks of a finished sequence back."""
        for group, table in sequence.tables.items():
            for block in filter(None, table):
                self._release(group, block)
            table.clear()

    def _pack(self, chunks: list[tuple[Sequence, int]]) -> PackedStep:
        size = self.layout.block_size
        limits = []
        for sequence, count in chunks:
            start, end = sequence.computed, sequence.computed + count
            limit = np.arange(start, end, dtype=np.int32)
            for first, _ in sequence.images:
                last = first + self.config.mm_tokens_per_image - 1
                inside = (limit >= first) & (limit <= last)
                assert not inside.any() or inside.sum() == self.config.mm_tokens_per_image, "a split image"
                limit[inside] = last
            limits.append(limit)
            for group, table in sequence.tables.items():
                while len(table) * size < end:
                    table.append(self._free[group].pop())
        width = max(len(s.tables[LayerGroup.GLOBAL]) for s, _ in chunks)
        tables = {
            group: np.array([s.tables[group] + [0] * (width - len(s.tables[group])) for s, _ in chunks], np.int32)
            for group in self.layout.groups
        }
        return PackedStep(
            positions=np.concatenate([np.arange(s.computed, s.computed + n, dtype=np.int32) for s, n in chunks]),
            attend_limits=np.concatenate(limits),
            query_lens=np.array([n for _, n in chunks], np.int32),
            decodes=next((i for i, (_, n) in enumerate(chunks) if n > 1), len(chunks)),
            block_tables=tables,
        )

    def _soft_tokens(self, chunks: list[tuple[Sequence, int]]) -> tuple[Tensor | None, Tensor | None]:
        pixels, rows, offset = [], [], 0
        for sequence, count in chunks:
            for first, image in sequence.images:
                if sequence.computed <= first < sequence.computed + count:
                    start = offset + first - sequence.computed
                    rows.append(torch.arange(start, start + self.config.mm_tokens_per_image))
                    pixels.append(image)
            offset += count
        if not pixels:
            return None, None
        soft = self.executor.vision(torch.stack(pixels).to(self.executor.dtype))
        return soft.flatten(0, 1), torch.cat(rows)

    def _free_behind_window(self, sequence: Sequence) -> None:
        """A local block is done with when the next token's window starts past its end."""
        table = sequence.tables[LayerGroup.LOCAL]
        passed = max(0, sequence.computed - self.layout.window + 1) // self.layout.block_size
        for n in range(min(passed, len(table))):
            if table[n]:
                self._release(LayerGroup.LOCAL, table[n])
                table[n] = 0

    def _release(self, group: LayerGroup, block: int) -> None:
        self.pools.tensors[group][block] = _RUBBISH
        self._free[group].insert(0, block)
