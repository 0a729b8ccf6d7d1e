"""What is set aside for computing, before the KV cache gets the rest, is what computing then takes; and no card is
promised more than it has."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from scripts.random_gemma3 import SHAPES, published_config, random_weights, write_directory
from tests.gemma3_random import write_random_checkpoint
from tests.peak_memory import peak_bytes
from tests.test_decode_graphs import Model, Repeated, decodes, prompts, segment_graphs
from wicore_backend import Engine, EngineConfig, SamplingParams
from wicore_backend.attention.gpu import hopper_decode
from wicore_backend.attention.gpu.hopper_decode import Calls, form_of
from wicore_backend.attention.gpu.needs import AttentionNeeds
from wicore_backend.attention.gpu.paged import GpuPagedAttention
from wicore_backend.attention.gpu.tiling import Tiling
from wicore_backend.attention.gpu.tuning import Tuning
from wicore_backend.engine.assembly import device_needs as needs_on_device
from wicore_backend.engine.cache_memory import kv_cache_bytes
from wicore_backend.engine.device_memory import Widening, device_needs
from wicore_backend.engine.logprobs import logprobs_bytes, logprobs_of
from wicore_backend.engine.pictures import MAX_BATCH, Picture, PictureEncoder, pixel_bytes
from wicore_backend.engine.runner import run_layers
from wicore_backend.engine.sampler import SamplingRow, sample, sampling_bytes
from wicore_backend.engine.sampling_params import SamplingParams as Params
from wicore_backend.engine.step_inputs import StepInputs
from wicore_backend.executor.cuda_executor import CudaExecutor
from wicore_backend.executor.embedding import Embedding
from wicore_backend.executor.int4_matrix import widened_bytes
from wicore_backend.executor.needs import activation_bytes, handed_bytes, logits_bytes
from wicore_backend.hmt.budget import divide_memory
from wicore_backend.hmt.fp8 import FP8
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.pool import KVPools
from wicore_backend.models.gemma3.checkpoint import load_weights
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.models.gemma3.rope import RotaryTables
from wicore_backend.models.gemma3.vision import encode_images, encoding_bytes
from wicore_backend.processor.images import PixelNormalization
from wicore_backend.processor.prompt import PromptImage
from wicore_backend.quantization.int4 import Int4Matrix

ROOT = Path(__file__).resolve().parent.parent
DEMO_MODEL = ROOT / "models" / "wicore-demo"
PICTURE = (ROOT / "client" / "wicore_client" / "assets" / "shapes.png").read_bytes()
GIB = 2**30
SMALL = 4096
"""Bytes that nobody counts: indices, results of a few numbers."""


def about(stated: int, measured: int, *, at_most: float = 2.0) -> None:
    assert measured <= stated + SMALL, f"{measured:,} bytes were taken, {stated:,} stated"
    assert stated <= at_most * measured + SMALL, f"{stated:,} bytes were stated, {measured:,} taken"


# ---- Each part against what the code takes


@pytest.mark.parametrize("groups", ["local and global", "global alone"])
@pytest.mark.parametrize("kv_dtype", [torch.float16, FP8])
def test_attention_takes_what_its_needs_say(groups, kv_dtype):
    layers = [LayerGroup.LOCAL, LayerGroup.GLOBAL, LayerGroup.GLOBAL] if "local" in groups else [LayerGroup.GLOBAL] * 2
    layout = KVLayout.of(layers, block_size=16, kv_heads=4, head_dim=64, window=64, bytes_per_value=kv_dtype.itemsize)
    blocks = {group: torch.zeros(4, *layout.block_shape(group)).to(kv_dtype) for group in layout.groups}
    attention = GpuPagedAttention(
        KVPools(layout, blocks), query_heads=8, scale=1.0, window=64, softcap=None, dtype=torch.float16, processors=20
    )
    tuning = Tuning.of(64, torch.float16, kv_dtype)
    needs = AttentionNeeds(Tiling(layout, 8, tuning, 20), value_bytes=2)
    for sequences, max_keys in ((33, 5000), (8, 5000), (1, 5000)):
        plan = attention.decode_bucket(sequences=sequences, max_keys=max_keys).plan
        tensors = [plan.out, plan.mass.decodes_at]
        for of_group in plan.decodes.values():
            scratch = of_group.scratch
            tensors += [of_group.items, scratch.partial, scratch.stats, scratch.arrived]
        about(needs.decode_bucket(sequences=sequences, max_keys=max_keys), storage_bytes(tensors), at_most=1.1)
        if sequences == 33:
            shared = plan.mass.values.untyped_storage().nbytes()
            about(needs.masses(sequences=33, max_keys=max_keys), shared, at_most=1.0)
        assert plan.mass.values.untyped_storage().nbytes() == shared
    for tokens in (500, 16):
        plan = attention.prompt_bucket(max_keys=2048, out=torch.zeros(tokens, 8 * 64).half()).plan
        taken = storage_bytes([plan.log_totals, plan.mass.values, plan.prefills[LayerGroup.GLOBAL].tiles])
        about(needs.prompt_bucket(tokens=tokens, max_keys=2048), taken, at_most=1.1)


@pytest.mark.parametrize("groups", [list(LayerGroup), [LayerGroup.GLOBAL]], ids=["local and global", "global alone"])
def test_decodes_for_hopper_s_kernel_take_no_more_than_its_needs_say(groups, monkeypatch):
    """Which count those for the other one, as it may turn out not to compile."""
    monkeypatch.setattr(hopper_decode, "hopper_decode", lambda *_, **__: mock.Mock())
    layout = KVLayout.of(groups, block_size=32, kv_heads=1, head_dim=128, window=64, bytes_per_value=2)
    pools = KVPools(layout, {group: torch.zeros(2, *layout.block_shape(group)).bfloat16() for group in groups})
    attention = GpuPagedAttention(
        pools, query_heads=1, scale=1.0, window=64, softcap=None, dtype=torch.bfloat16, processors=1
    )
    needs = AttentionNeeds(Tiling(layout, 1, Tuning.of(128, torch.bfloat16), 1), value_bytes=2)
    for sequences, max_keys in itertools.product((1, 7, hopper_decode.MOST), (1, 31, 5000)):
        plan = attention.decode_bucket(sequences=sequences, max_keys=max_keys).plan
        taken = storage_bytes([plan.out, plan.mass.decodes_at, *(of_group.work for of_group in plan.decodes.values())])
        assert taken <= needs.decode_bucket(sequences=sequences, max_keys=max_keys)


@pytest.mark.parametrize(("head_dim", "fits"), [(128, True), (64, False)])
def test_what_attention_keeps_for_decodes_is_what_its_needs_say(head_dim, fits):
    layout = KVLayout.of(
        [LayerGroup.GLOBAL], block_size=32, kv_heads=4, head_dim=head_dim, window=64, bytes_per_value=2
    )
    tiling = Tiling(layout, 8, Tuning.of(head_dim, torch.bfloat16), 132)
    form = form_of(tiling, torch.bfloat16, torch.bfloat16, capped=False)
    assert (form is not None) == fits
    taken = 0
    if form is not None:
        # As `HopperDecode` makes it, which needs a GPU.
        calls = Calls(form, blocks=132 * form.tuning.blocks, scale=1.0, device=torch.device("cpu"))
        taken = storage_bytes(kept for kept in vars(calls).values() if isinstance(kept, torch.Tensor))
    assert AttentionNeeds(tiling, value_bytes=2).kept() == taken


def storage_bytes(tensors) -> int:
    """Of all memory that the tensors lie in."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_a_step_of_its_own_takes_no_more_than_stated(tmp_path):
    model = Model(tmp_path, torch.device("cpu"))
    text = model.config.text
    tuning = Tuning.of(text.head_dim, torch.float32)
    needs = AttentionNeeds(Tiling(model.layout, text.num_heads, tuning, 4), value_bytes=4)
    for step in (
        decodes([40, 3, 17, 40], measured={1: [0, 1, 2, 3]}),
        prompts([30], decoded=[45, 2], measured={1: [0, 2]}),
        prompts([40, 2], measured={1: [0, 1]}),
    ):

        def plan(step=step):
            made = model.attention.plan(step)
            return made, model.attention.collect(made)

        tokens, sequences = len(step.positions), len(step.query_lens)
        staged = 2 * 8 * (tokens + 64 * sequences)  # On a CPU, what is sent to the device lies beside what it takes.
        assert peak_bytes(plan) <= needs.step(tokens=tokens, sequences=sequences, max_keys=48) + staged


