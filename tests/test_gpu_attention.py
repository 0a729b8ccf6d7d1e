"""The GPU's paged attention against its plain twin, on random steps over a pool that is NaN wherever nothing is.

Where there is no GPU, the kernels run on the CPU under OpenAI Triton's interpreter, on small shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.attention_kit import HOLES, Bench
from tests.kernel_kit import run_alone
from tests.paged_steps import DECODES, LAYERS, PREFILLS, Part, Shape
from wicore_backend.attention.gpu import hopper
from wicore_backend.attention.gpu.hopper import Widening, widening
from wicore_backend.attention.gpu.kernels.widen import widen_kernel
from wicore_backend.attention.gpu.tiling import Tiling
from wicore_backend.attention.gpu.tuning import PrefillLaunch, Tuning
from wicore_backend.hmt.fp8 import FP8, to_fp8
from wicore_backend.hmt.layout import KVLayout, LayerGroup

pytestmark = pytest.mark.filterwarnings("ignore::Warning:triton.runtime.interpreter")


def check(
    shape: Shape, parts: list[Part], device: torch.device, measured: Mapping[int, Sequence[int]] | None = None, **rest
) -> list[Tensor]:
    bench = Bench(shape, parts, device, **rest)
    step = bench.step(measured)
    return bench.check(step, bench.attention.plan(step))


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("heads", [(1, 3), (2, 2)], ids=lambda heads: f"{heads[0]}x{heads[1]}")
@pytest.mark.parametrize("parts", [DECODES, PREFILLS, DECODES + PREFILLS], ids=["decodes", "prefills", "both"])
def test_a_step_equals_the_twin(parts, heads, softcap, kernel_device):
    measured = {1: range(len(parts)), 3: [0]}
    check(Shape(kv_heads=heads[0], group_size=heads[1], softcap=softcap), parts, kernel_device, measured)


@pytest.mark.parametrize("block_size", [3, 8, 32, 64])
def test_blocks_of_any_size(block_size, kernel_device):
    parts = [DECODES[3], DECODES[4], PREFILLS[2]]
    check(Shape(block_size=block_size, kv_heads=1, window=17), parts, kernel_device, {3: [0, 1, 2]}, head_dim=8)


def test_long_prefixes_are_shared_out_among_programs(kernel_device):
    parts = [Part(150, 1), Part(90, 5), Part(170, 20)]
    check(Shape(kv_heads=1, window=100), parts, kernel_device, {1: [0, 1, 2]}, processors=32)


def test_blocks_that_have_left_are_invisible(kernel_device):
    check(Shape(), HOLES, kernel_device, {1: range(6), 3: [1, 4]})


def test_half_precision_is_near_the_twin(kernel_device):
    # Of the two types, the interpreter multiplies matrices of this one only.
    check(Shape(kv_heads=1, dtype=torch.float16), [DECODES[2], DECODES[4], PREFILLS[1]], kernel_device, {1: [0, 2]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("parts", [DECODES[2:], PREFILLS[1:3], HOLES[3:5]], ids=["decodes", "prefills", "with holes"])
def test_keys_and_values_in_fp8(parts, dtype, kernel_device):
    measured = {1: range(len(parts)), 3: [0]}
    shape = Shape(kv_heads=2, softcap=0.8, dtype=dtype, kv_dtype=FP8)
    for head_dim in (16, 40):  # As single values, and in pairs.
        check(shape, parts, kernel_device, measured, head_dim=head_dim)


def test_what_fp8_cannot_hold_becomes_the_largest_it_can_and_nan_0(kernel_device):
    shape = Shape(kv_heads=1, group_size=1, kv_dtype=FP8)
    bench = Bench(shape, [Part(5, 1), Part(4, 3)], kernel_device)
    step = bench.step()
    q, k, v = (x.contiguous() for x in bench.qkv(4))
    numbers = torch.tensor([1e9, -449, torch.inf, -torch.inf, torch.nan, 2.0**-10, 1.5 * 2**-9, 17.0, -0.0, 464.0])
    k[:, 0, :10], v[1, 0, :10] = numbers.to(k), -numbers.to(v)
    q[:] = 0  # What is written is looked at, so weights are not to be those of rows at the end of the range.
    plan, expected_plan = bench.attention.plan(step), bench.twin.plan(step)
    for layer, (group, _) in enumerate(bench.layout.layers):
        attended = bench.attention.attend(plan, layer, q, k, v)
        torch.testing.assert_close(
            attended, bench.twin.attend(expected_plan, layer, q, bench.stored(k), bench.stored(v))
        )
        pool = bench.pools.tensors[group].float()
        assert torch.equal(pool.nan_to_num(0.0), bench.expected_pools.tensors[group])
    expected = [448, -448, 448, -448, 0, 0, 2.0**-8, 16, 0, 448]
    assert bench.stored(numbers).tolist() == expected


def test_kernels_for_hopper_are_taken_where_the_tiles_of_every_group_fit(monkeypatch):
    card: Any = SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))

    def fits(block_size: int = 32, head_dim: int = 128, stored: torch.dtype = torch.bfloat16) -> bool:
        shape = {"kv_heads": 16, "head_dim": head_dim, "window": 1024, "bytes_per_value": stored.itemsize}
        layout = KVLayout.of(LAYERS, block_size=block_size, **shape)
        tuning = Tuning.of(head_dim, torch.bfloat16, stored)
        return hopper.fits(Tiling(layout, 32, tuning, 132), stored, torch.bfloat16, card)

    assert fits()
    assert fits(block_size=64)
    assert fits(block_size=128, stored=FP8)
    assert not fits(block_size=128), "a tile of the local layers' keys is half a block"
    assert not fits(head_dim=256)
    assert not fits(stored=torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    assert not fits()


def test_many_programs_take_less_memory_each() -> None:
    assert [Tuning.of(128, torch.bfloat16).decode_stages(count) for count in (1, 31, 32, 128)] == [5, 5, 3, 3]
    assert Tuning.of(128, torch.bfloat16, FP8).decode_stages(128) == 5


WIDE = KVLayout.of([LayerGroup.GLOBAL], block_size=32, kv_heads=16, head_dim=128, window=1024, bytes_per_value=1)


@pytest.mark.parametrize(
    ("blocks", "tiles", "sequences", "heads"),
    [
        (1000, 8, 1, 16),  # All heads: 256 MiB hold 32,768 tokens.
        (1025, 128, 1, 8),
        (4096, 128, 1, 4),
        (16384, 512, 4, 1),
        (16385, 512, 4, None),  # Not even one.
        (4096, 60, 1, None),  # 4 heads of so few tiles leave places empty.
        (100, 3, 1, None),  # Read too seldom.
        (100, 14, 4, None),
    ],
)
def test_keys_are_widened_first_where_that_pays(blocks, tiles, sequences, heads):
    found = widening(
        WIDE,
        first_block=7,
        blocks=blocks,
        tiles=tiles,
        sequences=sequences,
        programs=132,
        memory_bytes=2**28,
    )
    assert found == (None if heads is None else Widening(7, blocks, heads))


def test_widened_heads_are_what_the_pool_holds(kernel_device):
    numbers = to_fp8(torch.randn(5, 3, 2, 8, 4, 16)).to(kernel_device)
    tables = torch.tensor([4, 1, 3, 2], dtype=torch.int32, device=kernel_device)
    wide = torch.full((2, 2, 8, 2, 16), torch.nan, dtype=torch.float16, device=kernel_device)
    shape = {"KV_HEADS": 4, "HEADS": 2, "HEAD_DIM": 16, "BLOCK_SIZE": 8, "TOKENS": 4}
    pool = numbers.view(torch.uint8)
    widen_kernel[2, 2, 2](pool, wide, tables, 1, 2, 2 * pool.stride(1), pool.stride(0), **shape)
    assert torch.equal(wide.float(), numbers.float()[[1, 3], 2, :, :, 2:])


@pytest.mark.parametrize("seed", range(3))
def test_random_steps_equal_the_twin(seed, kernel_device):
    rng = np.random.default_rng(seed)
    decodes = [Part(int(past), 1) for past in rng.integers(0, 60, rng.integers(0, 4))]
    prefills = [
        Part(int(past), int(new), image=(int(new) // 3, int(new) // 2))
        for past, new in zip(rng.integers(0, 40, 2), rng.integers(2, 30, 2), strict=True)
    ]
    parts = [
        replace(part, gone=frozenset(rng.integers(0, 12, 3).tolist() if rng.random() < 0.5 else []))
        for part in decodes + prefills
    ]
    shape = Shape(int(rng.choice([4, 16])), 1, int(rng.integers(1, 4)), int(rng.integers(1, 50)))
    check(shape, parts, kernel_device, {3: range(len(parts))}, processors=int(rng.integers(1, 20)))


def test_the_kernels_for_hopper_compile_without_one():
    # Two warpgroups, each with a first tile, those after it and the last: products in steps of 16.
    assert run_alone("tests.compile_hopper_prefill").splitlines() == [
        "64 4 products 48 copies 8 widened 0",
        "128 2 products 64 copies 16 widened 0",
        "64 4 products 48 copies 12 widened 64",
        "128 2 products 64 copies 24 widened 128",
    ]


def test_the_kernels_fit_the_shared_memory_of_smaller_cards():
    cards = dict(line.split(": ") for line in run_alone("tests.compile_attention").splitlines())
    assert len(cards) == 4
    for card, sizes in cards.items():
        taken, limit = map(int, sizes.split())
        assert 0 < taken <= limit, card


# The real thing.

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]


class TestOnTheDevice:
    pytestmark = gpu
    PARTS: Sequence[Part] = (
        *(Part(past, 1) for past in (0, 575, 1023, 8191, 20_000)),
        Part(4000, 700),
        Part(0, 900, image=(300, 256)),
        Part(9000, 40),
        Part(1000, 300, gone=frozenset(range(3, 20))),
    )

    @pytest.mark.parametrize("kv_dtype", [None, FP8])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize(("heads", "head_dim"), [((16, 2), 128), ((2, 2), 64), ((4, 2), 256), ((1, 4), 256)])
    def test_real_shapes(self, heads, head_dim, dtype, kv_dtype):
        shape = Shape(32, *heads, 1024, dtype=dtype, kv_dtype=kv_dtype)
        measured = {1: range(len(self.PARTS))}
        layers = (LayerGroup.LOCAL, LayerGroup.GLOBAL)
        device = torch.device("cuda")
        check(shape, [*self.PARTS], device, measured, head_dim=head_dim, tuning=None, processors=None, layers=layers)

    @pytest.mark.parametrize(("kv_dtype", "widened_bytes"), [(None, 0), (FP8, 0), (FP8, 2**28), (FP8, 9 * 2**20)])
    @pytest.mark.parametrize(("keys", "stages"), [(64, None), (64, 4), (128, 2)])
    @pytest.mark.parametrize(
        ("block_size", "heads", "softcap"), [(16, (2, 4), None), (64, (1, 3), 0.8), (32, (16, 2), None)]
    )
    def test_prefills_by_each_kernel(self, block_size, heads, softcap, keys, stages, kv_dtype, widened_bytes):
        shape = Shape(block_size, *heads, 600, softcap, torch.bfloat16, kv_dtype)
        device = torch.device("cuda")
        # By 9 MiB, 4 of 16 heads' keys and values are widened at a time.
        parts = [Part(0, 1), Part(0, 1000), Part(1900, 1111, image=(700, 256)), Part(3, 4), Part(0, 64)]
        layers = (LayerGroup.LOCAL, LayerGroup.GLOBAL)
        launch = PrefillLaunch(keys, 8, 2, 1, rows=128, hopper_stages=stages)
        tuning = replace(Tuning.of(128, torch.bfloat16), prefill=launch, local_prefill=None)
        options = {"tuning": tuning, "processors": 8, "layers": layers, "widened_bytes": widened_bytes}
        check(shape, parts, device, head_dim=128, **options)
