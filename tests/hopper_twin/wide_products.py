"""Small products of 33 to 64 rows with INT4, by the kernel compiled for a CPU, beside their plain twin."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from tests import hopper_twin
from tests.accuracy import relative_error
from tests.hopper_twin.small_products import guarded, int4, plain
from wicore_backend.executor.int4_products import HEADERS
from wicore_backend.executor.int4_wide import MOST_ROWS, SOURCE, Cut, Form, boxed, given
from wicore_backend.quantization.int4 import TILE_ROWS

TEXTS = {file.name: file.read_text() for file in (SOURCE, *HEADERS)}


def tensor_map(matrix: Tensor, *, box_rows: int, box_matrices: int = 1) -> ctypes.Array[ctypes.c_uint64]:
    """What `warpgroups.hpp` takes for a map of `matrix` [R, C] or [M, R, C], 16 bits a number."""
    of = matrix if matrix.dim() == 3 else matrix[None]
    apart = [stride * of.itemsize for stride in reversed(of.stride())]
    numbers = (matrix.data_ptr(), *reversed(of.shape), *apart, 64, box_rows, box_matrices)
    return (ctypes.c_uint64 * 16)(*numbers)


class WideProductOfInt4:
    """Rows and a matrix, the kernel, and the plain twin.

    Parameters
    ----------
    launches
        In a stream. Each but the first reads what the one before it gave, and gives it where that reads.
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
        self.cut, self.launches = cut, launches
        self.form = Form(cut.warpgroups, gated, half_scales, zeros)
        self.memory = torch.randn(rows, inputs + (8 if launches == 1 else 0)).bfloat16()
        self._texts = texts

    @property
    def x(self) -> Tensor:
        """The rows, [T, K]."""
        return self.memory[:, : self.weight.shape[1]]

    @cached_property
    def _kernel(self) -> hopper_twin.HostKernel:
        return hopper_twin.HostKernel(SOURCE, self._texts, self.form.defines(), parameter="Product")

    def run(self, seed: int) -> Tensor:
        """What each launch gives, [launches, T, N] in float32; parts of sums are added.

        Raises
        ------
        hopper_twin.KernelError
            If anything was wrong.
        """
        weight, x, split = self.weight, self.x, self.cut.splits > 1
        shape = (len(x), weight.shape[0] // (1 + self.form.gated))
        out, beyond = guarded(
            (self.cut.splits, *shape) if split else shape,
            torch.float32 if split else torch.bfloat16,
            torch.device("cpu"),
        )
        places = [out]
        constant, mutable = {"x": self.memory}, {"out": out}
        if self.launches > 1:
            x = self.memory.clone()
            places.append(x)
            constant, mutable = {}, {"out": out, "x": x}
        constant |= {"what is beyond out": beyond, "codes": weight.codes, "scales": weight.scales}
        if weight.zeros is not None:
            constant["zeros"] = weight.zeros
        codes = tensor_map(boxed(weight), box_rows=TILE_ROWS, box_matrices=self.form.tiles // 2)
        launches = []
        for turn in range(self.launches):
            into = places[turn % 2]
            launches.append(given(tensor_map(x, box_rows=MOST_ROWS), codes, weight, self.cut, into))
            x = into
        self._kernel.run(
            launches,
            hopper_twin.Memory(constant, mutable),
            blocks=self.cut.blocks(weight.codes.shape[0]),
            threads=self.form.threads,
            shared_bytes=self.form.shared_bytes,
            seed=seed,
        )
        assert bool(beyond.isnan().all()), "beyond out"
        return torch.stack([result.float().sum(0) if split else result.float() for result in places])

    def error(self, results: Tensor) -> float:
        """Relative, of what all launches gave."""
        expected, reads = [], self.x
        for _ in range(self.launches):
            expected.append(plain(reads, self.weight, gated=self.form.gated))
            reads = expected[-1].bfloat16()
        return relative_error(results, torch.stack(expected))
