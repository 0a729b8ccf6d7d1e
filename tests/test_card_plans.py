"""Plans for cards: their arithmetic is the engine's, it adds up, and what is planned fits."""

import re
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from scripts.card_memory import MODELS, describe, with_tables
from scripts.random_gemma3 import published_config
from wicore_backend.config import EngineConfig
from wicore_backend.devices.cards import CARDS
from wicore_backend.devices.memory import CardMemory, kv_layout, segment_bytes, sequence_bytes, workspace_bytes
from wicore_backend.devices.plans import PLANS
from wicore_backend.engine.cache_memory import host_cache_bytes, image_cache_bytes, kv_cache_bytes
from wicore_backend.errors import InvalidArgumentError
from wicore_backend.executor.segments.contract import Precision, Segment, SegmentKind, segments
from wicore_backend.executor.tensorrt.profiles import MAX_IMAGES
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.models.gemma3.tensor_names import expected_shapes

DOCS = Path(__file__).resolve().parents[1] / "docs"
DEMO = Path(__file__).resolve().parents[1] / "models" / "wicore-demo"
TABLES = re.compile(r"<!-- tables.*?<!-- end of tables -->", re.DOTALL)
NUMBER = re.compile(r"\d[\d,]*\.?\d*")
GIB, MIB, KIB = 2**30, 2**20, 2**10


@pytest.fixture(scope="module")
def of_27b() -> Gemma3Config:
    return published_config("gemma-3-27b")


def memory_of(name: str, **settings: object) -> CardMemory:
    plan = PLANS[name]
    changed = replace(plan, settings={**plan.settings, **settings})
    return changed.memory(published_config(plan.model), Path("model"))


def test_a_token_and_a_window_of_the_27b_take_what_they_were_measured_to(of_27b):
    layout = kv_layout(of_27b, EngineConfig(model=Path("model")), Precision.BF16)
    assert layout.block_bytes(LayerGroup.GLOBAL) / layout.block_size == 80 * KIB
    assert layout.block_bytes(LayerGroup.LOCAL) // layout.block_size * layout.window == 416 * MIB
    sizes = sequence_bytes(layout, 131_072, max_chunk=1)
    assert sizes[LayerGroup.GLOBAL] == 10 * GIB
    assert sum(sizes.values()) / GIB == pytest.approx(10.4, abs=0.05)
    of_all = sum(layout.block_bytes(group) / layout.layers_in[group] for group in layout.groups) / 2 * 62
    assert of_all / layout.block_size * 131_072 / GIB == pytest.approx(62, abs=0.1)


def test_fp8_keys_and_values_take_half(of_27b):
    exact, fp8 = (
        sequence_bytes(
            kv_layout(of_27b, EngineConfig(model=Path("model"), kv_cache_dtype=kv), Precision.BF16),
            32_768,
            max_chunk=512,
        )
        for kv in ("auto", "fp8")
    )
    assert {group: 2 * size for group, size in fp8.items()} == exact


def test_weights_of_the_27b_take_what_they_were_measured_to(of_27b):
    def decoder(precision: Precision) -> int:
        sizes = segment_bytes(of_27b, precision)
        return sum(sizes.values()) - sizes[Segment(SegmentKind.VISION)]

    assert decoder(Precision.BF16) / 1e9 == pytest.approx(54.0, abs=0.1)
    assert 14e9 < decoder(Precision.INT4) < 17e9
    mid = Segment(SegmentKind.MID, 30)
    assert segment_bytes(of_27b, Precision.BF16)[mid] / MIB == pytest.approx(790, rel=0.01)
    assert segment_bytes(of_27b, Precision.INT4)[mid] / MIB == pytest.approx(206, rel=0.02)


@pytest.mark.parametrize("model", MODELS)
def test_every_tensor_but_the_token_table_is_in_one_segment(model):
    config = published_config(model)
    sizes = segment_bytes(config, Precision.FP32)
    tensors = {name: 4 * prod(shape) for name, shape in expected_shapes(config).items()}
    assert sum(sizes.values()) == sum(tensors.values()) - tensors["text.embed_tokens.weight"]
    assert list(sizes) == list(segments(config))
    assert all(sizes.values())


def test_segments_of_the_demo_model_are_sized_as_its_layers_are():
    config = Gemma3Config.from_checkpoint(DEMO)
    sizes = segment_bytes(config, Precision.FP32)
    text = config.text
    qkv = text.qkv_heads * text.head_dim * text.hidden_size + 2 * text.head_dim
    assert sizes[Segment(SegmentKind.FIRST)] == 4 * (qkv + text.hidden_size)


