"""What a layer of one token as one kernel (`streamed_layer.py`) is compiled for, and how it is shared out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from wicore_backend.hopper import SHARED_BYTES
from wicore_backend.models.gemma3.config import TextConfig
from wicore_backend.models.gemma3.weights import LayerWeights, Weight
from wicore_backend.quantization.fp8 import Fp8Matrix
from wicore_backend.quantization.int4 import TILE_ROWS, Int4Matrix

_WIDTH, _GROUP, _ROW_BYTES = 32, 128, 128
_TILE_KEYS, _MOST_MEMBERS = 32, 8
_FEWEST_STAGES = 3
_FEWEST_OF_WEIGHTS = 2
"""Stages, while others are slots for tiles of keys."""
_MOST_WARPS = 11
MOST_BLOCKS = 159
"""Of a launch: the kernel's parameters have room for so many shares."""

Bits = Literal[4, 8, 16]

_IN_FLIGHT: Mapping[Bits, int] = {4: 48 * 1024, 8: 116 * 1024, 16: 88 * 1024}
"""Bytes of weights on their way to a multiprocessor with which layers of 27B are fastest: what blocks tell each other
queues behind more. INT4 comes in large copies, others row by row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Ways to do the same, of which a card says what is fastest. Those of `MEASURED` have been found so.

    Attributes
    ----------
    warps
        That multiply; None for as many, 11 at most, as a tile of `hidden` inputs is shared out among in few equal
        stages: with 14 a layer of 27B takes 68.5 us in INT4 in place of 64.7 and 105.4 in FP8 in place of 104.4, with 7
        it takes 67.0 in INT4.
    in_flight
        Bytes of weights on their way to a multiprocessor; None for what suits the weights' bits.
    least
        Tiles of keys that a block attends to, where there are as many: fewer are read sooner, and make more parts to be
        put together. Not measured yet.
    """

    warps: int | None = None
    in_flight: int | None = None
    least: int = 3


MEASURED = Tuning()


@dataclass(frozen=True, slots=True)
class Pool:
    """Of the keys and values that a layer attends to: tokens of a block, bits of a number."""

    block_size: int
    bits: int