@pytest.mark.skipif(torch.cuda.is_available(), reason="where a card is, OpenAI Triton's kernels take no CPU's memory")
@torch.inference_mode()
def test_segments_and_the_head_take_what_is_stated(tmp_path):
    shape = {"hidden_size": 64, "intermediate_size": 512, "vocab_size": 4096, "num_hidden_layers": 2}
    write_random_checkpoint(tmp_path, text=shape)
    config = Gemma3Config.from_checkpoint(tmp_path)
    text = config.text
    executor = CudaExecutor(config, load_weights(tmp_path, config, device=torch.device("cpu"), dtype=torch.float32))
    rotary = RotaryTables(config, max_positions=64, device=torch.device("cpu"), dtype=torch.float32)
    rope = rotary.lookup(torch.arange(40, dtype=torch.int32))[text.layer_groups[0]]
    ids, attention = torch.zeros(40, dtype=torch.int64), torch.zeros(40, text.num_heads * text.head_dim)

    def mid():
        hidden = executor.embed(ids, None, None)
        q, k, v = executor.first(hidden, *rope)
        hidden, qkv = executor.mid(0, hidden, attention, *rope)
        return q, k, v, hidden, qkv

    about(activation_bytes(text, tokens=40, value_bytes=4), peak_bytes(mid))
    hidden, rows = torch.zeros(40, 64), torch.arange(30)
    taken = peak_bytes(lambda: executor.last(hidden, attention, rows))
    stated = logits_bytes(text, rows=30, value_bytes=4) + activation_bytes(text, tokens=30, value_bytes=4)
    about(stated, taken, at_most=3)


