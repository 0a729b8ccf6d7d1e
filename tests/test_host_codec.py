"""A host tier that keeps blocks encoded: what it holds, what the disk takes from it, and what comes back."""

import random
from typing import get_args

import pytest
import torch

from tests.test_tiers import PICTURE, SMALL, config, engine_on, greedy, talk
from wicore_backend import Engine, EngineConfig
from wicore_backend.engine.tiers import ColdStorage
from wicore_backend.errors import InvalidArgumentError
from wicore_backend.hmt.budget import divide_host_memory
from wicore_backend.hmt.codecs import CodecName, make_codec
from wicore_backend.hmt.cold_tier.staging import Stage
from wicore_backend.hmt.host_tier import SlotBlock
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.policy.lru import LRU
from wicore_backend.hmt.pool import KVPools, slot_bytes
from wicore_backend.hmt.transfers import Route, Transfer

G, L = LayerGroup.GLOBAL, LayerGroup.LOCAL
LAYOUT = KVLayout.of([L, L, G], block_size=16, kv_heads=2, head_dim=64, window=32, bytes_per_value=2)
BLOCKS, SLOTS = {G: 9, L: 9}, {G: 6, L: 6}


def pools_with(codec) -> KVPools:
    """On the CPU, with random blocks."""
    pools = KVPools.allocate(LAYOUT, BLOCKS, SLOTS, device=torch.device("cpu"), dtype=torch.bfloat16, host_codec=codec)
    generator = torch.Generator().manual_seed(0)
    for pool in pools.tensors.values():
        pool.copy_(torch.randn(pool.shape, generator=generator))
    return pools


def storage(directory, pools, codec) -> ColdStorage:
    return ColdStorage(
        directory,
        capacity_bytes=4 << 20,
        codec=codec,
        layout=LAYOUT,
        pools=pools,
        policy=LRU,
        fingerprint=b"a model",
        woken=lambda: None,
    )


def ended(cold: ColdStorage, count: int):
    finished: list = []
    while len(finished) < count:
        finished += cold.tier.finished()
    return finished


def name(number: int) -> bytes:
    return number.to_bytes(16, "little")


@pytest.mark.parametrize("codec", ["exact", "fp8", "q8", "q4"])
def test_a_slot_holds_what_the_codec_writes_and_a_block_what_it_reads(codec):
    pools = pools_with(codec)
    for group in (G, L):
        of_group = make_codec(codec, LAYOUT.block_shape(group), torch.bfloat16)
        block = pools.tensors[group][3:4].clone()
        record = of_group.encode(block)
        assert pools.apply([Transfer(Route.DEVICE_TO_HOST, group, 3, 5)]) is None
        assert torch.equal(pools.host[group][5].contiguous().view(torch.uint8).flatten(), record[0])
        pools.apply([Transfer(Route.HOST_TO_DEVICE, group, 5, 7)])
        decoded = torch.empty_like(block)
        of_group.decode(record, out=decoded)
        assert torch.equal(pools.tensors[group][7], decoded[0])


def test_the_same_memory_holds_nearly_twice_as_many_blocks_in_half_the_bytes():
    sizes = {codec: slot_bytes(LAYOUT, codec, torch.bfloat16) for codec in ("exact", "q8", "q4")}
    slots = {codec: divide_host_memory(BLOCKS, size, 10_000_000) for codec, size in sizes.items()}
    assert sizes["exact"] == {group: LAYOUT.block_bytes(group) for group in (G, L)}
    for group in (G, L):
        assert slots["q8"][group] > 1.9 * slots["exact"][group]
        assert slots["q4"][group] > 3.5 * slots["exact"][group]
    for codec, size in sizes.items():
        assert sum(slots[codec][group] * size[group] for group in (G, L)) <= 10_000_000


