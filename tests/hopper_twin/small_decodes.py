"""Decodes of a few short sequences by the kernel for Hopper, compiled for a CPU, beside plain attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tests import hopper_twin
from tests.accuracy import relative_error
from wicore_backend.attention.base import PackedStep
from wicore_backend.attention.gpu.hopper_decode import SOURCE, Calls, Form, Tuning
from wicore_backend.attention.gpu.schedule import Sequences, decode_work
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hopper import INSTRUCTIONS

TEXTS = {file.name: file.read_text() for file in (SOURCE, INSTRUCTIONS)}
FORM = Form(128, 2, 2, 32, most_sequences=8, tuning=Tuning(warps=2, stages=3))
SCALE = 0.1
_IDLE = 7.0
"""What results are before, those of idle rows after, too."""


@dataclass
class SmallDecodes:
    """Layers of one group, over a pool that is NaN where nothing was written.

    Queries, keys and values of a layer lie in one tensor, but for a later layer's queries: those are what the layer
    before gives.

    Attributes
    ----------
    keys
        That each sequence has, its own token's included.
    room
        Sequences that the step has room for.
    """

    keys: Sequence[int]
    group: LayerGroup = LayerGroup.GLOBAL
    window: int = 50
    blocks: int = 7
    room: int | None = None
    layers: int = 2
    form: Form = FORM
    texts: Mapping[str, str] = field(default_factory=lambda: TEXTS)

    def __post_init__(self) -> None:
        form, count = self.form, len(self.keys)
        torch.manual_seed(len(self.keys))
        held = [-(-keys // form.block_size) for keys in self.keys]
        self.table = np.zeros((count, max(held)), np.int32)
        order = iter(1 + np.random.default_rng(1).permutation(sum(held)))
        for row, blocks in zip(self.table, held, strict=True):
            row[:blocks] = [next(order) for _ in range(blocks)]
        shape = (sum(held) + 1, self.layers, 2, form.block_size, form.kv_heads, form.head_dim)
        self.pool = torch.full(shape, float("nan"), dtype=torch.bfloat16)
        self.kept: list[list[Tensor]] = []
        for layer in range(self.layers):
            self.kept.append([])
            for keys, row in zip(self.keys, self.table, strict=True):
                old = torch.randn(2, keys - 1, form.kv_heads, form.head_dim).bfloat16()
                self.kept[-1].append(old)
                for at in range(keys - 1):
                    self.pool[row[at // form.block_size], layer, :, at % form.block_size] = old[:, at]
        heads = form.kv_heads * (form.group + 2)
        self.qkv = torch.randn(self.layers, count, heads, form.head_dim).bfloat16()
        positions = np.array(self.keys, np.int32) - 1
        step = PackedStep(
            positions=positions,
            attend_limits=positions,
            query_lens=np.ones(count, np.int32),
            decodes=count,
            block_tables={self.group: self.table},
        )
        seen = Sequences.of(step, self.group, block_size=form.block_size, window=self.window)
        room = count if self.room is None else self.room
        work = decode_work(step, self.group, seen, window=self.window, sequences=room)
        self.work, self.tables = torch.from_numpy(work), torch.from_numpy(seen.table.astype(np.int32))
        self.kernel = hopper_twin.HostKernel(SOURCE, self.texts, form.defines(), parameter="Decode")

    def split(self, layer: int) -> list[Tensor]:
        """Queries, keys and values of the layer, as if it were the first."""
        kv = self.form.kv_heads
        return list(self.qkv[layer].split([kv * self.form.group, kv, kv], 1))

    def run(self, seed: int) -> list[Tensor]:
        """Each layer's result [sequences, query heads * d].

        Raises
        ------
        AssertionError
            If anything was wrong, or is written that should not be.
        """
        form, count, room = self.form, len(self.keys), len(self.work) - 1
        calls = Calls(form, blocks=self.blocks, scale=SCALE * np.log2(np.e), device=torch.device("cpu"))
        for left in (calls.parts, calls.stats):
            left.fill_(float("nan"))
        pool = self.pool.clone()
        heads = form.kv_heads * form.group
        out = [torch.full((room, heads * form.head_dim), _IDLE).bfloat16() for _ in range(self.layers)]
        launches = []
        for layer in range(self.layers):
            q, k, v = self.split(layer)
            if layer > 0:
                q = out[layer - 1].view(room, heads, form.head_dim)
            launches.append(
                calls.given(
                    *(q, k, v, pool, out[layer], self.work.flatten(), self.tables),
                    layer_at=layer * pool.stride(1),
                    block_stride=pool.stride(0),
                )
            )
        constant = {"work": self.work, "tables": self.tables, "qkv": self.qkv}
        mutable = {"pool": pool, "parts": calls.parts, "stats": calls.stats, "arrived": calls.arrived}
        self.kernel.run(
            launches,
            hopper_twin.Memory(constant, mutable | {f"out {i}": o for i, o in enumerate(out)}),
            blocks=self.blocks,
            threads=form.threads,
            shared_bytes=form.shared_bytes,
            seed=seed,
        )
        assert not calls.arrived.any(), "who counts next does not begin with nothing"
        assert all((o[count:] == _IDLE).all() for o in out), "idle rows have results"
        self._assert_written(pool)
        return [o[:count] for o in out]

    def error(self, results: Sequence[Tensor]) -> float:
        """The greatest relative one of a sequence in a layer."""
        errors = [
            relative_error(*pair)
            for layer, of_layer in enumerate(results)
            for pair in zip(of_layer, self.right(layer), strict=True)
        ]
        return float(np.max(errors))  # NaN if any is.

    def right(self, layer: int) -> Tensor:
        """The layer's result in float32."""
        form, rows = self.form, []
        queries, new_keys, new_values = (part.float() for part in self.split(layer))
        if layer > 0:
            queries = self.right(layer - 1).bfloat16().float().view_as(queries)
        for number, old in enumerate(self.kept[layer]):
            new = torch.stack([new_keys[number], new_values[number]])
            keys, values = torch.cat([old.float(), new[:, None]], 1)
            if self.group is LayerGroup.LOCAL:
                keys, values = keys[-self.window :], values[-self.window :]
            keys, values = (x.repeat_interleave(form.group, 1) for x in (keys, values))
            scores = torch.einsum("hd,thd->ht", queries[number], keys) * SCALE
            rows.append(torch.einsum("ht,thd->hd", scores.softmax(1), values).flatten())
        return torch.stack(rows)

    def _assert_written(self, pool: Tensor) -> None:
        """The pool is as it was, and has the new tokens' keys and values."""
        size, expected = self.form.block_size, self.pool.clone()
        for layer in range(self.layers):
            _, k, v = self.split(layer)
            for number, keys in enumerate(self.keys):
                place = self.table[number][(keys - 1) // size], layer, slice(None), (keys - 1) % size
                expected[place] = torch.stack([k[number], v[number]])
        assert torch.equal(pool.view(torch.int16), expected.view(torch.int16)), "the pool has not just the new tokens"
