"""Kernels of the codec of 4 bits a value.

Where a value lies in its range is told by multiplying with an inverse, so that a value in the middle between two codes
may get the one where PyTorch takes the other; both are as near.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl

from wicore_backend.hmt.codecs.kernels.addressing import layer_of
from wicore_backend.hmt.codecs.kernels.arithmetic import finite, load_numbers, nearest_integer, store_numbers
from wicore_backend.hmt.codecs.kernels.launching import Blocks, CodecKernels, warps

_CHANNELS_TOGETHER = tl.constexpr(2)
"""Key channels of a thread, which then has all tokens of them: nothing of theirs is worked out twice. With the 8 that
fill the widest load, the ranges are worked out by 8 threads each, and encoding takes more than twice as long."""
_FUZZ = tl.constexpr(2.0**-16)
"""Of a 15th, by which a channel may be out of its range: so that rounding does not widen one that ends on a 15th."""


class Q4Kernels(CodecKernels):
    """A program takes the keys or the values of a head: the tokens of the first half and, whose codes go into the same
    bytes, those of the second."""

    def __init__(
        self, blocks: Blocks, *, sections: Sequence[int], run: int, group: tuple[int, int], largest: float
    ) -> None:
        layers, _, tokens, heads, dim = blocks.shape
        _, channels, key_ranges, value_codes, value_ranges = accumulate(sections[:-1], initial=0)
        super().__init__(
            *(blocks, _encode, _decode),
            programs=layers * 2 * heads,
            encode_options={"LARGEST": min(torch.finfo(blocks.dtype).max, largest)},
            LAYERS=layers,
            TOKENS=tokens,
            HEADS=heads,
            DIM=dim,
            RUN=run,
            ROWS=group[0],
            WIDTH=group[1],
            CHANNELS=channels,
            KEY_RANGES=key_ranges,
            VALUE_CODES=value_codes,
            VALUE_RANGES=value_ranges,
            RECORD=blocks.record,
            num_warps=warps(tokens * dim, of_a_thread=64),
        )

    @classmethod
    def for_blocks(
        cls, blocks: Blocks, *, sections: Sequence[int], run: int, group: tuple[int, int], largest: float
    ) -> Q4Kernels | None:
        """Kernels for records of these sections, runs of so many tokens, groups of so many tokens and channels."""
        if not blocks.by_heads or blocks.shape[2] < 2 * group[0]:
            return None
        return cls(blocks, sections=sections, run=run, group=group, largest=largest)


@triton.jit(do_not_specialize_on_alignment=["records"])
def _encode(
    blocks,
    records,
    LARGEST: tl.constexpr,
    LAYERS: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    KEY_RANGES: tl.constexpr,
    VALUE_CODES: tl.constexpr,
    VALUE_RANGES: tl.constexpr,
    RECORD: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    head = tl.program_id(0) % HEADS
    layer = tl.program_id(0) // (2 * HEADS)
    source, record = layer_of(blocks, records, layer, LAYERS, 2 * TOKENS * HEADS * DIM, RECORD, ALIGNMENT)
    if tl.program_id(0) // HEADS % 2 == 0:
        channels, ranges = record + CHANNELS, (record + KEY_RANGES).to(blocks.dtype)
        _encode_keys(source, record, channels, ranges, head, LARGEST, TOKENS, HEADS, DIM, RUN)
    else:
        codes, ranges = record + VALUE_CODES, (record + VALUE_RANGES).to(blocks.dtype)
        source += TOKENS * HEADS * DIM
        _encode_values(source, codes, ranges, head, LARGEST, TOKENS, HEADS, DIM, ROWS, WIDTH)


@triton.jit
def _encode_keys(
    keys,
    codes,
    channels,
    ranges,
    head,
    LARGEST: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    RUN: tl.constexpr,
):
    RUNS: tl.constexpr = TOKENS // RUN
    offsets = _keys_of_head(head, TOKENS, HEADS, DIM, RUN)
    first = finite(load_numbers(keys, offsets), LARGEST)
    second = finite(load_numbers(keys + TOKENS // 2 * HEADS * DIM, offsets), LARGEST)
    low, high = tl.min(first, axis=1, keep_dims=True), tl.max(first, axis=1, keep_dims=True)
    low_2, high_2 = tl.min(second, axis=1, keep_dims=True), tl.max(second, axis=1, keep_dims=True)
    if RUNS == 1:
        low, high = tl.minimum(low, low_2), tl.maximum(high, high_2)
        low_2, high_2 = low, high
    run, run_2 = _runs_of_head(head, HEADS, RUNS)
    low, high = _store_key_ranges(channels, ranges, run, low, high, RUNS * HEADS)
    low_2, high_2 = _store_key_ranges(channels, ranges, run_2, low_2, high_2, RUNS * HEADS)
    first, second = _clamp(first, low, high), _clamp(second, low_2, high_2)
    tl.store(codes + offsets, (_codes(first, low, high) | _codes(second, low_2, high_2) << 4).to(tl.uint8))


@triton.jit
def _encode_values(
    values,
    codes,
    ranges,
    head,
    LARGEST: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    GROUPS: tl.constexpr = TOKENS * HEADS * DIM // (ROWS * WIDTH)
    offsets = _values_of_head(head, TOKENS, HEADS, DIM, ROWS, WIDTH)
    group = _groups_of_head(head, TOKENS, HEADS, DIM, ROWS, WIDTH)
    first = finite(load_numbers(values, offsets), LARGEST)
    second = finite(load_numbers(values + TOKENS // 2 * HEADS * DIM, offsets), LARGEST)
    low, high = _store_value_ranges(ranges, group, first, GROUPS)
    low_2, high_2 = _store_value_ranges(ranges, group + GROUPS // 2, second, GROUPS)
    tl.store(codes + offsets, (_codes(first, low, high) | _codes(second, low_2, high_2) << 4).to(tl.uint8))


@triton.jit(do_not_specialize_on_alignment=["records"])
def _decode(
    records,
    blocks,
    LAYERS: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    KEY_RANGES: tl.constexpr,
    VALUE_CODES: tl.constexpr,
    VALUE_RANGES: tl.constexpr,
    RECORD: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    head = tl.program_id(0) % HEADS
    layer = tl.program_id(0) // (2 * HEADS)
    target, record = layer_of(blocks, records, layer, LAYERS, 2 * TOKENS * HEADS * DIM, RECORD, ALIGNMENT)
    if tl.program_id(0) // HEADS % 2 == 0:
        channels, ranges = record + CHANNELS, (record + KEY_RANGES).to(blocks.dtype)
        _decode_keys(record, channels, ranges, target, head, TOKENS, HEADS, DIM, RUN)
    else:
        codes, ranges = record + VALUE_CODES, (record + VALUE_RANGES).to(blocks.dtype)
        target += TOKENS * HEADS * DIM
        _decode_values(codes, ranges, target, head, TOKENS, HEADS, DIM, ROWS, WIDTH)


@triton.jit
def _decode_keys(
    codes,
    channels,
    ranges,
    keys,
    head,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    RUN: tl.constexpr,
):
    RUNS: tl.constexpr = TOKENS // RUN
    offsets = _keys_of_head(head, TOKENS, HEADS, DIM, RUN)
    run, run_2 = _runs_of_head(head, HEADS, RUNS)
    codes = tl.load(codes + offsets)
    low, high = _load_key_ranges(channels, ranges, run, RUNS * HEADS, DIM)
    store_numbers(keys, offsets, _between(low, high, codes & 15))
    low, high = _load_key_ranges(channels, ranges, run_2, RUNS * HEADS, DIM)
    store_numbers(keys + TOKENS // 2 * HEADS * DIM, offsets, _between(low, high, codes >> 4))


@triton.jit
def _decode_values(
    codes,
    ranges,
    values,
    head,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    GROUPS: tl.constexpr = TOKENS * HEADS * DIM // (ROWS * WIDTH)
    offsets = _values_of_head(head, TOKENS, HEADS, DIM, ROWS, WIDTH)
    group = _groups_of_head(head, TOKENS, HEADS, DIM, ROWS, WIDTH)
    codes = tl.load(codes + offsets)
    low, high = load_numbers(ranges, group), load_numbers(ranges + GROUPS, group)
    store_numbers(values, offsets, _between(low, high, codes & 15))
    group += GROUPS // 2
    low, high = load_numbers(ranges, group), load_numbers(ranges + GROUPS, group)
    store_numbers(values + TOKENS // 2 * HEADS * DIM, offsets, _between(low, high, codes >> 4))


@triton.jit
def _keys_of_head(head, TOKENS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, RUN: tl.constexpr):
    """int32 [runs, tokens, DIM]: in the first half of the keys, those of a head. Half a run, if all tokens are one."""
    STEP: tl.constexpr = min(RUN, TOKENS // 2)
    tokens = tl.arange(0, TOKENS // 2 // STEP)[:, None, None] * STEP + tl.arange(0, STEP)[None, :, None]
    offsets = (tokens * HEADS + head) * DIM + tl.arange(0, DIM)[None, None, :]
    return tl.max_contiguous(offsets, (1, 1, _CHANNELS_TOGETHER))


@triton.jit
def _runs_of_head(head, HEADS: tl.constexpr, RUNS: tl.constexpr):
    """int32 [runs, 1, 1], twice: where the ranges of runs in the first half of tokens are, and in the second."""
    first = tl.arange(0, max(RUNS // 2, 1))[:, None, None] * HEADS + head
    return first, first + RUNS // 2 * HEADS  # The same, if all tokens are one run.


@triton.jit
def _values_of_head(
    head, TOKENS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """int32 [groups, ROWS, parts, WIDTH]: in the first half of the values, those of a head."""
    groups = tl.arange(0, TOKENS // 2 // ROWS)[:, None, None, None]
    tokens = groups * ROWS + tl.arange(0, ROWS)[None, :, None, None]
    channels = tl.arange(0, DIM // WIDTH)[None, None, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, None, :]
    return (tokens * HEADS + head) * DIM + channels


@triton.jit
def _groups_of_head(
    head, TOKENS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """int32 [groups, 1, parts, 1]: where the ranges of a head's groups in the first half of tokens are."""
    groups = tl.arange(0, TOKENS // 2 // ROWS)[:, None, None, None]
    return (groups * HEADS + head) * (DIM // WIDTH) + tl.arange(0, DIM // WIDTH)[None, None, :, None]


@triton.jit
def _store_key_ranges(channels, ranges, run, low, high, RUNS: tl.constexpr):
    """Write the ranges of runs of a head, and of their channels [runs, 1, DIM]; returns these as they will be read."""
    DIM: tl.constexpr = low.shape[2]
    least, most = tl.min(low, axis=2, keep_dims=True), tl.max(high, axis=2, keep_dims=True)
    begin, end = tl.floor(_way(low, least, most) + _FUZZ), tl.ceil(_way(high, least, most) - _FUZZ)
    tl.store(channels + run * DIM + tl.arange(0, DIM)[None, None, :], (begin + 16.0 * end).to(tl.uint8))
    store_numbers(ranges, run, least)
    store_numbers(ranges + RUNS, run, most)
    return _between(least, most, begin), _between(least, most, end)


@triton.jit
def _load_key_ranges(channels, ranges, run, RUNS: tl.constexpr, DIM: tl.constexpr):
    """float32 [runs, 1, DIM], twice: the ends of the channels' ranges."""
    ends = tl.load(channels + run * DIM + tl.arange(0, DIM)[None, None, :])
    least, most = load_numbers(ranges, run), load_numbers(ranges + RUNS, run)
    return _between(least, most, ends & 15), _between(least, most, ends >> 4)


@triton.jit
def _store_value_ranges(ranges, group, numbers, GROUPS: tl.constexpr):
    """Write the ranges of groups [groups, ROWS, parts, WIDTH]; returns their ends, [groups, 1, parts, 1]."""
    least = tl.min(tl.min(numbers, axis=3, keep_dims=True), axis=1, keep_dims=True)
    most = tl.max(tl.max(numbers, axis=3, keep_dims=True), axis=1, keep_dims=True)
    store_numbers(ranges, group, least)
    store_numbers(ranges + GROUPS, group, most)
    return least, most


@triton.jit
def _codes(numbers, low, high):
    """int32, 0 to 15: which 15th of the way from `low` to `high` numbers between them are nearest to."""
    return nearest_integer(_way(numbers, low, high))


@triton.jit
def _way(numbers, low, high):
    """How many 15ths of the way from `low` to `high` numbers between them are, but for rounding."""
    width = high - low
    factor = tl.where(width < 2.0**-64, 2.0**64, 1.0)  # For the inverse is finite from 2**-126 on.
    return (numbers - low) * factor * (15.0 / tl.where(width == 0, 1.0, width * factor))


@triton.jit
def _between(low, high, codes):
    """So many 15ths of the way from `low` to `high`; these themselves at 0 and 15."""
    way = codes.to(tl.float32) * (1 / 15)
    return tl.fma(tl.where(way < 0.5, way, way - 1.0), high - low, tl.where(way < 0.5, low, high))


@triton.jit
def _clamp(numbers, low, high):
    return tl.minimum(tl.maximum(numbers, low), high)
