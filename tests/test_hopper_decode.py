"""Decodes by the kernel for Hopper: what it is told of a step, which heads and pools it takes, and that it compiles.

What it computes: `test_hopper_decode_on_cpu.py`, whose steps a card has here, too.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.hopper_twin.small_decodes import SmallDecodes
from tests.kernel_kit import assert_nvrtc_compiles, needs_nvcc, nvcc_compiled
from tests.test_hopper_decode_on_cpu import BOUND, CASES, of_all_numbers, over
from wicore_backend.attention.base import PackedStep
from wicore_backend.attention.gpu.hopper_decode import (
    MOST,
    SOURCE,
    TUNED,
    Form,
    HopperDecode,
    Tuning,
    form_of,
    hopper_decode,
)
from wicore_backend.attention.gpu.schedule import WORK_FIELDS, WORK_KEYS, Sequences, decode_items, decode_work
from wicore_backend.attention.gpu.tiling import Tiling
from wicore_backend.attention.gpu.tuning import Tuning as TritonTuning
from wicore_backend.hmt.fp8 import FP8
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hopper import HEADERS, SHARED_BYTES

GLOBAL, LOCAL = LayerGroup.GLOBAL, LayerGroup.LOCAL
WINDOW = 50


# ---- What it is told of a step


def step_of(positions, *, prefilled=0, block_size=32):
    """Decodes at `positions`, and after them a prompt of `prefilled` tokens, if any; each has blocks of its own."""
    last = np.array([*positions, *([prefilled - 1] if prefilled else [])], np.int32)
    blocks = last // block_size + 1
    tables = np.zeros((len(last), blocks.max()), np.int32)
    for row, (first, count) in enumerate(zip(1 + blocks.cumsum() - blocks, blocks, strict=True)):
        tables[row, :count] = first + np.arange(count)
    tokens = np.concatenate([last[: len(positions)], np.arange(prefilled, dtype=np.int32)])
    return PackedStep(
        positions=tokens,
        attend_limits=tokens,
        query_lens=np.array([1] * len(positions) + ([prefilled] if prefilled else []), np.int32),
        decodes=len(positions),
        block_tables={GLOBAL: tables, LOCAL: tables},
    )


def work_of(step, group, *, sequences, block_size=32, window=WINDOW):
    seen = Sequences.of(step, group, block_size=block_size, window=window)
    return decode_work(step, group, seen, window=window, sequences=sequences), seen


def test_a_step_s_decodes_are_told_by_tiles_before_them_keys_and_block_tables():
    step = step_of([0, 31, 32, 100])
    work, _ = work_of(step, GLOBAL, sequences=4)
    assert work.dtype == np.int32
    assert work.tolist() == [[0, 0, 0, 0], [1, 0, 31, 1], [2, 0, 32, 2], [4, 0, 100, 4], [8, 0, 0, 0]]


def test_positions_of_a_window_count_from_its_first_block():
    work, seen = work_of(step_of([0, 49, 81, 100]), LOCAL, sequences=4)
    # Of 81 the first that is visible is 32, with which a block begins; of 100 it is 51, of the block that begins at 32.
    assert seen.shift.tolist() == [0, 0, 32, 32]
    assert work.tolist() == [[0, 0, 0, 0], [1, 0, 49, 1], [3, 0, 49, 3], [5, 19, 68, 5], [8, 0, 0, 0]]


def test_a_window_s_first_tile_need_not_be_its_block_s():
    work, _ = work_of(step_of([100], block_size=96), LOCAL, sequences=1, block_size=96)
    assert work.tolist() == [[0, 51, 100, 0], [3, 0, 0, 0]]


def test_idle_rows_have_no_tiles():
    work, _ = work_of(step_of([5, 40]), GLOBAL, sequences=4)
    assert work[:3].tolist() == [[0, 0, 5, 0], [1, 0, 40, 1], [3, 0, 0, 0]]
    assert work[3:].tolist() == [[3, 0, 0, 0], [3, 0, 0, 0]]


@given(
    positions=st.lists(st.integers(0, 500), min_size=1, max_size=6),
    prefilled=st.integers(0, 90),
    group=st.sampled_from(LayerGroup),
    block_size=st.sampled_from([32, 64, 96]),
    window=st.integers(1, 200),
    idle=st.integers(0, 2),
)
def test_tiles_are_those_of_the_visible_keys_as_they_are_the_other_kernel_s(
    positions, prefilled, group, block_size, window, idle
):
    step, count = step_of(positions, prefilled=prefilled, block_size=block_size), len(positions)
    work, seen = work_of(step, group, sequences=count + idle, block_size=block_size, window=window)
    assert work.shape == (count + idle + 1, WORK_FIELDS)
    items = decode_items(step, group, seen, window=window, keys=WORK_KEYS, items=7)
    for row, position in enumerate(positions):
        before, lowest, fresh, table_at = work[row].tolist()
        visible = range(max(0, position - window + 1) if group is LOCAL else 0, position + 1)
        shift = position - fresh
        assert range(shift + lowest, shift + fresh + 1) == visible
        table = seen.table[table_at:]
        assert all(
            table[(key - shift) // block_size] == step.block_tables[group][row][key // block_size] for key in visible
        )
        assert shift % block_size == 0
        tiles = {(key - shift) // WORK_KEYS for key in visible}
        assert work[row + 1, 0] - before == len(tiles)
        _, begin, end, *same = items[items[:, 0] == row, :6].T
        theirs = {key // WORK_KEYS for of_item in map(range, begin, end) for key in of_item}
        assert theirs == tiles
        assert all((of_item == right).all() for of_item, right in zip(same, (lowest, fresh, table_at), strict=True))
    assert (work[count:, 0] == work[count, 0]).all()


# ---- Which heads and pools it takes

TUNINGS = st.builds(
    Tuning, warps=st.integers(1, 8), blocks=st.integers(1, 3), stages=st.integers(1, 24), least=st.integers(1, 4)
)
over_every_pool = pytest.mark.parametrize("pool", TUNED)


@given(
    head_dim=st.sampled_from([64, 128, 192, 256]),
    kv_heads=st.sampled_from([1, 4, 16]),
    group=st.integers(1, 16),
    block_size=st.sampled_from([16, 32, 48, 64, 96]),
    tuning=TUNINGS,
    pool=st.sampled_from(list(TUNED)),
)
def test_what_fits_has_room_and_no_more_warps_than_stages(head_dim, kv_heads, group, block_size, tuning, pool):
    """And as many stages as are always the same warp's."""
    form = Form(head_dim, kv_heads, group, block_size, tuning=tuning, pool=pool)
    if not form.fits:
        return
    assert head_dim in (128, 256)
    assert group <= 8
    assert block_size % 32 == 0
    assert form.warps <= form.stages <= tuning.stages
    assert form.stages % form.warps == 0
    assert form.warps <= tuning.warps
    assert tuning.blocks * (form.shared_bytes + 1024) <= SHARED_BYTES
    defines = form.defines()
    assert (defines["WARPS"], defines["STAGES"]) == (form.warps, form.stages)
    assert form.threads == 32 * (defines["WARPS"] + 1)