@pytest.mark.parametrize("codec", ["fp8", "q8", "q4"])
def test_the_disk_takes_the_bytes_as_they_are_and_gives_them_back(tmp_path, codec):
    pools = pools_with(codec)
    pools.apply([Transfer(Route.DEVICE_TO_HOST, group, n + 1, n) for group in (G, L) for n in range(4)])
    before = {group: pools.host[group].clone() for group in (G, L)}
    blocks = [SlotBlock(group, name(n), n) for group in (G, L) for n in range(4)]
    cold = storage(tmp_path, pools, codec)
    assert cold.tier.spill(blocks) == len(blocks)
    assert all(done.there for done in ended(cold, len(blocks)))
    for slots in pools.host.values():
        slots.zero_()
    cold.tier.restore([SlotBlock(group, name(n), 5 - n) for group in (G, L) for n in range(4)])
    assert all(done.there for done in ended(cold, len(blocks)))
    cold.close()
    for group in (G, L):
        assert torch.equal(pools.host[group][[5, 4, 3, 2]], before[group][:4])


def test_records_mean_the_same_whichever_tier_encoded_them(tmp_path):
    exact = pools_with("exact")
    exact.apply([Transfer(Route.DEVICE_TO_HOST, G, 1, 0)])
    cold = storage(tmp_path, exact, "q8")
    cold.tier.spill([SlotBlock(G, name(1), 0)])
    ended(cold, 1)
    cold.close()

    encoded = pools_with("q8")
    encoded.apply([Transfer(Route.DEVICE_TO_HOST, G, 1, 0)])
    cold = storage(tmp_path, encoded, "q8")
    cold.tier.restore([SlotBlock(G, name(1), 3)])
    assert all(done.there for done in ended(cold, 1))
    cold.close()
    assert torch.equal(encoded.host[G][3], encoded.host[G][0])


def test_slots_that_are_neither_blocks_nor_records_are_refused():
    codec = make_codec("q8", LAYOUT.block_shape(G), torch.bfloat16)
    with pytest.raises(InvalidArgumentError, match=r"torch\.uint8 \[slots, \d+\] of encoded blocks"):
        Stage(codec, torch.zeros(4, codec.encoded_bytes + 1, dtype=torch.uint8))


def test_the_setting_offers_what_there_is():
    assert get_args(EngineConfig.model_fields["host_cache_codec"].annotation) == get_args(CodecName)


def test_the_disk_cannot_encode_what_is_encoded_already(tmp_path):
    with pytest.raises(
        InvalidArgumentError, match=r"nvme_codec = 'exact'.*host_cache_codec = 'q8'; set both to the same"
    ):
        Engine(config(nvme_cache_path=tmp_path, host_cache_codec="q8", nvme_codec="exact"))


def test_half_the_bytes_in_host_memory_and_on_the_disk_give_the_same_answer_also_after_a_restart(tmp_path):
    with Engine(config(prefix_cache=False)) as engine:
        expected = engine.generate(talk(), greedy(), images=[PICTURE])
    with engine_on(tmp_path, host_cache_codec="q8", nvme_codec="q8") as engine:
        engine.generate(talk(), greedy(), images=[PICTURE])
    with engine_on(tmp_path, host_cache_codec="q8", nvme_codec="q8") as engine:
        again = engine.generate(talk(), greedy(), images=[PICTURE])
    assert again.usage.cached_tokens > 500
    assert again.token_ids == expected.token_ids


def test_host_memory_with_encoded_blocks_keeps_what_exact_ones_of_its_size_lose():
    prompts = [[2, *random.Random(n).choices(range(300, 1500), k=800)] for n in range(3)]
    cached: dict[str, int] = {}
    tokens: dict[str, list] = {}
    for codec in ("exact", "q8"):
        settings = {"host_cache_bytes": 6_000_000, "host_cache_codec": codec, "hmt_policy": "lru"}
        with Engine(config(**SMALL, **settings)) as engine:
            results = [engine.generate(prompt, greedy()) for _ in range(2) for prompt in prompts]
            engine._model.blocks.check_integrity()
        cached[codec] = sum(result.usage.cached_tokens for result in results[3:])
        tokens[codec] = [result.token_ids for result in results]
    assert cached["q8"] > 2000 > cached["exact"]
    assert tokens["q8"][:3] == tokens["exact"][:3], "what is computed, and not restored, is exact"
