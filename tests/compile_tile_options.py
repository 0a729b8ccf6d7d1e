"""Compiles one option of each kind that `scripts/benchmark_tiles.py` times, for a card that is not here.

A line each: bytes of shared memory, products on tensor cores, whether tiles are brought ahead, kind and option.

To be run as a program of its own, without TRITON_INTERPRET: the interpreter's session cannot compile. With names of
options it compiles these, and with "all" every one.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import partial

from triton.compiler import CompiledKernel

from scripts.benchmark_tiles import OPTIONS
from tests import compile_fp8_products, compile_products
from wicore_backend.executor.kernels.products import Tile

SOME = ("gate-up: 256 first", "down: 3 parts")


def kernels(names: set[str]) -> Iterator[tuple[str, CompiledKernel]]:
    for kind, by_rows in OPTIONS.items():
        for rows, options in by_rows.items():
            for name, tiles in options.items():
                for role, tile in tiles.items():
                    if not isinstance(tile, Tile) or (names and name not in names):
                        continue
                    compiled = partial(compile_products.compiled, tile)
                    if kind == "fp8":
                        compiled = partial(compile_fp8_products.compiled, tile)
                    yield f"{kind}:{rows} {role} {name}", compiled(rows, gated=role == "gate_up")


if __name__ == "__main__":
    given = set(sys.argv[1:])
    for name, kernel in kernels(set() if "all" in given else given or set(SOME)):
        ptx = kernel.asm["ptx"]
        products = len(re.findall(r"wgmma\.mma_async\.sync|mma\.sync", ptx))
        print(kernel.metadata.shared, products, len(re.findall(r"cp\.async\.c[ag]", ptx)), name, flush=True)
