"""A matrix on the GPU by its role: the one place that knows which class multiplies by which kind of weight."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from wicore_backend.executor import fp8_matrix, int4_matrix, plain_matrix
from wicore_backend.executor.fp8_matrix import Fp8GpuMatrix
from wicore_backend.executor.int4_matrix import Int4GpuMatrix
from wicore_backend.executor.kernels import fp8_rows, small
from wicore_backend.executor.plain_matrix import PlainMatrix
from wicore_backend.executor.roles import Role
from wicore_backend.models.gemma3.weights import Weight
from wicore_backend.quantization.fp8 import Fp8Matrix, Rows
from wicore_backend.quantization.int4 import Int4Matrix

_MayTakeFp8 = Fp8GpuMatrix | Int4GpuMatrix
"""Of so many rows, or of none: each says so."""


class Matrix(Protocol):
    """x W^T + b for x [T, K], a weight [N, K] and a bias [N] or none, in the form that the matrix's role asks for.

    That is [T, N], in float32 if it is the head; GELU of the first half times the second, [T, N / 2], if it is gate and
    up; and [T, N] or parts of a sum, float32 [S, T, N], where a norm comes next (out and down).
    """

    def __call__(self, x: Rows) -> Tensor: ...


def matrix_of(role: Role, weight: Weight, bias: Tensor | None = None, *, fp8_prefill: bool = False) -> Matrix:
    """The matrix that multiplies by `weight` fastest, by as many rows as there are in each call.

    With `fp8_prefill` an INT4 matrix multiplies many rows in FP8, where it can.
    """
    if isinstance(weight, Tensor):
        return PlainMatrix(role, weight, bias)
    if isinstance(weight, Fp8Matrix):
        return Fp8GpuMatrix(role, weight, bias)
    if isinstance(weight, Int4Matrix):
        return Int4GpuMatrix(role, weight, bias, fp8_prefill=fp8_prefill)
    raise TypeError(f"no kernels multiply by a {type(weight).__name__}")


def widened_bytes(weight: Weight, *, fp8_prefill: bool = False) -> int:
    """Memory that a product by `weight` takes at most besides its operands and its result."""
    if isinstance(weight, Fp8Matrix):
        return fp8_matrix.widened_bytes(weight)
    if isinstance(weight, Int4Matrix):
        return int4_matrix.widened_bytes(weight, fp8_prefill=fp8_prefill)
    return plain_matrix.shared_bytes(weight) if isinstance(weight, Tensor) else 0


def add_norm(
    matrix: Matrix, x: Rows, residual: Tensor, weight: Tensor, next_weight: Tensor, eps: float, *, reader: Matrix
) -> tuple[Tensor, Rows]:
    """`small.add_norm` of `matrix` times `x`; its second result is in the form that `reader`, which reads it, takes."""
    product = matrix.unscaled(x) if isinstance(matrix, _MayTakeFp8) else matrix(x)
    quantizes = isinstance(reader, _MayTakeFp8) and reader.takes_fp8(len(residual))
    if quantizes or not isinstance(product, Tensor):
        return fp8_rows.add_norm(product, residual, weight, next_weight, eps, quantizes=quantizes)
    return small.add_norm(product, residual, weight, next_weight, eps)


def gated(gate_up: Matrix, x: Rows, *, reader: Matrix) -> Rows:
    """`gate_up` times `x`, in the form that `reader` takes if that costs nothing."""
    if isinstance(gate_up, Fp8GpuMatrix) and isinstance(reader, Fp8GpuMatrix):
        return gate_up.gated(x, reader=reader)
    if isinstance(gate_up, Int4GpuMatrix) and isinstance(reader, Int4GpuMatrix):
        return gate_up.gated(x, reader=reader)
    return gate_up(x)
