"""Keys and values in FP8: half of the memory, kept as they are in every tier, and never taken for another type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_tiers import SMALL, config, engine_on, greedy, talk
from wicore_backend import Engine
from wicore_backend.errors import InvalidArgumentError
from wicore_backend.hmt.codecs import make_codec
from wicore_backend.hmt.cold_tier.staging import Stage, staging_for
from wicore_backend.hmt.fp8 import FP8, LARGEST, to_fp8
from wicore_backend.hmt.layout import LayerGroup

PICTURE = (Path(__file__).resolve().parent.parent / "client" / "wicore_client" / "assets" / "shapes.png").read_bytes()
FP8_KV: dict[str, Any] = {"kv_cache_dtype": "fp8"}


@pytest.fixture(scope="module")
def expected():
    """The answer by keys and values in FP8 that nothing has moved."""
    with Engine(config(**FP8_KV, prefix_cache=False)) as engine:
        return engine.generate(talk(), greedy(), images=[PICTURE])


def test_as_much_memory_holds_as_many_tokens_as_bytes_a_number_say():
    blocks: dict[str, int] = {}
    for kv_cache_dtype in ("auto", "fp8"):
        with Engine(config(**SMALL, kv_cache_dtype=kv_cache_dtype, host_cache_bytes=3_000_000)) as engine:
            pools, layout = engine._model.pools, engine._model.blocks.layout
            for group, pool in pools.tensors.items():
                assert pool[0].nbytes == layout.block_bytes(group) == pools.host[group][0].nbytes
            blocks[kv_cache_dtype] = len(pools.tensors[LayerGroup.GLOBAL])
            assert sum(pool.nbytes for pool in pools.tensors.values()) <= SMALL["kv_cache_bytes"]
            assert sum(slots.nbytes for slots in pools.host.values()) <= 3_000_000
            assert engine.generate("What is 12 + 7?", greedy(20, ignore_eos=False)).text == "19"
    assert blocks["fp8"] == 65 > blocks["auto"], "room for all that two sequences can use"


def test_another_tenant_of_the_prefix_cache_is_answered_as_the_first():
    with Engine(config(**FP8_KV)) as engine:
        first, second = (engine.generate(talk(), greedy(), images=[PICTURE]) for _ in range(2))
    assert second.usage.cached_tokens > first.usage.cached_tokens == 0
    assert first.token_ids == second.token_ids


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none")
def test_a_gpu_answers_as_the_cpu(expected):
    with Engine(config(**FP8_KV, device="cuda", kv_cache_bytes=2**30)) as engine:
        answers = [engine.generate(talk(), greedy(), images=[PICTURE]) for _ in range(2)]
    assert answers[1].usage.cached_tokens > answers[0].usage.cached_tokens == 0
    assert [answer.token_ids for answer in answers] == [expected.token_ids] * 2


def test_blocks_come_back_from_host_memory_and_from_the_disk_as_they_were(tmp_path, expected):
    with engine_on(tmp_path, nvme_codec=None, **FP8_KV) as engine:
        first = engine.generate(talk(), greedy(), images=[PICTURE])
    with engine_on(tmp_path, nvme_codec=None, **FP8_KV) as engine:
        again = engine.generate(talk(), greedy(), images=[PICTURE])
    assert again.usage.cached_tokens >= again.usage.prompt_tokens - 32
    assert first.token_ids == again.token_ids == expected.token_ids


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ({}, FP8_KV),
        (FP8_KV, {}),
        (FP8_KV, FP8_KV | {"dtype": "bfloat16"}),
    ],
    ids=["float32 as FP8", "FP8 as float32", "FP8 computed in another type"],
)
def test_a_block_is_a_miss_to_who_would_have_written_it_otherwise(written, read, tmp_path):
    prompt = [2, *range(300, 600)]
    with engine_on(tmp_path, **written) as engine:
        engine.generate(prompt, greedy(2))
    with engine_on(tmp_path, **written) as engine:
        assert engine.generate(prompt, greedy(2)).usage.cached_tokens > 250
    with engine_on(tmp_path, **read) as engine:
        assert engine.generate(prompt, greedy(2)).usage.cached_tokens == 0


@pytest.mark.parametrize("setting", ["host_cache_codec", "nvme_codec"])
def test_what_is_rounded_once_is_not_rounded_again(setting, tmp_path):
    with pytest.raises(
        InvalidArgumentError, match=rf"{setting} = 'q8': with kv_cache_dtype = 'fp8'.*set it to 'exact'"
    ):
        Engine(config(**FP8_KV, nvme_cache_path=tmp_path, **{setting: "q8"}))


@pytest.mark.parametrize("name", ["fp8", "q8", "q4"])
def test_lossy_codecs_take_no_rounded_blocks(name):
    with pytest.raises(InvalidArgumentError, match=rf"{name} cannot encode blocks of torch\.float8_e4m3fn"):
        make_codec(name, (2, 2, 16, 1, 64), FP8)


def test_exact_records_keep_every_byte_there_is():
    codec = make_codec("exact", (2, 2, 8, 1, 16), FP8)
    blocks = torch.arange(256, dtype=torch.uint8).repeat(4).view(FP8).view(2, 2, 2, 8, 1, 16)
    decoded = torch.empty_like(blocks)
    codec.decode(codec.encode(blocks), out=decoded)
    assert codec.encoded_bytes == 512
    assert torch.equal(decoded.view(torch.uint8), blocks.view(torch.uint8))
    assert codec.fingerprint != make_codec("exact", (2, 2, 8, 1, 16), torch.bfloat16).fingerprint


def test_blocks_in_scattered_slots_are_staged_as_they_are():
    codec = make_codec("exact", (1, 2, 4, 1, 8), FP8)
    slots = torch.randint(256, (6, 1, 2, 4, 1, 8), dtype=torch.uint8).view(FP8)
    before = slots.view(torch.uint8).clone()
    stage = Stage(codec, slots)
    records = torch.empty(3, codec.encoded_bytes, dtype=torch.uint8)
    staging = staging_for([stage])
    stage.encode([4, 1, 3], records, staging)
    stage.decode(records, [0, 5, 2], staging)
    after = slots.view(torch.uint8)
    assert torch.equal(after[[0, 5, 2]], before[[4, 1, 3]])
    assert torch.equal(after[[4, 1, 3]], before[[4, 1, 3]])


def test_numbers_are_rounded_to_the_nearest_and_stay_finite():
    every = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    finite = every[every.isfinite()].unique()
    middles = (finite[1:] + finite[:-1]) / 2
    beyond = torch.tensor([1e30, -1e30, torch.inf, -torch.inf, torch.nan])
    assert to_fp8(beyond).float().tolist() == [LARGEST, -LARGEST, LARGEST, -LARGEST, 0]
    assert torch.equal(to_fp8(finite).float(), finite)
    for nudge, nearest in ((0.999, finite), (1.001, finite)):
        numbers = middles * nudge
        expected = nearest[(numbers[:, None] - nearest).abs().argmin(1)]
        assert torch.equal(to_fp8(numbers).float(), expected)
    halves = to_fp8(middles).view(torch.uint8)
    assert (halves % 2 == 0).all(), "half to even"
