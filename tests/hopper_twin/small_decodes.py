"""Decodes of a few short sequences by the kernel for Hopper, compiled for a CPU or a card, beside plain attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from ctypes import Structure
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tests import hopper_twin
from tests.accuracy import relative_error
from wicore_backend.attention.base import PackedStep
from wicore_backend.attention.gpu.hopper_decode import SOURCE, Calls, Form, Tuning
from wicore_backend.attention.gpu.masses import Measurements
from wicore_backend.attention.gpu.schedule import WORK_KEYS, Sequences, decode_work
from wicore_backend.hmt.fp8 import FP8, to_fp8
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hopper import HEADERS

if TYPE_CHECKING:
    from wicore_backend.hopper.nvrtc import Kernel

TEXTS = {file.name: file.read_text() for file in (SOURCE, *HEADERS)}
FORM = Form(128, 2, 2, 32, tuning=Tuning(warps=2, blocks=2, stages=4), most_sequences=8)
FORM_FP8 = replace(FORM, pool=FP8)
SCALE = 0.1
_IDLE = 7.0
"""What results are before, those of idle rows after, too."""

_OF_MASSES = 1e-3
"""Powers of two that masses may differ by."""


@dataclass
class SmallDecodes:
    """Layers of one group, over a pool that is NaN where nothing was written; bytes if it is in FP8.

    Queries, keys and values of a layer lie in one tensor, but for a later layer's queries: those are what the layer
    before gives.

    Attributes
    ----------
    keys
        That each sequence has, its own token's included.
    room
        Sequences that the step has room for.
    measured
        Those whose attention mass is asked for, in each layer, which is global.
    idle
        Whether there is nothing to do yet: all rows are idle.
    """

    keys: Sequence[int]
    group: LayerGroup = LayerGroup.GLOBAL
    window: int = 50
    blocks: int = 7
    room: int | None = None
    layers: int = 2
    measured: Sequence[int] = ()
    idle: bool = False
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
        self.pool = self._stored(torch.full(shape, float("nan")))
        self.kept: list[list[Tensor]] = []
        for layer in range(self.layers):
            self.kept.append([])
            for keys, row in zip(self.keys, self.table, strict=True):
                old = torch.randn(2, keys - 1, form.kv_heads, form.head_dim).bfloat16()
                self.kept[-1].append(self._rounded(old))
                stored = self._stored(self.kept[-1][-1])
                for at in range(keys - 1):
                    self.pool[row[at // form.block_size], layer, :, at % form.block_size] = stored[:, at]
        heads = form.kv_heads * (form.group + 2)
        self.qkv = torch.randn(self.layers, count, heads, form.head_dim).bfloat16()
        positions = np.array(self.keys, np.int32) - 1
        step = PackedStep(
            positions=positions,
            attend_limits=positions,
            query_lens=np.ones(count, np.int32),
            decodes=count,
            block_tables={self.group: self.table},
            measured={layer: self.measured for layer in range(self.layers) if self.measured},
        )
        seen = Sequences.of(step, self.group, block_size=form.block_size, window=self.window)
        room = count if self.room is None else self.room
        work = decode_work(step, self.group, seen, window=self.window, sequences=room)
        self.work, self.tables = torch.from_numpy(work), torch.from_numpy(seen.table.astype(np.int32))
        self.measurements = Measurements.of(step, seen.table_at, cell=WORK_KEYS)
        self.mass_at = torch.full((self.layers, room), -1, dtype=torch.int32)
        for layer, places in self.measurements.of_decodes.items():
            self.mass_at[layer, :count] = torch.from_numpy(places)
        if self.idle:
            self.work.zero_()

    @cached_property
    def _twin(self) -> hopper_twin.HostKernel:
        return hopper_twin.HostKernel(SOURCE, self.texts, self.form.defines(), parameter="Decode")

    @cached_property
    def _on_card(self) -> Kernel:
        from wicore_backend.hopper.nvrtc import Kernel

        form = self.form
        return Kernel.of(
            SOURCE, HEADERS, form.defines(), threads=form.threads, shared_bytes=form.shared_bytes, cooperative=False
        )

    def split(self, layer: int) -> list[Tensor]:
        """Queries, keys and values of the layer, as if it were the first."""
        return self._split(self.qkv[layer])

    def _split(self, qkv: Tensor) -> list[Tensor]:
        kv = self.form.kv_heads
        return list(qkv.split([kv * self.form.group, kv, kv], 1))

    def _rounded(self, numbers: Tensor) -> Tensor:
        """float32 of bfloat16 as they are read from the pool."""
        return (to_fp8(numbers) if self.form.pool == FP8 else numbers).float()

    def _stored(self, numbers: Tensor) -> Tensor:
        """Numbers that the pool has, as its elements."""
        stored = numbers.to(self.form.pool)
        return stored.view(torch.uint8) if self.form.pool == FP8 else stored

    def run(self, seed: int) -> list[Tensor]:
        """Each layer's result [sequences, query heads * d], by the twin of a card.

        Raises
        ------
        AssertionError
            If anything was wrong, or is written that should not be.
        """

        def launch(launches: list[Structure], memory: hopper_twin.Memory) -> None:
            form = self.form
            cut = {"blocks": self.blocks, "threads": form.threads, "shared_bytes": form.shared_bytes}
            self._twin.run(launches, memory, **cut, seed=seed)

        return self._run(torch.device("cpu"), launch)

    def run_on_card(self) -> list[Tensor]:
        """As `run`, by the card that this machine has."""

        def launch(launches: list[Structure], _: hopper_twin.Memory) -> None:
            for one in launches:
                self._on_card.launch(self.blocks, one)
            torch.cuda.synchronize()

        return self._run(torch.device("cuda"), launch)

    def _run(self, device: torch.device, launch: Callable[[list[Structure], hopper_twin.Memory], None]) -> list[Tensor]:
        form, count, room = self.form, 0 if self.idle else len(self.keys), len(self.work) - 1
        calls = Calls(form, blocks=self.blocks, scale=SCALE * np.log2(np.e), device=device)
        for left in (calls.parts, calls.stats):
            left.fill_(float("nan"))
        pool = self.pool.to(device, copy=True)
        work, tables, qkv, mass_at = (
            of_step.to(device) for of_step in (self.work, self.tables, self.qkv, self.mass_at)
        )
        heads = form.kv_heads * form.group
        shape = (room, heads * form.head_dim)
        out = [torch.full(shape, _IDLE, dtype=torch.bfloat16, device=device) for _ in range(self.layers)]
        # A row before it is nobody's.
        mass = torch.full((1 + self.measurements.rows, heads), float("nan"), device=device)
        launches = []
        for layer in range(self.layers):
            q, k, v = self._split(qkv[layer])
            if layer > 0:
                q = out[layer - 1].view(room, heads, form.head_dim)
            launches.append(
                calls.given(
                    *(q, k, v, pool, out[layer], work.flatten(), tables),
                    layer_at=layer * pool.stride(1),
                    block_stride=pool.stride(0),
                    mass_at=mass_at[layer] if self.measured else None,
                    mass=mass[1:] if self.measured else None,
                )
            )
        constant = {"work": work, "tables": tables, "qkv": qkv, "mass_at": mass_at}
        mutable = {"pool": pool, "parts": calls.parts, "stats": calls.stats, "arrived": calls.arrived, "mass": mass}
        launch(launches, hopper_twin.Memory(constant, mutable | {f"out {i}": o for i, o in enumerate(out)}))
        assert not calls.arrived.any(), "who counts next does not begin with nothing"
        assert all((o[count:] == _IDLE).all() for o in out), "idle rows have results"
        self._assert_written(pool.cpu(), count)
        results = [o[:count].cpu() for o in out]
        self._assert_measured(mass.cpu(), results)
        return results

    def error(self, results: Sequence[Tensor]) -> float:
        """The greatest relative one of a sequence in a layer."""
        errors: list[float] = []
        for of_layer, pairs in zip(results, self._attended(results), strict=True):
            right = (torch.einsum("ht,thd->hd", scores.softmax(1), values).flatten() for scores, values in pairs)
            errors += map(relative_error, of_layer, right)
        return float(np.max(errors))  # NaN if any is.

    def _attended(self, results: Sequence[Tensor]) -> list[list[tuple[Tensor, Tensor]]]:
        """Of each layer and sequence scores float32 [query heads, keys that are visible], its own last, and values
        [those keys, query heads, d], if layers give `results`."""
        layers: list[list[tuple[Tensor, Tensor]]] = []
        for layer, all_old in enumerate(self.kept):
            queries, *new_kv = self.split(layer)
            queries, new_keys, new_values = queries.float(), *map(self._rounded, new_kv)
            if layer > 0:
                queries = results[layer - 1].float().view(-1, *queries.shape[1:])
            layers.append([])
            for query, old, *new in zip(queries[: len(results[layer])], all_old, new_keys, new_values, strict=False):
                keys, values = torch.cat([old, torch.stack(new)[:, None]], 1)
                if self.group is LayerGroup.LOCAL:
                    keys, values = keys[-self.window :], values[-self.window :]
                keys, values = (x.repeat_interleave(self.form.group, 1) for x in (keys, values))
                layers[-1].append((torch.einsum("hd,thd->ht", query, keys) * SCALE, values))
        return layers

    def _assert_written(self, pool: Tensor, count: int) -> None:
        """The pool is as it was, and has the new tokens' keys and values."""
        size, expected = self.form.block_size, self.pool.clone()
        for layer in range(self.layers):
            _, *kv = self.split(layer)
            k, v = (self._stored(self._rounded(new)) for new in kv)
            for number, keys in enumerate(self.keys[:count]):
                place = self.table[number][(keys - 1) // size], layer, slice(None), (keys - 1) % size
                expected[place] = torch.stack([k[number], v[number]])
        assert torch.equal(pool.view(torch.uint8), expected.view(torch.uint8)), "the pool has not just the new tokens"

    def _assert_measured(self, mass: Tensor, results: Sequence[Tensor]) -> None:
        """Masses of tiles, of the own key and of all are what plain attention has, and nothing else is written."""
        expected = torch.full_like(mass, float("nan"))
        for pairs, places in zip(self._attended(results), self.mass_at.tolist(), strict=True):
            for (scores, _), place in zip(pairs, places, strict=False):
                if place < 0:
                    continue
                old = scores[:, :-1]  # None of the last tile's, if the own key is its first.
                tiles = [old[:, at : at + WORK_KEYS] for at in range(0, scores.shape[1], WORK_KEYS)]
                for row, part in zip(expected[1 + place :], (*tiles, scores[:, -1:], scores), strict=False):
                    row.copy_(part.logsumexp(1) * np.log2(np.e))
        assert torch.equal(mass.isnan(), expected.isnan()), "wrong places of masses"
        there = ~expected.isnan()
        assert torch.allclose(mass[there], expected[there], rtol=0, atol=_OF_MASSES), "wrong masses"
