"""Products of many rows by the kernel for Hopper: who multiplies what, that it is compiled, what adds tiles' parts, and
on a card what it computes."""

from __future__ import annotations

import ctypes
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies
from torch import Tensor

from tests.accuracy import relative_error
from tests.kernel_kit import SHAPES_OF_27B, TOLERANCE, assert_nvrtc_compiles, needs_nvcc, nvcc_compiled
from wicore_backend.executor import plain_matrix, wide_product
from wicore_backend.executor.kernels.shared_tiles import ROW_TILES, ROWS, WEIGHT_ROWS, Shares, sum_parts, tile_columns
from wicore_backend.executor.plain_matrix import WIDE_ROWS, PlainMatrix
from wicore_backend.executor.wide_product import HEADERS, SOURCE, Cut, Form, WideProduct, copyable, fits
from wicore_backend.hopper import SHARED_BYTES

PROGRAMS = 66
FORMS = [Form(gated, half) for gated in (False, True) for half in (False, True)]
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper card"
)
both_ways = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])


def gelu_gated(product: Tensor) -> Tensor:
    gate, up = product.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


# ---- Who multiplies what


@pytest.mark.parametrize(("tiles", "programs"), [(672, 132), (336, 66), (330, 66), (5, 66), (1, 4), (67, 66)])
def test_the_tiles_that_are_left_over_are_shared_out(tiles, programs):
    shares = Shares.of(tiles, steps=84, programs=programs)
    most = -(-shares.units // programs)
    assert shares.units == shares.shared * shares.splits + tiles - shares.shared
    assert shares.splits <= 21, "a part is not worth its sum"
    assert shares.shared * shares.splits <= programs, "memory is for a part a program"
    # As many whole tiles for each program, and a part for most of them; or else it would not pay to share any.
    assert (shares.tiles - shares.shared) % programs == 0 if shares.shared else most == -(-tiles // programs)
    assert most - (shares.shared > 0) == tiles // programs or not shares.shared


def units(cut: Cut, programs: int) -> list[tuple[int, int, int, int]]:
    """Row and column of a tile and its steps, of all clusters' units, as the kernel has them (`Unit`).

    The last rows' tiles may be two of a unit.
    """
    clusters, rest = divmod(cut.blocks(programs), 2)
    assert rest == 0
    assert 1 <= clusters <= programs
    shared, splits = cut.shares.shared, cut.shares.splits
    found: list[tuple[int, int, int, int]] = []
    for cluster in range(clusters):
        for number in range(cluster, cut.shares.units, clusters):
            tile, begin, end = number - shared * (splits - 1), 0, cut.steps
            if number < shared * splits:
                tile, part = divmod(number, splits)
                begin, end = cut.steps * part // splits, cut.steps * (part + 1) // splits
            if (pair := tile - cut.row_tiles * cut.column_tiles) >= 0:
                columns = range(pair * 2, min(pair * 2 + 2, cut.column_tiles))
                found.extend((cut.row_tiles, column, begin, end) for column in columns)
                continue
            width = ROW_TILES * cut.column_tiles
            first, within = tile // width * ROW_TILES, tile % width
            size = min(cut.row_tiles - first, ROW_TILES)
            found.append((first + within % size, within // size, begin, end))
    return found


@both_ways
@given(
    rows=strategies.integers(1, 9000),
    tiles=strategies.integers(1, 90),
    steps=strategies.integers(1, 90),
    programs=strategies.integers(1, 80),
)
def test_each_step_of_each_tile_is_one_clusters(gated, rows, tiles, steps, programs):
    cut = Cut.of(rows, tiles * tile_columns(gated=gated), steps * 64, gated=gated, programs=programs)
    left = rows - cut.row_tiles * ROWS
    assert 0 < left <= ROWS // 2 if cut.pairs else -ROWS < left <= 0
    assert cut.shares.shared <= cut.row_tiles * cut.column_tiles, "a part is of a whole tile"
    seen = units(cut, programs)
    whole: Counter[tuple[int, int]] = Counter()
    for row, column, begin, end in seen:
        assert 0 <= begin < end <= steps
        whole[row, column] += end - begin
    assert whole == {(row, column): steps for row in range(-(-rows // ROWS)) for column in range(tiles)}
    assert len(set(seen)) == len(seen)


def test_what_the_kernel_is_given_is_as_long_as_its_structure():
    assert ctypes.sizeof(wide_product._Product) == 320
    assert wide_product._Product.out.offset == 256
    assert wide_product._Product.rows.offset == 272


def test_matrices_with_whole_tiles_fit():
    for role in WIDE_ROWS:
        assert fits(torch.empty(SHAPES_OF_27B[role], dtype=torch.bfloat16, device="meta"))
    weight = torch.empty(512, 640, dtype=torch.float16, device="meta")
    assert fits(weight)
    assert not fits(weight[:384])
    assert not fits(weight[:, :600])
    assert not fits(weight.float())


def test_rows_that_begin_at_multiples_of_16_bytes_are_copied():
    x = torch.empty(4, 256, dtype=torch.bfloat16)
    assert copyable(x)
    assert copyable(x[:, 64:128])
    assert copyable(torch.empty(1, 257, dtype=torch.bfloat16)[:, :256])
    assert not copyable(x[:, 1:65])
    assert not copyable(x.T)
    assert not copyable(torch.empty(4, 257, dtype=torch.bfloat16)[:, :256])


class Seen:
    """Stands for `WideProduct` where there is no card: rows of each call."""

    def __init__(self, weight: Tensor, *, gated: bool) -> None:
        self._weight, self._gated = weight, gated
        self.rows: list[int] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return exact(x, self._weight, gated=self._gated).to(x.dtype)


@pytest.mark.parametrize("role", WIDE_ROWS)
def test_a_matrix_takes_it_from_its_number_of_rows_on(role, kernel_device, monkeypatch):
    monkeypatch.setattr(plain_matrix, "overlaps", lambda _: True)
    monkeypatch.setattr(plain_matrix, "compiles", lambda _, *, gated: gated == (role == "gate_up"))
    products: list[Seen] = []
    monkeypatch.setattr(plain_matrix, "WideProduct", lambda *a, **k: products.append(Seen(*a, **k)) or products[-1])
    monkeypatch.setattr(plain_matrix, "WIDE_ROWS", {**WIDE_ROWS, role: 300})
    weight = (torch.randn(512, 64, device=kernel_device) * 0.1).half()
    matrix = PlainMatrix(role, weight, tiles={})
    for rows, columns in ((299, 64), (300, 64), (301, 64), (302, 71)):  # The last cannot be copied.
        x = torch.randn(rows, columns, device=kernel_device).half()[:, :64]
        assert relative_error(matrix(x), exact(x, weight, gated=role == "gate_up")) < TOLERANCE[torch.float16]
    assert products[0].rows == [300, 301]
    PlainMatrix(role, weight, torch.zeros(512, device=kernel_device).half(), tiles={})
    PlainMatrix(role, weight[:384], tiles={})
    assert len(products) == 1, "nothing adds a bias, and there are whole tiles only"


# ---- What adds tiles' parts


@both_ways
@pytest.mark.parametrize("rows", [512, 400])
def test_the_parts_of_tiles_are_added(rows, gated, kernel_device):
    """Of 2 x 3 tiles, the first 4 of which were shared out; the others are not touched."""
    shares = Shares(6, 4, 3)
    columns = tile_columns(gated=gated)
    parts = torch.randn(4, 3, ROWS, WEIGHT_ROWS, device=kernel_device)
    out = torch.full((rows, 3 * columns + 8), torch.nan, device=kernel_device)
    sum_parts(parts, out[:, : 3 * columns], shares, row_tiles=2, gated=gated)
    tiles = parts.sum(1)
    for number, tile in enumerate(gelu_gated(tiles) if gated else tiles):
        column, row = divmod(number, 2)  # Tiles below each other come first.
        place = out[row * ROWS : (row + 1) * ROWS, column * columns : (column + 1) * columns]
        assert relative_error(place, tile[: len(place)]) < 1e-5
        place.fill_(torch.nan)
    assert out.isnan().all()


# ---- The kernel


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_nvrtc_compiles_it(form):
    assert_nvrtc_compiles(SOURCE, HEADERS, form.defines())


@needs_nvcc
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_nvcc_compiles_it_without_spills_for_a_block_a_multiprocessor(form, tmp_path):
    spills, registers = nvcc_compiled(SOURCE, form.defines(), tmp_path / "code")
    assert not any(spills)
    assert registers * 384 <= 65536
    given_out = [int(count) for count in re.findall(r"(?:give|take)_registers<(\d+)>", SOURCE.read_text())]
    assert given_out == [40, 232]
    assert registers * 384 >= (40 + 2 * 232) * 128, "two warpgroups take no more than the third one leaves"
    assert form.shared_bytes <= SHARED_BYTES


def exact(x: Tensor, weight: Tensor, *, gated: bool) -> Tensor:
    product = x.float() @ weight.float().T
    return gelu_gated(product) if gated else product


@pytest.mark.gpu
@on_hopper
@both_ways
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 100, 256, 257, 300, 512, 1000, 2049, 11_400])
def test_products_of_many_rows(rows, dtype, gated):
    """768 weight rows, three tiles: up to 2,049 rows all tiles are shared out, of 11,400 the first three of 135."""
    weight = (torch.randn(768, 640, device="cuda") * 0.05).to(dtype)
    x = torch.randn(rows, 640, device="cuda").to(dtype)
    product = WideProduct(weight, gated=gated)
    ours = product(x)
    assert relative_error(ours, exact(x, weight, gated=gated)) < TOLERANCE[dtype]
    assert torch.equal(product(x), ours), "sums have one order"


@pytest.mark.gpu
@on_hopper
@both_ways
@pytest.mark.parametrize("tiles", [66, 67])
@pytest.mark.parametrize("rows", [257, 300, 384, 385, 640, 2049])
def test_the_last_rows_have_two_tiles_beside_each_other(rows, tiles, gated):
    """As wide as the card, in which of an odd number of tiles the last one is alone."""
    columns = tiles * tile_columns(gated=gated)
    weight = (torch.randn(columns * (1 + gated), 320, device="cuda") * 0.05).bfloat16()
    x = torch.randn(rows, 320, device="cuda").bfloat16()
    out = torch.full((rows, columns + 8), torch.nan, device="cuda", dtype=torch.bfloat16)
    product = WideProduct(weight, gated=gated)
    product(x, out=out[:, :columns])
    assert relative_error(out[:, :columns], exact(x, weight, gated=gated)) < TOLERANCE[torch.bfloat16]
    assert out[:, columns:].isnan().all()
    assert torch.equal(product(x), out[:, :columns]), "sums have one order"


@pytest.mark.gpu
@on_hopper
@both_ways
@pytest.mark.parametrize("role", ["qkv", "out", "gate_up", "down"])
@pytest.mark.parametrize("rows", [512, 2049])
def test_products_by_the_matrices_of_the_27b_model(rows, role, gated):
    weight = (torch.randn(SHAPES_OF_27B[role], device="cuda") * 0.02).bfloat16()
    x = torch.randn(rows, weight.shape[1], device="cuda").bfloat16()
    ours = WideProduct(weight, gated=gated)(x)
    assert relative_error(ours, exact(x, weight, gated=gated)) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@on_hopper
@both_ways
def test_rows_and_results_may_be_columns_of_longer_ones(gated):
    weight = (torch.randn(2560, 640, device="cuda") * 0.05).bfloat16()
    x = torch.randn(3000, 800, device="cuda").bfloat16()[:, 80:720]
    columns = 2560 // (1 + gated)
    out = torch.full((3000, columns + 72), torch.nan, device="cuda", dtype=torch.bfloat16)
    WideProduct(weight, gated=gated)(x, out=out[:, 40 : 40 + columns])
    expected = exact(x, weight, gated=gated)
    assert relative_error(out[:, 40 : 40 + columns], expected) < TOLERANCE[torch.bfloat16]
    assert out[:, :40].isnan().all()
    assert out[:, 40 + columns :].isnan().all()


@pytest.mark.gpu
@on_hopper
@both_ways
def test_a_graph_computes_what_is_there_when_it_is_replayed(gated):
    """Twice in a row, so that one product begins while the one before it, which it reads, is computed."""
    first = (torch.randn(1280 * (1 + gated), 1280, device="cuda") * 0.03).bfloat16()
    second = (torch.randn(1280, 1280, device="cuda") * 0.03).bfloat16()
    x = torch.zeros(3000, 1280, device="cuda").bfloat16()
    products = WideProduct(first, gated=gated), WideProduct(second, gated=False)
    products[1](products[0](x))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        between = products[0](x)
        out = products[1](between)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        for weight in (first, second):
            weight.copy_(torch.randn_like(weight) * 0.03)
        graph.replay()
        assert relative_error(between, exact(x, first, gated=gated)) < TOLERANCE[torch.bfloat16]
        assert relative_error(out, exact(between, second, gated=False)) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("role", WIDE_ROWS)
def test_a_matrix_multiplies_about_its_number_of_rows(role):
    weight = (torch.randn(512, 640, device="cuda") * 0.05).bfloat16()
    matrix = PlainMatrix(role, weight)
    for rows in (WIDE_ROWS[role] - 1, WIDE_ROWS[role]):
        x = torch.randn(rows, 640, device="cuda").bfloat16()
        ours = matrix(x)
        assert relative_error(ours, exact(x, weight, gated=role == "gate_up")) < TOLERANCE[torch.bfloat16]
