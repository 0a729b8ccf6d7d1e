"""Executors compared segment by segment, on the same random inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import assert_never

import torch
from torch import Tensor

from wicore_backend.executor.base import Executor
from wicore_backend.executor.segments.contract import Segment, SegmentKind, segments
from wicore_backend.models.gemma3.config import Gemma3Config

Results = Mapping[tuple[int, Segment], tuple[Tensor, ...]]
"""Of each segment for each number of tokens, float32 in host memory."""


@torch.inference_mode()
def results(executor: Executor, config: Gemma3Config, tokens: Sequence[int]) -> Results:
    """What each segment gives for random inputs, which are the same for every executor of the model."""
    given: dict[tuple[int, Segment], tuple[Tensor, ...]] = {}
    for count in tokens:
        for segment in segments(config):
            random = torch.Generator().manual_seed(count)
            found = _run(executor, config, segment, count, random)
            # Copied, since an executor may give memory that its next segment writes to.
            given[count, segment] = tuple(value.to("cpu", torch.float32, copy=True) for value in found)
    return given


def _run(
    executor: Executor, config: Gemma3Config, segment: Segment, count: int, random: torch.Generator
) -> tuple[Tensor, ...]:
    text = config.text

    def made(*shape: int, dtype: torch.dtype) -> Tensor:
        # Rounded once for all: what differs is then what was computed.
        return torch.randn(shape, generator=random).bfloat16().to(executor.device, dtype)

    hidden = made(count, text.hidden_size, dtype=executor.residual)
    attention = made(count, text.num_heads * text.head_dim, dtype=executor.dtype)
    angles = torch.rand(count, text.head_dim // 2, generator=random).mul_(6.0).repeat(1, 2)
    cos, sin = (part.bfloat16().to(executor.device, executor.dtype) for part in (angles.cos(), angles.sin()))
    match segment.kind:
        case SegmentKind.FIRST:
            return tuple(executor.first(hidden, cos, sin))
        case SegmentKind.MID:
            after, qkv = executor.mid(segment.layer, hidden, attention, cos, sin)
            return after, *qkv
        case SegmentKind.LAST:
            rows = torch.arange(0, count, max(1, count // 4), device=executor.device)
            return (executor.last(hidden, attention, rows),)
        case SegmentKind.VISION:
            vision = config.vision
            assert vision is not None, "a text-only model has no vision segment"
            side = vision.image_size
            return (executor.vision(made(1, vision.num_channels, side, side, dtype=executor.dtype)),)
    assert_never(segment.kind)


def worst_errors(found: Results, expected: Results) -> Mapping[SegmentKind, float]:
    """For each kind of segment the largest difference, in parts of the largest value; infinite if it is no number."""
    worst: dict[SegmentKind, float] = {}
    for place, values in found.items():
        for value, right in zip(values, expected[place], strict=True):
            error = float((value - right).abs().max() / right.abs().max())
            kind = place[1].kind
            worst[kind] = max(worst.get(kind, 0.0), error if error == error else float("inf"))
    return worst
