"""The kernels of the dense segments against their plain twins: on the GPU, or under the interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.accuracy import relative_error
from tests.gemma3_random import write_random_checkpoint
from tests.kernel_kit import (
    EPS,
    HOPPER_SHARED_MEMORY,
    SHAPES_OF_27B,
    TOLERANCE,
    every_dtype,
    rms_norm,
    run_alone,
    segments,
)
from wicore_backend.executor.cuda_executor import CudaExecutor
from wicore_backend.executor.kernels import small
from wicore_backend.executor.kernels.products import Tile, product
from wicore_backend.executor.kernels.small import add_norm, embed, gated, norm, qk_norm_rope
from wicore_backend.executor.plain_matrix import TILES, PlainMatrix
from wicore_backend.executor.torch_executor import TorchExecutor
from wicore_backend.models.gemma3.checkpoint import load_weights
from wicore_backend.models.gemma3.config import Gemma3Config


@every_dtype
def test_embedding(dtype, kernel_device):
    table = torch.randn(20, 48, device=kernel_device).to(dtype)
    ids = torch.tensor([3, 19, 0], device=kernel_device)
    assert relative_error(embed(ids, table, 7.0), table[ids].float() * 7) < TOLERANCE[dtype]


@every_dtype
@pytest.mark.parametrize(("rows", "size"), [(3, 48), (3, 256), (7, 48), (12, 48)])
def test_norms(dtype, rows, size, kernel_device, monkeypatch):
    monkeypatch.setattr(small, "_MANY_ROWS", 5)  # From which on, and from the next, a program takes several.
    monkeypatch.setattr(small, "_VERY_MANY_ROWS", 10)
    x, residual = (torch.randn(rows, size, device=kernel_device).to(dtype) for _ in range(2))
    weight, next_weight = (torch.rand(size, device=kernel_device) + 0.5 for _ in range(2))
    assert relative_error(norm(x, weight, EPS), rms_norm(x, weight)) < TOLERANCE[dtype]
    before = residual.clone()
    summed, normed = add_norm(x, residual, weight, next_weight, EPS)
    theirs = rms_norm(x, weight) + residual.float()
    assert relative_error(summed, theirs) < TOLERANCE[dtype]
    assert relative_error(normed, rms_norm(theirs, next_weight)) < TOLERANCE[dtype]
    assert torch.equal(residual, before)


@every_dtype
def test_a_norm_sums_the_parts_of_a_product(dtype, kernel_device):
    parts, residual = torch.randn(4, 3, 48, device=kernel_device), torch.randn(3, 48, device=kernel_device).to(dtype)
    weight = torch.rand(48, device=kernel_device) + 0.5
    summed, _ = add_norm(parts, residual, weight, weight, EPS)
    assert relative_error(summed, rms_norm(parts.sum(0), weight) + residual.float()) < TOLERANCE[dtype]


@every_dtype
@pytest.mark.parametrize(("q_heads", "kv_heads", "head_dim"), [(4, 2, 16), (9, 3, 24), (1, 1, 8)])
def test_queries_and_keys_are_normed_and_rotated_in_place(dtype, q_heads, kv_heads, head_dim, kernel_device):
    heads, qk = q_heads + 2 * kv_heads, q_heads + kv_heads
    product = torch.randn(3, heads * head_dim, device=kernel_device).to(dtype)
    weight = torch.rand(qk, head_dim, device=kernel_device) + 0.5
    angles = torch.randn(3, 1, head_dim // 2, device=kernel_device).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    expected = product.clone().view(3, heads, head_dim).float()
    x = rms_norm(expected[:, :qk], weight)
    turned = torch.cat((-x[..., head_dim // 2 :], x[..., : head_dim // 2]), -1)
    expected[:, :qk] = x * cos.float() + turned * sin.float()

    values = product.view(3, heads, head_dim)[:, qk:].clone()
    qk_norm_rope(product, weight, cos.squeeze(1), sin.squeeze(1), EPS)
    ours = product.view(3, heads, head_dim)
    assert relative_error(ours, expected) < TOLERANCE[dtype]
    assert torch.equal(ours[:, qk:], values)


@every_dtype
def test_gated_gelu(dtype, kernel_device):
    gate_up = torch.randn(3, 96, device=kernel_device).mul_(4).to(dtype)
    gate_up[0, 0] = -100  # Whose exponential overflows.
    gate, up = gate_up.float().chunk(2, -1)
    assert relative_error(gated(gate_up), F.gelu(gate, approximate="tanh") * up) < TOLERANCE[dtype]


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_products_of_few_rows(dtype, rows, splits, kernel_device):
    if rows > 1 and dtype is torch.bfloat16 and kernel_device.type == "cpu":
        pytest.skip("the interpreter multiplies bfloat16 matrices as if their bits were integers")
    x = torch.randn(rows, 2 * 128, device=kernel_device).to(dtype)[:, ::2].contiguous()
    wide = torch.randn(rows, 160, device=kernel_device).to(dtype)
    weight = torch.randn(64, 128, device=kernel_device).to(dtype)
    tile = Tile(16, 16, 3, 32, splits=splits, dot=rows > 1)
    assert tile.fits(weight)
    assert not tile.fits(weight[:56])
    assert not tile.fits(weight[:, :16])
    assert not tile.fits(weight[:, :120])
    for of in (x, wide[:, :128]):  # A view, rows apart by more than they are long.
        ours = product(of, weight, tile)
        assert ours.shape == ((splits, rows, 64) if splits > 1 else (rows, 64))
        whole = ours.sum(0) if splits > 1 else ours
        assert relative_error(whole, of.float() @ weight.float().T) < TOLERANCE[dtype]
    if splits == 1:
        assert product(x, weight, tile, result_type=torch.float32).dtype == torch.float32
        gate, up = (x.float() @ weight.float().T).chunk(2, -1)
        ours = product(x, weight, tile, gated=True)
        assert relative_error(ours, F.gelu(gate, approximate="tanh") * up) < TOLERANCE[dtype]


@pytest.mark.parametrize("role", TILES)
def test_tilings_can_be_chosen_by_whoever_makes_a_matrix(role, kernel_device):
    dtype = torch.bfloat16 if kernel_device.type == "cuda" else torch.float16
    weight = torch.randn(64, 128, device=kernel_device).to(dtype)
    x = torch.randn(3, 128, device=kernel_device).to(dtype)
    ours = PlainMatrix(role, weight, tiles={16: (Tile(16, 16, 3, 32),)})(x)
    assert relative_error(ours, PlainMatrix(role, weight)(x)) < TOLERANCE[dtype]


@pytest.mark.parametrize(("role", "shape"), SHAPES_OF_27B.items())
def test_every_tiling_fits_the_matrices_of_the_27b_model(role, shape):
    weight = torch.empty(shape, device="meta", dtype=torch.bfloat16)
    for tiles in TILES[role].values():
        assert all(tile.fits(weight, gated=role == "gate_up") for tile in tiles)


def test_every_tiling_compiles_for_hopper_and_loads_its_first_tile_before_it_waits():
    lines = [line.split() for line in run_alone("tests.compile_products").splitlines()]
    assert len(lines) == sum(len(tiles) for by_rows in TILES.values() for tiles in by_rows.values())
    for shared, early_loads, *tiling in lines:
        assert int(shared) <= HOPPER_SHARED_MEMORY, tiling
        assert int(early_loads) > 0, tiling


@pytest.mark.parametrize(
    "text", [{}, {"attention_bias": True, "final_logit_softcapping": 2.0, "head_dim": 24}], ids=["plain", "biases"]
)
@pytest.mark.parametrize("rows", [1, 5])
def test_the_executor_computes_what_its_plain_twin_does(text, rows, tmp_path, kernel_device):
    write_random_checkpoint(tmp_path, text=text)
    config = Gemma3Config.from_checkpoint(tmp_path)
    weights = load_weights(tmp_path, config, device=kernel_device, dtype=torch.float32)
    ours, theirs = (segments(executor(config, weights), rows, config) for executor in (CudaExecutor, TorchExecutor))
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) < 1e-5