@pytest.mark.parametrize("name", PLANS)
def test_what_is_planned_fits_and_adds_up(name):
    plan, memory = PLANS[name], memory_of(name)
    context = memory.settings.context(memory.config.text.max_position_embeddings)
    assert plan.precision in plan.card.precisions
    assert memory.longest >= context
    assert memory.sequences(context) >= 1
    assert memory.reserve > 0.2 * GIB
    parts = [*memory.weights.values(), *memory.working.values(), memory.kv_cache, memory.reserve]
    assert sum(parts) == plan.card.memory_bytes
    assert all(size >= 0 for size in parts)
    pools = sum(memory.blocks[group] * memory.layout.block_bytes(group) for group in memory.layout.groups)
    assert pools <= memory.kv_cache
    assert ("embedding table" in memory.on_host) is memory.settings.host_embeddings
    assert memory.host_tokens > 0
    assert memory.disk_tokens > memory.host_tokens


def test_a_plan_says_when_a_context_does_not_fit():
    memory = memory_of("rtx4090-27b", kv_cache_dtype="auto", max_model_len=131_072)
    assert 0 < memory.longest < 131_072
    assert f"does not fit: the longest sequence that it holds is {memory.longest:,}" in describe(
        PLANS["rtx4090-27b"], memory
    )
    with pytest.raises(InvalidArgumentError, match="one sequence of max_model_len = 131,072 tokens takes"):
        memory.sequences(8192)
    shorter = memory_of("rtx4090-27b", kv_cache_dtype="auto", max_model_len=memory.longest)
    assert shorter.sequences(memory.longest) == 1


def test_workspace_is_what_the_library_said_of_the_27b(of_27b):
    """docs/benchmarks/tensorrt.md: 88,080,384 bytes of a `mid` for 512 tokens, 367,525,888 of the tower for 4."""
    settings = EngineConfig(model=Path("model"), max_running=8)
    tower, decoder = 367_525_888 * MAX_IMAGES // 4, 88_080_384
    assert workspace_bytes(of_27b, settings, Precision.INT4) == pytest.approx(tower + decoder, rel=0.01)
    without = replace(of_27b, vision=None)
    assert workspace_bytes(without, settings, Precision.INT4) == decoder


def test_more_sequences_fit_where_they_are_shorter():
    short, long = (memory_of("l20-27b", max_model_len=length) for length in (8192, 65_536))
    assert short.sequences(8192) > long.sequences(65_536)


@pytest.mark.parametrize("model", ["gemma-3-12b", "gemma-3-27b"])
def test_a_t10_does_not_hold_the_larger_models(model):
    settings = EngineConfig(model=Path("model"), max_running=1, host_embeddings=True)
    memory = CardMemory.of(
        published_config(model),
        settings,
        Precision.FP16,
        card=CARDS["t10"],
    )
    assert memory.longest == 0
    assert memory.reserve < 0
    # Nor do two, the 27b: they have 29.5 GiB.
    assert (sum(memory.weights.values()) > 2 * memory.card_bytes) is (model == "gemma-3-27b")


def test_a_setting_that_there_is_none_of_is_an_error():
    with pytest.raises(InvalidArgumentError, match="'kv_cache_type' is not a setting"):
        memory_of("l20-27b", kv_cache_type="fp8")


def test_what_settings_say_goes_before_shares_of_what_is_free():
    settings = EngineConfig(model=Path("model"), kv_cache_bytes=5, host_cache_bytes=0, image_cache_bytes=3)
    assert kv_cache_bytes(settings, free=10**9, needed=0) == 5
    assert (host_cache_bytes(settings, cuda=True), image_cache_bytes(settings, cuda=True)) == (0, 3)
    shares = EngineConfig(model=Path("model"), hmt_gpu_threshold=0.5, image_cache_bytes=0, host_cache_bytes=0)
    assert kv_cache_bytes(shares, free=1000, needed=200) == 400
    assert kv_cache_bytes(shares, free=None, needed=200) == GIB
    with_host = shares.model_copy(update={"host_cache_bytes": 1})
    assert kv_cache_bytes(with_host, free=1000, needed=200) == 400 - 400 // 16


def test_the_page_has_the_tables_that_the_command_prints():
    """But for what a better estimate of some part changes by a little."""
    page = (DOCS / "operations.md").read_text()
    remedy = "python -m scripts.card_memory --write docs/operations.md"
    (made,) = TABLES.findall(with_tables(page))
    (there,) = TABLES.findall(page)
    assert NUMBER.sub("#", there) == NUMBER.sub("#", made), remedy
    for old, new in zip(NUMBER.findall(there), NUMBER.findall(made), strict=True):
        a, b = (float(number.replace(",", "")) for number in (old, new))
        assert abs(a - b) <= max(0.3 if "." in old else 1, 0.05 * b), f"{old} is {new} now: {remedy}"
    with pytest.raises(ValueError, match="no place"):
        with_tables("# Another page")
