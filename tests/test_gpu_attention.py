"""The GPU's paged attention against its plain twin, on random steps over a pool that is NaN wherever nothing is.

Where there is no GPU, the kernels run on the CPU under OpenAI Triton's interpreter, on small shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.kernel_kit import run_alone
from tests.paged_steps import DECODES, LAYERS, PREFILLS, SCALE, Part, Shape, bits, step_of, store
from wicore_backend.attention.base import PackedStep
from wicore_backend.attention.gpu import hopper
from wicore_backend.attention.gpu.hopper import Widening, widening
from wicore_backend.attention.gpu.kernels.widen import widen_kernel
from wicore_backend.attention.gpu.paged import GpuPagedAttention
from wicore_backend.attention.gpu.rehearsal import rehearse
from wicore_backend.attention.gpu.tiling import Tiling
from wicore_backend.attention.gpu.tuning import Launch, PrefillLaunch, Tuning
from wicore_backend.attention.torch_paged import TorchPagedAttention
from wicore_backend.hmt.fp8 import FP8, to_fp8
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.pool import KVPools

pytestmark = pytest.mark.filterwarnings("ignore::Warning:triton.runtime.interpreter")

NAN = 0x7F
"""Of e4m3."""
SMALL = Tuning(Launch(16, 4, 2, 1), PrefillLaunch(16, 4, 1, 1, rows=16, least_keys=16))
"""Small tiles, so that short sequences have several."""


@dataclass
class Bench:
    """The GPU's attention and its twin over pools with the same keys and values."""

    shape: Shape
    parts: list[Part]
    device: torch.device
    head_dim: int = 16
    tuning: Tuning | None = SMALL
    processors: int | None = 4
    layers: Sequence[LayerGroup] = LAYERS
    widened_bytes: int = 2**28
    pool_blocks: int | None = None
    """Of each pool; by default what the parts take."""

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.layout = KVLayout.of(
            self.layers,
            block_size=self.shape.block_size,
            kv_heads=self.shape.kv_heads,
            head_dim=self.head_dim,
            window=self.shape.window,
            bytes_per_value=self.shape.stored.itemsize,
        )
        self.blocks = sum(self.counts) + 3 if self.pool_blocks is None else self.pool_blocks
        self.expected_pools, self.pools = self._pools(torch.float32), self._pools(self.shape.stored)
        self.empty()
        settings: dict[str, Any] = {"scale": SCALE, "window": self.shape.window, "softcap": self.shape.softcap}
        self.twin = TorchPagedAttention(self.expected_pools, **settings)
        self.attention = self.over(self.pools, processors=self.processors, widened_bytes=self.widened_bytes)

    @property
    def counts(self) -> list[int]:
        """Of each part the blocks."""
        return [-(-(part.past + part.new) // self.shape.block_size) for part in self.parts]

    def over(self, pools: KVPools, /, *, processors: int | None, widened_bytes: int) -> GpuPagedAttention:
        return GpuPagedAttention(
            pools,
            query_heads=self.shape.kv_heads * self.shape.group_size,
            scale=SCALE,
            window=self.shape.window,
            softcap=self.shape.softcap,
            dtype=self.shape.dtype,
            tuning=self.tuning,
            processors=processors,
            widened_bytes=widened_bytes,
        )

    def _pools(self, dtype: torch.dtype) -> KVPools:
        return KVPools.allocate(self.layout, dict.fromkeys(LayerGroup, self.blocks), device=self.device, dtype=dtype)

    def empty(self) -> None:
        """Leave nothing in the pools."""
        for expected, pool in zip(self.expected_pools.tensors.values(), self.pools.tensors.values(), strict=True):
            expected.zero_()
            bits(pool).fill_(NAN if pool.dtype == FP8 else torch.nan)

    def random(self, *size: int) -> Tensor:
        random = torch.randn(*size, generator=self.generator, device=self.device)
        return random.to(self.shape.dtype)

    def stored(self, numbers: Tensor) -> Tensor:
        """float32, as the pools hold them."""
        return (to_fp8(numbers) if self.shape.stored == FP8 else numbers).float()

    def step(self, measured: Mapping[int, Sequence[int]] | None = None, *, seed: int = 0) -> PackedStep:
        """The parts' step, over whose past the pools are filled."""
        step = step_of(self.shape, self.parts, self.counts, self.blocks, np.random.default_rng(seed), measured or {})
        for group, index in self.layout.layers:
            if group not in self.layout.groups:
                continue
            past = [self.stored(self.random(2, part.past, self.shape.kv_heads, self.head_dim)) for part in self.parts]
            for pools in (self.expected_pools, self.pools):
                store(pools.tensors[group], index, step.block_tables[group], past, [0] * len(past))
        return step

    def qkv(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """As an executor makes them: parts of one tensor."""
        heads = self.shape.kv_heads
        fused = self.random(tokens, heads * (self.shape.group_size + 2), self.head_dim)
        queries = heads * self.shape.group_size
        return fused[:, :queries], fused[:, queries:-heads], fused[:, -heads:]

    def check(self, step: PackedStep, plan, *, rows: int | None = None) -> list[Tensor]:
        """Attend in all layers, by `plan`, of which the step's rows are the first; returns each layer's result."""
        tokens = len(step.positions)
        expected_plan = self.twin.plan(step)
        results = []
        for layer, (group, _) in enumerate(self.layout.layers):
            q, k, v = self.qkv(rows or tokens)
            attended = self.attention.attend(plan, layer, q, k, v)
            new = (self.stored(x[:tokens]) for x in (k, v))
            expected = self.twin.attend(expected_plan, layer, q[:tokens].float(), *new)
            error = (attended[:tokens].float() - expected).norm() / expected.norm()
            assert error <= (1e-5 if self.shape.dtype is torch.float32 else 1e-2), f"layer {layer}: {error}"
            assert attended.isfinite().all()
            pool, expected_pool = self.pools.tensors[group].float(), self.expected_pools.tensors[group]
            written = ~pool.isnan()
            assert torch.equal(pool[written], expected_pool[written])
            assert (expected_pool[~written] == 0).all(), "keys or values have not been written"
            results.append(attended.clone())
        self.check_mass(self.attention.mass(plan), self.twin.mass(expected_plan))
        return results

    def check_mass(
        self, masses: Mapping[int, NDArray[np.float32]], expected: Mapping[int, NDArray[np.float32]]
    ) -> None:
        assert masses.keys() == expected.keys()
        for sequence, mass in masses.items():
            assert mass.dtype == np.float32
            np.testing.assert_allclose(
                mass, expected[sequence], atol=1e-5 if self.shape.dtype is torch.float32 else 1e-2
            )
            assert mass.sum() == pytest.approx(1, abs=1e-4 if self.shape.dtype is torch.float32 else 1e-2)


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


HOLES = [
    Part(31, 1, gone=frozenset({2, 3, 5})),
    Part(33, 1),
    Part(100, 1, gone=frozenset(range(1, 24))),
    Part(64, 1, gone=frozenset(range(16))),
    Part(32, 9, gone=frozenset(range(8))),
    Part(25, 12, image=(2, 6), gone=frozenset({1, 4})),
]


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


# A plan that serves many steps.


def test_a_bucket_serves_whatever_fits_it_at_the_same_addresses(kernel_device):
    steps = [
        (DECODES, {1: [0, 4], 3: [2]}),
        (HOLES[:4], {3: [0, 1]}),
        ([Part(7, 1)], {}),
    ]
    bench = Bench(Shape(kv_heads=1), DECODES, kernel_device, pool_blocks=70)
    bucket = bench.attention.decode_bucket(sequences=6, max_keys=120)
    before = [result.data_ptr() for result in (bucket.plan.out, bucket.plan.decodes[LayerGroup.GLOBAL].items)]
    for parts, measured in steps:
        bench.empty()
        bench.parts = parts
        step = bench.step(measured)
        bench.check(step, bench.attention.refresh(bucket, step), rows=6)
    assert before == [result.data_ptr() for result in (bucket.plan.out, bucket.plan.decodes[LayerGroup.GLOBAL].items)]


@pytest.mark.parametrize("window", [10, 64], ids=["beyond the window", "within it"])
def test_a_bucket_serves_a_prompt_by_itself(window, kernel_device):
    """Whose groups see the same within the window, where one's tiles serve both, whatever tiles of keys they have."""
    tuning = replace(SMALL, prefill=replace(SMALL.prefill, keys=32), local_prefill=SMALL.prefill)
    shape = Shape(window=window)
    bench = Bench(shape, [Part(0, 40)], kernel_device, tuning=tuning, processors=1, pool_blocks=20)
    out = torch.zeros(40, 4 * 16, device=kernel_device)
    bucket = bench.attention.prompt_bucket(max_keys=60, out=out)
    for part in (Part(0, 40), Part(17, 23, image=(5, 9)), Part(0, 3), Part(30, 20, gone=frozenset({1, 2}))):
        bench.empty()
        bench.parts = [part]
        step = bench.step({1: [0]})
        bench.check(step, bench.attention.refresh_prompt(bucket, step), rows=40)


def test_a_bucket_refuses_what_it_has_no_room_for_and_stays_as_it_was(kernel_device):
    bench = Bench(Shape(), DECODES[:2], kernel_device, pool_blocks=50)
    decodes, measured = bench.attention.decode_bucket(sequences=2, max_keys=40), bench.step({1: [0, 1]})
    bench.attention.refresh(decodes, measured)
    asked = decodes.plan.measurements
    mass_less = bench.attention.decode_bucket(sequences=2, max_keys=40, measures=False)
    for parts, of_layers, bucket, words in (
        (PREFILLS[:1], {}, decodes, "1 of the step's sequences are prefills"),
        (DECODES[:3], {}, decodes, "3 decodes do not fit a bucket of 2"),
        (DECODES[4:], {}, decodes, "101 keys does not fit a bucket of 40"),
        (DECODES[:2], {1: [0, 1], 3: [0]}, decodes, "3 measurements of mass do not fit a bucket with room for 2"),
        (DECODES[:2], {1: [0]}, mass_less, "1 measurements of mass do not fit a bucket with room for 0"),
        (DECODES[:2], {0: [0]}, decodes, r"asked of layers \[0\], which are local"),
    ):
        bench.parts = parts
        with pytest.raises(ValueError, match=words):
            bench.attention.refresh(bucket, bench.step(of_layers))
        assert bucket.plan.measurements is (asked if bucket is decodes else None)
    prompt = bench.attention.prompt_bucket(max_keys=30, out=torch.zeros(16, 4 * 16, device=kernel_device))
    mass_less = bench.attention.prompt_bucket(max_keys=30, out=prompt.plan.out, measures=False)
    for parts, of_layers, bucket, words in (
        (PREFILLS[:2], {}, prompt, "given 2 sequences"),
        (DECODES[2:3], {}, prompt, "given 1 sequences"),
        (PREFILLS[3:], {}, prompt, "20 tokens of 20 keys, .* do not fit a bucket of 16 tokens, 30 keys"),
        ([Part(25, 9)], {}, prompt, "9 tokens of 34 keys, .* do not fit a bucket of 16 tokens, 30 keys"),
        (PREFILLS[:1], {1: [0], 3: [0]}, mass_less, r"asked of layers \[1, 3\]; a bucket has room for \[\]"),
    ):
        bench.parts = parts
        with pytest.raises(ValueError, match=words):
            bench.attention.refresh_prompt(bucket, bench.step(of_layers))
        assert bucket.plan.measurements is None


@pytest.mark.parametrize(("stored", "widened_heads"), [(None, []), (FP8, [2, 1])])
def test_what_no_bucket_launches_is_rehearsed_over_pools_of_its_own(stored, widened_heads, kernel_device):
    shape = Shape(32, kv_heads=2, window=2000, dtype=torch.float16, kv_dtype=stored)
    bench = Bench(shape, [Part(0, 1)], kernel_device, processors=16)
    for pool in bench.pools.tensors.values():
        bits(pool).zero_()
    plans, heads = [], []

    def make(pools: KVPools, /, *, processors: int | None, widened_bytes: int) -> Any:
        attention = bench.over(pools, processors=processors or 16, widened_bytes=widened_bytes)
        plan = attention.plan

        def noted(step: PackedStep) -> Any:
            plans.append(plan(step))
            blocks, tiles = (
                len(step.block_tables[LayerGroup.GLOBAL][0]),
                plans[-1].prefills[LayerGroup.GLOBAL].num_items,
            )
            counts = {"first_block": 0, "blocks": blocks, "tiles": tiles, "sequences": 1, "programs": processors or 16}
            if widened := widening(pools.layout, memory_bytes=widened_bytes, **counts):
                heads.append(widened.heads)
            return plans[-1]

        attention.plan = noted
        return attention

    rehearse(bench.pools, make, tiling=Tiling(bench.layout, 4, SMALL, 16), dtype=torch.float16)
    assert all(of_group.scratch is not None for of_group in plans[0].prefills.values()), "keys are not shared out"
    assert heads == widened_heads, "not as many heads at once as can be"
    assert not any(bits(pool).any() for pool in bench.pools.tensors.values())


def test_the_kernels_for_hopper_compile_without_one():
    # Two warpgroups, each with a first tile, those after it and the last: products in steps of 16.
    assert run_alone("tests.compile_hopper_prefill").splitlines() == [
        "64 4 products 64 copies 8 widened 0",
        "128 2 products 96 copies 16 widened 0",
        "64 4 products 64 copies 12 widened 64",
        "128 2 products 96 copies 24 widened 128",
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

    @pytest.mark.parametrize(
        ("dtype", "kv_dtype"), [(torch.bfloat16, None), (torch.float32, None), (torch.bfloat16, FP8)]
    )
    def test_a_captured_graph_serves_other_steps(self, dtype, kv_dtype):
        shape, device = Shape(32, 4, 2, 1024, dtype=dtype, kv_dtype=kv_dtype), torch.device("cuda")
        layers = (LayerGroup.LOCAL, LayerGroup.GLOBAL)
        lengths = [[5, 700, 1500, 9000], [9001, 30], [8000, 8000, 8000, 8000], [0]]
        bench = Bench(shape, [Part(9000, 1)] * 4, device, head_dim=128, tuning=None, processors=None, layers=layers)
        bucket = bench.attention.decode_bucket(sequences=4, max_keys=9100)
        qkv = [tuple(x.clone() for x in bench.qkv(4)) for _ in layers]
        results = [torch.empty_like(bucket.plan.out) for _ in layers]

        def run():
            for layer, result in enumerate(results):
                result.copy_(bench.attention.attend(bucket.plan, layer, *qkv[layer]))

        bench.attention.refresh(bucket, bench.step())
        with torch.cuda.stream(torch.cuda.Stream()):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        for past in lengths:
            bench.parts = [Part(length, 1) for length in past]
            step = bench.step({1: range(len(past))})
            for layer, (q, k, v) in enumerate(bench.qkv(4) for _ in layers):
                for static, new in zip(qkv[layer], (q, k, v), strict=True):
                    static.copy_(new)
            bench.attention.refresh(bucket, step)
            later = None
            for _ in range(3):  # The counters have to be back at zero.
                graph.replay()
                later = bench.attention.collect(bucket.plan)
            expected_plan = bench.twin.plan(step)
            for layer, result in enumerate(results):
                q, k, v = (x[: len(past)] for x in qkv[layer])
                expected = bench.twin.attend(expected_plan, layer, q.float(), bench.stored(k), bench.stored(v))
                error = (result[: len(past)].float() - expected).norm() / expected.norm()
                assert error <= (1e-5 if dtype is torch.float32 else 1e-2)
            bench.check_mass(later(), bench.twin.mass(expected_plan))
