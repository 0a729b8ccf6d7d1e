"""Compiles the prefill kernel for Hopper, which takes no such card, and counts what it does.

To be run as a program of its own, without TRITON_INTERPRET: the interpreter's session cannot compile.
"""

from __future__ import annotations

import re

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout

from wicore_backend.attention.gpu.kernels.prefill_hopper import hopper_prefill_kernel

HOPPER = GPUTarget("cuda", 90, 32)
SHAPE = {"KV_HEADS": 16, "GROUP": 2, "GROUP_ROWS": 2, "HEAD_DIM": 128, "BLOCK_SIZE": 32, "SOFTCAP": False}
TYPES = {"q": "*bf16", "out": "*bf16", "log_totals": "*fp32", "scale": "fp32", "softcap": "fp32"}
TYPES |= dict.fromkeys(("tiles", "tables", "lowers", "uppers"), "*i32")


def compiled(keys: int, stages: int) -> str:
    """The kernel's PTX."""
    constants = SHAPE | {"KEYS": keys, "STAGES": stages}
    shared = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    types = (
        TYPES
        | {"pool": f"tensordesc<bf16[{SHAPE['BLOCK_SIZE']}, 64],{shared!r}>"}
        | dict.fromkeys(constants, "constexpr")
    )
    names = [parameter.name for parameter in hopper_prefill_kernel.params]
    signature = {name: types.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = GluonASTSource(hopper_prefill_kernel, signature, constants, aligned)
    ptx: str = triton.compile(source, target=HOPPER, options={"num_warps": 4}).asm["ptx"]
    return ptx


if __name__ == "__main__":
    for keys, stages in ((64, 4), (128, 2)):
        ptx = compiled(keys, stages)
        products, copies = len(re.findall("wgmma.mma_async", ptx)), len(re.findall("cp.async.bulk.tensor", ptx))
        print(keys, stages, "products", products, "copies", copies)
