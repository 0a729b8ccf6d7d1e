"""A matrix of 16 or 32 bits a value on the GPU, and the fastest of its products for as many rows as there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from wicore_backend.executor.kernels.products import MAX_ROWS, Tile, product
from wicore_backend.executor.kernels.shared_tiles import parts_bytes
from wicore_backend.executor.kernels.small import gated, overlaps
from wicore_backend.executor.roles import Role
from wicore_backend.executor.tile_choice import TileChoice
from wicore_backend.quantization.fp8 import Rows

TILES: Mapping[Role, Mapping[int, tuple[Tile, ...]]] = {
    "qkv": {1: (Tile(64, 128, 6, 256), Tile(8, 256, 4, 1024, dot=False)), 16: (Tile(64, 128, 6, 512),)},
    "out": {
        1: (Tile(4, 1024, 1, 4096, dot=False), Tile(4, 256, 6, 1024, dot=False)),
        16: (Tile(64, 128, 4, 128, splits=2),),
    },
    "gate_up": {1: (Tile(4, 256, 6, 512, dot=False),), 16: (Tile(64, 64, 5, 128),)},
    "down": {
        1: (Tile(8, 512, 3, 1024, dot=False), Tile(4, 256, 6, 1024, dot=False)),
        16: (Tile(64, 64, 6, 128, splits=2),),
    },
    "head": {1: (Tile(4, 256, 6, 512, dot=False),), 16: (Tile(64, 128, 4, 128),), 64: (Tile(64, 64, 6, 64),)},
}
"""For each role, by the largest number of rows, the tilings that are faster than cuBLAS: the first that fits is taken.

Measured on an H200 at the shapes of Gemma-3-27B (docs/benchmarks/hopper.md).
"""


_GATED_ROWS = 257
"""From as many on, three tiles of rows, the kernel for gate and up is faster than cuBLAS with GELU after it."""


def shared_bytes(weight: Tensor) -> int:
    """Memory for the sums of tiles that are shared out, if a product by `weight` can have any."""
    return parts_bytes(weight.device) if weight.dtype.itemsize == 2 and overlaps(weight) else 0


class PlainMatrix:
    """`Matrix` of a `weight` [N, K] as it is: by cuBLAS, for few rows streamed, gate and up of many in one kernel.

    Parameters
    ----------
    tiles
        By the largest number of rows, tilings to choose from on any card; by default, on Hopper, those of `TILES`.
    """

    def __init__(
        self,
        role: Role,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        tiles: Mapping[int, tuple[Tile, ...]] | None = None,
    ) -> None:
        self._role = role
        self._weight = weight
        self._bias = bias
        # The tilings were chosen on Hopper, and other cards have less shared memory than some of them take.
        hopper = overlaps(weight)
        streamed = weight.dtype.itemsize == 2 and bias is None and (tiles is not None or hopper)
        tiles = TILES[role] if tiles is None else tiles
        self._tile = TileChoice(tiles if streamed else {}, lambda tile: tile.fits(weight, gated=role == "gate_up"))
        self._gated: Callable[[Tensor, Tensor], Tensor] | None = None
        if streamed and hopper and role == "gate_up":
            # Imported where it is used: it is written in a language for such cards alone.
            from wicore_backend.executor.kernels.gated_hopper import fits, gated_product

            self._gated = gated_product if fits(weight) else None

    def __call__(self, x: Rows) -> Tensor:
        assert isinstance(x, Tensor), "only an FP8 matrix is given rows in FP8"
        tile = self._tile(len(x)) if len(x) <= MAX_ROWS else None
        if tile is not None:
            result_type = torch.float32 if self._role == "head" else x.dtype
            return product(x, self._weight, tile, gated=self._role == "gate_up", result_type=result_type)
        if self._gated is not None and len(x) >= _GATED_ROWS:
            return self._gated(x, self._weight)
        whole = F.linear(x, self._weight, self._bias)
        if self._role == "gate_up":
            return gated(whole)
        return whole.float() if self._role == "head" else whole