@torch.inference_mode()
def test_what_steps_have_outside_of_engines_is_what_is_stated():
    """A step's, and what the last one left, which is read when its logits are asked for."""
    config, cpu, tokens = Gemma3Config.from_checkpoint(DEMO_MODEL), torch.device("cpu"), 200
    text = config.text
    embed = Embedding(torch.zeros(8, text.hidden_size), device=cpu, residual=torch.float32)
    rotary = RotaryTables(config, max_positions=tokens, device=cpu, dtype=torch.float32)
    ids, positions = torch.zeros(tokens, dtype=torch.int64), torch.arange(tokens, dtype=torch.int32)
    qkv, own, last = (None,) * 3, torch.zeros(tokens, text.hidden_size), text.num_layers - 2

    def mid(layer: int, *_) -> tuple:
        return (torch.empty_like(own) if layer == last else own), qkv

    executor = SimpleNamespace(first=lambda *_: qkv, mid=mid)
    attention = SimpleNamespace(attend=lambda *_: torch.empty(tokens, text.num_heads * text.head_dim))
    layers = [(group, 0) for group in text.layer_groups]

    def step():
        hidden = embed(ids, None, None)
        return run_layers(executor, attention, None, layers, hidden, rotary.lookup(positions))

    about(handed_bytes(text, tokens=tokens, value_bytes=4), peak_bytes(lambda: (step(), step())))


