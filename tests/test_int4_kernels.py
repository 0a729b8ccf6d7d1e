"""The kernels of INT4 matrices against their plain twins: on the GPU, or under the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.accuracy import relative_error
from tests.gemma3_random import write_random_checkpoint
from tests.kernel_kit import EPS, HOPPER_SHARED_MEMORY, SHAPES_OF_27B, on, run_alone, segments
from tests.peak_memory import peak_bytes
from tests.test_int4 import random_matrix
from wicore_backend.executor import int4_matrix, matrix
from wicore_backend.executor.cuda_executor import CudaExecutor
from wicore_backend.executor.int4_matrix import INT4_TILES, Int4GpuMatrix, widened_bytes
from wicore_backend.executor.kernels import fp8_rows
from wicore_backend.executor.kernels.fp8_rows import Unscaled
from wicore_backend.executor.kernels.int4 import MAX_ROWS, Int4Tile, int4_product
from wicore_backend.executor.kernels.int4_codes import dequantize, takes
from wicore_backend.executor.torch_executor import TorchExecutor
from wicore_backend.models.gemma3.checkpoint import load_weights
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.quantization.fp8 import FP8, Fp8Rows, quantized_rows
from wicore_backend.quantization.int4 import Int4Matrix, in_fp8
from wicore_backend.quantization.int4_rounding import quantized_int4

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 1e-2}
TILES = [
    Int4Tile(16, 3),
    Int4Tile(32, 2, early=True),
    Int4Tile(16, 3, parts=4),
    Int4Tile(32, 3, warps=2, parts=2, splits=2),
    Int4Tile(64, 3, splits=3, early=True),
    Int4Tile(16, 3, scaled=True),
    Int4Tile(32, 3, parts=4, early=True, scaled=True),
]
"""Five spans, as below, are not shared out evenly among 2, 3 or 4."""


@pytest.fixture
def dtype(kernel_device):
    """The interpreter multiplies bfloat16 matrices as if their bits were integers."""
    return torch.bfloat16 if kernel_device.type == "cuda" else torch.float16


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
def test_products_of_few_rows(zeros, rows, tile, dtype, kernel_device):
    weight = on(kernel_device, random_matrix(64, 320, 32, zeros=zeros, dtype=dtype))
    x = torch.randn(rows, 400, device=kernel_device).to(dtype)[:, :320]  # Rows apart by more than they are long.
    ours = int4_product(x, weight, tile, result_type=torch.float32)
    assert ours.shape == ((tile.splits, rows, 64) if tile.splits > 1 else (rows, 64))
    whole = ours.sum(0) if tile.splits > 1 else ours
    theirs = x.float() @ weight.dequantized(torch.float32).T
    assert relative_error(whole, theirs) < (TOLERANCE[dtype] if tile.scaled else 1e-4)
    if tile.splits == 1:
        gate, up = theirs.chunk(2, -1)
        gated = int4_product(x, weight, tile, gated=True)
        assert gated.dtype == dtype
        assert relative_error(gated, F.gelu(gate, approximate="tanh") * up) < TOLERANCE[dtype]


@pytest.mark.parametrize("group", [64, 128])
def test_groups_of_other_lengths(group, dtype, kernel_device):
    weight = on(kernel_device, random_matrix(32, 512, group, zeros=True, dtype=dtype))
    x = torch.randn(2, 512, device=kernel_device).to(dtype)
    ours = int4_product(x, weight, Int4Tile(16, 3, warps=2, parts=2), result_type=torch.float32)
    assert relative_error(ours, x.float() @ weight.dequantized(torch.float32).T) < 1e-4


@pytest.mark.parametrize("scale_type", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
def test_widening_is_exact(zeros, scale_type, kernel_device):
    weight = on(kernel_device, random_matrix(48, 320, 32, zeros=zeros, dtype=scale_type))
    out = torch.full(weight.shape, torch.nan, device=kernel_device)
    dequantize(weight, out)
    assert torch.equal(out, weight.dequantized(torch.float32))


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
def test_widening_to_fp8_rounds_each_number_once(zeros, kernel_device):
    weight = on(kernel_device, random_matrix(48, 320, 32, zeros=zeros, dtype=torch.float16))
    theirs, exact = in_fp8(weight), weight.dequantized(torch.float32)
    out = torch.full(weight.shape, 0x7F, dtype=torch.uint8, device=kernel_device)
    dequantize(weight, out, scale=theirs.scale)
    assert torch.equal(out.view(FP8).float(), theirs.values.float())
    assert relative_error(theirs.dequantized(torch.float32), exact) < 4e-2
    assert theirs.values.float().abs().max() <= 448


def test_gate_and_up_are_widened_some_columns_of_both_at_a_time(monkeypatch, dtype, kernel_device):
    """For a kernel for both, which is not run here: 3 x 128 columns, of which 2 x 128 fit."""
    monkeypatch.setattr(int4_matrix, "_WIDENED_AT_ONCE", 2 * 2 * 128 * 64)
    monkeypatch.setattr(int4_matrix, "_ONE_KERNEL_ROWS", 5)
    weight = on(kernel_device, random_matrix(2 * 384, 64, 32, dtype=dtype))
    seen = []

    def gated_product(x, both, *, out):
        seen.append(len(both) // 2)
        gate, up = (x.float() @ both.float().T).chunk(2, -1)
        out.copy_(F.gelu(gate, approximate="tanh") * up)

    matrix = Int4GpuMatrix("gate_up", weight, tiles={})
    monkeypatch.setattr(matrix, "_gated", gated_product)
    x = torch.randn(5, 64, device=kernel_device).to(dtype)
    gate, up = (x.float() @ weight.dequantized(torch.float32).T).chunk(2, -1)
    assert relative_error(matrix(x), F.gelu(gate, approximate="tanh") * up) < TOLERANCE[dtype]
    assert seen == [256, 128]


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper card"
)
@pytest.mark.parametrize("rows", [511, 512, 3000])
@pytest.mark.parametrize(("fp8_prefill", "most"), [(False, 1e-2), (True, 6e-2)])
def test_prompts_in_every_way(fp8_prefill, most, rows):
    weight = quantized_int4(torch.randn(43008, 1024, device="cuda").bfloat16())
    x = torch.randn(rows, 1024, device="cuda").bfloat16()
    gate, up = (x.float() @ weight.dequantized(torch.float32).T).chunk(2, -1)
    ours = Int4GpuMatrix("gate_up", weight, fp8_prefill=fp8_prefill)(x)
    assert relative_error(ours, F.gelu(gate, approximate="tanh") * up) < most


@pytest.fixture
def anywhere_in_fp8(monkeypatch):
    """As on a card that multiplies FP8: PyTorch does on a CPU, too."""
    monkeypatch.setattr(int4_matrix, "multiplies_in_fp8", takes)


@pytest.mark.usefixtures("anywhere_in_fp8")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("role", ["qkv", "out", "gate_up", "down"])
def test_prompts_in_fp8_are_products_of_rows_and_weights_in_fp8(role, bias, kernel_device):
    """Rows that are quantised here, and rows that already were; with scales, and with scales left to who reads it."""
    weight = on(kernel_device, random_matrix(64, 320, 32, zeros=True, dtype=torch.bfloat16))
    added = torch.randn(64, device=kernel_device).bfloat16() if bias else None
    matrix = Int4GpuMatrix(role, weight, added, fp8_prefill=True)
    x = torch.randn(MAX_ROWS + 1, 320, device=kernel_device).bfloat16()
    rows = quantized_rows(x)
    exact = rows.dequantized() @ in_fp8(weight).dequantized(torch.float32).T + (0 if added is None else added.float())
    unscaled = matrix.unscaled(x)
    assert isinstance(unscaled, Unscaled) == (role != "qkv" and not bias)
    if isinstance(unscaled, Unscaled):
        unscaled = unscaled.scaled()
    assert relative_error(unscaled, exact) < 1e-2
    if role == "gate_up":
        gate, up = exact.chunk(2, -1)
        exact = F.gelu(gate, approximate="tanh") * up
    for given in (x, rows):
        assert matrix(given).dtype == torch.bfloat16
        assert relative_error(matrix(given), exact) < 1e-2


@pytest.mark.usefixtures("anywhere_in_fp8")
@pytest.mark.parametrize("role", INT4_TILES)
@pytest.mark.parametrize("rows", [1, 17, MAX_ROWS])
def test_few_rows_and_the_head_are_not_multiplied_in_fp8(role, rows, kernel_device):
    weight = on(kernel_device, random_matrix(64, 320, 32, dtype=torch.bfloat16))
    plain, narrow = Int4GpuMatrix(role, weight), Int4GpuMatrix(role, weight, fp8_prefill=True)
    x = torch.randn(rows, 320, device=kernel_device).bfloat16()
    assert torch.equal(narrow(x), plain(x))
    assert not narrow.takes_fp8(rows)
    assert narrow.takes_fp8(MAX_ROWS + 1) == (role != "head")


@pytest.mark.usefixtures("anywhere_in_fp8")
def test_a_layer_hands_its_rows_on_in_fp8(kernel_device):
    """From each norm and from GELU to the product that reads them; with what none of them takes, as it was."""
    down_by_up = {"out": (64, 64), "gate_up": (128, 64), "down": (64, 64)}
    weights = {
        role: on(kernel_device, random_matrix(*shape, 32, dtype=torch.bfloat16)) for role, shape in down_by_up.items()
    }
    norm = torch.ones(64, device=kernel_device)
    x, residual = (torch.randn(MAX_ROWS + 2, 64, device=kernel_device).bfloat16() for _ in range(2))

    def layer(*, fp8_prefill: bool) -> tuple[list[type], Tensor]:
        of = {role: Int4GpuMatrix(role, weight, fp8_prefill=fp8_prefill) for role, weight in weights.items()}
        hidden, normed = matrix.add_norm(of["out"], x, residual, norm, norm, EPS, reader=of["gate_up"])
        fed = matrix.gated(of["gate_up"], normed, reader=of["down"])
        hidden, last = matrix.add_norm(of["down"], fed, hidden, norm, norm, EPS, reader=of["out"])
        return [type(rows) for rows in (normed, fed, last)], hidden

    kinds, hidden = layer(fp8_prefill=True)
    assert kinds == [Fp8Rows] * 3
    exact_kinds, exact = layer(fp8_prefill=False)
    assert exact_kinds == [Tensor] * 3
    assert 1e-3 < relative_error(hidden, exact) < 6e-2


@pytest.mark.usefixtures("anywhere_in_fp8")
@pytest.mark.parametrize("fp8_prefill", [False, True])
@pytest.mark.parametrize(("role", "shape"), [("gate_up", (256, 128)), ("down", (128, 128))])
def test_what_widening_takes_is_what_is_stated(role, shape, fp8_prefill, monkeypatch):
    """Of the memory around kernels, which take none, where a CPU's operators have more."""
    monkeypatch.setattr(int4_matrix, "_WIDENED_AT_ONCE", 16 * 128)
    monkeypatch.setattr(int4_matrix, "dequantize", lambda *_, **__: None)
    monkeypatch.setattr(int4_matrix, "gated", lambda whole: whole.new_empty(len(whole), whole.shape[1] // 2))
    monkeypatch.setattr(
        fp8_rows, "quantize_rows", lambda x: Fp8Rows(torch.empty(x.shape, dtype=FP8), torch.empty(len(x)))
    )
    monkeypatch.setattr(
        torch, "_scaled_mm", lambda x, y, *, out_dtype, **_: x.new_empty(len(x), y.shape[1], dtype=out_dtype)
    )
    monkeypatch.setattr(torch, "mm", lambda *_, **__: None)
    rows, (outputs, inputs) = MAX_ROWS + 2, shape
    weight = random_matrix(outputs, inputs, 32, dtype=torch.bfloat16)
    matrix = Int4GpuMatrix(role, weight, tiles={}, fp8_prefill=fp8_prefill)
    x = torch.zeros(rows, inputs).bfloat16()
    stated = widened_bytes(weight, fp8_prefill=fp8_prefill)
    assert stated == (outputs * inputs if fp8_prefill else 2 * 16 * inputs)
    results = 2 * rows * (outputs * 3 // 2 if role == "gate_up" else outputs)
    operand = rows * inputs if fp8_prefill and role == "down" else 0  # Those in 16 bits are GELU's, which are gone.
    taken = peak_bytes(lambda: matrix(x))
    assert stated + 2 * rows * outputs <= taken <= stated + results + operand + 4096


def test_scales_of_another_type_than_the_rows(dtype, kernel_device):
    """As of a GPTQ checkpoint, whose scales are float16, in a bfloat16 model."""
    other = torch.float16 if dtype is torch.bfloat16 else torch.bfloat16
    weight = on(kernel_device, replace(random_matrix(32, 128, 32, zeros=True, dtype=other), dtype=dtype))
    x = torch.randn(1, 128, device=kernel_device).to(dtype)
    ours = int4_product(x, weight, Int4Tile(32, 3), result_type=torch.float32)
    assert relative_error(ours, x.float() @ weight.dequantized(torch.float32).T) < 1e-4


@pytest.mark.parametrize(
    ("rows", "columns", "group"), [(32, 96, 32), (24, 128, 32), (32, 128, 16)], ids=["odd", "rows", "short"]
)
def test_what_the_kernels_do_not_read_is_widened_by_the_twin(rows, columns, group, kernel_device):
    weight = on(kernel_device, random_matrix(rows, columns, group, dtype=torch.bfloat16))
    assert not takes(weight)
    x = torch.randn(3, columns, device=kernel_device).bfloat16()
    assert relative_error(Int4GpuMatrix("qkv", weight)(x), x.float() @ weight.dequantized(torch.float32).T) < 1e-2


@pytest.mark.parametrize("role", INT4_TILES)
@pytest.mark.parametrize("rows", [1, 8, 16, 64, 128, 200])
def test_every_number_of_rows_in_every_role(role, rows, kernel_device):
    """On Hopper by each tiling and by cuBLAS; elsewhere widened."""
    weight = on(kernel_device, quantized_int4(torch.randn(256, 2304).bfloat16()))
    x = torch.randn(rows, 2304, device=kernel_device).bfloat16()
    ours = Int4GpuMatrix(role, weight)(x)
    theirs = x.float() @ weight.dequantized(torch.float32).T
    if role == "gate_up":
        gate, up = theirs.chunk(2, -1)
        theirs = F.gelu(gate, approximate="tanh") * up
    assert ours.dtype == (torch.float32 if role == "head" or ours.dim() == 3 else torch.bfloat16)
    assert relative_error(ours.sum(0) if ours.dim() == 3 else ours, theirs) < 1e-2


@pytest.mark.parametrize("rows", [2, 150])
def test_a_bias_is_added(rows, kernel_device):
    weight = on(kernel_device, quantized_int4(torch.randn(48, 256).bfloat16()))
    x, bias = torch.randn(rows, 256, device=kernel_device).bfloat16(), torch.randn(48, device=kernel_device).bfloat16()
    theirs = x.float() @ weight.dequantized(torch.float32).T + bias.float()
    assert relative_error(Int4GpuMatrix("out", weight, bias)(x), theirs) < 1e-2


@pytest.mark.parametrize("role", INT4_TILES)
def test_every_tiling_fits_the_matrices_of_the_27b_model(role):
    rows, columns = SHAPES_OF_27B[role]
    codes = torch.empty(rows // 16, columns // 256, 16, 32, dtype=torch.int32, device="meta")
    scales = torch.empty(rows // 16, columns // 256, 16, 2, dtype=torch.bfloat16, device="meta")
    weight = Int4Matrix(codes, scales, None, torch.bfloat16)
    assert takes(weight)
    for most, tile in INT4_TILES[role].items():
        assert tile.fits(weight)
        assert most <= MAX_ROWS
        assert tile.parts in (1, tile.warps)
        assert tile.splits == 1 or role in ("out", "down")  # What reads these sums parts.


def test_every_tiling_compiles_for_hopper():
    lines = [line.split() for line in run_alone("tests.compile_int4_products").splitlines()]
    assert len(lines) == sum(1 + (most == 8) for by_rows in INT4_TILES.values() for most in by_rows)
    for shared, early, early_loads, products, *tiling in lines:
        assert int(shared) <= HOPPER_SHARED_MEMORY, tiling
        assert (int(early_loads) > 0) == bool(int(early)), tiling
        assert int(products) > 0, tiling


@pytest.mark.parametrize("rows", [1, 5])
def test_the_executor_computes_what_its_plain_twin_does(rows, tmp_path, kernel_device):
    write_random_checkpoint(tmp_path)
    config = Gemma3Config.from_checkpoint(tmp_path)
    weights = load_weights(tmp_path, config, device=kernel_device, dtype=torch.float32)
    layers = tuple(
        replace(layer, **{name: quantized_int4(getattr(layer, name), 16) for name in ("qkv", "out", "gate_up", "down")})
        for layer in weights.text.layers
    )
    weights = replace(weights, text=replace(weights.text, layers=layers, head=quantized_int4(weights.text.head, 16)))
    ours, theirs = (segments(executor(config, weights), rows, config) for executor in (CudaExecutor, TorchExecutor))
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) < 1e-5
