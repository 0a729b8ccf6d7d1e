"""The kernels of FP8 matrices against their plain twins: on the GPU, or under the interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.accuracy import relative_error
from tests.gemma3_random import write_random_checkpoint
from tests.kernel_kit import EPS, HOPPER_SHARED_MEMORY, SHAPES_OF_27B, every_dtype, rms_norm, run_alone, segments
from tests.peak_memory import peak_bytes
from tests.test_fp8 import quantize
from wicore_backend.executor import fp8_matrix
from wicore_backend.executor.cuda_executor import CudaExecutor
from wicore_backend.executor.fp8_matrix import FP8_TILES, Fp8GpuMatrix
from wicore_backend.executor.kernels import fp8_rows
from wicore_backend.executor.kernels.fp8_products import fp8_product
from wicore_backend.executor.kernels.fp8_rows import Unscaled, add_norm, gated, quantize_rows
from wicore_backend.executor.kernels.products import Tile
from wicore_backend.executor.torch_executor import TorchExecutor
from wicore_backend.models.gemma3.checkpoint import load_weights
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.quantization.fp8 import FP8, Fp8Matrix, quantized_fp8, quantized_rows

ROUNDING = 1e-2
"""Of rows quantised from values that differ in their last bits: now and then one comes out a step of FP8 away."""


def same_rows(ours, theirs):
    assert relative_error(ours.scale, theirs.scale) < 1e-3
    assert relative_error(ours.dequantized(), theirs.dequantized()) < ROUNDING


def unscaled(rows, columns, device):
    return Unscaled(
        torch.randn(rows, columns, device=device).half(),
        torch.rand(rows, device=device) + 0.5,
        torch.rand(columns, device=device) + 0.5,
    )


@every_dtype
@pytest.mark.parametrize("size", [48, 256])
def test_rows_are_quantised_by_their_own_largest(dtype, size, kernel_device):
    x = (torch.randn(4, size, device=kernel_device) * torch.tensor([[1e-5], [1.0], [1e4], [0.0]]).to(kernel_device)).to(
        dtype
    )
    wide = torch.randn(4, 3 * size, device=kernel_device).to(dtype)
    for of in (x, wide[:, size : 2 * size]):  # A view, rows apart by more than they are long.
        ours, theirs = quantize_rows(of), quantized_rows(of)
        assert torch.equal(ours.values.view(torch.uint8), theirs.values.view(torch.uint8))
        assert torch.equal(ours.scale, theirs.scale)
    assert not ours.values[3:].isnan().any()


def test_a_row_of_the_smallest_numbers_has_a_scale_with_an_inverse(kernel_device):
    x = torch.tensor([[1e-40, -1e-41], [1e-36, 1e-37]], device=kernel_device)
    for rows in (quantize_rows(x), quantized_rows(x)):
        assert (rows.scale >= 2.0**-120).all()
        assert (rows.dequantized() - x).abs().max() < 2.0**-123, "more than half a step of FP8 there"


@every_dtype
@pytest.mark.parametrize("parts", [0, 3])
@pytest.mark.parametrize("many_rows", [1, 256], ids=["row after row", "a program a row"])
def test_a_norm_writes_its_rows_in_fp8(dtype, parts, many_rows, kernel_device, monkeypatch):
    monkeypatch.setattr(fp8_rows, "_MANY_ROWS", many_rows)
    size = 80
    x = torch.randn(*([parts] if parts else []), 3, size, device=kernel_device)
    x = x if parts else x.to(dtype)
    residual = torch.randn(3, size, device=kernel_device).to(dtype)
    weight, next_weight = (torch.rand(size, device=kernel_device) + 0.5 for _ in range(2))
    summed, normed = add_norm(x, residual, weight, next_weight, EPS, quantizes=True)
    theirs = rms_norm(x.sum(0) if parts else x, weight) + residual.float()
    assert relative_error(summed, theirs) < (1e-2 if dtype is torch.bfloat16 else 1e-3)
    same_rows(normed, quantized_rows(rms_norm(theirs, next_weight)))


@pytest.mark.parametrize("quantizes", [False, True])
def test_a_norm_scales_a_product_that_was_not(quantizes, kernel_device):
    x, residual = unscaled(3, 48, kernel_device), torch.randn(3, 48, device=kernel_device)
    weight = torch.rand(48, device=kernel_device) + 0.5
    summed, normed = add_norm(x, residual, weight, weight, EPS, quantizes=quantizes)
    theirs = rms_norm(x.scaled(), weight) + residual
    assert relative_error(summed, theirs) < 1e-5
    if quantizes:
        same_rows(normed, quantized_rows(rms_norm(theirs, weight)))
    else:
        assert relative_error(normed, rms_norm(theirs, weight)) < 1e-5


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("many_rows", [1, 256])
def test_gelu_writes_its_rows_in_fp8(scales, many_rows, kernel_device, monkeypatch):
    monkeypatch.setattr(fp8_rows, "_MANY_ROWS", many_rows)
    gate_up = unscaled(3, 96, kernel_device)
    gate_up.values[0, 0] = -100  # Whose exponential overflows.
    wide = gate_up.scaled() if scales else gate_up.values.float()
    gate, up = wide.chunk(2, -1)
    same_rows(gated(gate_up if scales else gate_up.values), quantized_rows(F.gelu(gate, approximate="tanh") * up))


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_products_of_few_rows(dtype, rows, splits, kernel_device):
    weight = quantized_fp8(
        (torch.randn(64, 128, device=kernel_device) * torch.rand(64, 1, device=kernel_device)).to(dtype)
    )
    x = torch.randn(rows, 128, device=kernel_device).to(dtype)
    of = quantized_rows(x) if rows > 1 else x
    exact = (of.dequantized() if rows > 1 else of.float()) @ weight.dequantized(torch.float32).T
    tile = Tile(16, 32, 3, 32, splits=splits, dot=rows > 1)
    ours = fp8_product(of, weight, tile)
    assert ours.shape == ((splits, rows, 64) if splits > 1 else (rows, 64))
    assert relative_error(ours.sum(0) if splits > 1 else ours, exact) < 1e-2
    if splits == 1:
        assert fp8_product(of, weight, tile, result_type=torch.float32).dtype == torch.float32
        gate, up = exact.chunk(2, -1)
        assert relative_error(fp8_product(of, weight, tile, gated=True), F.gelu(gate, approximate="tanh") * up) < 1e-2


@pytest.mark.parametrize("rows", [1, 5])
def test_the_executor_computes_what_its_plain_twin_does(rows, tmp_path, kernel_device):
    write_random_checkpoint(tmp_path, text={"attention_bias": True})
    quantize(tmp_path)
    config = Gemma3Config.from_checkpoint(tmp_path)
    weights = load_weights(tmp_path, config, device=kernel_device, dtype=torch.float32)
    ours, theirs = (segments(executor(config, weights), rows, config) for executor in (CudaExecutor, TorchExecutor))
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="multiplies FP8 on tensor cores")
@pytest.mark.parametrize("role", ["qkv", "out", "gate_up", "down", "head"])
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 64, 100, 300, 3000])
def test_every_way_to_multiply_gives_the_plain_twins_product(role, rows):
    """Of the same quantised numbers, in float32, at sizes that the tilings are for."""
    N, K = {"gate_up": (10752, 5376), "down": (1344, 21504), "head": (2048, 5376)}.get(role, SHAPES_OF_27B[role])
    weight = quantized_fp8(torch.randn(N, K, device="cuda", dtype=torch.bfloat16).mul_(K**-0.5))
    x = torch.randn(rows, K, device="cuda", dtype=torch.bfloat16)
    matrix = Fp8GpuMatrix(role, weight)
    seen = quantized_rows(x).dequantized() if matrix.takes_fp8(rows) else x.float()
    exact = seen @ weight.dequantized(torch.float32).T
    if role == "gate_up":
        gate, up = exact.chunk(2, -1)
        exact = F.gelu(gate, approximate="tanh") * up
    ours = matrix(x)
    assert relative_error(ours.sum(0) if ours.dim() == 3 else ours, exact) < 1e-2
    if role in ("out", "down"):
        raw = matrix.unscaled(x)
        raw = raw.scaled() if isinstance(raw, Unscaled) else raw
        assert relative_error(raw.sum(0) if raw.dim() == 3 else raw, exact) < 1e-2


@pytest.mark.parametrize("role", ["qkv", "gate_up", "head"])
def test_what_cublas_cannot_multiply_is_widened_a_part_at_a_time(role, monkeypatch, kernel_device):
    weight = quantized_fp8(torch.randn(120, 64, device=kernel_device).half())
    bias = torch.randn(120, device=kernel_device).half() if role == "qkv" else None
    x = torch.randn(20, 64, device=kernel_device).half()
    whole = Fp8GpuMatrix(role, weight, bias)(x)
    monkeypatch.setattr(fp8_matrix, "_WIDENED_AT_ONCE", 7 * 64)
    in_parts = Fp8GpuMatrix(role, weight, bias)
    assert relative_error(in_parts(x), whole) < 1e-3
    if kernel_device.type == "cpu":
        results = 2 * x.new_empty(20, 120).nbytes * (2 if role == "head" else 1)
        part = x.new_empty(7, 64)
        inside = peak_bytes(lambda: F.linear(x, part))  # Some CPUs' own product in float16 takes memory beside it.
        assert peak_bytes(lambda: in_parts(x)) <= results + 6 * 7 * 64 + inside


@pytest.mark.parametrize("role", FP8_TILES)
def test_every_tiling_fits_the_matrices_of_the_27b_model(role):
    N, K = SHAPES_OF_27B[role]
    weight = Fp8Matrix(torch.empty(N, K, device="meta", dtype=FP8), torch.empty(N, device="meta"), torch.bfloat16)
    for tiles in FP8_TILES[role].values():
        assert any(tile.fits(weight.values, gated=role == "gate_up") for tile in tiles)


def test_every_tiling_compiles_for_hopper_and_loads_its_first_tile_before_it_waits():
    lines = [line.split() for line in run_alone("tests.compile_fp8_products").splitlines()]
    assert len(lines) == sum(len(tiles) for by_rows in FP8_TILES.values() for tiles in by_rows.values())
    for shared, early_loads, *tiling in lines:
        assert int(shared) <= HOPPER_SHARED_MEMORY, tiling
        assert int(early_loads) > 0, tiling
