"""The CPU's 16-bit matrices: the same product as float32's, taken only where nothing is lost."""

import pytest
import torch

from wicore_backend.executor.linear import Linear, _can_pack

pytestmark = pytest.mark.skipif(not _can_pack(), reason="this build of PyTorch has no FBGEMM, so nothing is packed")


@pytest.mark.parametrize("tokens", [1, 3, 16, 200])
@pytest.mark.parametrize("size", [1e-6, 0.05, 1e6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_checkpoints_matrix_is_packed_and_gives_float32s_product(tokens, size, dtype):
    generator = torch.Generator().manual_seed(tokens)
    weight = torch.randn(70, 64, generator=generator) * (size if dtype == torch.bfloat16 else min(size, 100.0))
    weight[0, :8] = size * 1e-9  # Small beside the rest, and for most sizes far below float16's own range.
    weight = weight.to(dtype).float()
    bias = torch.randn(70, generator=generator) * size
    x = torch.randn(tokens, 64, generator=generator)
    linear = Linear(weight, bias)
    assert linear._packed is not None
    exact = x.double() @ weight.double().T + bias.double()
    assert (linear(x) - exact).norm() / exact.norm() < 1e-6


def test_a_matrix_that_needs_32_bits_keeps_them():
    weight = torch.randn(8, 8)
    linear = Linear(weight)
    assert linear._packed is None
    x = torch.randn(2, 8)
    assert torch.equal(linear(x), torch.nn.functional.linear(x, weight))


def test_a_matrix_of_zeros_is_no_special_case():
    assert not Linear(torch.zeros(4, 4))(torch.ones(1, 4)).any()
