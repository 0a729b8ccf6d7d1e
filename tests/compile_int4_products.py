"""Compiles every tiling of the INT4 products for Hopper, as `compile_products` does those of plain ones."""

from __future__ import annotations

import re
from typing import Any

import triton.language as tl
from triton.compiler import CompiledKernel

from tests.compile_products import compiled_product, early_loads
from wicore_backend.executor.int4_matrix import INT4_TILES
from wicore_backend.executor.kernels.int4 import MAX_ROWS, Int4Tile, _product
from wicore_backend.quantization.int4 import TILE_ROWS


def compiled(tile: Int4Tile, rows: int, *, gated: bool) -> CompiledKernel:
    """The kernel of `int4_product` in bf16, for groups of 128, on a card that starts kernels early."""
    constants: dict[str, Any] = {
        "ROWS": max(8, min(rows, MAX_ROWS)),
        "ONE_ROW": rows == 1,
        "COLUMNS": tile.columns,
        "GROUP": 128,
        "TILE_ROWS": TILE_ROWS,
        "EARLY": int(tile.early),
        "STAGES": tile.stages,
        "PARTS": tile.parts,
        "SPLITS": tile.splits,
        "UNEVEN": True,
        "SCALE": tl.bfloat16,
        "HAS_ZEROS": True,
        "SCALED": tile.scaled,
        "GATED": gated,
        "OVERLAPPED": True,
        "PACKED": True,
    }
    types = {
        "x": "*bf16",
        "codes": "*i16",
        "scales": "*i32",
        "zeros": "*i32",
        "out": "*fp32" if tile.splits > 1 else "*bf16",
    }
    return compiled_product(_product, constants, types, warps=tile.warps)


if __name__ == "__main__":
    for role, by_rows in INT4_TILES.items():
        for most, tile in by_rows.items():
            for rows in (1, 8) if most == 8 else (most,):
                kernel = compiled(tile, rows, gated=role == "gate_up")
                after_wait = kernel.asm["ptx"].partition("griddepcontrol.wait")[2]
                products = len(re.findall(r"wgmma\.mma_async\.sync|mma\.sync", after_wait))
                print(kernel.metadata.shared, int(tile.early), early_loads(kernel), products, role, rows)
