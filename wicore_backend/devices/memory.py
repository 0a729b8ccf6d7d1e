"""Where a card's memory goes: weights, workspace, caches, and what of them lies in host memory or on a disk.

Weights, what steps take, KV cache and tiers follow from a model's configuration and an engine's settings by the
arithmetic that the engine itself uses. What CUDA takes and what TensorRT computes in are estimates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import assert_never

import torch

from wicore_backend.attention.gpu.needs import AttentionNeeds
from wicore_backend.attention.gpu.tiling import Tiling
from wicore_backend.attention.gpu.tuning import Tuning
from wicore_backend.config import EngineConfig
from wicore_backend.devices.cards import Card
from wicore_backend.engine.cache_memory import host_cache_bytes, image_cache_bytes, kv_cache_bytes
from wicore_backend.engine.device_memory import Widening, device_needs
from wicore_backend.executor.segments.contract import Precision, Segment, SegmentKind, segments
from wicore_backend.executor.tensorrt.contexts import EXECUTION_CONTEXT_BYTES
from wicore_backend.executor.tensorrt.profiles import GUESSED_TOKENS, MAX_IMAGES
from wicore_backend.hmt.budget import divide_host_memory, divide_memory
from wicore_backend.hmt.fp8 import FP8
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.pool import slot_bytes, staging_bytes
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.models.gemma3.tensor_names import HEAD, expected_shapes, may_be_quantized

CONTEXT_BYTES = 600 * 2**20
"""Of a process with CUDA, cuBLAS, an engine's library and its own kernels, before any tensor: an estimate."""

_EMBEDDING = "text.embed_tokens.weight"
_POOLING_HEAD = "vision.head."
_VECTOR_BYTES = 4
"""Norms are float32 in engines."""
_HOST_TIER = "host tier of the KV cache"
_INT4_GROUP = 128
_SCALE_BITS = 16
_FP8_SCALE_BYTES = 4


def segment_bytes(config: Gemma3Config, precision: Precision) -> Mapping[Segment, int]:
    """Bytes of each segment's weights."""
    sizes = dict.fromkeys(segments(config), 0)
    for name, shape in expected_shapes(config).items():
        if (segment := _segment_of(config, name)) is not None:
            sizes[segment] += _tensor_bytes(name, shape, precision)
    return sizes


def embedding_bytes(config: Gemma3Config, precision: Precision) -> int:
    """Of the table that tokens are looked up in, which no segment holds."""
    return config.text.vocab_size * config.text.hidden_size * precision.activations.itemsize


def _segment_of(config: Gemma3Config, name: str) -> Segment | None:
    """The segment that holds the tensor of this canonical name; None for what no segment has."""
    last_layer = config.text.num_layers - 1
    if name == _EMBEDDING or name.startswith(_POOLING_HEAD):
        return None
    if name.startswith(("vision.", "projector.")):
        return Segment(SegmentKind.VISION)
    if not name.startswith("text.layers."):
        return Segment(SegmentKind.LAST)
    _, _, number, part = name.split(".", 3)
    layer = int(number)
    if part.startswith(("input_layernorm", "self_attn")) and not part.startswith("self_attn.o_proj"):
        return Segment(SegmentKind.MID, layer - 1) if layer else Segment(SegmentKind.FIRST)
    return Segment(SegmentKind.LAST) if layer == last_layer else Segment(SegmentKind.MID, layer)


