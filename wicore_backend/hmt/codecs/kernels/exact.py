"""Kernels of the codec that loses nothing: copies of blocks that need not lie together."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wicore_backend.hmt.codecs.kernels.addressing import layer_of
from wicore_backend.hmt.codecs.kernels.launching import Blocks, CodecKernels, largest_power_dividing, warps

_WORD = 8
"""Bytes; a thread takes several."""
_WORDS = 2048
"""Of a program."""


class ExactKernels(CodecKernels):
    """A program takes consecutive words of a layer."""

    def __init__(self, blocks: Blocks) -> None:
        layers, layer = blocks.shape[0], blocks.record // _WORD
        words = largest_power_dividing(layer, _WORDS)
        super().__init__(
            *(blocks, _encode, _decode),
            programs=layers * (layer // words),
            encode_options={},
            LAYERS=layers,
            LAYER=layer,
            WORDS=words,
            num_warps=warps(words, of_a_thread=8),
        )

    @classmethod
    def for_blocks(cls, blocks: Blocks) -> ExactKernels | None:
        """Kernels for layers of whole words that are not too few at a time."""
        fits = blocks.record % _WORD == 0 and largest_power_dividing(blocks.record // _WORD, _WORDS) >= 64
        return cls(blocks) if fits else None

    def encode(self, blocks: Tensor, records: Tensor) -> None:
        """See CodecKernels."""
        super().encode(_words(blocks), _words(records))

    def decode(self, records: Tensor, blocks: Tensor) -> None:
        """See CodecKernels."""
        super().decode(_words(records), _words(blocks))


def _words(tensor: Tensor) -> Tensor:
    return tensor.view(len(tensor), -1).view(torch.int64)


@triton.jit(do_not_specialize_on_alignment=["records"])
def _encode(blocks, records, LAYERS: tl.constexpr, LAYER: tl.constexpr, WORDS: tl.constexpr, ALIGNMENT: tl.constexpr):
    offsets = tl.program_id(0) % (LAYER // WORDS) * WORDS + tl.arange(0, WORDS)
    layer = tl.program_id(0) // (LAYER // WORDS)
    source, record = layer_of(blocks, records, layer, LAYERS, LAYER, LAYER, ALIGNMENT)
    tl.store(record + offsets, tl.load(source + offsets))


@triton.jit(do_not_specialize_on_alignment=["records"])
def _decode(records, blocks, LAYERS: tl.constexpr, LAYER: tl.constexpr, WORDS: tl.constexpr, ALIGNMENT: tl.constexpr):
    offsets = tl.program_id(0) % (LAYER // WORDS) * WORDS + tl.arange(0, WORDS)
    layer = tl.program_id(0) // (LAYER // WORDS)
    target, record = layer_of(blocks, records, layer, LAYERS, LAYER, LAYER, ALIGNMENT)
    tl.store(target + offsets, tl.load(record + offsets))
