"""INT4 matrices in memory and how they are made without data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.accuracy import relative_error
from wicore_backend.quantization.int4 import TILE_ROWS, Int4Matrix
from wicore_backend.quantization.int4_rounding import quantized_int4


def random_parts(
    rows: int, columns: int, group: int, *, zeros: bool, scale_type: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zeros of a matrix, as `Int4Matrix.packed` takes them; the extreme codes are there."""
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    codes[0, 0], codes[-1, -1] = 0, 15
    scales = (torch.rand(rows, columns // group) + 0.1).to(scale_type)
    return codes, scales, torch.randint(0, 16, scales.shape).to(scale_type) if zeros else None


def random_matrix(rows: int, columns: int, group: int, *, zeros: bool = False, dtype: torch.dtype) -> Int4Matrix:
    parts = random_parts(rows, columns, group, zeros=zeros, scale_type=dtype)
    return Int4Matrix.packed(*parts, dtype)


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize(
    ("rows", "columns", "group"), [(32, 512, 128), (16, 704, 64), (24, 96, 32), (7, 64, 64), (48, 80, 16)]
)
def test_what_is_packed_comes_out_again(rows: int, columns: int, group: int, zeros: bool) -> None:
    codes, scales, points = random_parts(rows, columns, group, zeros=zeros)
    matrix = Int4Matrix.packed(codes, scales, points, torch.bfloat16)
    assert matrix.shape == (rows, columns)
    assert matrix.group == group
    assert matrix.nbytes == rows * columns // 2 + scales.nbytes * (2 if zeros else 1)
    ours = matrix.unpacked()
    assert torch.equal(ours[0], codes)
    assert torch.equal(ours[1], scales)
    assert (ours[2] is None) is not zeros
    expected = codes.float().view(rows, -1, group) - (8 if points is None else points.float()[:, :, None])
    expected = (expected * scales.float()[:, :, None]).view(rows, columns)
    assert torch.equal(matrix.dequantized(torch.float32), expected)
    assert matrix.dequantized().dtype == torch.bfloat16


def test_a_quarter_of_a_span_lies_in_the_same_bits() -> None:
    codes, scales, _ = random_parts(TILE_ROWS, 256, 128, zeros=False)
    halves = Int4Matrix.packed(codes, scales, None, torch.bfloat16).codes.view(torch.int16)
    assert halves.shape == (1, 1, TILE_ROWS, 64)
    for quarter in range(4):
        assert torch.equal((halves[0, 0] >> 4 * quarter) & 15, codes[:, quarter * 64 :][:, :64])


def test_zero_points_of_eight_are_none() -> None:
    codes, scales, _ = random_parts(16, 64, 32, zeros=False)
    assert Int4Matrix.packed(codes, scales, torch.full_like(scales, 8), torch.float32).zeros is None


@pytest.mark.parametrize("rows", [16, 9])
def test_matrices_are_stacked_whatever_their_tiles_and_zeros(rows: int) -> None:
    parts = [
        random_matrix(32, 128, 32, dtype=torch.bfloat16),
        random_matrix(rows, 128, 32, dtype=torch.bfloat16),
        random_matrix(16, 128, 32, zeros=True, dtype=torch.bfloat16),
    ]
    for some in (parts[:2], parts):
        stacked = Int4Matrix.stacked(some)
        assert torch.equal(stacked.dequantized(), torch.cat([part.dequantized() for part in some]))


def test_parts_of_the_rows_are_views() -> None:
    matrix = random_matrix(64, 128, 32, zeros=True, dtype=torch.bfloat16)
    part = matrix.tile_rows(1, 3)
    assert part.codes.data_ptr() == matrix.codes[1].data_ptr()
    assert torch.equal(part.dequantized(), matrix.dequantized()[16:48])


@pytest.mark.parametrize("group", [32, 128])
def test_a_search_errs_less_than_rounding_by_the_largest(group: int) -> None:
    matrix = torch.randn(64, 512)
    matrix[3, 7] = 30.0  # An outlier, which takes its group's levels unless it is cut off.
    grouped = matrix.view(64, -1, group)
    scales = grouped.abs().amax(2, keepdim=True) / 7
    rounded = ((grouped / scales).round().clamp(-8, 7) * scales).view(64, 512)
    searched = relative_error(quantized_int4(matrix, group).dequantized(), matrix)
    assert searched < 0.86 * relative_error(rounded, matrix)
    assert searched < relative_error(quantized_int4(matrix, group, search=False).dequantized(), matrix)


def test_zero_points_suit_values_that_are_not_about_zero() -> None:
    matrix = torch.rand(32, 256) + 0.05
    with_zeros = quantized_int4(matrix, 64, symmetric=False)
    assert relative_error(with_zeros.dequantized(), matrix) < 0.04
    assert relative_error(quantized_int4(matrix, 64).dequantized(), matrix) > 0.04


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zeros_constants_and_tiny_values_survive(symmetric: bool, dtype: torch.dtype) -> None:
    matrix = torch.zeros(48, 64)
    matrix[16:32] = -3.0
    matrix[32:] = torch.randn(16, 64) * 1e-3
    quantised = quantized_int4(matrix.to(dtype), 32, symmetric=symmetric)
    assert quantised.dtype == dtype
    ours = quantised.dequantized(torch.float32)
    assert torch.equal(ours[:16], matrix[:16])
    assert relative_error(ours[16:32], matrix[16:32]) < 5e-3
    assert relative_error(ours[32:], matrix[32:]) < 0.12


def test_groups_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="96 inputs cannot be cut into groups of 128"):
        quantized_int4(torch.zeros(16, 96), 128)
