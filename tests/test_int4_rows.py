"""Products of a few rows with INT4 by the kernel for Hopper, compiled by g++: right in any order of its parts."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from tests import hopper_twin
from tests.accuracy import relative_error
from wicore_backend.executor.int4_rows import HEADERS, SOURCE, Cut, Form, given
from wicore_backend.quantization.int4 import Int4Matrix
from wicore_backend.quantization.int4_rounding import quantized_int4

TEXTS = {file.name: file.read_text() for file in (SOURCE, *HEADERS)}


class SmallProduct:
    """Rows and a matrix, the kernel, and the plain twin."""

    def __init__(
        self,
        rows: int,
        outputs: int,
        inputs: int,
        *,
        cut: Cut,
        gated: bool = False,
        symmetric: bool = True,
        texts: Mapping[str, str] = TEXTS,
    ) -> None:
        torch.manual_seed(rows)
        matrix = torch.randn(outputs, inputs).bfloat16()
        weight = quantized_int4(matrix, symmetric=symmetric, search=False)
        assert isinstance(weight, Int4Matrix)
        self.weight, self.cut, self.gated = weight, cut, gated
        self.form = Form(cut.tiles, zeros=weight.zeros is not None)
        self.kernel = hopper_twin.HostKernel(SOURCE, texts, self.form.defines(), parameter="Product")
        self.memory = torch.randn(rows, inputs + 8).bfloat16()
        self.x = self.memory[:, :inputs]

    def run(self, seed: int) -> Tensor:
        columns = self.weight.shape[0] // (1 + self.gated)
        split = self.cut.splits > 1
        shape = (self.cut.splits, len(self.x), columns) if split else (len(self.x), columns)
        out = torch.full(shape, float("nan"), dtype=torch.float32 if split else torch.bfloat16)
        constant = {"x": self.memory, "codes": self.weight.codes, "scales": self.weight.scales}
        if self.weight.zeros is not None:
            constant["zeros"] = self.weight.zeros
        self.kernel.run(
            [given(self.x, self.weight, self.cut, out, gated=self.gated)],
            hopper_twin.Memory(constant, {"out": out}),
            blocks=self.cut.blocks(self.weight.codes.shape[0]),
            threads=self.form.threads,
            shared_bytes=self.form.shared_bytes,
            seed=seed,
        )
        return out.float().sum(0) if split else out.float()

    def expected(self) -> Tensor:
        product = self.x.float() @ self.weight.dequantized(torch.float32).T
        if not self.gated:
            return product
        gate, up = product.chunk(2, 1)
        return torch.nn.functional.gelu(gate, approximate="tanh") * up


CASES = {
    "one block": ((5, 64, 512), {"cut": Cut(4, 1)}),
    "several blocks, the last with fewer tiles": ((8, 160, 768), {"cut": Cut(4, 1)}),
    "inputs in splits": ((3, 64, 1280), {"cut": Cut(2, 3)}),
    "gate and up": ((7, 192, 512), {"cut": Cut(4, 1), "gated": True}),
    "zero points": ((4, 64, 512), {"cut": Cut(4, 1), "symmetric": False}),
    "many tiles": ((2, 352, 1280), {"cut": Cut(22, 1)}),
}


@pytest.fixture(params=CASES, scope="module")
def case(request):
    sizes, more = CASES[request.param]
    with torch.inference_mode():
        yield SmallProduct(*sizes, **more)


def test_a_product_is_the_plain_twin_s_and_the_same_in_any_order(case):
    first = case.run(seed=0)
    assert relative_error(first, case.expected()) < 5e-3
    for seed in (1, 2):
        assert torch.equal(case.run(seed), first), f"with seed {seed}"
