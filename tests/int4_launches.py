"""INT4 products by kernels for Hopper where there is none: any device passes for it, and launches are listed."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from wicore_backend.executor import int4_products
from wicore_backend.executor.int4_products import HEADERS
from wicore_backend.quantization.int4 import Int4Matrix

H200_BLOCKS = 132


class Launched(NamedTuple):
    source: Path
    form: dict[str, int]
    threads: int
    shared_bytes: int
    blocks: int
    given: Any


class Mapped(NamedTuple):
    """What a tensor map stands for, of which the driver would make it."""

    address: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    box: tuple[int | None, int]

    @classmethod
    def of(cls, words: ctypes.Array[ctypes.c_uint64]) -> Mapped:
        return _MAPPED[words[0]]


_MAPPED: list[Mapped] = []


def listed_launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launched]]:
    launches: list[Launched] = []

    class Kernel:
        def __init__(self, source, headers, defines, *, threads, shared_bytes, cooperative):
            assert headers == HEADERS
            assert not cooperative
            self._made = (source, defines, threads, shared_bytes)

        def launch(self, blocks, parameters):
            launches.append(Launched(*self._made, blocks, parameters))

    def tensor_map(matrix, *, box_rows, box_matrices=None):
        _MAPPED.append(Mapped(matrix.data_ptr(), tuple(matrix.shape), matrix.stride(), (box_matrices, box_rows)))
        return (ctypes.c_uint64 * 16)(len(_MAPPED) - 1)

    nvrtc: Any = ModuleType("nvrtc")
    nvrtc.Kernel, nvrtc.tensor_map = SimpleNamespace(of=Kernel), tensor_map
    monkeypatch.setitem(sys.modules, "wicore_backend.hopper.nvrtc", nvrtc)
    monkeypatch.setattr(int4_products, "overlaps", lambda _: True)
    properties = torch.cuda.get_device_properties
    of_cpu = SimpleNamespace(multi_processor_count=H200_BLOCKS)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda d=None: of_cpu if d == torch.device("cpu") else properties(d)
    )
    monkeypatch.setattr(torch.cuda, "device", _CudaDeviceOrCpu)
    int4_products.compiled.cache_clear()
    yield launches
    int4_products.compiled.cache_clear()
    _MAPPED.clear()


class _CudaDeviceOrCpu(torch.cuda.device):
    """Leaves a CPU as it is; a class, as what it is in place of, since PyTorch asks what is one of it."""

    def __init__(self, device):
        self._is_cpu = device == torch.device("cpu")
        if not self._is_cpu:
            super().__init__(device)

    def __enter__(self):
        return None if self._is_cpu else super().__enter__()

    def __exit__(self, *raised):
        return None if self._is_cpu else super().__exit__(*raised)


def random_int4(outputs: int, inputs: int, *, zeros: bool = False, half_scales: bool = False) -> Int4Matrix:
    """A matrix on the card, made there: to quantise a large one takes long."""
    shape, kind = (outputs // 16, inputs // 256, 16), torch.float16 if half_scales else torch.bfloat16
    codes = torch.randint(-(2**31), 2**31, (*shape, 32), dtype=torch.int32, device="cuda")
    scales = (torch.rand(*shape, 2, device="cuda") * 0.01 + 0.001).to(kind)
    zero_points = torch.randint(0, 16, scales.shape, device="cuda").to(kind) if zeros else None
    return Int4Matrix(codes, scales, zero_points, torch.bfloat16)
