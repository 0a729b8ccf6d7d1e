"""What the dense segments are as graphs: their names, and the names, types and shapes of what goes in and comes out.

ONNX files, TensorRT engines and the executors that run them all hold to this page. A graph computes one of
`Executor`'s functions (executor/base.py) over T packed tokens; embeddings are looked up outside, since a table of a
gigabyte that is read a row at a time has no business in an engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

import torch

from wicore_backend.models.gemma3.config import Gemma3Config

TOKENS = "T"
"""Packed tokens of a step."""
ROWS = "R"
"""Of them, those whose logits are asked for."""
IMAGES = "N"


class Precision(StrEnum):
    """How a set of segments computes, and how it keeps its matrices."""

    FP32 = "fp32"
    """float32 throughout: for machines without a GPU, and to prove graphs."""
    BF16 = "bf16"
    FP16 = "fp16"
    """For cards without bfloat16 (T10, T4: SM75). Gemma-3 overflows float16, so the residual stream is float32, and
    what reaches a norm is scaled down by a power of two that the norm takes out again."""
    INT4 = "int4"
    """Decoder matrices in 4 bits with a scale for each 128 inputs (64 or 32 where those of a matrix are no multiple, or
    where a quantised checkpoint has such), widened as they are read; the rest as bf16."""
    FP8 = "fp8"
    """Decoder matrices in e4m3 with a scale for each output, multiplied by activations in e4m3 with a scale for each
    token, where the library can; the rest as bf16."""

    @property
    def activations(self) -> torch.dtype:
        """Of queries, keys, values, attention's results, cosines, sines and pixels."""
        match self:
            case Precision.FP32:
                return torch.float32
            case Precision.FP16:
                return torch.float16
            case Precision.BF16 | Precision.INT4 | Precision.FP8:
                return torch.bfloat16
        assert_never(self)

    @property
    def residual(self) -> torch.dtype:
        """Of the hidden states, and of the soft tokens that replace some of them."""
        return torch.float32 if self is Precision.FP16 else self.activations


class SegmentKind(StrEnum):
    """Which of the executor's functions."""

    FIRST = "first"
    MID = "mid"
    LAST = "last"
    VISION = "vision"


@dataclass(frozen=True, slots=True, order=True)
class Segment:
    """One function of one model. `layer` is that whose end a `mid` is, and 0 for the others."""

    kind: SegmentKind
    layer: int = 0

    @property
    def name(self) -> str:
        """Of its files: `first`, `mid_007`, `last`, `vision`."""
        return f"mid_{self.layer:03}" if self.kind is SegmentKind.MID else str(self.kind)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a segment. A size that differs from step to step has its letter: `TOKENS`, `ROWS` or `IMAGES`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class SegmentSpec:
    """A segment's tensors, in order."""

    segment: Segment
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def segments(config: Gemma3Config) -> Iterator[Segment]:
    """All segments of a model, in the order in which a step runs them; vision comes last."""
    yield Segment(SegmentKind.FIRST)
    for layer in range(config.text.num_layers - 1):
        yield Segment(SegmentKind.MID, layer)
    yield Segment(SegmentKind.LAST)
    if config.vision is not None:
        yield Segment(SegmentKind.VISION)


def segment_spec(config: Gemma3Config, segment: Segment, precision: Precision) -> SegmentSpec:
    """What `segment` takes and gives, weights that are inputs aside.

    first   hidden, cos, sin             -> q, k, v
    mid     hidden, attention, cos, sin  -> hidden_out, q, k, v
    last    hidden, attention, rows      -> logits
    vision  pixels                       -> soft_tokens
    """
    text, activations, residual = config.text, precision.activations, precision.residual

    def stream(name: str) -> TensorSpec:
        return TensorSpec(name, residual, (TOKENS, text.hidden_size))

    attention = TensorSpec("attention", activations, (TOKENS, text.num_heads * text.head_dim))
    rotary = tuple(TensorSpec(name, activations, (TOKENS, text.head_dim)) for name in ("cos", "sin"))
    heads = {"q": text.num_heads, "k": text.num_kv_heads, "v": text.num_kv_heads}
    qkv = tuple(TensorSpec(name, activations, (TOKENS, count, text.head_dim)) for name, count in heads.items())
    match segment.kind:
        case SegmentKind.FIRST:
            return SegmentSpec(segment, (stream("hidden"), *rotary), qkv)
        case SegmentKind.MID:
            return SegmentSpec(segment, (stream("hidden"), attention, *rotary), (stream("hidden_out"), *qkv))
        case SegmentKind.LAST:
            rows = TensorSpec("rows", torch.int64, (ROWS,))
            logits = TensorSpec("logits", torch.float32, (ROWS, text.vocab_size))
            return SegmentSpec(segment, (stream("hidden"), attention, rows), (logits,))
        case SegmentKind.VISION:
            vision = config.vision
            assert vision is not None, "a text-only model has no vision segment"
            pixels = (IMAGES, vision.num_channels, vision.image_size, vision.image_size)
            soft_tokens = (IMAGES, config.mm_tokens_per_image, text.hidden_size)
            return SegmentSpec(
                segment,
                (TensorSpec("pixels", activations, pixels),),
                (TensorSpec("soft_tokens", residual, soft_tokens),),
            )
    assert_never(segment.kind)
