"""Compiles the product of gate and up for Hopper, which takes no such card, and prints what it has of it.

To be run as a program of its own, without TRITON_INTERPRET: the interpreter's session cannot compile.
"""

from __future__ import annotations

import re

import triton
from triton.compiler import CompiledKernel
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout

from tests.compile_products import HOPPER
from wicore_backend.executor.kernels.gated_hopper import gated_kernel
from wicore_backend.executor.kernels.shared_tiles import COLUMNS, DEPTH, ROWS


def compiled(dtype: str, *, strided: bool = False) -> CompiledKernel:
    """The kernel for values of 16 bits, whose results are some columns of longer rows if `strided`."""
    shared = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    types = {
        "x": f"tensordesc<{dtype}[{ROWS}, {DEPTH}],{shared!r}>",
        "weight": f"tensordesc<{dtype}[{COLUMNS}, {DEPTH}],{shared!r}>",
        "out": f"*{dtype}",
        "parts": "*fp32",
    }
    names = [parameter.name for parameter in gated_kernel.params]
    constants = {} if strided else {"out_stride": None}
    signature = {name: types.get(name, "i32") for name in names} | dict.fromkeys(constants, "constexpr")
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in ("out", "parts", "columns", "depth")}
    if strided:
        aligned[(names.index("out_stride"),)] = [["tt.divisibility", 16]]
    source = GluonASTSource(gated_kernel, signature, constants, aligned)
    return triton.compile(source, target=HOPPER, options={"num_warps": 4})


if __name__ == "__main__":
    for dtype, strided in (("bf16", False), ("fp16", False), ("bf16", True)):
        kernel = compiled(dtype, strided=strided)
        print(
            kernel.metadata.shared,
            len(re.findall("wgmma.mma_async", kernel.asm["ptx"])),
            kernel.asm["ptx"].count("m64n256k16"),
            dtype,
        )
