"""Decodes are told to the kernel that takes them, and to no other: `HopperDecode` up to so many, where there is one.

A plain twin stands in for it here; what the kernel itself computes: `test_hopper_decode_on_cpu.py`.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.attention_kit import HOLES, SMALL, Bench
from tests.paged_steps import DECODES, LAYERS, PREFILLS, SCALE, Part, Shape
from wicore_backend.attention.gpu import hopper_decode, tile_scheduler
from wicore_backend.attention.gpu.hopper_decode import MOST
from wicore_backend.attention.gpu.plans import DecodeItems, DecodeWork
from wicore_backend.attention.gpu.schedule import WORK_FIELDS, WORK_KEYS
from wicore_backend.attention.gpu.tuning import Launch, Tuning
from wicore_backend.hmt.layout import LayerGroup

pytestmark = pytest.mark.filterwarnings("ignore::Warning:triton.runtime.interpreter")

LOG2_E = np.log2(np.e)
BY_TILES = Tuning(Launch(WORK_KEYS, 4, 2, 1), SMALL.prefill)
"""Attention mass is that of the tiles that `HopperDecode` has."""
SHAPE = Shape(block_size=WORK_KEYS, window=50)
HELD = [Part(0, 1), Part(31, 1), Part(32, 1), Part(200, 1), Part(130, 1, gone=frozenset({0, 2}))]


class PlainDecode:
    """`HopperDecode` in PyTorch, for numbers of any type."""

    def __init__(self) -> None:
        self.launches: list[tuple[LayerGroup, int]] = []

    def __call__(
        self, group, sequences, q, k, v, pool, out, work, tables, *, layer_at, block_stride, mass_at=None, mass=None
    ):
        self.launches.append((group, sequences))
        size, heads, layer = pool.shape[3], pool.shape[4], layer_at // pool.stride(1)
        assert block_stride == pool.stride(0)
        assert len(work) == (sequences + 1) * WORK_FIELDS
        records = work.view(-1, WORK_FIELDS).tolist()
        for row, ((before, lowest, fresh, table_at), (after, *_)) in enumerate(pairwise(records)):
            if before == after:
                continue
            assert after - before == fresh // WORK_KEYS + 1 - lowest // WORK_KEYS
            blocks = tables[table_at : table_at + fresh // size + 1].long()
            pool[blocks[-1], layer, :, fresh % size] = torch.stack([k[row], v[row]])
            shared = q.shape[1] // heads
            keys, values = (
                of_blocks.flatten(0, 1)[: fresh + 1].repeat_interleave(shared, 1)
                for of_blocks in pool[blocks, layer].unbind(1)
            )
            scores = torch.einsum("hd,thd->ht", q[row], keys)[:, lowest:] * SCALE
            out[row] = torch.einsum("ht,thd->hd", scores.softmax(1), values[lowest:]).flatten()
            if mass is not None and mass_at[row] >= 0:
                tiles = [scores[:, at : min(at + WORK_KEYS, fresh)] for at in range(0, fresh + 1, WORK_KEYS)]
                for place, part in enumerate((*tiles, scores[:, -1:], scores), int(mass_at[row])):
                    mass[place] = part.logsumexp(1) * LOG2_E


@pytest.fixture
def plain(monkeypatch) -> PlainDecode:
    """Attentions that are made have it."""
    kernel = PlainDecode()
    monkeypatch.setattr(hopper_decode, "hopper_decode", lambda *_, **__: kernel)
    return kernel


@pytest.fixture
def forbidden(monkeypatch):
    """Makes one of `TileScheduler`'s books fail."""

    def fail(*_, **__):
        raise AssertionError("worked out for nobody")

    return lambda name: monkeypatch.setattr(tile_scheduler, name, fail)


def bench_of(parts, device, **more) -> Bench:
    return Bench(SHAPE, parts, device, tuning=BY_TILES, **more)


