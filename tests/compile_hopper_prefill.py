"""Compiles the prefill kernels for Hopper, which takes no such card, and counts what they do.

To be run as a program of its own, without TRITON_INTERPRET: the interpreter's session cannot compile.
"""

from __future__ import annotations

import re
from typing import Any

import triton
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout

from tests.compile_products import HOPPER
from wicore_backend.attention.gpu.kernels.prefill_hopper import hopper_prefill_kernel
from wicore_backend.attention.gpu.kernels.prefill_hopper_fp8 import hopper_fp8_prefill_kernel
from wicore_backend.attention.gpu.tuning import HOPPER_SHARED_BYTES

SHAPE = {"KV_HEADS": 16, "GROUP": 2, "GROUP_ROWS": 2, "HEAD_DIM": 128, "BLOCK_SIZE": 32}
SHAPE |= {"SOFTCAP": False, "HEAD_AXIS": 1}
TYPES = {"q": "*bf16", "out": "*bf16", "log_totals": "*fp32", "scale": "fp32", "softcap": "fp32"}
TYPES |= dict.fromkeys(("tiles", "tables", "lowers", "uppers"), "*i32")


def compiled(kernel: Any, keys: int, stages: int) -> str:
    """The kernel's PTX."""
    fp8 = kernel is hopper_fp8_prefill_kernel
    constants = SHAPE | {"KEYS": keys, "STAGES": stages}
    shared = NVMMASharedLayout(swizzle_byte_width=64 if fp8 else 128, element_bitwidth=8 if fp8 else 16, rank=2)
    element = "u8" if fp8 else "bf16"
    types = (
        TYPES
        | {"pool": f"tensordesc<{element}[{SHAPE['BLOCK_SIZE']}, 64],{shared!r}>"}
        | dict.fromkeys(constants, "constexpr")
    )
    names = [parameter.name for parameter in kernel.params]
    signature = {name: types.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = GluonASTSource(kernel, signature, constants, aligned)
    done = triton.compile(source, target=HOPPER, options={"num_warps": 4})
    assert done.metadata.shared <= HOPPER_SHARED_BYTES, f"{done.metadata.shared} bytes of shared memory"
    ptx: str = done.asm["ptx"]
    return ptx


if __name__ == "__main__":
    for kernel in (hopper_prefill_kernel, hopper_fp8_prefill_kernel):
        for keys, stages in ((64, 4), (128, 2)):
            ptx = compiled(kernel, keys, stages)
            products, copies = len(re.findall("wgmma.mma_async", ptx)), len(re.findall("cp.async.bulk.tensor", ptx))
            widened = len(re.findall(r"cvt\.rn\.f16x2\.e4m3x2", ptx))
            print(keys, stages, "products", products, "copies", copies, "widened", widened)