def _tensor_bytes(name: str, shape: tuple[int, ...], precision: Precision) -> int:
    count = prod(shape)
    if len(shape) < 2:
        return count * _VECTOR_BYTES
    if name != HEAD and may_be_quantized(name):
        if precision is Precision.INT4:
            return (count * 4 + count // _INT4_GROUP * _SCALE_BITS) // 8
        if precision is Precision.FP8:
            return count + shape[0] * _FP8_SCALE_BYTES
    return count * precision.activations.itemsize


def kv_layout(config: Gemma3Config, settings: EngineConfig, precision: Precision) -> KVLayout:
    """The KV cache's shape under these settings."""
    text = config.text
    return KVLayout.of(
        text.layer_groups,
        block_size=settings.block_size,
        kv_heads=text.num_kv_heads,
        head_dim=text.head_dim,
        window=text.window,
        bytes_per_value=_kv_dtype(settings, precision).itemsize,
    )


def _kv_dtype(settings: EngineConfig, precision: Precision) -> torch.dtype:
    return FP8 if settings.kv_cache_dtype == "fp8" else precision.activations


def sequence_bytes(layout: KVLayout, tokens: int, *, max_chunk: int) -> Mapping[LayerGroup, int]:
    """The most that a sequence of `tokens` tokens, computed by up to `max_chunk`, takes of each group's pool."""
    return {group: layout.blocks_held(group, tokens, max_chunk) * layout.block_bytes(group) for group in layout.groups}


def workspace_bytes(config: Gemma3Config, settings: EngineConfig, precision: Precision) -> int:
    """About the memory that engines compute in: the decoder's contexts share it, and the tower has its own."""
    needs = {kind: _intermediates(config, settings, precision, kind) for kind in {s.kind for s in segments(config)}}
    tower = needs.pop(SegmentKind.VISION, 0)
    return tower + max(needs.values())


def _intermediates(config: Gemma3Config, settings: EngineConfig, precision: Precision, kind: SegmentKind) -> int:
    """As much as TensorRT-RTX 1.7 said that the 27b's take, in bytes (docs/benchmarks/tensorrt.md).

    It keeps gate and up, what GELU makes of them and their product, and no scores of the tower's attention.
    """
    text, value = config.text, precision.activations.itemsize
    tokens, rows = settings.max_batch_tokens, settings.max_running + GUESSED_TOKENS
    match kind:
        case SegmentKind.FIRST:
            return tokens * (text.qkv_heads * text.head_dim + 3 * text.hidden_size) * value
        case SegmentKind.MID:
            return tokens * 4 * text.intermediate_size * value
        case SegmentKind.LAST:
            return rows * (4 * text.intermediate_size + 10 * text.hidden_size) * value
        case SegmentKind.VISION:
            vision = config.vision
            assert vision is not None, "a text-only model has no vision segment"
            values = 2 * vision.intermediate_size + 9 * vision.hidden_size // 4
            return MAX_IMAGES * vision.patches_per_side**2 * values * value
    assert_never(kind)


def buffer_bytes(config: Gemma3Config, settings: EngineConfig, precision: Precision) -> int:
    """Of what segments hand on: hidden states twice, queries, keys and values."""
    text, tokens = config.text, settings.max_batch_tokens
    hidden = 2 * tokens * text.hidden_size * precision.residual.itemsize
    return hidden + tokens * text.qkv_heads * text.head_dim * precision.activations.itemsize


def _step_needs(config: Gemma3Config, settings: EngineConfig, precision: Precision, card: Card) -> Mapping[str, int]:
    """What the engine sets aside for steps, attention, sampling and their graphs."""
    text, dtype, layout = config.text, precision.activations, kv_layout(config, settings, precision)
    tuning = Tuning.of(text.head_dim, dtype, _kv_dtype(settings, precision), card.shared_bytes)
    tiling = Tiling(layout, text.num_heads, tuning, card.processors)
    context = settings.context(text.max_position_embeddings)
    return device_needs(
        config,
        settings,
        AttentionNeeds(tiling, value_bytes=dtype.itemsize),
        Widening(),
        max_model_len=context,
        value_bytes=dtype.itemsize,
        own_activations=True,
        recorded_segment_bytes=EXECUTION_CONTEXT_BYTES,
    )


@dataclass(frozen=True)
class CardMemory:
    """What one engine takes of one card, and of the machine around it. All sizes in bytes.

    Attributes
    ----------
    weights
        By part, of those on the card.
    working
        By part: what computing takes besides weights.
    kv_cache
        What is left of the card for it; 0 if the model does not fit.
    on_host
        By part: what lies in host memory.
    """

    config: Gemma3Config
    settings: EngineConfig
    precision: Precision
    card_bytes: int
    weights: Mapping[str, int]
    working: Mapping[str, int]
    kv_cache: int
    on_host: Mapping[str, int]

    @classmethod
    def of(
        cls,
        config: Gemma3Config,
        settings: EngineConfig,
        precision: Precision,
        *,
        card: Card,
    ) -> CardMemory:
        """The memory of an engine with `settings` on `card`, with segments in `precision`."""
        sizes, text, value_bytes = segment_bytes(config, precision), config.text, precision.activations.itemsize
        head = text.vocab_size * text.hidden_size * value_bytes
        vision = sizes.get(Segment(SegmentKind.VISION), 0)
        embedding = embedding_bytes(config, precision)
        weights = {"decoder": sum(sizes.values()) - head - vision, "head": head}
        weights |= {"vision tower": vision} if vision else {}
        on_host = {"embedding table": embedding} if settings.host_embeddings else {}
        weights |= {} if settings.host_embeddings else {"embedding table": embedding}
        working = {
            "CUDA and libraries": CONTEXT_BYTES,
            "workspace of engines": workspace_bytes(config, settings, precision),
            "between segments": buffer_bytes(config, settings, precision),
            "steps": sum(_step_needs(config, settings, precision, card).values()),
        }
        free = card.memory_bytes - sum(weights.values())
        kv_cache = max(0, kv_cache_bytes(settings, free=free, needed=sum(working.values())))
        on_host |= {_HOST_TIER: host_cache_bytes(settings, cuda=True)}
        working |= {
            "pictures seen last": image_cache_bytes(settings, cuda=True),
            "blocks on their way": staging_bytes(kv_cache) if on_host[_HOST_TIER] else 0,
        }
        return cls(config, settings, precision, card.memory_bytes, weights, working, kv_cache, on_host)

    @property
    def reserve(self) -> int:
        """What is left free, for what no arithmetic sees; below 0 if the model does not fit."""
        return self.card_bytes - sum(self.weights.values()) - sum(self.working.values()) - self.kv_cache

    @cached_property
    def layout(self) -> KVLayout:
        return kv_layout(self.config, self.settings, self.precision)

    def one_sequence(self, tokens: int) -> int:
        """Bytes of the KV cache that one sequence of `tokens` tokens takes."""
        return sum(sequence_bytes(self.layout, tokens, max_chunk=self.settings.max_batch_tokens).values())

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the KV cache holds, in whole blocks; 0 if it holds none."""
        least, most = 0, self.layout.blocks_for(self.config.text.max_position_embeddings)
        while least < most:
            middle = (least + most + 1) // 2
            # Block 0 of each pool is nobody's.
            spare = sum(self.layout.block_bytes(group) for group in self.layout.groups)
            fits = self.one_sequence(middle * self.layout.block_size) + spare <= self.kv_cache
            least, most = (middle, most) if fits else (least, middle - 1)
        return least * self.layout.block_size

    @cached_property
    def blocks(self) -> Mapping[LayerGroup, int]:
        """Of each group's pool, as the engine divides the KV cache.

        Raises
        ------
        InvalidArgumentError
            If it does not hold one sequence of the settings' `max_model_len`.
        """
        return divide_memory(
            self.layout,
            memory_bytes=self.kv_cache,
            max_sequences=self.settings.max_running,
            max_tokens=self.settings.context(self.config.text.max_position_embeddings),
            max_chunk=self.settings.max_batch_tokens,
        )

    def sequences(self, tokens: int) -> int:
        """How many sequences of `tokens` tokens are on the card at once."""
        chunk = self.settings.max_batch_tokens
        held = {group: self.layout.blocks_held(group, tokens, chunk) for group in self.layout.groups}
        return min(self.settings.max_running, *((self.blocks[group] - 1) // held[group] for group in held))

    @property
    def host_tokens(self) -> int:
        """Tokens whose global keys and values the host tier holds besides."""
        kv_dtype = _kv_dtype(self.settings, self.precision)
        slots = divide_host_memory(
            self.blocks,
            slot_bytes(self.layout, self.settings.host_cache_codec, kv_dtype),
            self.on_host[_HOST_TIER],
        )
        return slots.get(LayerGroup.GLOBAL, 0) * self.layout.block_size

    @property
    def disk_tokens(self) -> int:
        """Tokens whose global keys and values the disk holds at most; 0 without one."""
        if self.settings.nvme_cache_path is None:
            return 0
        kv_dtype = _kv_dtype(self.settings, self.precision)
        stored = slot_bytes(self.layout, self.settings.disk_codec, kv_dtype)
        return self.settings.nvme_cache_bytes // stored[LayerGroup.GLOBAL] * self.layout.block_size
