"""What a step's segments leave to attention and to each other, for executors whose results have places of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from wicore_backend.executor.base import QKV
from wicore_backend.executor.segments.contract import Precision, Segment, SegmentKind, TensorSpec, segment_spec
from wicore_backend.models.gemma3.config import Gemma3Config


@dataclass(frozen=True, slots=True, eq=False)
class Between:
    """Two hidden states, of which a layer reads one and writes one, and queries, keys and values, which are read before
    the next are written."""

    hidden: tuple[Tensor, Tensor]
    qkv: QKV

    @classmethod
    def of(cls, config: Gemma3Config, precision: Precision, *, tokens: int, device: torch.device) -> Self:
        """Memory for steps of up to so many tokens."""

        def room(spec: TensorSpec) -> Tensor:
            return torch.zeros(tokens, *_row(spec), dtype=spec.dtype, device=device)

        hidden, qkv = _left(config, precision)
        return cls((room(hidden), room(hidden)), QKV(*map(room, qkv)))

    @staticmethod
    def nbytes(config: Gemma3Config, precision: Precision, *, tokens: int) -> int:
        """What `of` takes."""
        hidden, qkv = _left(config, precision)
        return tokens * sum(spec.dtype.itemsize * math.prod(_row(spec)) for spec in (hidden, hidden, *qkv))

    def __len__(self) -> int:
        return len(self.qkv.q)

    def first(self, tokens: int) -> Self:
        """The part that a step of so many tokens has."""
        one, other = self.hidden
        return type(self)((one[:tokens], other[:tokens]), QKV(*(part[:tokens] for part in self.qkv)))

    def after(self, layer: int) -> Tensor:
        """The hidden state that `layer` writes; the other one is what it reads."""
        return self.hidden[layer % 2]


def _left(config: Gemma3Config, precision: Precision) -> tuple[TensorSpec, tuple[TensorSpec, ...]]:
    spec = segment_spec(config, Segment(SegmentKind.FIRST), precision)
    return spec.inputs[0], spec.outputs


def _row(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(size for size in spec.shape if isinstance(size, int))
