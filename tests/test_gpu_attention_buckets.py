"""Plans of the GPU's paged attention that serve many steps: what they hold, refuse, and leave to others.

Where there is no GPU, the kernels run on the CPU under OpenAI Triton's interpreter, on small shapes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.attention_kit import HOLES, SMALL, Bench
from tests.paged_steps import DECODES, PREFILLS, Part, Shape, bits
from wicore_backend.attention.base import PackedStep
from wicore_backend.attention.gpu.hopper import widening
from wicore_backend.attention.gpu.rehearsal import rehearse
from wicore_backend.attention.gpu.tiling import Tiling
from wicore_backend.hmt.fp8 import FP8
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.hmt.pool import KVPools

pytestmark = pytest.mark.filterwarnings("ignore::Warning:triton.runtime.interpreter")


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none")
@pytest.mark.parametrize(("dtype", "kv_dtype"), [(torch.bfloat16, None), (torch.float32, None), (torch.bfloat16, FP8)])
def test_a_captured_graph_serves_other_steps(dtype, kv_dtype):
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
