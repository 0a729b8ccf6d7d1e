"""Products of a few rows with INT4 by the kernel for Hopper: how matrices are cut, which ones it takes, that it is
compiled, and what it computes at the sizes of a published model.

What it computes of small ones: `test_int4_rows_on_cpu.py`, whose cases a card has here, too.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from typing import Any, ClassVar, cast

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from scripts.random_gemma3 import SHAPES
from tests.accuracy import relative_error
from tests.hopper_twin.small_products import SmallProduct, int4, plain
from tests.int4_launches import H200_BLOCKS, listed_launches, random_int4
from tests.kernel_kit import EPS, SHAPES_OF_27B, assert_nvrtc_compiles, needs_nvcc, nvcc_compiled, on
from tests.test_int4_rows_on_cpu import BOUND, CASES
from wicore_backend.executor.int4_matrix import Int4GpuMatrix, widened_bytes
from wicore_backend.executor.int4_products import HEADERS, fits
from wicore_backend.executor.int4_rows import MOST_ROWS, SOURCE, Cut, Form, rows_product
from wicore_backend.executor.kernels.int4 import Int4Tile
from wicore_backend.executor.kernels.small import add_norm
from wicore_backend.executor.roles import Role
from wicore_backend.hopper import SHARED_BYTES
from wicore_backend.quantization.int4 import Int4Matrix
from wicore_backend.quantization.int4_rounding import quantized_int4

MOST_WARPS = 11
IN_PARTS = ("out", "down")


def shapes_of(model: str) -> dict[Role, tuple[int, int]]:
    """Outputs and inputs of a layer's matrices."""
    shape = SHAPES[model]
    hidden, fed, head_dim = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    return {
        "qkv": ((heads + 2 * kv_heads) * head_dim, hidden),
        "out": (hidden, heads * head_dim),
        "gate_up": (2 * fed, hidden),
        "down": (hidden, fed),
    }


PUBLISHED = {
    f"{role} of {model}": (role, *shape)
    for model in ("gemma-3-4b", "gemma-3-12b", "gemma-3-27b")
    for role, shape in shapes_of(model).items()
}
every_published = pytest.mark.parametrize("matrix", PUBLISHED)


