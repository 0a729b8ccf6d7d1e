"""The ONNX Runtime executor's numbers: those of transformers and of the torch executor; and its embedding's."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from scripts import quantize
from tests.accuracy import relative_error
from tests.gemma3_driver import Driver
from tests.gemma3_random import VISION, write_random_checkpoint
from tests.model_parity import (
    CASES,
    FIVE_TO_ONE,
    GLOBAL,
    IMAGE,
    LOCAL,
    NEW_TOKENS,
    generate_together,
    greedy,
    pass_on_the_softcap,
    reference_logits,
    sequence_of,
)
from tests.onnx_kit import CPU, DEMO, executor_of
from wicore_backend import Engine, EngineConfig, SamplingParams
from wicore_backend.executor.embedding import Embedding
from wicore_backend.executor.onnx_session import OnnxSegment
from wicore_backend.executor.segments.contract import Precision
from wicore_backend.executor.torch_executor import TorchExecutor
from wicore_backend.models.gemma3.checkpoint import load_weights
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.models.gemma3.layers import embedding_scale

pytestmark = pytest.mark.usefixtures("one_thread")


TEXT_ONLY = {"one layer, a norm with a large eps", "soft-capped scores and logits"}
"""Of the cases below; the others are tried with pictures. (transformers caps no logits of a model that has vision.)"""


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("an image at the start, in the middle, at the end", "embedded"),
        ("several images, adjacent ones too", "embedded"),
        ("several images, adjacent ones too", "inputs"),
        ("an image longer than the window", "embedded"),
        ("a tower of other sizes, text beside images", "embedded"),
        ("one query head a KV head", "embedded"),
        ("four query heads a KV head, window shorter than the prompt", "embedded"),
        ("linear scaling of positions", "embedded"),
        ("soft-capped scores and logits", "embedded"),
        ("biases in attention", "embedded"),
        ("biases in attention", "inputs"),
        ("one layer, a norm with a large eps", "embedded"),
    ],
)
def test_logits_and_greedy_tokens_are_those_of_transformers_and_of_the_torch_executor(
    name, weights, tmp_path, monkeypatch
):
    case = CASES[name]
    if name not in TEXT_ONLY and case.vision is None:
        case = replace(case, vision={}, prompts=(*case.prompts, (7, IMAGE, 9)))
    pass_on_the_softcap(monkeypatch, case.text.get("attn_logit_softcapping"))
    reference = write_random_checkpoint(tmp_path / "model", text=case.text, vision=case.vision, seed=len(name))

    def run(executor):
        driver = Driver(tmp_path / "model")
        driver.executor = executor or driver.executor
        generator = torch.Generator().manual_seed(1)
        size = driver.config.vision.image_size if driver.config.vision else 0
        sequences = [sequence_of(prompt, size, generator) for prompt in case.prompts]
        lengths = [len(s.ids) for s in sequences]
        return sequences, lengths, generate_together(driver, sequences, chunk=case.chunk)

    sequences, lengths, logits = run(executor_of(tmp_path / "model", tmp_path / "graphs", weights=weights))
    on_torch, _, torch_logits = run(None)
    assert [s.ids for s in sequences] == [s.ids for s in on_torch]
    for sequence, length, ours, torchs in zip(sequences, lengths, logits, torch_logits, strict=True):
        theirs = reference_logits(reference, sequence)[:-1]
        assert relative_error(ours, theirs) < 1e-5
        assert relative_error(ours, torchs) < 1e-5
        tokens = greedy(theirs[length - 1 :])
        assert tokens.tolist() == sequence.ids[length:]
        assert len(set(tokens.tolist())) > NEW_TOKENS // 16, "an answer that repeats itself shows little"


def served_checkpoint(path, text, vision, seed):
    """A random checkpoint with the demo model's tokenizer and 16 soft tokens a picture, to be served by an engine."""
    text = {"vocab_size": 2048, "tie_word_embeddings": False, **text}
    write_random_checkpoint(path, text=text, vision=vision, seed=seed)
    for file in DEMO.glob("*.json*"):
        if file.name not in ("config.json", "README.md"):
            shutil.copy(file, path)
    for file in ("chat_template.jinja", "tokenizer.model"):
        shutil.copy(DEMO / file, path)
    side = {**VISION, **vision}["image_size"]
    edit_json(path / "config.json", boi_token_index=7, eoi_token_index=8, image_token_index=9, eos_token_id=[1, 6])
    edit_json(path / "preprocessor_config.json", size={"height": side, "width": side}, image_seq_length=16)
    edit_json(path / "processor_config.json", image_seq_length=16)


def edit_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


SERVED = {
    "two queries a key": ({}, {}),
    "a key for each query": ({"num_key_value_heads": 4}, {}),
    "one key for all queries, small window": ({"num_key_value_heads": 1, "sliding_window": 6}, {}),
    "five local layers to a global one": (FIVE_TO_ONE, {}),
    "all layers global": ({"layer_types": [GLOBAL] * 3, "num_hidden_layers": 3}, {}),
    "all layers local": ({"layer_types": [LOCAL] * 3, "num_hidden_layers": 3}, {}),
    "biases, capped logits": ({"attention_bias": True, "final_logit_softcapping": 3.0}, {}),
    "another tower": ({"hidden_size": 64}, {"image_size": 48, "patch_size": 6, "num_hidden_layers": 3}),
}


