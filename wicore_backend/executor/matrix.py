"""A matrix on the GPU by its role: the one place that knows which class multiplies by which kind of weight."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from wicore_backend.executor.fp8_matrix import Fp8GpuMatrix
from wicore_backend.executor.kernels import small
from wicore_backend.executor.kernels.fp8_rows import add_norm_quantized
from wicore_backend.executor.plain_matrix import PlainMatrix
from wicore_backend.executor.roles import Role
from wicore_backend.models.gemma3.weights import Weight
from wicore_backend.quantization.fp8 import Fp8Matrix, Rows


class Matrix(Protocol):
    """x W^T + b for x [T, K], a weight [N, K] and a bias [N] or none, in the form that the matrix's role asks for.

    That is [T, N], in float32 if it is the head; GELU of the first half times the second, [T, N / 2], if it is gate and
    up; and [T, N] or parts of a sum, float32 [S, T, N], where a norm comes next (out and down).
    """

    def __call__(self, x: Rows) -> Tensor: ...


def matrix_of(role: Role, weight: Weight, bias: Tensor | None = None) -> Matrix:
    """The matrix that multiplies by `weight` fastest, by as many rows as there are in each call."""
    if isinstance(weight, Tensor):
        return PlainMatrix(role, weight, bias)
    if isinstance(weight, Fp8Matrix):
        return Fp8GpuMatrix(role, weight, bias)
    raise TypeError(f"no kernels multiply by a {type(weight).__name__}")


def add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, next_weight: Tensor, eps: float, *, reader: Matrix
) -> tuple[Tensor, Rows]:
    """`small.add_norm`, its second result in the form that `reader`, which multiplies it, takes."""
    if isinstance(reader, Fp8GpuMatrix) and reader.takes_fp8(len(residual)):
        return add_norm_quantized(x, residual, weight, next_weight, eps)
    return small.add_norm(x, residual, weight, next_weight, eps)


def feedforward(gate_up: Matrix, down: Matrix, x: Rows) -> Tensor:
    """Through both matrices of an MLP: what lies between them is in the form that `down` takes."""
    if isinstance(gate_up, Fp8GpuMatrix) and isinstance(down, Fp8GpuMatrix):
        return down(gate_up.gated(x, reader=down))
    return down(gate_up(x))
