"""Compiles every tiling of the products for Hopper, which takes no such card, and prints what it has of it.

A line each: bytes of shared memory, wide loads before the kernel waits for its input, role and rows.

To be run as a program of its own, without TRITON_INTERPRET: the interpreter's session cannot compile.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from wicore_backend.executor.kernels.products import Tile, _product
from wicore_backend.executor.plain_matrix import TILES
from wicore_backend.executor.roles import Role

HOPPER = GPUTarget("cuda", 90, 32)
ANY_NUMBER = ("rows", "spans")
"""Numbers that the kernels are not compiled for."""


def compiled(tile: Tile, rows: int, *, gated: bool) -> CompiledKernel:
    """The kernel of `product` for bf16 on a card that starts kernels early."""
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
    types = {"x": "*bf16", "weight": "*bf16", "out": "*fp32" if tile.splits > 1 else "*bf16"}
    return compiled_product(_product, constants, types, warps=tile.warps)


def compiled_product(
    kernel: Any, constants: Mapping[str, Any], types: Mapping[str, str], *, warps: int
) -> CompiledKernel:
    """A product for Hopper whose programs start early; what has no type among `types` is a whole number."""
    names = [parameter.name for parameter in kernel.params]
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name not in ANY_NUMBER and signature[name] != "constexpr"
    }
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    return triton.compile(source, target=HOPPER, options={"num_warps": warps, "launch_pdl": True})


def early_loads(kernel: CompiledKernel) -> int:
    """How many wide loads come before the kernel waits for its input."""
    before_wait, wait, _ = kernel.asm["ptx"].partition("griddepcontrol.wait")
    return len(re.findall(r"ld\.global[\w.]*\.v4", before_wait)) if wait else 0


def tell(tilings: Mapping[Role, Mapping[int, Iterable[Tile]]], compiled: Callable[..., CompiledKernel]) -> None:
    """Print a line for each tiling, by role and rows."""
    for role, by_rows in tilings.items():
        for rows, tiles in by_rows.items():
            for tile in tiles:
                kernel = compiled(tile, rows, gated=role == "gate_up")
                print(kernel.metadata.shared, early_loads(kernel), role, rows)


if __name__ == "__main__":
    tell(TILES, compiled)