@pytest.mark.parametrize("name", SERVED)
def test_an_engine_on_it_answers_as_one_on_torch(name, tmp_path):
    """Ragged batches, chunks of 80 tokens, pictures, prefix hits, guesses: all of the engine, 64 tokens."""
    text, vision = SERVED[name]
    served_checkpoint(tmp_path / "model", text, vision, seed=len(name))
    rng = np.random.default_rng(len(name))
    picture, other = (rng.integers(0, 256, (50, 70, 3), np.uint8) for _ in range(2))
    prompts = ["Describe this picture.", "Compare them.", "What is 12 + 7?", "The code of Anna is 4821. " * 12]
    images = [[picture], [picture, other], [], []]
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=2)

    def answers(executor):
        settings = {"max_batch_tokens": 80, "max_running": 6, "threads": 1, "engines": tmp_path / "engines"}
        with Engine(EngineConfig(model=tmp_path / "model", device="cpu", executor=executor, **settings)) as engine:
            assert engine.statistics().executor.name == executor
            return engine.generate(prompts * 2, params, images=images * 2)

    for ours, torchs in zip(answers("onnx"), answers("torch"), strict=True):
        assert ours.token_ids == torchs.token_ids
        assert len(set(ours.token_ids)) > NEW_TOKENS // 16, "an answer that repeats itself shows little"
        assert [t.logprob for t in ours.logprobs] == pytest.approx([t.logprob for t in torchs.logprobs], abs=2e-5)


@pytest.mark.parametrize("scheme", [quantize.fp8(), quantize.int4(64)], ids=["fp8", "int4"])
def test_a_quantised_checkpoint_is_exported_widened(scheme, tmp_path):
    quantize.quantize(DEMO, tmp_path / "model", scheme, device=CPU)
    ours, torchs = (demo_answers(tmp_path / "model", tmp_path / "engines", executor=e) for e in ("onnx", "torch"))
    assert [answer.token_ids for answer in ours] == [answer.token_ids for answer in torchs]
    for one, other in zip(ours, torchs, strict=True):
        assert [t.logprob for t in one.logprobs] == pytest.approx([t.logprob for t in other.logprobs], abs=5e-5)


def test_the_demo_model_answers_in_float16_what_it_does_in_float32(tmp_path):
    half = demo_answers(DEMO, tmp_path, executor="onnx", dtype="float16")
    full = demo_answers(DEMO, tmp_path, executor="torch")
    assert [answer.text for answer in half] == [answer.text for answer in full]
    assert half[1].text == "19"
    assert half[2].text == "4821"


def demo_answers(model, engines, **settings):
    """To questions about a picture, a sum, and a text that takes several chunks."""
    picture = (DEMO.parent.parent / "client" / "wicore_client" / "assets" / "shapes.png").read_bytes()
    prompts = [
        "What is in this picture?",
        "What is 12 + 7?",
        "The code of Anna is 4821. " * 20 + "What is the code of Anna?",
    ]
    params = SamplingParams(temperature=0.0, max_tokens=32, logprobs=1)
    config = EngineConfig(model=model, device="cpu", engines=engines, threads=1, max_batch_tokens=160, **settings)
    with Engine(config) as engine:
        return engine.generate(prompts, params, images=[[picture], [], []])


def test_float16_keeps_its_residual_stream_in_float32(tmp_path):
    write_random_checkpoint(tmp_path / "model", text=FIVE_TO_ONE, vision={}, seed=3)

    def logits(executor):
        driver = Driver(tmp_path / "model", dtype=torch.float16 if executor else torch.float32)
        driver.executor = executor or driver.executor
        generator = torch.Generator().manual_seed(4)
        sequences = [sequence_of(prompt, VISION["image_size"], generator) for prompt in ((20, IMAGE, 30), (50,))]
        return driver.step([(s, len(s.ids)) for s in sequences])

    executor = executor_of(tmp_path / "model", tmp_path / "graphs", precision=Precision.FP16)
    assert (executor.dtype, executor.residual) == (torch.float16, torch.float32)
    assert executor.embed(torch.tensor([9, 10]), None, None).dtype is torch.float32
    for half, full in zip(logits(executor), logits(None), strict=True):
        assert 0 < relative_error(half, full) < 6e-3


