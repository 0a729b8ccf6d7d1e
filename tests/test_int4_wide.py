"""Products of 33 to 64 rows with INT4 by the kernel for Hopper: how matrices are cut, which ones it takes, that it is
compiled without a register lost or a product waited for, and what it computes on a card."""

from __future__ import annotations

import subprocess
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.accuracy import relative_error
from tests.hopper_twin.small_products import int4, plain
from tests.int4_launches import H200_BLOCKS, Mapped, listed_launches, random_int4
from tests.kernel_kit import EPS, SHAPES_OF_27B, assert_nvrtc_compiles, needs_nvcc, nvcc_compiled, on
from wicore_backend.executor.int4_matrix import Int4GpuMatrix, widened_bytes
from wicore_backend.executor.int4_products import HEADERS
from wicore_backend.executor.int4_wide import SOURCE, Cut, Form, wide_product
from wicore_backend.executor.kernels.small import add_norm
from wicore_backend.executor.roles import Role
from wicore_backend.hopper import ARCHITECTURE, SHARED_BYTES
from wicore_backend.quantization.int4 import Int4Matrix

ROLES: tuple[Role, ...] = ("gate_up", "down")
IN_PARTS = ("down",)

# ---- How a matrix is cut


def dealt(cut: Cut, tiles: int, spans: int, *, gated: bool) -> list[tuple[list[int], range]]:
    """Of each block the tiles that it gives and its spans, as the kernel has them (`Share`)."""
    found = []
    half = cut.warpgroups * 4
    for block in range(cut.blocks(tiles)):
        place, split = divmod(block, cut.splits)
        first = place * half * (1 if gated else 2)
        one = range(first, first + half)
        other = range(tiles // 2 + first, tiles // 2 + first + half) if gated else range(first + half, first + 2 * half)
        ends = (tiles // 2, tiles) if gated else (tiles, tiles)
        of_block = [tile for part, end in zip((one, other), ends, strict=True) for tile in part if tile < end]
        found.append((of_block, range(spans * split // cut.splits, spans * (split + 1) // cut.splits)))
    return found


@given(
    pairs=st.integers(1, 2000),
    spans=st.integers(1, 100),
    processors=st.integers(1, 200),
    role=st.sampled_from(ROLES),
)
def test_whatever_its_size_a_matrix_is_cut_without_overlap_or_gap(pairs, spans, processors, role):
    splits = role in IN_PARTS
    cut = Cut.of(2 * pairs, spans, processors=processors, splits=splits)
    shares = dealt(cut, 2 * pairs, spans, gated=role == "gate_up")
    assert all(of_block and of_split for of_block, of_split in shares), "no block has nothing to do"
    whose = torch.zeros(2 * pairs, spans, dtype=torch.int32)
    for of_block, of_split in shares:
        whose[of_block, of_split.start : of_split.stop] += 1
    assert bool((whose == 1).all()), "each span of each tile is one block's"
    assert cut.warpgroups in (2, 3)
    if splits:
        assert cut.splits == 1 or (cut.blocks(2 * pairs) <= processors and spans // cut.splits >= 2)
    else:
        assert cut.splits == 1


def test_matrices_of_27b_are_cut_as_was_fastest():
    def cut(role: Role) -> Cut:
        outputs, inputs = SHAPES_OF_27B[role]
        return Cut.of(outputs // 16, inputs // 256, processors=H200_BLOCKS, splits=role in IN_PARTS)

    assert {role: cut(role) for role in ROLES} == {"gate_up": Cut(3, 1), "down": Cut(2, 6)}


@given(pairs=st.integers(1, 2000), spans=st.integers(1, 100), processors=st.integers(1, 200))
def test_parts_take_less_than_what_is_stated_for_a_product_of_many_rows(pairs, spans, processors):
    """Which no step has at the same time."""
    cut = Cut.of(2 * pairs, spans, processors=processors, splits=True)
    codes = torch.empty(2 * pairs, spans, 16, 32, dtype=torch.int32, device="meta")
    scales = torch.empty(2 * pairs, spans, 16, 2, dtype=torch.bfloat16, device="meta")
    if cut.splits > 1:
        parts = cut.splits * 64 * pairs * 32 * torch.float32.itemsize
        assert 4 * parts <= widened_bytes(Int4Matrix(codes, scales, None, torch.bfloat16))


FORMS = [
    Form(warpgroups, gated, half_scales, zeros)
    for warpgroups in (2, 3)
    for gated in (False, True)
    for half_scales, zeros in ((False, False), (False, True), (True, True))
]
every_form = pytest.mark.parametrize("form", FORMS, ids=str)


@every_form
def test_a_block_has_room_for_its_rings_and_its_sums(form):
    of_stage, of_rows = form.warpgroups * 8 * 2048 + 16, 2 * (64 * 512 + 16)
    codes = -(-form.code_stages * of_stage // 1024) * 1024
    assert codes + of_rows <= form.shared_bytes <= SHARED_BYTES
    assert 64 * (form.warpgroups * 128 + 4) * 4 <= form.shared_bytes, "sums take the rings' place"
    assert codes + of_stage + of_rows > SHARED_BYTES, "the ring is as long as it can be"
    assert form.code_stages >= 3
    assert form.threads == (form.warpgroups + 1) * 128


# ---- Which matrices and rows it takes


@pytest.fixture
def launched(monkeypatch):
    yield from listed_launches(monkeypatch)


def test_a_head_qkv_and_out_have_none(launched):
    weight = int4(64, 512)
    others: tuple[Role, ...] = ("head", "qkv", "out")
    assert all(wide_product(role, weight) is None for role in others)
    assert wide_product("down", weight) is not None
    assert launched == []


def test_other_devices_have_none():
    assert wide_product("down", int4(64, 512)) is None


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("rows", [33, 50, 64])
def test_what_is_launched_is_for_the_role_and_the_rows(role, rows, launched):
    weight = int4(640, 3072, zeros=True, half_scales=True)
    product = wide_product(role, weight)
    assert product is not None
    x = torch.zeros(rows, 3080).bfloat16()[:, :3072]
    out = product(x)
    in_parts, gated = role in IN_PARTS, role == "gate_up"
    cut = Cut.of(40, 12, processors=H200_BLOCKS, splits=in_parts)
    assert cut == (Cut(2, 6) if in_parts else Cut(2, 1))
    assert out.shape == ((6, rows, 640) if in_parts else (rows, 320))
    assert out.dtype is (torch.float32 if in_parts else torch.bfloat16)
    (launch,) = launched
    form = Form(2, gated, half_scales=True, zeros=True)
    assert launch[:5] == (SOURCE, form.defines(), form.threads, form.shared_bytes, cut.blocks(40))
    told = launch.given
    assert weight.zeros is not None
    assert [told.scales, told.zeros, told.out] == [t.data_ptr() for t in (weight.scales, weight.zeros, out)]
    assert Mapped.of(told.x) == (x.data_ptr(), (rows, 3072), (3080, 1), (None, 64))
    of_codes = (weight.codes.data_ptr(), (40, 12 * 16, 64), (12 * 1024, 64, 1), (8, 16))
    assert Mapped.of(told.codes) == of_codes
    assert (told.rows, told.tiles, told.spans, told.splits, told.wide) == (rows, 40, 12, cut.splits, in_parts)


X = torch.zeros(65, 528).bfloat16()


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize(
    ("x", "taken"),
    [
        (X[:32, :512], False),
        (X[:33, :512], True),
        (X[:64, 8:520], True),
        (X[:65, :512], False),
        (X[:40, 1:513], False),
        (X.flatten()[: 40 * 516].view(40, 516)[:, :512], False),
        (torch.zeros(512, 40).bfloat16().T, False),
    ],
    ids=["32", "33", "64, further on", "65", "not at 16 bytes", "16 bytes not apart", "columns"],
)
def test_it_takes_33_to_64_rows_that_boxes_can_be_copied_of(x, taken):
    product = wide_product("down", int4(64, 512))
    assert product is not None
    assert product.takes(x) == taken


@pytest.mark.parametrize("role", ["qkv", "out", *ROLES])
def test_a_matrix_has_33_to_64_rows_multiplied_by_it_and_others_by_others(role, launched, kernel_device):
    weight = on(kernel_device, int4(64, 512))
    matrix = Int4GpuMatrix(role, weight)
    for rows in (1, 9, 32, 33, 64, 65):
        x, before = torch.randn(rows, 512, device=kernel_device).mul_(0.1).bfloat16(), len(launched)
        result = matrix(x)
        assert len(launched) - before == (33 <= rows <= 64 and role in ROLES), f"{rows} rows"
        if len(launched) == before:
            whole = result.sum(0) if result.dim() == 3 else result  # Other kernels, too, give parts of a sum.
            assert relative_error(whole, plain(x, weight, gated=role == "gate_up")) < 1e-2


# ---- Whether it compiles; no GPU is needed


@every_form
def test_it_compiles(form):
    assert_nvrtc_compiles(SOURCE, HEADERS, form.defines())


@every_form
@needs_nvcc
def test_the_toolkit_s_compiler_takes_it_and_no_register_spills(form, tmp_path):
    spills, of_thread = nvcc_compiled(SOURCE, form.defines(), tmp_path / "code")
    assert set(spills) == {0}
    assert form.threads * of_thread <= 65_536


@pytest.mark.parametrize("form", [Form(2), Form(3, gated=True, zeros=True)], ids=str)
@pytest.mark.parametrize("waits", [True, False])
@needs_nvcc
def test_products_go_on_while_registers_are_made_anew(form, waits, tmp_path):
    """The compiler says so where it makes each end before the next: as it would if they went on into the next span."""
    text = SOURCE.read_text()
    end = "        wgmma_wait<0>();\n"
    assert text.count(end) == 1
    source = tmp_path / SOURCE.name
    source.write_text(text if waits else text.replace(end, ""))
    folders = {f"-I{header.parent}" for header in HEADERS}
    defines = [f"-D{name}={value}" for name, value in form.defines().items()]
    command = ["nvcc", f"-arch={ARCHITECTURE}", "-std=c++17", *sorted(folders), *defines, "-cubin", "-o"]
    result = subprocess.run([*command, tmp_path / "code", source], capture_output=True, text=True, check=True)
    assert ("serialized" in result.stdout + result.stderr) != waits


# ---- What it computes on a card

_HAS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
SMALL: dict[Role, tuple[int, int]] = {"gate_up": (832, 256), "down": (736, 2304)}
ODD: dict[Role, tuple[int, int]] = {"gate_up": (41120, 1280), "down": (2592, 10496)}
"""The last blocks have fewer tiles; splits have not the same spans; gate and up take three warpgroups."""
KINDS: dict[str, dict[str, bool]] = {
    "as it is": {},
    "zero points": {"zeros": True},
    "float16 scales": {"half_scales": True},
    "float16 scales and zero points": {"half_scales": True, "zeros": True},
}


class TestOnTheDevice:
    pytestmark: ClassVar = [pytest.mark.gpu, pytest.mark.skipif(not _HAS_HOPPER, reason="needs a Hopper GPU")]

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("role", ROLES)
    @pytest.mark.parametrize("shapes", [SMALL, ODD, SHAPES_OF_27B], ids=["small", "odd", "27B"])
    def test_every_role_s_product_is_the_plain_twin_s(self, shapes, role, kind):
        weight, gated = random_int4(*shapes[role], **KINDS[kind]), role == "gate_up"
        product = wide_product(role, weight)
        assert product is not None
        for rows in (33, 40, 48, 63, 64):
            x = torch.randn(rows, weight.shape[1] + 8, device="cuda").bfloat16()[:, : weight.shape[1]]
            assert product.takes(x)
            result = product(x)
            assert (result.dim() == 3) == (role in IN_PARTS)
            whole = result.sum(0) if role in IN_PARTS else result
            assert relative_error(whole, plain(x, weight, gated=gated)) < 1e-2, f"{rows} rows"
            for _ in range(5):
                assert torch.equal(product(x), result), f"{rows} rows"

    @pytest.mark.parametrize("role", ROLES)
    def test_a_row_s_result_is_its_own_whoever_the_others_are(self, role):
        """Not a bit of it is another where fewer are there, or one that is no number: rows are of several requests."""
        weight = random_int4(*SMALL[role], zeros=True)
        product = wide_product(role, weight)
        assert product is not None
        x = torch.randn(64, weight.shape[1], device="cuda").bfloat16()
        whole = product(x)
        assert torch.equal(product(x[:35]), whole[..., :35, :])
        x[7] = float("nan")
        others = [n for n in range(64) if n != 7]
        result = product(x)
        assert torch.equal(result[..., others, :], whole[..., others, :])
        assert bool(result[..., 7, :].isnan().all())

    @pytest.mark.parametrize("rows", [33, 48, 64])
    @pytest.mark.parametrize("shape", ["small", "27B"])
    def test_replays_repeat_bit_for_bit_whatever_came_between(self, shape, rows):
        """A layer's products and the norms between them, which lie over each other; out is by another kernel."""
        hidden, attended, fed = (512, 768, 1280) if shape == "small" else (5376, 4096, 21504)
        sizes = {"out": (hidden, attended), "gate_up": (2 * fed, hidden), "down": (hidden, fed)}
        matrices = {role: Int4GpuMatrix(role, random_int4(*size)) for role, size in sizes.items()}
        assert all(matrices[role]._wide_product is not None for role in ROLES)
        norm = torch.ones(hidden, device="cuda")
        given = [torch.randn(4, rows, size, device="cuda").bfloat16() for size in (hidden, attended)]
        stream, attention = (torch.empty_like(of_turn[0]) for of_turn in given)

        def layer():
            summed, normed = add_norm(matrices["out"](attention), stream, norm, norm, EPS)
            return add_norm(matrices["down"](matrices["gate_up"](normed)), summed, norm, norm, EPS)

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
