"""Products with a decoder's matrices, in each way that a matrix can be kept.

Fused matrices (QKV, gate and up) stay one product, as the other executors have them: TensorRT reads the input once and
takes the parts apart where they are used next, without copies, and tensors that those executors hold can be bound.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from wicore_backend.executor.segments.graph import Scope, Value
from wicore_backend.models.gemma3.weights import Weight, plain
from wicore_backend.quantization.fp8 import FP8, FP8_MAX, Fp8Matrix, quantized_fp8
from wicore_backend.quantization.int4 import SYMMETRIC_ZERO, Int4Matrix
from wicore_backend.quantization.int4_rounding import quantized_int4

Keeping = Literal["plain", "int4", "fp8"]

INT4_GROUPS = (128, 64, 32)
"""Inputs that share a scale: the first that fits a matrix which is quantised here; one that is quantised already may
have any. TensorRT-RTX 1.7 keeps the codes of each, and widens them in the kernel that multiplies."""
FP8_INPUTS = 16
"""A matrix in FP8 must have a multiple of so many inputs: what tensor cores read at once."""
_SMALLEST_SCALE = 1e-12
"""Of a token: one of zeros is zeros whatever its scale."""


def product(at: Scope, name: str, x: Value, weight: Weight, *, activations: torch.dtype) -> Value:
    """x W^T of `x` [T, in] and a weight [out, in] that is kept as it comes; in `activations`, or float32 from FP8."""
    if isinstance(weight, Int4Matrix):
        return _int4_product(at, name, at.graph.cast(x, activations), weight)
    if isinstance(weight, Fp8Matrix):
        return _fp8_product(at, name, x, weight, activations)
    assert isinstance(weight, Tensor), f"no graph multiplies by a {type(weight).__name__}"
    matrix = at.weight(f"{name}.weight", weight)
    return at("Gemm", at.graph.cast(x, activations), matrix, name=name, transB=1)


def kept(weight: Weight, keeping: Keeping, dtype: torch.dtype, *, search: bool = True) -> Weight:
    """`weight` [out, in] as it is to be kept in a graph that computes in `dtype`.

    A plain one is quantised, one that is quantised in a way that the graph cannot take is widened and quantised again.
    `search` is `quantized_int4`'s.

    Raises
    ------
    ValueError
        If the matrix has a number of inputs that cannot be kept so.
    """
    if keeping == "plain":
        return plain(weight, dtype)
    if keeping == "int4":
        if isinstance(weight, Int4Matrix) and keeps_codes(weight):
            return weight
        return quantized_int4(plain(weight, dtype), int4_group(weight.shape[1]), search=search)
    if weight.shape[1] % FP8_INPUTS:
        raise ValueError(f"{weight.shape[1]} inputs are no multiple of {FP8_INPUTS}")
    return weight if isinstance(weight, Fp8Matrix) else quantized_fp8(plain(weight, dtype))


def int4_group(inputs: int) -> int:
    """Inputs that share a scale in a matrix of so many, or ValueError if none do."""
    for group in INT4_GROUPS:
        if inputs % group == 0:
            return group
    raise ValueError(f"{inputs} inputs are no multiple of {INT4_GROUPS[-1]}")


def keeps_codes(matrix: Int4Matrix) -> bool:
    """Whether a graph can have the codes of `matrix`: there are no zero points in it, and groups have a known size."""
    return matrix.zeros is None and matrix.group in INT4_GROUPS


def _int4_product(at: Scope, name: str, x: Value, weight: Int4Matrix) -> Value:
    """Codes [in, out] with scales down the inputs: the one form in which TensorRT and ONNX Runtime both know a product
    of weights in four bits, and read them so. Scales are rounded to the type of `x`."""
    codes, scales, _ = weight.unpacked()
    nibbles = (codes ^ SYMMETRIC_ZERO).T.reshape(-1)  # code - 8 in two's complement
    packed = nibbles[::2] | nibbles[1::2] << 4
    rows, columns = weight.shape
    matrix = at.graph.int4_weight(at.name(f"{name}.codes"), packed, (columns, rows), x.dtype)
    steps = at.weight(f"{name}.scales", scales.T.to(x.dtype))
    widened = at("DequantizeLinear", matrix, steps, name=f"{name}.widened", axis=0, block_size=weight.group)
    return at("MatMul", x, widened, name=name)


def _fp8_product(at: Scope, name: str, x: Value, weight: Fp8Matrix, activations: torch.dtype) -> Value:
    """Tokens are scaled to E4M3's range each, then multiplied in it; scales of tokens and outputs come in after that.

    To the libraries both operands have the scale 1, which is what their products in FP8 know; TensorRT-RTX computes
    the product in FP8 for SM89, with one kernel before it for the tokens' scales and one after it for all scales.
    """
    graph, tokens = at.graph, Scope(at.graph, at.name(f"{name}.tokens"))
    x = at.wide(x)
    largest = tokens("ReduceMax", tokens("Abs", x, name="magnitude"), graph.integers(1), name="largest", keepdims=1)
    scale = tokens("Div", largest, graph.number(FP8_MAX, torch.float32), name="range")
    scale = tokens("Max", scale, graph.number(_SMALLEST_SCALE, torch.float32), name="scale")
    scaled = graph.cast(tokens("Div", x, scale, name="scaled"), activations)
    one, zero = graph.number(1.0, activations), graph.constant(torch.zeros((), dtype=FP8), name="0 float8_e4m3fn")
    rounded = tokens("QuantizeLinear", scaled, one, zero, name="rounded", dtype=FP8)
    values = tokens("DequantizeLinear", rounded, one, name="values", dtype=activations)
    stored = at.weight(f"{name}.values", weight.values)
    matrix = at("DequantizeLinear", stored, one, name=f"{name}.widened", dtype=activations)
    unscaled = at("Gemm", values, matrix, name=name, transB=1)
    by_token = at("Mul", at.wide(unscaled), scale, name=f"{name}.by_token")
    return at("Mul", by_token, at.weight(f"{name}.scales", weight.scale), name=f"{name}.scaled")
