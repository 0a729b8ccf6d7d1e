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
from wicore_backend.executor.kernels.shared_tiles import COLUMNS, ROWS, Shares, sum_parts
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


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper card"
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 700, 4097, 11_400])
def test_gate_and_up_of_many_rows_in_one_kernel(rows, dtype):
    from wicore_backend.executor.kernels.gated_hopper import fits, gated_product

    weight = (torch.randn(2 * 384, 640, device="cuda") * 0.05).to(dtype)
    x = torch.randn(rows, 640, device="cuda").to(dtype)
    assert fits(weight)
    assert not fits(weight[:640])
    assert not fits(weight[:, :600])
    gate, up = (x.float() @ weight.float().T).chunk(2, -1)
    assert relative_error(gated_product(x, weight), F.gelu(gate, approximate="tanh") * up) < TOLERANCE[dtype]


@pytest.mark.parametrize(("tiles", "programs"), [(672, 132), (336, 132), (660, 132), (5, 132), (1, 4), (135, 132)])
def test_the_tiles_that_are_left_over_are_shared_out(tiles, programs):
    shares = Shares.of(tiles, steps=84, programs=programs)
    most = -(-shares.units // programs)
    assert shares.units == shares.shared * shares.splits + tiles - shares.shared
    assert shares.splits <= 21, "a part is not worth its sum"
    assert shares.shared * shares.splits <= programs, "memory is for a part a program"
    # As many whole tiles for each program, and a part for most of them; or else it would not pay to share any.
    assert (shares.tiles - shares.shared) % programs == 0 if shares.shared else most == -(-tiles // programs)
    assert most - (shares.shared > 0) == tiles // programs or not shares.shared


@pytest.mark.parametrize("rows", [256, 200])
def test_the_parts_of_tiles_are_added_before_gelu(rows, kernel_device):
    """Of 2 x 3 tiles, the first 4 of which were shared out; the others are not touched."""
    shares = Shares(6, 4, 3)
    parts = torch.randn(12, ROWS, 2, COLUMNS, device=kernel_device)
    out = torch.full((rows, 3 * COLUMNS), torch.nan, device=kernel_device)
    sum_parts(parts, out, shares)
    gate, up = parts.view(4, 3, ROWS, 2, COLUMNS).sum(1).unbind(2)
    tiles = F.gelu(gate, approximate="tanh") * up
    for number, tile in enumerate(tiles):
        column, row = divmod(number, 2)  # Tiles below each other come first.
        place = out[row * ROWS : (row + 1) * ROWS, column * COLUMNS : (column + 1) * COLUMNS]
        assert relative_error(place, tile[: len(place)]) < 1e-5
        place.fill_(torch.nan)
    assert out.isnan().all()


def test_gate_and_up_compile_for_hopper_with_its_widest_product():
    for line in run_alone("tests.compile_gated_product").splitlines():
        shared, products, widest, _ = line.split()
        assert int(shared) <= HOPPER_SHARED_MEMORY
        assert int(products) == int(widest) > 0


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
