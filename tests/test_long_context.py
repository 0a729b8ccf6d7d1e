"""128K tokens: what the KV cache of one sequence takes, and sequences that are far more than the device holds."""

import json
import random
import threading
from pathlib import Path

import pytest
import torch

from tests.gemma3_random import write_random_checkpoint
from wicore_backend import Engine, EngineConfig, SamplingParams
from wicore_backend.hmt.blocks import BlockManager, PrefixMatch
from wicore_backend.hmt.codecs import make_codec
from wicore_backend.hmt.layout import KVLayout, LayerGroup

CONTEXT = 131_072
CHUNK = 2048
DEMO = Path(__file__).resolve().parent.parent / "models" / "wicore-demo"


def test_a_sequence_of_128k_tokens_of_the_27b_takes_a_sixth_of_all_its_keys():
    groups = [LayerGroup.GLOBAL if layer % 6 == 5 else LayerGroup.LOCAL for layer in range(62)]
    layout = KVLayout.of(groups, block_size=32, kv_heads=16, head_dim=128, window=1024, bytes_per_value=2)
    books = BlockManager(layout, dict.fromkeys(LayerGroup, CONTEXT // 32 + 2), max_chunk=CHUNK)
    blocks = books.open(None, PrefixMatch(), max_tokens=CONTEXT, expected_tokens=CONTEXT)
    all_keys = len(groups) * 2 * CONTEXT * 16 * 128 * 2

    def taken(size_of) -> float:
        return float(sum(blocks.held(group) * size_of(group) for group in layout.groups) / all_keys)

    def fp8(group: LayerGroup) -> int:
        return make_codec("fp8", layout.block_shape(group), torch.bfloat16).encoded_bytes

    peak = 0.0
    for start in range(0, CONTEXT - CHUNK, CHUNK):
        assert books.extend(blocks, start, start + CHUNK)
        peak = max(peak, taken(layout.block_bytes))
    for position in range(CONTEXT - CHUNK, CONTEXT):
        assert books.extend(blocks, position, position + 1)
    assert taken(layout.block_bytes) <= 0.17
    assert taken(fp8) <= 0.085
    assert peak <= 0.185, "a chunk of the prompt takes more than its window beside it"
    books.check_integrity()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The demo model's heads and windows in one local and one global layer, for 128K tokens."""
    directory = tmp_path_factory.mktemp("long")
    demo = json.loads((DEMO / "config.json").read_text())["text_config"]
    kept = {name: demo[name] for name in ("vocab_size", "head_dim", "sliding_window", "query_pre_attn_scalar")}
    text = kept | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "layer_types": ["sliding_attention", "full_attention"],
        "max_position_embeddings": CONTEXT,
    }
    write_random_checkpoint(directory, text=text)
    for path in DEMO.iterdir():
        if path.suffix != ".safetensors" and path.name not in ("config.json", "README.md"):
            (directory / path.name).write_bytes(path.read_bytes())
    return directory


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sequences_of_128k_tokens_share_a_device_that_holds_one(checkpoint, tmp_path):
    prompts = [[2, *random.Random(n).choices(range(300, 2000), k=CONTEXT - 101)] for n in range(2)]
    greedy = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    config = EngineConfig(
        model=checkpoint,
        device="cpu",
        dtype="float32",
        max_batch_tokens=CHUNK,
        max_running=2,
        kv_cache_bytes=110_000_000,
        host_cache_bytes=100_000_000,
        nvme_cache_path=tmp_path,
        nvme_cache_bytes=600_000_000,
        nvme_codec="exact",
        limits={"max_prompt_tokens": CONTEXT - 1},
    )
    with Engine(config) as engine:
        pools, layout = engine._model.blocks.pools, engine._model.blocks.layout
        most, ended = dict.fromkeys(pools, 0), threading.Event()

        def watch() -> None:
            while not ended.wait(0.01):
                for group, pool in pools.items():
                    most[group] = max(most[group], pool.active)

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            first = engine.generate(prompts, greedy)
            again = engine.generate(prompts, greedy)
        finally:
            ended.set()
            watching.join()
        print([(r.usage.cached_tokens, r.usage.ttft_s, r.usage.total_s) for r in [*first, *again]], most)
        assert pools[LayerGroup.GLOBAL].capacity < 2 * CONTEXT // 32
        assert [r.token_ids for r in again] == [r.token_ids for r in first]
        assert min(r.usage.cached_tokens for r in again) > CONTEXT - 200
        assert most[LayerGroup.LOCAL] <= 2 * layout.blocks_held(LayerGroup.LOCAL, CONTEXT, CHUNK)
        engine._scheduler.check_integrity()