@pytest.mark.parametrize("rows", [1, 30, 70])
def test_choosing_tokens_takes_what_is_stated(rows):
    vocab = 8192
    logits = torch.randn(rows, vocab)
    drawn = Params(temperature=1.0, top_k=64, top_p=0.95, min_p=0.01, presence_penalty=0.1, logit_bias={3: 1.0})
    asked = [SamplingRow(drawn, seed=7, place=2, prompt=[2, 3], answer=[5]) for _ in range(rows)]
    about(sampling_bytes(rows=rows, vocab=vocab), peak_bytes(lambda: sample(logits, asked)))
    tokens = torch.zeros(rows, dtype=torch.int64)
    about(logprobs_bytes(rows=rows, vocab=vocab), peak_bytes(lambda: logprobs_of(logits, tokens, [5] * rows)))


def test_tokens_that_are_drawn_in_parts_are_those_drawn_at_once():
    logits = torch.randn(70, 500)
    drawn = Params(temperature=1.0, top_p=0.9)
    rows = [SamplingRow(drawn, seed=seed, place=seed) for seed in range(70)]
    one_by_one = [sample(logits[n : n + 1], rows[n : n + 1]).tokens.item() for n in range(70)]
    assert sample(logits, rows).tokens.tolist() == one_by_one
    mixed = [row if n % 3 else SamplingRow(Params(temperature=0.0), seed=0, place=0) for n, row in enumerate(rows)]
    expected = [token if n % 3 else int(logits[n].argmax()) for n, token in enumerate(one_by_one)]
    assert sample(logits, mixed).tokens.tolist() == expected


def test_the_vision_tower_takes_what_is_stated(tmp_path):
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 3}
    write_random_checkpoint(tmp_path, vision=vision)
    config = Gemma3Config.from_checkpoint(tmp_path)
    assert config.vision is not None
    weights = load_weights(tmp_path, config, device=torch.device("cpu"), dtype=torch.float32)
    assert weights.vision is not None
    side = config.vision.image_size
    pixels = torch.randn(4, 3, side, side)
    taken = peak_bytes(lambda: encode_images(pixels, weights.vision, config))
    about(encoding_bytes(config.vision, pictures=4, value_bytes=4), taken)

    whole = PictureEncoder(
        lambda pixels: torch.zeros(len(pixels), 1, 1),
        PixelNormalization(mean=(0.5,) * 3, std=(0.5,) * 3),
        device=torch.device("cpu"),
        dtype=torch.float32,
        cache_bytes=0,
    )
    shown = [np.full((3, side, side), n, np.uint8) for n in range(MAX_BATCH)]
    pictures = [Picture("", PromptImage(0, 1, pixels, bytes([n]))) for n, pixels in enumerate(shown)]
    stated = pixel_bytes(config.vision, pictures=MAX_BATCH, value_bytes=4)
    about(stated, peak_bytes(lambda: whole.soft_tokens(pictures)))


def test_rotations_take_what_is_stated():
    config = Gemma3Config.from_checkpoint(DEMO_MODEL)
    tables = RotaryTables(config, max_positions=100, device=torch.device("cpu"), dtype=torch.bfloat16)
    taken = sum(table.nbytes for table in tables._tables.values())
    assert RotaryTables.nbytes(config.text, max_positions=100, value_bytes=2) == taken


# ---- Together, for cards


