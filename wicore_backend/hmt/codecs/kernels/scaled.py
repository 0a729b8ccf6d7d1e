"""Kernels of the codecs of a byte a value: fp8 and q8."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wicore_backend.hmt.codecs.kernels.addressing import layer_of, tokens_of_head
from wicore_backend.hmt.codecs.kernels.arithmetic import (
    e4m3_of,
    e4m3_units,
    finite,
    in_units_of,
    load_numbers,
    nearest_integer,
    store_numbers,
)
from wicore_backend.hmt.codecs.kernels.launching import Blocks, CodecKernels, largest_power_dividing, warps

_FP8_MAX = tl.constexpr(448.0)
_Q8_GROUP = tl.constexpr(64)
_Q8_VALUES = 4096
"""Of a program."""
_Q8_FIRST = tl.constexpr(float.fromhex("0x1.0204p-7"))
_Q8_REST = tl.constexpr(float.fromhex("0x1.020408p-28"))
"""1 / 127: 16 bits, and those that follow."""


class Fp8Kernels(CodecKernels):
    """A program takes the keys or the values of a head."""

    def __init__(self, blocks: Blocks) -> None:
        layers, _, tokens, heads, dim = blocks.shape
        super().__init__(
            *(blocks, _encode_fp8, _decode_fp8),
            programs=layers * 2 * heads,
            encode_options={"LARGEST": torch.finfo(blocks.dtype).max},
            LAYERS=layers,
            TOKENS=tokens,
            HEADS=heads,
            DIM=dim,
            RECORD=blocks.record,
            num_warps=warps(tokens * dim, of_a_thread=32),
        )

    @classmethod
    def for_blocks(cls, blocks: Blocks) -> Fp8Kernels | None:
        return cls(blocks) if blocks.by_heads else None


class Q8Kernels(CodecKernels):
    """A program takes consecutive groups."""

    def __init__(self, blocks: Blocks) -> None:
        values = largest_power_dividing(blocks.layer, _Q8_VALUES)
        super().__init__(
            *(blocks, _encode_q8, _decode_q8),
            programs=blocks.shape[0] * (blocks.layer // values),
            encode_options={"LARGEST": torch.finfo(blocks.dtype).max},
            LAYERS=blocks.shape[0],
            LAYER=blocks.layer,
            GROUPS=values // _Q8_GROUP.value,
            RECORD=blocks.record,
            num_warps=warps(values, of_a_thread=64),
        )

    @classmethod
    def for_blocks(cls, blocks: Blocks) -> Q8Kernels | None:
        return cls(blocks) if blocks.layer % _Q8_GROUP.value == 0 else None


@triton.jit(do_not_specialize_on_alignment=["records"])
def _encode_fp8(
    blocks,
    records,
    LARGEST: tl.constexpr,
    LAYERS: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    RECORD: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    head = tl.program_id(0) % (2 * HEADS)  # The values' heads follow those of the keys.
    layer = tl.program_id(0) // (2 * HEADS)
    source, record = layer_of(blocks, records, layer, LAYERS, 2 * TOKENS * HEADS * DIM, RECORD, ALIGNMENT)
    offsets = head // HEADS * (TOKENS * HEADS * DIM) + tokens_of_head(head % HEADS, TOKENS, HEADS, DIM)
    numbers = finite(load_numbers(source, offsets), LARGEST)
    largest = tl.max(tl.abs(numbers))
    units = in_units_of(numbers, largest, SHORT=blocks.dtype.element_ty != tl.float32)
    tl.store(record + offsets, e4m3_of(units * _FP8_MAX))
    scales = (record + 2 * TOKENS * HEADS * DIM).to(blocks.dtype)
    store_numbers(scales, head, largest)


@triton.jit(do_not_specialize_on_alignment=["records"])
def _decode_fp8(
    records,
    blocks,
    LAYERS: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    RECORD: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    head = tl.program_id(0) % (2 * HEADS)
    layer = tl.program_id(0) // (2 * HEADS)
    target, record = layer_of(blocks, records, layer, LAYERS, 2 * TOKENS * HEADS * DIM, RECORD, ALIGNMENT)
    offsets = head // HEADS * (TOKENS * HEADS * DIM) + tokens_of_head(head % HEADS, TOKENS, HEADS, DIM)
    scales = (record + 2 * TOKENS * HEADS * DIM).to(blocks.dtype)
    units = e4m3_units(tl.load(record + offsets))
    store_numbers(target, offsets, units * load_numbers(scales, head))


@triton.jit(do_not_specialize_on_alignment=["records"])
def _encode_q8(
    blocks,
    records,
    LARGEST: tl.constexpr,
    LAYERS: tl.constexpr,
    LAYER: tl.constexpr,
    GROUPS: tl.constexpr,
    RECORD: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    part = tl.program_id(0) % (LAYER // (GROUPS * _Q8_GROUP))
    layer = tl.program_id(0) // (LAYER // (GROUPS * _Q8_GROUP))
    source, record = layer_of(blocks, records, layer, LAYERS, LAYER, RECORD, ALIGNMENT)
    groups = part * GROUPS + tl.arange(0, GROUPS)[:, None]
    offsets = groups * _Q8_GROUP + tl.arange(0, _Q8_GROUP)[None, :]
    numbers = finite(load_numbers(source, offsets), LARGEST)
    largest = tl.max(tl.abs(numbers), axis=1, keep_dims=True)
    units = in_units_of(numbers, largest, SHORT=blocks.dtype.element_ty != tl.float32)
    tl.store(record + offsets, nearest_integer(units * 127.0).to(tl.uint8))
    scales = (record + LAYER).to(blocks.dtype)
    store_numbers(scales, groups, largest)


@triton.jit(do_not_specialize_on_alignment=["records"])
def _decode_q8(
    records,
    blocks,
    LAYERS: tl.constexpr,
    LAYER: tl.constexpr,
    GROUPS: tl.constexpr,
    RECORD: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    part = tl.program_id(0) % (LAYER // (GROUPS * _Q8_GROUP))
    layer = tl.program_id(0) // (LAYER // (GROUPS * _Q8_GROUP))
    target, record = layer_of(blocks, records, layer, LAYERS, LAYER, RECORD, ALIGNMENT)
    groups = part * GROUPS + tl.arange(0, GROUPS)[:, None]
    offsets = groups * _Q8_GROUP + tl.arange(0, _Q8_GROUP)[None, :]
    scales = (record + LAYER).to(blocks.dtype)
    codes = tl.load((record + offsets).to(tl.pointer_type(tl.int8))).to(tl.float32)
    units = tl.fma(codes, _Q8_FIRST, codes * _Q8_REST)
    store_numbers(target, offsets, units * load_numbers(scales, groups))