def cut_of(matrix: str) -> Cut:
    role, outputs, inputs = PUBLISHED[matrix]
    return Cut.of(outputs // 16, inputs // 256, processors=H200_BLOCKS, splits=role in IN_PARTS)


# ---- How a matrix is cut


def dealt(cut: Cut, tiles: int, spans: int, *, gated: bool) -> list[tuple[list[int], range]]:
    """Of each block its tiles and its spans, as the kernel has them (`Share`)."""
    found = []
    for block in range(cut.blocks(tiles)):
        place, split = divmod(block, cut.splits)
        if gated:
            pairs = range(place * cut.tiles // 2, min((place + 1) * cut.tiles // 2, tiles // 2))
            of_block = [tile for pair in pairs for tile in (pair, tiles // 2 + pair)]
        else:
            of_block = list(range(place * cut.tiles, min((place + 1) * cut.tiles, tiles)))
        found.append((of_block, range(spans * split // cut.splits, spans * (split + 1) // cut.splits)))
    return found


def check_cut(cut: Cut, tiles: int, spans: int, processors: int, *, splits: bool, gated: bool) -> None:
    shares = dealt(cut, tiles, spans, gated=gated)
    assert all(of_block and of_split for of_block, of_split in shares), "no block has nothing to do"
    whose = torch.zeros(tiles, spans, dtype=torch.int32)
    for of_block, of_split in shares:
        assert len(of_block) % 2 == 0
        whose[of_block, of_split.start : of_split.stop] += 1
    assert bool((whose == 1).all()), "each span of each tile is one block's"
    assert cut.tiles % 2 == 0
    assert 2 <= cut.tiles <= 2 * MOST_WARPS
    fewest = -(-tiles // (2 * MOST_WARPS))
    if splits:
        assert len(shares) <= max(processors, fewest)
        assert cut.splits == 1 or spans // cut.splits >= 4
        more = replace(cut, splits=cut.splits + 1)
        assert spans // more.splits < 4 or more.blocks(tiles) > processors, "more blocks would not be better"
    else:
        assert cut.splits == 1
        assert len(shares) <= processors or cut.tiles == 2 * MOST_WARPS
        fewer = replace(cut, tiles=cut.tiles - 2)
        assert not fewer.tiles or fewer.blocks(tiles) > processors, "fewer tiles would take more than a wave"


@every_published
@pytest.mark.parametrize("processors", [114, H200_BLOCKS])
def test_published_models_are_cut_into_one_wave_without_overlap_or_gap(matrix, processors):
    role, outputs, inputs = PUBLISHED[matrix]
    tiles, spans = outputs // 16, inputs // 256
    cut = Cut.of(tiles, spans, processors=processors, splits=role in IN_PARTS)
    check_cut(cut, tiles, spans, processors, splits=role in IN_PARTS, gated=role == "gate_up")
    assert cut.blocks(tiles) <= processors or role == "gate_up"


@given(
    pairs=st.integers(1, 2000),
    spans=st.integers(1, 100),
    processors=st.integers(1, 200),
    role=st.sampled_from(["qkv", "out", "gate_up", "down"]),
)
def test_whatever_its_size_a_matrix_is_cut_without_overlap_or_gap(pairs, spans, processors, role):
    splits = role in IN_PARTS
    cut = Cut.of(2 * pairs, spans, processors=processors, splits=splits)
    check_cut(cut, 2 * pairs, spans, processors, splits=splits, gated=role == "gate_up")


@pytest.mark.parametrize("half_scales", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("tiles", range(2, 2 * MOST_WARPS + 1, 2))
def test_a_block_has_room_for_its_ring_and_its_parts_take_stages_in_turns(tiles, zeros, half_scales):
    form = Form(tiles, half_scales, zeros)
    of_stage = tiles * 16 * 128 + MOST_ROWS * 256 * 2 + 16
    assert form.stages * of_stage <= form.shared_bytes <= SHARED_BYTES == 227 * 1024
    assert form.parts * MOST_ROWS * (tiles * 16 + 4) * 4 <= form.shared_bytes, "sums take the ring's place"
    assert form.stages % form.parts == 0
    assert form.stages >= 4, "a block has that much on its way"
    more = form.stages + form.parts
    assert more > 12 or more * of_stage > SHARED_BYTES, "the ring is as long as it can be"
    assert 1 <= form.parts * form.pairs <= MOST_WARPS < (form.parts + 1) * form.pairs
    assert form.threads == (form.parts * form.pairs + 1) * 32
    assert form.defines() == {
        "TILES": tiles,
        "PARTS": form.parts,
        "STAGES": form.stages,
        "SCALE_HALF": half_scales,
        "ZEROS": zeros,
    }


def without_contents(outputs: int, inputs: int) -> Int4Matrix:
    codes = torch.empty(outputs // 16, inputs // 256, 16, 32, dtype=torch.int32, device="meta")
    scales = torch.empty(outputs // 16, inputs // 256, 16, 2, dtype=torch.bfloat16, device="meta")
    return Int4Matrix(codes, scales, None, torch.bfloat16)


@given(pairs=st.integers(1, 2000), spans=st.integers(1, 100), processors=st.integers(1, 200))
def test_parts_take_less_than_what_is_stated_for_a_product_of_many_rows(pairs, spans, processors):
    """Which no step has at the same time: `widened_bytes` counts with every step's activations (`device_needs`)."""
    cut = Cut.of(2 * pairs, spans, processors=processors, splits=True)
    assume(cut.splits > 1)
    parts = cut.splits * MOST_ROWS * pairs * 32 * torch.float32.itemsize
    assert 4 * parts <= widened_bytes(without_contents(pairs * 32, spans * 256))


# ---- Which matrices it takes


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, not at a multiple of 16 bytes."""
    room = torch.empty(tensor.numel() + 16, dtype=tensor.dtype)
    place = next(n for n in range(1, 16) if room[n:].data_ptr() % 16)
    return room[place : place + tensor.numel()].view(tensor.shape).copy_(tensor)


TAKEN: dict[str, dict[str, bool]] = {
    "as it is": {},
    "zero points": {"zeros": True},
    "float16 scales": {"half_scales": True},
}


@pytest.mark.parametrize("kind", TAKEN)
def test_matrices_in_bfloat16_with_groups_of_128_fit(kind):
    assert fits(int4(64, 512, **TAKEN[kind]))


OTHERS = {
    "groups of 64": lambda: quantized_int4(torch.randn(64, 512).bfloat16(), 64, search=False),
    "a group for a span": lambda: quantized_int4(torch.randn(64, 384).bfloat16(), search=False),
    "no whole tiles": lambda: quantized_int4(torch.randn(40, 512).bfloat16(), search=False),
    "tiles of an odd number": lambda: int4(48, 512),
    "a model in float16": lambda: replace(int4(64, 512), dtype=torch.float16),
    "a model in float32": lambda: replace(int4(64, 512), dtype=torch.float32),
    "codes that are not aligned": lambda: _with(int4(64, 512), "codes", unaligned),
    "zero points that are not aligned": lambda: _with(int4(64, 512, zeros=True), "zeros", unaligned),
    "scales that lie apart": lambda: _with(int4(64, 512), "scales", lambda scales: scales.repeat(1, 1, 1, 2)[..., ::2]),
}


def _with(weight: Int4Matrix, name: str, change: Any) -> Int4Matrix:
    return replace(weight, **{name: change(getattr(weight, name))})


@pytest.mark.parametrize("what", OTHERS)
def test_other_matrices_are_left_to_others(what, launched):
    weight = OTHERS[what]()
    assert not fits(weight)
    assert rows_product("qkv", weight) is None
    assert launched == []


@pytest.fixture
def launched(monkeypatch):
    yield from listed_launches(monkeypatch)


def test_a_head_has_none(launched):
    weight = int4(64, 512)
    assert rows_product("head", weight) is None
    assert rows_product("qkv", weight) is not None
    assert launched == []


def test_other_devices_have_none():
    assert rows_product("qkv", int4(64, 512)) is None


@pytest.mark.parametrize("role", ["qkv", "out", "gate_up", "down"])
@pytest.mark.parametrize("rows", [2, 5, MOST_ROWS])
def test_what_is_launched_is_for_the_role_and_the_rows(role, rows, launched):
    weight = int4(640, 3072, zeros=True, half_scales=True)
    product = rows_product(role, weight)
    assert product is not None
    x = torch.zeros(rows, 3080).bfloat16()[:, :3072]
    out = product(x)
    in_parts, gated = role in IN_PARTS, role == "gate_up"
    cut = Cut.of(40, 12, processors=H200_BLOCKS, splits=in_parts)
    assert cut == (Cut(22, 3) if in_parts else Cut(2, 1))
    assert out.shape == ((3, rows, 640) if in_parts else (rows, 320 if gated else 640))
    assert out.dtype is (torch.float32 if in_parts else torch.bfloat16)
    (launch,) = launched
    form = Form(cut.tiles, half_scales=True, zeros=True)
    assert launch[:5] == (SOURCE, form.defines(), form.threads, form.shared_bytes, cut.blocks(40))
    told = launch.given
    tensors = (x, weight.codes, weight.scales, weight.zeros, out)
    assert [told.x, told.codes, told.scales, told.zeros, told.out] == [tensor.data_ptr() for tensor in tensors]
    assert (told.x_row, told.rows, told.tiles, told.spans) == (6160, rows, 40, 12)
    assert (told.splits, told.gated, told.wide) == (cut.splits, gated, in_parts)


@pytest.mark.usefixtures("launched")
def test_each_form_is_compiled_once():
    first, second = (rows_product("qkv", int4(64, 512)) for _ in range(2))
    assert first is not None
    assert second is not None
    assert first._kernel is second._kernel


ROWS = torch.zeros(9, 528).bfloat16()


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize(
    ("x", "taken"),
    [
        (ROWS[:1, :512], False),
        (ROWS[:2, :512], True),
        (ROWS[:8, 8:520], True),
        (ROWS[:9, :512], False),
        (ROWS[:0, :512], False),
        (ROWS[:4, 1:513], False),
        (ROWS.flatten()[: 4 * 516].view(4, 516)[:, :512], False),
        (torch.zeros(512, 4).bfloat16().T, False),
    ],
    ids=["one", "two", "eight, further on", "nine", "none", "not at 16 bytes", "16 bytes not apart", "columns"],
)
def test_it_takes_two_to_eight_rows_that_can_be_copied(x, taken):
    product = rows_product("qkv", int4(64, 512))
    assert product is not None
    assert product.takes(x) == taken


@pytest.mark.parametrize("role", ["qkv", "out", "gate_up", "down"])
def test_a_matrix_has_two_to_eight_rows_multiplied_by_it_and_others_by_others(role, launched, kernel_device):
    weight = on(kernel_device, int4(64, 512))
    matrix = Int4GpuMatrix(role, weight)
    for rows in (1, 2, 3, 8, 9, 130):
        x, before = torch.randn(rows, 512, device=kernel_device).mul_(0.1).bfloat16(), len(launched)
        result = matrix(x)
        assert len(launched) - before == (2 <= rows <= 8), f"{rows} rows"
        if len(launched) == before:
            whole = result.sum(0) if result.dim() == 3 else result  # Other kernels, too, give parts of a sum.
            assert relative_error(whole, plain(x, weight, gated=role == "gate_up")) < 1e-2


def test_a_bias_tilings_that_are_given_and_a_head_are_left_to_others(launched, kernel_device):
    weight, x = on(kernel_device, int4(64, 512)), torch.randn(4, 512, device=kernel_device).bfloat16()
    expected = plain(x, weight, gated=False)
    bias = torch.zeros(64, device=kernel_device).bfloat16()
    for matrix in (Int4GpuMatrix("qkv", weight, bias), Int4GpuMatrix("head", weight)):
        assert relative_error(matrix(x), expected) < 1e-2
    Int4GpuMatrix("qkv", weight, tiles={8: Int4Tile(16, 3)})(x)
    assert launched == []


@pytest.mark.parametrize(
    "error", [RuntimeError("no such instruction"), OSError("no libnvrtc"), ImportError("no cuda-bindings")], ids=repr
)
def test_where_it_cannot_be_compiled_others_multiply_and_it_is_told(
    error, launched, kernel_device, monkeypatch, caplog
):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(sys.modules["wicore_backend.hopper.nvrtc"].Kernel, "of", refuse)
    weight, x = on(kernel_device, int4(64, 512)), torch.randn(4, 512, device=kernel_device).bfloat16()
    with caplog.at_level(logging.WARNING):
        matrix = Int4GpuMatrix("qkv", weight)
    (record,) = caplog.records
    assert "slower" in record.message
    assert record.exc_info is not None
    assert record.exc_info[1] is error
    assert relative_error(matrix(x), plain(x, weight, gated=False)) < 1e-2
    assert launched == []


@pytest.mark.usefixtures("launched")
def test_without_cuda_bindings_others_multiply(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wicore_backend.hopper.nvrtc", cast(Any, None))
    assert rows_product("qkv", int4(64, 512)) is None
    assert "slower" in caplog.text


# ---- Whether it compiles; no GPU is needed

FORMS = {
    **{
        f"{tiles} tiles, all": Form(tiles, True, True)
        for tiles in sorted({cut_of(matrix).tiles for matrix in PUBLISHED})
    },
    "22 tiles, symmetric": Form(22),
}
every_form = pytest.mark.parametrize("form", FORMS)


@every_form
def test_it_compiles(form):
    assert_nvrtc_compiles(SOURCE, HEADERS, FORMS[form].defines())


@every_form
@needs_nvcc
def test_the_toolkit_s_compiler_takes_it_and_a_multiprocessor_has_registers_for_a_block(form, tmp_path):
    spills, of_thread = nvcc_compiled(SOURCE, FORMS[form].defines(), tmp_path / "code")
    assert set(spills) == {0}
    assert FORMS[form].threads * of_thread <= 65_536


# ---- What it computes on a card

_HAS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
SMALL = {"qkv": (320, 512), "out": (160, 768), "gate_up": (832, 256), "down": (736, 2304)}


class TestOnTheDevice:
    pytestmark: ClassVar = [pytest.mark.gpu, pytest.mark.skipif(not _HAS_HOPPER, reason="needs a Hopper GPU")]

    @pytest.mark.parametrize("case", CASES)
    def test_small_products_are_the_plain_twin_s(self, case):
        sizes, more = CASES[case]
        product = SmallProduct(*sizes, **more)
        first = product.run_on_card()
        assert product.error(first) < BOUND
        for _ in range(20):
            assert torch.equal(product.run_on_card(), first)

    @pytest.mark.parametrize("kind", TAKEN)
    @pytest.mark.parametrize("role", SMALL)
    @pytest.mark.parametrize("shapes", [SMALL, SHAPES_OF_27B], ids=["small", "27B"])
    def test_every_role_s_product_is_the_plain_twin_s(self, shapes, role, kind):
        weight, gated = random_int4(*shapes[role], **TAKEN[kind]), role == "gate_up"
        product = rows_product(role, weight)
        assert product is not None
        for rows in range(2, MOST_ROWS + 1):
            x = torch.randn(rows, weight.shape[1] + 8, device="cuda").bfloat16()[:, : weight.shape[1]]
            assert product.takes(x)
            result = product(x)
            assert (result.dim() == 3) == (role in IN_PARTS)
            whole = result.sum(0) if role in IN_PARTS else result
            assert relative_error(whole, plain(x, weight, gated=gated)) < 1e-2, f"{rows} rows"

    @pytest.mark.parametrize("rows", [2, 5, MOST_ROWS])
    @pytest.mark.parametrize("shape", ["small", "27B"])
    def test_replays_repeat_bit_for_bit_whatever_came_between(self, shape, rows):
        """A layer's products and the norms between them, which lie over each other."""
        hidden, attended, fed = (512, 768, 1280) if shape == "small" else (5376, 4096, 21504)
        sizes = {"out": (hidden, attended), "gate_up": (2 * fed, hidden), "down": (hidden, fed), "qkv": (1024, hidden)}
        matrices = {role: Int4GpuMatrix(role, random_int4(*size)) for role, size in sizes.items()}
        assert all(matrix._rows_product is not None for matrix in matrices.values())
        norm = torch.ones(hidden, device="cuda")
        given = [torch.randn(4, rows, size, device="cuda").bfloat16() for size in (hidden, attended)]
        stream, attention = (torch.empty_like(of_turn[0]) for of_turn in given)

        def layer():
            summed, normed = add_norm(matrices["out"](attention), stream, norm, norm, EPS)
            summed, normed = add_norm(matrices["down"](matrices["gate_up"](normed)), summed, norm, norm, EPS)
            return summed, normed, matrices["qkv"](normed)

        def turn_to(turn):
            for into, of_turn in zip((stream, attention), given, strict=True):
                into.copy_(of_turn[turn])

        once = []
        for turn in range(4):
            turn_to(turn)
            once.append([result.clone() for result in layer()])
        assert all(bool(result.isfinite().all()) for results in once for result in results)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = layer()
        other = torch.randn(1024, 1024, device="cuda")
        for replay in range(100):
            turn_to(replay % 4)
            graph.replay()
            if replay % 3 == 0:
                torch.mm(other, other)
            for result, right in zip(results, once[replay % 4], strict=True):
                assert torch.equal(result, right), f"replay {replay}"