@dataclass(frozen=True, slots=True)
class Form:
    """What the kernel is compiled for.

    Attributes
    ----------
    hidden, attended, fed, qkv
        Sizes: of the residual stream, of attention's result, of the MLP, of all heads.
    head_dim, qk_heads
        Of a head; and how many are normalised and rotated.
    window
        Keys that a token sees in a local layer.
    bits
        Of a weight.
    half_scales, zeros
        Whether INT4's scales are float16, not bfloat16, and whether it has zero points.
    tuning
        How.
    pool
        If attention is of the layer, that of its keys.
    """

    hidden: int
    attended: int
    fed: int
    qkv: int
    head_dim: int
    qk_heads: int
    window: int
    bits: Bits
    half_scales: bool = False
    zeros: bool = False
    tuning: Tuning = MEASURED
    pool: Pool | None = None

    @classmethod
    def of(cls, config: TextConfig, layers: Sequence[LayerWeights], tuning: Tuning = MEASURED) -> Form | None:
        """The form for a model's layers; None if the kernel is not for such."""
        if any(layer.qkv_bias is not None or layer.out_bias is not None for layer in layers):
            return None
        kinds = {_kind(weight) for layer in layers for weight in matrices_of(layer)}
        kind = kinds.pop()
        if kinds or kind is None:
            return None
        form = cls(
            config.hidden_size,
            config.num_heads * config.head_dim,
            config.intermediate_size,
            config.qkv_heads * config.head_dim,
            config.head_dim,
            config.qk_heads,
            config.window,
            kind.bits,
            kind.half_scales,
            kind.zeros,
            tuning,
        )
        return form if form._fits() else None

    @property
    def kv_heads(self) -> int:
        """Heads of keys."""
        return self.qkv // self.head_dim - self.qk_heads

    @property
    def members(self) -> int:
        """Query heads of a KV head."""
        return self.attended // self.head_dim // self.kv_heads

    @property
    def depths(self) -> tuple[int, int, int, int]:
        """Inputs of out, of gate and up, of down and of QKV."""
        return self.attended, self.hidden, self.fed, self.hidden

    @property
    def tiles(self) -> tuple[int, int, int, int]:
        """Of outputs of each, of 16."""
        return self.hidden // TILE_ROWS, 2 * self.fed // TILE_ROWS, self.hidden // TILE_ROWS, self.qkv // TILE_ROWS

    @property
    def span(self) -> int:
        """Inputs of a span: a warp's part of a tile at once."""
        return _ROW_BYTES * 8 // self.bits

    @property
    def warps(self) -> int:
        """That multiply."""
        if self.tuning.warps is not None:
            return self.tuning.warps
        spans = self.hidden // self.span
        return -(-spans // -(-spans // _MOST_WARPS))

    @property
    def _steps(self) -> tuple[int, int, int, int]:
        """Stages of what is computed as one of each matrix."""
        out, gate_up, down, qkv = (-(-depth // (self.span * self.warps)) for depth in self.depths)
        return out, 2 * gate_up, down, qkv

    def shares(self, blocks: int) -> list[list[int]]:
        """Where each block's stages of each matrix begin, and where the last one's end: [matrices, blocks + 1]."""
        return [
            shared_out(tiles // together, steps, blocks)
            for tiles, steps, together in zip(self.tiles, self._steps, self._together, strict=True)
        ]

    @property
    def _together(self) -> tuple[int, int, int, int]:
        """Tiles of each matrix that are computed as one: of gate and up, a pair."""
        return 1, 2, 1, 1

    def launch(self, shares: Sequence[Sequence[int]], *, most_stages: int | None = None) -> Launch | None:
        """How to compile and launch it for blocks with such shares; None if there is no room in shared memory.

        The ring has as many stages as there is room for, or `most_stages`.
        """
        parts, given = [], []
        for share, steps, together in zip(shares, self._steps, self._together, strict=True):
            ends = [-(-end // steps) for end in share]
            parts.append(together * max(after - first // steps for first, after in zip(share, ends[1:], strict=False)))
            given.append(max(after - first for first, after in pairwise(ends)))
        warps = self.warps
        # x, and each warp's part of each output.
        area = max(d * 2 + tiles * warps * TILE_ROWS * 4 for d, tiles in zip(self.depths, parts, strict=True))
        if self.pool is not None:
            if not self._attends(self.pool, blocks=len(shares[0]) - 1):
                return None
            # What warps put together, then what the parts of each head weigh.
            area = max(area, warps * self.members * (self.head_dim * 4 + 8), len(shares[0]) * self.members * 8)
        sums = max(self.depths) // _GROUP * 8 if self.bits == 4 else 0
        beside = 4 * warps * 4 + sums + 144 + area + (0 if self.pool is None else 8 * warps)
        stage = warps * TILE_ROWS * (_ROW_BYTES + (4 * (1 + self.zeros) if self.bits == 4 else 0))
        stages = (SHARED_BYTES - beside) // (stage + 16)
        if stages < _FEWEST_STAGES or len(shares[0]) > MOST_BLOCKS + 1 or max(given) * TILE_ROWS > warps * _WIDTH:
            return None
        stages = min(stages, most_stages or stages)
        threads = (warps + 1) * _WIDTH
        in_flight = min(stages - 1, max(1, (self.tuning.in_flight or _IN_FLIGHT[self.bits]) // stage))
        slots = 0
        if self.pool is not None:
            blocks_of_head = (len(shares[0]) - 1) // self.kv_heads
            tiles = (self.window - 2) // _TILE_KEYS + 2  # In a full window that begins and ends anywhere.
            of_part = max(-(-tiles // blocks_of_head), min(tiles, self.tuning.least))
            slots = min(of_part, warps, (stages - _FEWEST_OF_WEIGHTS) * (stage // self._tile_bytes(self.pool)))
        return Launch(stages, in_flight, slots, threads=threads, shared_bytes=stages * (stage + 16) + beside)

    def defines(self, launch: Launch) -> dict[str, int]:
        """For the compiler."""
        attention = {}
        if self.pool is not None:
            attention = {
                "KV_HEADS": self.kv_heads,
                "MEMBERS": self.members,
                "BLOCK_SIZE": self.pool.block_size,
                "POOL_BITS": self.pool.bits,
                "LEAST": self.tuning.least,
                "SLOTS": launch.slots,
            }
        return {
            "ATTENDS": int(self.pool is not None),
            **attention,
            "HIDDEN": self.hidden,
            "ATTENDED": self.attended,
            "FED": self.fed,
            "QKV": self.qkv,
            "HEAD_DIM": self.head_dim,
            "QK_HEADS": self.qk_heads,
            "BITS": self.bits,
            "SCALE_HALF": int(self.half_scales),
            "ZEROS": int(self.zeros),
            "WARPS": self.warps,
            "STAGES": launch.stages,
            "FLIGHT": launch.in_flight,
        }

    def _fits(self) -> bool:
        """Whether all sizes are whole numbers of tiles, spans, groups and heads."""
        deep = all(depth % self.span == depth % _GROUP == 0 for depth in self.depths)
        return deep and self.head_dim in (_GROUP, 2 * _GROUP)

    def _tile_bytes(self, pool: Pool) -> int:
        """Of keys and values."""
        return 2 * _TILE_KEYS * self.head_dim * pool.bits // 8

    def _attends(self, pool: Pool, *, blocks: int) -> bool:
        """Whether a stage has room for a tile of keys and values, and there are heads for which the kernel is."""
        stage = self.warps * TILE_ROWS * _ROW_BYTES
        fits = self._tile_bytes(pool) <= stage and pool.block_size % _TILE_KEYS == 0
        return fits and self.members <= _MOST_MEMBERS and self.kv_heads <= blocks


@dataclass(frozen=True, slots=True)
class Launch:
    """How the kernel is compiled and launched.

    Attributes
    ----------
    stages, in_flight
        Of the ring; and of those, how many may be on their way at once.
    slots
        For tiles of keys, in the ring's first stages.
    threads, shared_bytes
        Of a block.
    """

    stages: int
    in_flight: int
    slots: int
    threads: int
    shared_bytes: int


def shared_out(pieces: int, stages: int, blocks: int) -> list[int]:
    """Where each block's part of `pieces` with so many `stages` each begins, and where the last one's ends, in stages.

    Blocks wait for each other after each matrix, so that all get equally many stages, and a piece may be two blocks'.
    It is never three's: where there are fewer pieces than blocks, each is one block's.
    """
    if pieces < blocks:
        return [pieces * block // blocks * stages for block in range(blocks + 1)]
    return [pieces * stages * block // blocks for block in range(blocks + 1)]


@dataclass(frozen=True, slots=True)
class _Kind:
    """What the kernel must know of a matrix besides its shape."""

    bits: Bits
    half_scales: bool = False
    zeros: bool = False


def matrices_of(layer: LayerWeights) -> tuple[Weight, ...]:
    """All of them, which are of one kind if the kernel takes them."""
    return layer.qkv, layer.out, layer.gate_up, layer.down


def _kind(weight: Weight) -> _Kind | None:
    """None if the kernel does not multiply by such a matrix."""
    if weight.dtype is not torch.bfloat16:
        return None
    if isinstance(weight, Tensor):
        return _Kind(16) if _copied_at_once(weight) else None
    if isinstance(weight, Fp8Matrix):
        return _Kind(8) if _copied_at_once(weight.values) else None
    if isinstance(weight, Int4Matrix):
        tiled = weight.codes.shape[2] == TILE_ROWS and weight.scales.shape[3] == 2 and weight.group == _GROUP
        tensors = [tensor for tensor in (weight.codes, weight.scales, weight.zeros) if tensor is not None]
        if tiled and all(map(_copied_at_once, tensors)):
            return _Kind(4, weight.scales.dtype is torch.float16, weight.zeros is not None)
    return None


def _copied_at_once(tensor: Tensor) -> bool:
    """Whether its rows can be copied as bytes that lie together, from an address that bulk copies take."""
    return tensor.is_contiguous() and tensor.data_ptr() % 16 == 0