@torch.inference_mode()
def test_steps_of_any_size_follow_each_other_and_results_outlast_the_next_layer(tmp_path):
    write_random_checkpoint(tmp_path / "model")
    config = Gemma3Config.from_checkpoint(tmp_path / "model")
    plain = TorchExecutor(config, load_weights(tmp_path / "model", config, device=CPU, dtype=torch.float32))
    executor = executor_of(tmp_path / "model", tmp_path / "graphs")
    text = config.text
    for tokens in (3, 1, 40, 7, 40, 2):
        torch.manual_seed(tokens)
        hidden, attention = torch.randn(tokens, text.hidden_size), torch.randn(tokens, text.num_heads * text.head_dim)
        cos, sin = torch.randn(tokens, text.head_dim), torch.randn(tokens, text.head_dim)
        rows = torch.tensor([tokens - 1, 0], dtype=torch.int32)
        one, _ = executor.mid(0, hidden, attention, cos, sin)
        two, qkv = executor.mid(1, one, attention, cos, sin)
        expected, _ = plain.mid(0, hidden, attention, cos, sin)
        then, expected_qkv = plain.mid(1, expected, attention, cos, sin)
        assert relative_error(one, expected) < 1e-5
        assert relative_error(two, then) < 1e-5
        for ours, theirs in zip(qkv, expected_qkv, strict=True):
            assert relative_error(ours, theirs) < 1e-5
        for part, whole in zip(executor.first(hidden, cos, sin), plain.first(hidden, cos, sin), strict=True):
            assert relative_error(part, whole) < 1e-5
        assert relative_error(executor.last(two, attention, rows), plain.last(then, attention, rows)) < 1e-5


@torch.inference_mode()
def test_a_rehearsal_runs_every_segment_and_leaves_results_as_they_are(tmp_path, monkeypatch):
    write_random_checkpoint(tmp_path / "model", vision={})
    executor = executor_of(tmp_path / "model", tmp_path / "graphs")
    ran = set()
    run = OnnxSegment.run

    def noted(segment, inputs, outputs):
        ran.add(id(segment))
        run(segment, inputs, outputs)

    hidden, attention, rotation = torch.randn(5, 48), torch.randn(5, 64), torch.randn(5, 16)
    before = [part.clone() for part in executor.mid(1, hidden, attention, rotation, rotation)[1]]
    monkeypatch.setattr(OnnxSegment, "run", noted)
    executor.rehearse(tokens=64, pictures=3)
    assert len(ran) == 6, "first, three mid, last and vision"
    after = executor.mid(1, hidden, attention, rotation, rotation)[1]
    assert all(torch.equal(*parts) for parts in zip(before, after, strict=True))


def test_steps_of_ever_more_tokens_leave_no_memory_behind():
    """In a process of its own, since what ONNX Runtime shares lasts as long as that."""
    grown = float(subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True).stdout)
    assert grown < 2**26, f"{grown / 2**20:.0f} MiB"


GROWTH = """
import resource, tempfile
from pathlib import Path
import torch
from tests.onnx_kit import DEMO, executor_of

with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
    executor = executor_of(DEMO, Path(directory))
    hidden, attention, rotation = torch.randn(512, 256), torch.randn(512, 256), torch.randn(512, 64)

    def step(tokens):
        executor.mid(0, hidden[:tokens], attention[:tokens], rotation[:tokens], rotation[:tokens])

    step(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for tokens in range(1, 513, 3):
        step(tokens)
    print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def test_a_kernel_widens_rows_as_it_looks_them_up(kernel_device):
    from wicore_backend.executor.kernels.small import embed

    table = torch.randn(50, 100).half().to(kernel_device)
    ids = torch.tensor([3, 49, 3, 0], device=kernel_device)
    rows = embed(ids, table, 1.7, dtype=torch.float32)
    assert torch.allclose(rows, table[ids].float() * 1.7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_rows_come_from_page_locked_host_memory():
    table = torch.randn(50, 128).half()
    embed = Embedding(table.pin_memory(), device=torch.device("cuda"), residual=torch.float32)
    ids = torch.tensor([3, 49, 3, 0], device="cuda")
    on_device = Embedding(table.cuda(), device=ids.device, residual=torch.float32)
    assert torch.equal(embed(ids, None, None), on_device(ids, None, None))
    assert torch.allclose(embed(ids, None, None).cpu(), table[ids.cpu()].float() * embedding_scale(128, torch.float32))


def test_soft_tokens_replace_rows_whose_id_is_beyond_the_vocabulary():
    table = torch.randn(5, 4)
    embed = Embedding(table, device=CPU, residual=torch.float32)
    soft = torch.randn(2, 4)
    embedded = embed(torch.tensor([1, 99, 3, 99]), soft, torch.tensor([1, 3]))
    assert torch.equal(embedded, torch.stack([table[1] * 2, soft[0], table[3] * 2, soft[1]]))
    with pytest.raises(ValueError, match="a table on cpu that cuda:0 cannot read"):
        Embedding(table, device=torch.device("cuda", 0), residual=torch.float32)


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_table_on_the_gpu_is_read_whether_or_not_the_gpu_is_named_by_its_number(device):
    with FakeTensorMode():
        table = torch.empty(5, 4, device="cuda:0")
        Embedding(table, device=torch.device(device), residual=torch.float32)
        with pytest.raises(ValueError, match="a table on cuda:0 that cuda:1 cannot read"):
            Embedding(table, device=torch.device("cuda", 1), residual=torch.float32)
