"""Compiles every tiling of the FP8 products for Hopper, as `compile_products` does those of plain ones."""

from __future__ import annotations

from typing import Any

from triton.compiler import CompiledKernel

from tests.compile_products import compiled_product, tell
from wicore_backend.executor.fp8_matrix import FP8_TILES
from wicore_backend.executor.kernels.fp8_products import _fp8_product
from wicore_backend.executor.kernels.products import Tile


def compiled(tile: Tile, rows: int, *, gated: bool) -> CompiledKernel:
    """The kernel of `fp8_product` in bf16 on a card that starts kernels early."""
    constants: dict[str, Any] = {
        "ROWS": max(16, rows) if tile.dot else 1,
        "COLUMNS": tile.columns,
        "FIRST": tile.first,
        "DEPTH": tile.depth,
        "STAGES": tile.stages,
        "SPLITS": tile.splits,
        "GATED": gated,
        "OVERLAPPED": True,
    }
    types = {
        "x": "*fp8e4nv" if tile.dot else "*bf16",
        "x_scale": "*fp32",
        "weight": "*fp8e4nv",
        "weight_scale": "*fp32",
        "out": "*fp32" if tile.splits > 1 else "*bf16",
    }
    return compiled_product(_fp8_product, constants, types, warps=tile.warps)


if __name__ == "__main__":
    tell(FP8_TILES, compiled)