def int4(rows: int, columns: int) -> Int4Matrix:
    """A matrix without contents."""
    spans = columns // 256
    codes = torch.empty(rows // 16, spans, 16, 32, dtype=torch.int32, device="meta")
    scales = torch.empty(rows // 16, spans, 16, 2, dtype=torch.bfloat16, device="meta")
    return Int4Matrix(codes, scales, None, torch.bfloat16)


@pytest.fixture(scope="module")
def shape_of_27b() -> Gemma3Config:
    return published_config("gemma-3-27b")


def layout_of(config: Gemma3Config, settings: EngineConfig) -> KVLayout:
    text = config.text
    return KVLayout.of(
        text.layer_groups,
        block_size=settings.block_size,
        kv_heads=text.num_kv_heads,
        head_dim=text.head_dim,
        window=text.window,
        bytes_per_value=1 if settings.kv_cache_dtype == "fp8" else 2,
    )


def needs_of_27b(config: Gemma3Config, settings: EngineConfig) -> dict[str, int]:
    """On a card like an RTX 4090, whose weights are INT4."""
    layout = layout_of(config, settings)
    pool = FP8 if settings.kv_cache_dtype == "fp8" else torch.bfloat16
    tuning = Tuning.of(128, torch.bfloat16, pool, shared_bytes=101_376)
    attention = AttentionNeeds(Tiling(layout, 32, tuning, 128), value_bytes=2)
    widening = Widening(matrix=widened_bytes(int4(43008, 5376)), keys=0)
    length = settings.context(config.text.max_position_embeddings)
    return device_needs(config, settings, attention, widening, max_model_len=length, value_bytes=2)


CARD = 24 * GIB - 600 * 2**20
"""What a card of 24 GB has for a process, less its own context."""
WEIGHTS_OF_27B = int(15.9 * GIB)
"""Its layers in INT4, 12.5 GiB; the embedding, which is the head, and the tower in 16 bits."""


def settings_of(**more) -> EngineConfig:
    return EngineConfig(model=DEMO_MODEL, kv_cache_dtype="fp8", nvme_codec="exact", **more)


@pytest.mark.parametrize(("max_running", "tokens"), [(64, 8192), (16, 32_768), (4, 65_536)])
def test_a_27b_model_in_int4_has_room_to_compute_on_a_card_of_24_gb(shape_of_27b, max_running, tokens):
    settings = settings_of(max_running=max_running, max_model_len=tokens)
    needs = needs_of_27b(shape_of_27b, settings)
    free = CARD - WEIGHTS_OF_27B
    cache = kv_cache_bytes(settings, free=free, needed=sum(needs.values()))
    layout = layout_of(shape_of_27b, settings)
    # One sequence at least, or it is refused by name when the model is loaded, not in the middle of an answer.
    divide_memory(layout, memory_bytes=cache, max_sequences=max_running, max_tokens=tokens, max_chunk=512)
    assert cache + sum(needs.values()) <= free
    # The parts that used to be left out, or were counted as if they were a few MiB.
    assert needs["pictures"] > GIB // 8
    assert needs["steps"] > shape_of_27b.text.vocab_size * 4 * max_running * 4
    assert needs["plans"] > max_running * tokens // 32 * 32 * 4


def test_more_of_anything_needs_more(shape_of_27b):
    def total(**more) -> int:
        return sum(needs_of_27b(shape_of_27b, settings_of(**{"max_model_len": 8192} | more)).values())

    assert total(cuda_graphs=False) < total() < total(max_running=65) < total(max_running=256)
    assert total() < total(max_batch_tokens=1024) < total(max_batch_tokens=8192)
    assert total() < total(max_model_len=131_072)
    assert total(max_guessed_tokens=0) < total()


def test_what_a_step_is_given_is_set_aside_once_for_all_recorded_sizes(shape_of_27b):
    """It was counted for each size as if they did not share it."""
    needs = {n: needs_of_27b(shape_of_27b, settings_of(max_batch_tokens=n))["recorded steps"] for n in (512, 1024)}
    tokens, text = 512, shape_of_27b.text
    of_inputs = StepInputs.nbytes(text, tokens=tokens, value_bytes=2)
    assert needs[1024] - needs[512] == activation_bytes(text, tokens=tokens, value_bytes=2) + of_inputs


@pytest.mark.parametrize("tokens", [512, 8192])
def test_what_recorded_steps_are_given_is_set_aside_once_and_for_them_alone(shape_of_27b, monkeypatch, tokens):
    """Steps that are not recorded have it as well, as activations: it was counted for both."""
    monkeypatch.setattr(StepInputs, "nbytes", lambda *_, **__: 2**60)
    for graphs in (True, False):
        needs = needs_of_27b(shape_of_27b, settings_of(max_batch_tokens=tokens, cuda_graphs=graphs))
        assert sum(needs.values()) >> 60 == graphs


@pytest.mark.parametrize("residual", [torch.float16, torch.float32])
def test_what_recorded_steps_are_given_takes_what_is_stated(residual):
    """Hidden states of cards without bfloat16 are in float32."""
    text = Gemma3Config.from_checkpoint(DEMO_MODEL).text
    executor = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float16, residual=residual)
    inputs = StepInputs.of(text, executor, tokens=30)
    taken = sum(tensor.nbytes for tensor in (inputs.embedded, inputs.positions, inputs.attended))
    assert taken <= StepInputs.nbytes(text, tokens=30, value_bytes=2) <= 1.5 * taken


@torch.inference_mode()
def test_a_rehearsed_step_takes_no_more_than_a_step(tmp_path):
    """Its inputs, which lie beside its activations, are no more than these and attention's results."""
    model = Model(tmp_path, torch.device("cpu"))
    text, tokens = model.config.text, 60
    segments = segment_graphs(model, Repeated, max_tokens=16)
    attention = AttentionNeeds(
        Tiling(model.layout, text.num_heads, Tuning.of(text.head_dim, torch.float32), 4), value_bytes=4
    )
    stated = activation_bytes(text, tokens=tokens, value_bytes=4)
    stated += attention.step(tokens=tokens, sequences=1, max_keys=48)
    assert peak_bytes(lambda: segments.rehearse(tokens)) <= stated


@pytest.mark.parametrize("max_running", [1, 64])
def test_a_small_model_takes_little(max_running):
    config = Gemma3Config.from_checkpoint(DEMO_MODEL)
    settings = EngineConfig(model=DEMO_MODEL, max_running=max_running)
    tuning = Tuning.of(config.text.head_dim, torch.bfloat16)
    tiling = Tiling(layout_of(config, settings), config.text.num_heads, tuning, 132)
    attention = AttentionNeeds(tiling, value_bytes=2)
    needs = device_needs(config, settings, attention, Widening(), max_model_len=8192, value_bytes=2)
    assert sum(needs.values()) < GIB // 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes a GPU's memory")
@pytest.mark.parametrize("shape", ["wicore-demo", "gemma-3-4b"])
@torch.inference_mode()
def test_a_model_computes_within_what_was_set_aside(shape, tmp_path, monkeypatch):
    """At the most that may run at once, sampled from all tokens, with pictures if it sees them."""
    model = DEMO_MODEL
    if shape in SHAPES:
        write_directory(shape, tmp_path, like=DEMO_MODEL)
        model = tmp_path
        monkeypatch.setattr(
            "wicore_backend.engine.executor_loading.load_weights",
            lambda _, config, *, device, dtype, **_progress: random_weights(config, device=device, dtype=dtype),
        )
    stated = []

    def noted(*of_model, **more):
        torch.cuda.empty_cache()
        needs = needs_on_device(*of_model, **more)
        stated.append((torch.cuda.mem_get_info()[0], sum(needs.values())))
        return needs

    monkeypatch.setattr("wicore_backend.engine.loading.device_needs", noted)
    settings = EngineConfig(
        model=model,
        device="cuda",
        hmt_gpu_threshold=0.2,
        max_running=32,
        max_model_len=4096,
        host_cache_bytes=0,
        image_cache_bytes=0,
    )
    torch.cuda.empty_cache()
    with Engine(settings) as engine:
        params = SamplingParams(max_tokens=40, temperature=1.0, top_p=0.9, ignore_eos=True)
        engine.generate(["The sea is wide and " * 40 + str(n) for n in range(48)], params)
        if model is DEMO_MODEL:
            shown = [{"type": "image"}, {"type": "text", "text": "Describe it."}]
            engine.generate([[{"role": "user", "content": shown}]] * 5, params, images=[[PICTURE]] * 5)
        pools = sum(tensor.nbytes for tensor in engine._model.pools.tensors.values())
        (free, needed), left = stated[0], torch.cuda.mem_get_info()[0]
        taken = free - left - pools
    assert 0.1 * needed < taken <= needed, f"{taken:,} bytes were taken, {needed:,} set aside"
