"""The codec that loses nothing."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wicore_backend.hmt.codecs.base import NUMBERS, BlockKernels, Codec
from wicore_backend.hmt.fp8 import FP8

if TYPE_CHECKING:
    from wicore_backend.hmt.codecs.kernels.launching import Blocks


class ExactCodec(Codec):
    """The bytes themselves."""

    name = "exact"
    dtypes = (*NUMBERS, FP8)

    def _layer_bytes(self) -> int:
        return prod(self.shape[1:]) * self.dtype.itemsize

    def _pack(self, layers: Tensor, records: Tensor, _scratch: Tensor) -> None:
        records.copy_(layers.view(len(layers), -1).view(torch.uint8))

    def _unpack(self, records: Tensor, layers: Tensor, _scratch: Tensor) -> None:
        layers.view(len(layers), -1).view(torch.uint8).copy_(records)

    def _make_kernels(self, blocks: Blocks) -> BlockKernels | None:
        from wicore_backend.hmt.codecs.kernels.exact import ExactKernels

        return ExactKernels.for_blocks(blocks)
