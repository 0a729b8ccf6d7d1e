"""Small layers of one token as one kernel each that attend themselves, compiled for a CPU, beside their plain twin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tests.accuracy import relative_error
from tests.hopper_twin.small_layers import SHAPE, TEXTS, SmallLayers
from wicore_backend.attention.base import PackedStep, Unattended
from wicore_backend.attention.gpu.schedule import Sequences, decode_work
from wicore_backend.executor.streamed_layer import MEASURED, LayerCalls, Pool, Tuning
from wicore_backend.executor.torch_executor import TorchExecutor
from wicore_backend.hmt.fp8 import FP8, to_fp8
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.models.gemma3.config import TextConfig

_HIDDEN: Mapping[tuple[str, torch.dtype], int] = {
    ("bf16", torch.bfloat16): 512,
    ("bf16", FP8): 512,
    ("fp8", torch.bfloat16): 1024,
    ("fp8", FP8): 512,
    ("int4", torch.bfloat16): 2048,
    ("int4", FP8): 1024,
    ("int4 with zero points", FP8): 1024,
}
"""By weights and pool: a stage has room for a tile of keys."""
SCALE = 0.1
_LAYERS = 2


class AttendingLayers(SmallLayers):
    """As `SmallLayers`; before each of the two layers one token attends to keys in a pool, which is NaN where nothing
    was written.

    Parameters
    ----------
    kv_dtype
        Of the pool, bfloat16 or FP8.
    """

    def __init__(
        self,
        directory: Path,
        kind: str,
        kv_dtype: torch.dtype,
        *,
        block_size: int = 32,
        tuning: Tuning = MEASURED,
        texts: Mapping[str, str] = TEXTS,
    ) -> None:
        shape = {**SHAPE, "hidden_size": _HIDDEN[kind, kv_dtype], "intermediate_size": 512, "num_key_value_heads": 2}
        self.shape, pool = shape, Pool(block_size, 8 * kv_dtype.itemsize)
        super().__init__(directory, kind, tuning=tuning, texts=texts, shape=shape, pool=pool)
        self.kv_dtype = kv_dtype
        self.block_size = block_size

    def token(self, *, keys: int, window: int) -> Token:
        """One that is the `keys`-th of its sequence; 0 for none."""
        return Token(self, keys, window)

    def attend(self, token: Token, seed: int, calls: LayerCalls | None = None) -> list[tuple[Tensor, Tensor]]:
        """What each layer leaves.

        Raises
        ------
        AssertionError
            If anything was wrong, or the pool has not just the token's keys and values.
        """
        calls = self.calls() if calls is None else calls
        for memory in (calls.parts, calls.stats):
            memory.fill_(float("nan"))
        results = [calls.results(token.hidden), calls.results(token.hidden)]
        pool = token.pool.clone()
        hidden = token.hidden, results[0][0]
        heads = token.heads, results[0][1]
        launches = [
            calls.given(layer, hidden[layer], token.left(layer, heads[layer], pool), *self.rope, results[layer])
            for layer in range(_LAYERS)
        ]
        constant = {"hidden": token.hidden, "heads": token.heads, "work": token.work, "tables": token.tables}
        self.launch(calls, launches, results, constant, {"pool": pool}, seed)
        token.assert_written(pool, [heads.clone() for heads in heads])
        return results


class Layers(Protocol):
    """Layers that attend themselves, of which each may follow the other, and their plain twin."""

    text: TextConfig
    kv_dtype: torch.dtype
    block_size: int
    twin: TorchExecutor
    rope: tuple[Tensor, Tensor]


class Token:
    """What one brings, and the keys and values that it sees in each layer."""

    def __init__(self, layers: Layers, keys: int, window: int) -> None:
        self._text, self._dtype, self._size, self._window = layers.text, layers.kv_dtype, layers.block_size, window
        self._keys = keys
        kv_heads, head_dim, size = self._text.num_kv_heads, self._text.head_dim, self._size
        blocks = -(-max(keys, 1) // size)
        torch.manual_seed(keys)
        self._table = (1 + np.random.default_rng(1).permutation(blocks)).astype(np.int32)
        self.pool = self._stored(torch.full((blocks + 1, _LAYERS, 2, size, kv_heads, head_dim), float("nan")))
        self._old = [self._rounded(torch.randn(2, max(keys - 1, 0), kv_heads, head_dim)) for _ in range(_LAYERS)]
        for layer, old in enumerate(self._old):
            stored = self._stored(old)
            for at in range(keys - 1):
                self.pool[self._table[at // size], layer, :, at % size] = stored[:, at]
        position = np.array([max(keys, 1) - 1], np.int32)
        step = PackedStep(
            positions=position,
            attend_limits=position,
            query_lens=np.ones(1, np.int32),
            decodes=1,
            block_tables={LayerGroup.LOCAL: self._table[None]},
        )
        seen = Sequences.of(step, LayerGroup.LOCAL, block_size=size, window=window)
        self.work = torch.from_numpy(decode_work(step, LayerGroup.LOCAL, seen, window=window, sequences=1))
        if keys == 0:
            self.work.zero_()
        self.tables = torch.from_numpy(seen.table.astype(np.int32))
        self.hidden = torch.randn(1, self._text.hidden_size).bfloat16()
        self.heads = torch.randn(1, self._text.qkv_heads * head_dim).bfloat16()

    def left(self, layer: int, heads: Tensor, pool: Tensor) -> Unattended:
        """Its attention in the layer."""
        q, k, v = self._split(heads)
        return Unattended(
            *(q, k, v, pool, self.work, self.tables),
            layer_at=layer * pool.stride(1) * pool.itemsize,
            block_stride=pool.stride(0) * pool.itemsize,
            block_size=self._size,
            scale=SCALE * float(np.log2(np.e)),
        )

    def to(self, device: torch.device) -> Token:
        """The same, there."""
        for name in ("pool", "work", "tables", "hidden", "heads"):
            setattr(self, name, getattr(self, name).to(device))
        self._old = [old.to(device) for old in self._old]
        return self

    def errors(self, layers: Layers, results: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
        """Relative, of the residual stream and the heads after each layer."""
        found = []
        hidden, heads = self.hidden, self.heads
        rope = [table.float() for table in layers.rope]
        for layer, (ours, our_heads) in enumerate(results):
            theirs, qkv = layers.twin.mid(layer, hidden.float(), self.attention(layer, heads), *rope)
            right = torch.cat([part.flatten() for part in qkv])
            found += [relative_error(ours, theirs), relative_error(our_heads.flatten(), right)]
            hidden, heads = ours, our_heads
        return found

    def attention(self, layer: int, heads: Tensor) -> Tensor:
        """Plain attention in float32 [1, query heads * d]."""
        query, *new = (part[0].float() for part in self._split(heads))
        if self._keys == 0:
            return torch.zeros(1, query.numel(), device=query.device)
        both = torch.cat([self._old[layer], torch.stack([self._rounded(x) for x in new])[:, None]], 1)
        keys, values = (x[-self._window :].repeat_interleave(len(query) // x.shape[1], 1) for x in both)
        scores = torch.einsum("hd,thd->ht", query, keys) * SCALE
        return torch.einsum("ht,thd->hd", scores.softmax(1), values).reshape(1, -1)

    def assert_written(self, pool: Tensor, heads: Sequence[Tensor]) -> None:
        """The pool is as it was, and has the token's key and value of each layer."""
        expected = self.pool.clone()
        at = self._keys - 1
        for layer, of_layer in enumerate(heads[: _LAYERS if self._keys else 0]):
            _, k, v = self._split(of_layer)
            new = self._stored(torch.stack([self._rounded(k[0]), self._rounded(v[0])]))
            expected[self._table[at // self._size], layer, :, at % self._size] = new
        assert torch.equal(pool.view(torch.uint8), expected.view(torch.uint8)), "the pool has not just the new token"

    def _split(self, heads: Tensor) -> list[Tensor]:
        text = self._text
        sizes = [text.num_heads, text.num_kv_heads, text.num_kv_heads]
        return list(heads.view(1, text.qkv_heads, text.head_dim).split(sizes, 1))

    def _rounded(self, numbers: Tensor) -> Tensor:
        """float32 of bfloat16 as they are read from the pool."""
        numbers = numbers.bfloat16()
        return (to_fp8(numbers) if self._dtype == FP8 else numbers).float()

    def _stored(self, numbers: Tensor) -> Tensor:
        stored = numbers.to(self._dtype)
        return stored.view(torch.uint8) if self._dtype == FP8 else stored