@pytest.mark.parametrize(
    "parts", [HELD, HELD + PREFILLS, [Part(40, 1)] * MOST], ids=["decodes", "with prefills", "the most"]
)
def test_hopper_s_kernel_is_told_of_sequences_and_of_no_items(parts, plain, forbidden, kernel_device):
    forbidden("decode_items")
    bench = bench_of(parts, kernel_device)
    step = bench.step({1: range(len(parts)), 3: [0]})
    plan = bench.attention.plan(step)
    assert all(isinstance(of_group, DecodeWork) for of_group in plan.decodes.values())
    bench.check(step, plan)
    assert plain.launches == [(group, step.decodes) for group, _ in bench.layout.layers]


def test_more_decodes_than_it_takes_are_shared_out_as_items(plain, forbidden, kernel_device):
    forbidden("decode_work")
    shape = replace(SHAPE, kv_heads=1)
    bench = Bench(shape, [Part(3, 1)] * (MOST + 1), kernel_device, tuning=BY_TILES, layers=LAYERS[:2])
    step = bench.step({1: [MOST]})
    plan = bench.attention.plan(step)
    assert all(isinstance(of_group, DecodeItems) for of_group in plan.decodes.values())
    bench.check(step, plan)
    assert not plain.launches


@pytest.mark.parametrize("parts", [DECODES, DECODES + PREFILLS], ids=["decodes", "with prefills"])
def test_where_there_is_no_such_kernel_nothing_is_worked_out_for_it(parts, forbidden, kernel_device):
    forbidden("decode_work")
    bench = bench_of(parts, kernel_device)
    step = bench.step({1: [0]})
    bench.check(step, bench.attention.plan(step))
    bucket = bench.attention.decode_bucket(sequences=5, max_keys=120)
    bench.parts = DECODES
    step = bench.step({3: [0, 4]})
    bench.check(step, bench.attention.refresh(bucket, step), rows=5)


def test_a_step_of_prefills_alone_has_no_decodes(plain, kernel_device):
    bench = bench_of(PREFILLS, kernel_device)
    step = bench.step()
    plan = bench.attention.plan(step)
    assert not plan.decodes
    bench.check(step, plan)
    assert not plain.launches


def addresses(bucket):
    return [of_group.work.data_ptr() for of_group in bucket.plan.decodes.values()]


def test_a_bucket_for_hopper_s_kernel_serves_whatever_fits_it(plain, forbidden, kernel_device):
    """Its idle rows are left alone, whatever step was there before."""
    forbidden("decode_items")
    bench = bench_of(HELD, kernel_device, pool_blocks=40)
    bucket = bench.attention.decode_bucket(sequences=6, max_keys=201)
    before = addresses(bucket)
    for parts, measured in (HELD, {1: [0, 3], 3: [2]}), (HELD[2:4], {3: [0, 1]}), (HOLES[:4], {}), ([Part(7, 1)], {}):
        bench.empty()
        bench.parts = parts
        step = bench.step(measured)
        bench.check(step, bench.attention.refresh(bucket, step), rows=6)
    assert addresses(bucket) == before
    assert {sequences for _, sequences in plain.launches} == {6}


@pytest.mark.usefixtures("plain")
def test_an_idle_bucket_for_hopper_s_kernel_has_no_tiles(kernel_device):
    plan = bench_of(HELD, kernel_device).attention.decode_bucket(sequences=3, max_keys=40).plan
    assert not any(of_group.work.any() for of_group in plan.decodes.values())


def test_a_bucket_of_more_than_it_takes_serves_few_as_well(plain, forbidden, kernel_device):
    """Its graph was recorded with the other kernel."""
    forbidden("decode_work")
    bench = bench_of(HELD, kernel_device)
    bucket = bench.attention.decode_bucket(sequences=MOST + 1, max_keys=201)
    step = bench.step({1: [3]})
    bench.check(step, bench.attention.refresh(bucket, step), rows=MOST + 1)
    assert not plain.launches
