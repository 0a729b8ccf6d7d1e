"""Compiles the attention kernels for cards that are not here, and prints the shared memory that each takes.

To be run as a program of its own, without TRITON_INTERPRET: the interpreter's session cannot compile.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from wicore_backend.attention.gpu.kernels.decode import decode_kernel
from wicore_backend.attention.gpu.kernels.prefill import prefill_kernel
from wicore_backend.attention.gpu.tuning import Launch, Tuning

CARDS = {"T10": (75, 65_536), "RTX 4090, L20": (89, 101_376)}
"""Compute capability and the shared memory that a program may have."""
IN_HALF = {"q", "k", "v", "out"}
IN_FLOAT = {"mass", "partial", "stats", "log_totals"}
NUMBERS = {"items", "tables", "mass_at", "arrived", "tiles", "lowers", "uppers"}


def shared_bytes(kernel: Any, constants: dict[str, Any], pool: str | None, capability: int, launch: Launch) -> int:
    """What a program of the kernel takes."""
    names = [parameter.name for parameter in kernel.params]
    constants = {name: value for name, value in constants.items() if name in names}
    half = "*fp16" if capability < 80 else "*bf16"
    types = dict.fromkeys(IN_HALF, half) | dict.fromkeys(IN_FLOAT, "*fp32") | dict.fromkeys(NUMBERS, "*i32")
    types["pool"] = pool or half
    types |= dict.fromkeys(("scale", "softcap"), "fp32") | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    target = GPUTarget("cuda", capability, 32)
    driver.set_active(SimpleNamespace(get_current_target=lambda: target))  # Kernels ask it what card they are for.
    shared: int = triton.compile(source, target=target, options=options).metadata.shared
    return shared


if __name__ == "__main__":
    for card, (capability, limit) in CARDS.items():
        for head_dim, kv_heads in ((128, 16), (256, 4)):
            half = torch.float16 if capability < 80 else torch.bfloat16
            tuning = Tuning.of(head_dim, half, shared_bytes=limit)
            shape: dict[str, Any] = {
                "KV_HEADS": kv_heads,
                "HEAD_DIM": head_dim,
                "DIMS": head_dim,
                "BLOCK_SIZE": 32,
                "GROUP": 2,
            }
            shape |= {"GROUP_ROWS": 2, "SOFTCAP": False, "PRECISION": "ieee"}
            prefill = shape | {"ROWS": tuning.prefill.rows, "KEYS": tuning.prefill.keys, "SPLIT": False}
            decode = shape | {"ROWS": 16, "KEYS": tuning.decode.keys, "CELL": 32, "AT_ONCE": 4096 // (2 * head_dim)}
            decode |= {"MEASURE": True, "OVERLAPPED": False}
            taken = max(
                shared_bytes(kernel, shape, pool, capability, launch)
                for pool in (None, "*u8")
                for kernel, shape, launch in (
                    (prefill_kernel, prefill, tuning.prefill),
                    (decode_kernel, decode, tuning.decode),
                )
            )
            print(f"{card}, heads of {head_dim}:", taken, limit, flush=True)