def forms_of(head_dim, kv_heads, group, *, pool):
    """All that it is compiled for, by what it is called in `TUNED`."""
    form = Form(head_dim, kv_heads, group, 32, pool=pool)
    return {name: replace(form, tuning=tuning) for name, tuning in TUNED[pool]._asdict().items()}


@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("head_dim", [128, 256])
@over_every_pool
def test_published_heads_fit_as_it_is_tuned(pool, head_dim, group):
    assert all(form.fits for form in forms_of(head_dim, 4, group, pool=pool).values())


@over_every_pool
def test_heads_of_128_have_all_that_they_are_tuned_for(pool):
    for form in forms_of(128, 16, 2, pool=pool).values():
        assert (form.warps, form.stages) == (form.tuning.warps, form.tuning.stages)


@over_every_pool
def test_what_the_others_leave_fits_the_memory_of_several(pool):
    """They share it (`Calls`)."""
    assert max(tuning.blocks for tuning in TUNED[pool]) == TUNED[pool].several.blocks


def test_over_either_pool_as_much_is_left():
    """As `AttentionNeeds` has it."""
    assert {tunings.several.blocks for tunings in TUNED.values()} == {Tuning().blocks}


def test_warps_that_have_no_stage_take_no_room():
    """Eight queries for each key of 256 leave 33 KB for two warps' sums, of 113; six would leave none of it."""
    form = Form(256, 1, 8, 32, tuning=Tuning(warps=6, stages=12), pool=FP8)
    assert (form.warps, form.stages) == (3, 3)
    assert form.shared_bytes == 3 * (2 * 32 * 256 + 16) + 65 * 16 + 2 * 3 * 8 * (256 * 4 + 8) + 16


