"""Small products of a few rows with INT4, by the kernel compiled for a CPU or a card, beside their plain twin."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from ctypes import Structure
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests import hopper_twin
from tests.accuracy import relative_error
from tests.kernel_kit import on
from wicore_backend.executor.int4_products import HEADERS
from wicore_backend.executor.int4_rows import SOURCE, Cut, Form, given
from wicore_backend.quantization.int4 import Int4Matrix
from wicore_backend.quantization.int4_rounding import quantized_int4

TEXTS = {file.name: file.read_text() for file in (SOURCE, *HEADERS)}


def int4(outputs: int, inputs: int, *, zeros: bool = False, half_scales: bool = False) -> Int4Matrix:
    """A random matrix in bfloat16, with groups of 128."""
    weight = quantized_int4(torch.randn(outputs, inputs).bfloat16(), symmetric=not zeros, search=False)
    assert isinstance(weight, Int4Matrix)
    if half_scales:
        widened = None if weight.zeros is None else weight.zeros.half()
        weight = replace(weight, scales=weight.scales.half(), zeros=widened)
    return weight


def plain(x: Tensor, weight: Int4Matrix, *, gated: bool) -> Tensor:
    """What the product stands for, in float32 [T, N], or [T, N / 2] of gate and up."""
    product = x.float() @ weight.dequantized(torch.float32).T
    if not gated:
        return product
    gate, up = product.chunk(2, 1)
    return F.gelu(gate, approximate="tanh") * up


class SmallProduct:
    """Rows and a matrix, the kernel, and the plain twin.

    Parameters
    ----------
    launches
        In a stream. Each but the first reads what the one before it gave, and gives it where that reads.

    Attributes
    ----------
    memory
        The rows, with what lies between them.
    """

    def __init__(
        self,
        rows: int,
        outputs: int,
        inputs: int,
        *,
        cut: Cut,
        gated: bool = False,
        zeros: bool = False,
        half_scales: bool = False,
        launches: int = 1,
        texts: Mapping[str, str] = TEXTS,
    ) -> None:
        torch.manual_seed(rows)
        self.weight = int4(outputs, inputs, zeros=zeros, half_scales=half_scales)
        self.cut, self.gated, self.launches = cut, gated, launches
        self.form = Form(cut.tiles, half_scales=half_scales, zeros=zeros)
        self.memory = torch.randn(rows, inputs + (8 if launches == 1 else 0)).bfloat16()
        self._texts = texts

    @property
    def x(self) -> Tensor:
        """The rows, [T, K]."""
        return self.memory[:, : self.weight.shape[1]]

    @cached_property
    def _on_host(self) -> hopper_twin.HostKernel:
        return hopper_twin.HostKernel(SOURCE, self._texts, self.form.defines(), parameter="Product")

    @cached_property
    def _on_card(self) -> Any:
        from wicore_backend.hopper.nvrtc import Kernel

        form = self.form
        return Kernel.of(
            SOURCE, HEADERS, form.defines(), threads=form.threads, shared_bytes=form.shared_bytes, cooperative=False
        )

    def run(self, seed: int) -> Tensor:
        """What each launch gives, [launches, T, N] in float32; parts of sums are added.

        Raises
        ------
        hopper_twin.KernelError
            If anything was wrong.
        """

        def launch(launches: list[Structure], memory: hopper_twin.Memory) -> None:
            self._on_host.run(
                launches,
                memory,
                blocks=self._blocks,
                threads=self.form.threads,
                shared_bytes=self.form.shared_bytes,
                seed=seed,
            )

        return self._run(torch.device("cpu"), launch)

    def run_on_card(self) -> Tensor:
        """As `run`, by the card that this machine has."""

        def launch(launches: list[Structure], _: hopper_twin.Memory) -> None:
            for one in launches:
                self._on_card.launch(self._blocks, one)
            torch.cuda.synchronize()

        return self._run(torch.device("cuda"), launch).cpu()

    @property
    def _blocks(self) -> int:
        return self.cut.blocks(self.weight.codes.shape[0])

    def _run(self, device: torch.device, launch: Callable[[list[Structure], hopper_twin.Memory], None]) -> Tensor:
        weight, memory = on(device, self.weight), self.memory.to(device)
        columns, split = weight.shape[0] // (1 + self.gated), self.cut.splits > 1
        shape = (len(memory), columns)
        out, beyond = guarded(
            (self.cut.splits, *shape) if split else shape, torch.float32 if split else torch.bfloat16, device
        )
        places, x = [out], memory[:, : weight.shape[1]]
        constant, mutable = {"x": memory}, {"out": out}
        if self.launches > 1:
            x = memory.clone()
            places.append(x)
            constant, mutable = {}, {"out": out, "x": x}
        constant |= {"what is beyond out": beyond, "codes": weight.codes, "scales": weight.scales}
        if weight.zeros is not None:
            constant["zeros"] = weight.zeros
        launches = []
        for turn in range(self.launches):
            into = places[turn % 2]
            launches.append(given(x, weight, self.cut, into, gated=self.gated))
            x = into
        launch(launches, hopper_twin.Memory(constant, mutable))
        assert bool(beyond.isnan().all()), "beyond out"
        return torch.stack([result.float().sum(0) if split else result.float() for result in places])

    def error(self, results: Tensor) -> float:
        """Relative, of what all launches gave."""
        expected, reads = [], self.x
        for _ in range(self.launches):
            expected.append(plain(reads, self.weight, gated=self.gated))
            reads = expected[-1].bfloat16()
        return relative_error(results, torch.stack(expected))


def guarded(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for a result, of NaN, and what lies behind it, as long."""
    size = math.prod(shape)
    out, beyond = torch.full((2 * size,), float("nan"), dtype=dtype, device=device).split(size)
    return out.view(shape), beyond
