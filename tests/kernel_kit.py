"""What tests of kernels share: what they are compared with, a large model's shapes, and programs that compile them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from wicore_backend.hopper import ARCHITECTURE
from wicore_backend.hopper import HEADERS as HOPPER_HEADERS
from wicore_backend.quantization.int4 import Int4Matrix

ROOT = Path(__file__).resolve().parent.parent
HOPPER_SHARED_MEMORY = 227 * 1024  # a program's, at most
SHAPES_OF_27B = {
    "qkv": (8192, 5376),
    "out": (5376, 4096),
    "gate_up": (43008, 5376),
    "down": (5376, 21504),
    "head": (262_208, 5376),
}
EPS = 1e-6
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def run_alone(program: str) -> str:
    """What a module prints that is run as a program without the interpreter, in whose session nothing is compiled."""
    alone = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", program]
    done = subprocess.run(command, env=alone, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def assert_nvrtc_compiles(source: Path, headers: Sequence[Path], defines: Mapping[str, int]) -> None:
    """Where there is NVRTC, for Hopper; no GPU is needed."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="PyTorch's builds for CUDA bring cuda-bindings")
    try:
        nvrtc.nvrtcVersion()
    except RuntimeError as error:
        pytest.skip(f"no NVRTC: {error}")
    from wicore_backend.hopper.nvrtc import compiled

    assert compiled(source, headers, defines, architecture=ARCHITECTURE).startswith(b"\x7fELF")


def nvcc_compiled(source: Path, defines: Mapping[str, int], code: Path) -> tuple[list[int], int]:
    """Bytes that spill, each time that they are told, and registers that each thread is given, of a kernel for Hopper,
    which is left in `code`."""
    given = (f"-D{name}={value}" for name, value in defines.items())
    command = ["nvcc", f"-arch={ARCHITECTURE}", "-std=c++17", f"-I{HOPPER_HEADERS[0].parent}", *given, "-cubin"]
    command += ["--resource-usage", "-o", str(code), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert code.read_bytes().startswith(b"\x7fELF")
    told = result.stdout + result.stderr
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill", told)]
    assert spills
    (registers,) = map(int, re.findall(r"Used (\d+) registers", told))
    return spills, -(-registers // 8) * 8  # They are given out in eights.


def on(device: torch.device, matrix: Int4Matrix) -> Int4Matrix:
    """The matrix there."""
    zeros = None if matrix.zeros is None else matrix.zeros.to(device)
    return replace(matrix, codes=matrix.codes.to(device), scales=matrix.scales.to(device), zeros=zeros)


def rms_norm(x, weight):
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


@torch.inference_mode()
def segments(executor, rows, config):
    """All that the segments of `executor` give, on the same inputs; attention is some function of q, k, v."""
    torch.manual_seed(1)
    device, text = executor.device, config.text
    angles = torch.randn(rows, text.head_dim // 2).repeat(1, 2).to(device)
    soft = torch.randn(1, text.hidden_size).to(device) if rows > 1 else None
    hidden = executor.embed(
        torch.randint(text.vocab_size, (rows,)).to(device), soft, None if soft is None else torch.tensor([2]).to(device)
    )
    seen = [hidden]
    q, k, v = executor.first(hidden, angles.cos(), angles.sin())
    for layer in range(text.num_layers):
        seen += [q.clone(), k.clone(), v.clone()]
        groups = text.num_heads // text.num_kv_heads
        attention = (q + k.repeat_interleave(groups, 1) * v.repeat_interleave(groups, 1)).flatten(1)
        if layer == text.num_layers - 1:
            return [*seen, executor.last(hidden, attention, torch.tensor([rows - 1, 0], device=device))]
        hidden, (q, k, v) = executor.mid(layer, hidden, attention, angles.cos(), angles.sin())
        seen.append(hidden)
    raise AssertionError("a model has layers")