@over_every_pool
def test_more_stages_would_not_fit(pool):
    """The ring is as long as it can be."""
    form = Form(256, 4, 2, 32, tuning=Tuning(warps=1, stages=100), pool=pool)
    of_stage = 2 * 32 * 256 * pool.itemsize + 2 * 8
    assert 2 * (form.shared_bytes + 1024) <= SHARED_BYTES < 2 * (form.shared_bytes + of_stage + 1024)


def tiling_of(*, head_dim=128, kv_heads=4, query_heads=8, block_size=32, processors=132):
    layout = KVLayout.of(
        [LOCAL, GLOBAL], block_size=block_size, kv_heads=kv_heads, head_dim=head_dim, window=1024, bytes_per_value=2
    )
    return Tiling(layout, query_heads, TritonTuning.of(head_dim, torch.bfloat16), processors)


@over_every_pool
def test_the_form_is_the_model_s(pool):
    form = form_of(tiling_of(), pool, torch.bfloat16, capped=False)
    assert form == Form(128, 4, 2, 32, tuning=TUNED[pool].several, pool=pool)


@pytest.mark.parametrize(
    ("pool", "queries"),
    [
        (FP8, torch.float16),
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
    ],
    ids=["float16 over FP8", "float32", "float16", "bfloat16 over float32"],
)
def test_other_numbers_are_left_to_the_other_kernel(pool, queries):
    assert form_of(tiling_of(), pool, queries, capped=False) is None


@pytest.mark.parametrize(
    "shape",
    [
        {"query_heads": 36},
        {"head_dim": 64},
        {"block_size": 16},
        {"block_size": 48},
        {"kv_heads": 16, "query_heads": 32, "processors": 7},
    ],
    ids=["nine queries for each key", "heads of 64", "blocks of 16", "blocks of 48", "more heads than blocks"],
)
def test_other_shapes_are_left_to_the_other_kernel(shape):
    assert form_of(tiling_of(**shape), torch.bfloat16, torch.bfloat16, capped=False) is None


def test_scores_with_a_cap_are_left_to_the_other_kernel():
    assert form_of(tiling_of(), torch.bfloat16, torch.bfloat16, capped=True) is None


def test_other_devices_have_none():
    for form in (Form(128, 4, 2, 32), None):
        assert hopper_decode(form, processors=132, scale=1.0, device=torch.device("cpu")) is None


# ---- What is launched


@pytest.fixture
def launched(monkeypatch):
    """The kernels that are made, each with the number of blocks of its launches."""
    kernels = []

    class Kernel:
        def __init__(self, source, headers, defines, *, threads, shared_bytes, cooperative):
            assert (source, headers) == (SOURCE, HEADERS)
            assert not cooperative
            assert threads == 32 * (defines["WARPS"] + 1)
            assert shared_bytes <= SHARED_BYTES
            self.defines, self.blocks = defines, []
            kernels.append(self)

        def launch(self, blocks, _):
            self.blocks.append(blocks)

    nvrtc = ModuleType("nvrtc")
    nvrtc.Kernel = SimpleNamespace(of=Kernel)
    monkeypatch.setitem(sys.modules, "wicore_backend.hopper.nvrtc", nvrtc)
    return kernels


@pytest.mark.parametrize(
    ("pool", "group", "sequences", "taken"),
    [
        (torch.bfloat16, LOCAL, 8, "1 block"),
        (torch.bfloat16, LOCAL, 9, "2 blocks"),
        (torch.bfloat16, GLOBAL, 1, "1 block"),
        (torch.bfloat16, GLOBAL, MOST, "1 block"),
        (FP8, LOCAL, 8, "1 block"),
        (FP8, LOCAL, 9, "2 blocks"),
        (FP8, GLOBAL, 1, "2 blocks"),
        (FP8, GLOBAL, MOST, "2 blocks"),
    ],
)
def test_the_kernel_is_that_for_the_layer_and_the_sequences(pool, group, sequences, taken, launched):
    form = form_of(tiling_of(), pool, torch.bfloat16, capped=False)
    decode = HopperDecode(form, processors=132, scale=1.0, device=torch.device("cpu"))
    assert len(launched) == 2, "each distinct one is compiled once"
    q, kv, pool_ = torch.zeros(sequences, 8, 128), torch.zeros(sequences, 4, 128), torch.zeros(1)
    work = torch.zeros((sequences + 1) * WORK_FIELDS, dtype=torch.int32)
    decode(group, sequences, q, kv, kv, pool_, q, work, work, layer_at=0, block_stride=0)
    blocks = {"1 block": 132, "2 blocks": 264}[taken]
    (kernel,) = (kernel for kernel in launched if kernel.blocks)
    assert kernel.blocks == [blocks]
    assert kernel.defines == replace(form, tuning=TUNED[pool].of(group, sequences)).defines()


# ---- Whether it compiles; no GPU is needed

HEADS = {
    "heads of 128": (128, 16, 2),
    "heads of 256": (256, 4, 2),
    "eight queries for each key": (128, 1, 8),
    "large heads, eight queries for each key": (256, 1, 8),
}
FORMS = {
    f"{name}, {'FP8' if pool == FP8 else 'bfloat16'}, {tuned}": form
    for name, heads in HEADS.items()
    for pool in TUNED
    for tuned, form in forms_of(*heads, pool=pool).items()
    if tuned != "of_global"  # One of the others.
}
every_form = pytest.mark.parametrize("form", FORMS)


@every_form
def test_it_compiles(form):
    assert_nvrtc_compiles(SOURCE, HEADERS, FORMS[form].defines())


@every_form
@needs_nvcc
def test_the_toolkit_s_compiler_takes_it_and_a_multiprocessor_has_registers_for_its_blocks(form, tmp_path):
    spills, of_thread = nvcc_compiled(SOURCE, FORMS[form].defines(), tmp_path / "code")
    assert max(spills) <= 8
    assert FORMS[form].tuning.blocks * FORMS[form].threads * of_thread <= 65_536


# ---- What it computes on a card

_HAS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


class TestOnTheDevice:
    pytestmark: ClassVar = [pytest.mark.gpu, pytest.mark.skipif(not _HAS_HOPPER, reason="needs a Hopper GPU")]

    @over_every_pool
    @pytest.mark.parametrize("case", CASES)
    def test_results_are_plain_attention_s(self, case, pool):
        decodes = SmallDecodes(**over(pool, CASES[case]))
        first = decodes.run_on_card()
        assert decodes.error(first) < BOUND
        for _ in range(20):
            assert all(map(torch.equal, decodes.run_on_card(), first))

    @over_every_pool
    @pytest.mark.parametrize("tuned", ["few", "several"])
    @pytest.mark.parametrize(("head_dim", "kv_heads", "group"), [(128, 16, 2), (256, 4, 2), (128, 2, 8), (256, 1, 4)])
    def test_a_card_s_worth_of_blocks_gives_plain_attention_s(self, head_dim, kv_heads, group, tuned, pool):
        form = forms_of(head_dim, kv_heads, group, pool=pool)[tuned]
        keys = [*range(1, 40), 575, 576, 577, 1023, 1024, 1025, 3000]
        decodes = SmallDecodes(keys, form=form, blocks=132 * form.tuning.blocks, measured=[0, 39, 45])
        assert decodes.error(decodes.run_on_card()) < BOUND

    @pytest.mark.parametrize("head_dim", [128, 256])
    def test_a_token_s_own_key_and_value_go_to_a_pool_in_fp8_as_others_write_them(self, head_dim):
        decodes = of_all_numbers(head_dim)
        assert decodes.error(decodes.run_on_card()) == 0.0
