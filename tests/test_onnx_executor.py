"""The ONNX Runtime executor: transformers' and the torch executor's numbers, and what can be wrong with its files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
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
from wicore_backend import Engine, EngineConfig, SamplingParams
from wicore_backend.engine import executor_loading, exporting
from wicore_backend.engine.exporting import exported_segments
from wicore_backend.errors import EngineError, ExecutorError, SegmentError
from wicore_backend.executor.embedding import Embedding
from wicore_backend.executor.onnx_executor import OnnxExecutor
from wicore_backend.executor.onnx_session import OnnxRuntime, OnnxSegment, cuda_options
from wicore_backend.executor.segments.contract import Precision, Segment, SegmentKind, segments
from wicore_backend.executor.segments.export import bindings, export_segments
from wicore_backend.executor.torch_executor import TorchExecutor
from wicore_backend.models.gemma3.checkpoint import CheckpointReader, load_weights
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.models.gemma3.layers import embedding_scale

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
DEMO = Path(__file__).resolve().parent.parent / "models" / "wicore-demo"


def executor_of(checkpoint, directory, *, precision=Precision.FP32, weights="embedded"):
    """The executor of a checkpoint, whose graphs are exported to `directory`."""
    exported = export_segments(checkpoint, directory, precision, weights=weights)
    return opened(checkpoint, exported)


def opened(checkpoint, exported):
    config, precision = Gemma3Config.from_checkpoint(checkpoint), exported.precision
    loaded = load_weights(checkpoint, config, device=CPU, dtype=precision.activations)
    given = {}
    if exported.weights == "inputs":
        given = {segment: bindings(config, loaded, segment, precision) for segment in segments(config)}
    embedding = Embedding(loaded.text.embedding, device=CPU, residual=precision.residual)
    return OnnxExecutor(config, exported, embedding, OnnxRuntime(CPU, threads=1), weights=given)


# Numbers.

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
from tests.test_onnx_executor import DEMO, executor_of

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


def test_others_in_the_process_that_use_onnx_runtime_are_left_alone(checkpoint, tmp_path):
    exported = export_segments(checkpoint, tmp_path, Precision.FP32)
    opened(checkpoint, exported)
    theirs = onnxruntime.SessionOptions()
    theirs.intra_op_num_threads = 2
    path = exported.files[Segment(SegmentKind.FIRST)].path
    assert onnxruntime.InferenceSession(path, theirs, providers=["CPUExecutionProvider"]).get_inputs()


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


# Where graphs come from.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_random_checkpoint(path, vision={})
    return path


def settings_of(checkpoint, engines):
    return EngineConfig(model=checkpoint, device="cpu", engines=engines)


def test_graphs_are_exported_once_and_the_other_weights_are_not_read(tmp_path, monkeypatch):
    settings = EngineConfig(model=DEMO, device="cpu", executor="onnx", engines=tmp_path / "engines", threads=1)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    with Engine(settings) as engine:
        first = engine.generate("hello", params).token_ids
    assert (tmp_path / "engines" / "fp32" / "segments.json").exists()

    def nobody(*_args, **_kwargs):
        raise AssertionError("that takes time and memory, and is not needed")

    monkeypatch.setattr(exporting, "export_segments", nobody)
    monkeypatch.setattr(executor_loading, "load_weights", nobody)
    for part in ("layer", "vision", "head"):
        monkeypatch.setattr(CheckpointReader, part, nobody)
    (tmp_path / "engines" / "fp32").chmod(0o500)
    with Engine(settings) as engine:
        assert engine.generate("hello", params).token_ids == first


def test_of_many_that_start_at_once_one_exports(checkpoint, tmp_path, monkeypatch):
    exports = []
    export = exporting.export_segments

    def slow(*args, **kwargs):
        exports.append(threading.get_ident())
        return export(*args, **kwargs)

    monkeypatch.setattr(exporting, "export_segments", slow)
    found, began = [], threading.Barrier(6)

    def start():
        began.wait()
        found.append(exported_segments(settings_of(checkpoint, tmp_path), Precision.FP32, weights="embedded"))

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 6
    assert len(exports) == 1
    assert all(each == found[0] for each in found)


def test_an_export_that_was_cut_short_is_finished_by_the_next_start(checkpoint, tmp_path, monkeypatch):
    export = exporting.export_segments

    def cut_short(*args, **kwargs):
        def progress(done, total):
            if done > total / 3:
                raise KeyboardInterrupt

        return export(*args, **{**kwargs, "progress": progress})

    monkeypatch.setattr(exporting, "export_segments", cut_short)
    with pytest.raises(KeyboardInterrupt):
        exported_segments(settings_of(checkpoint, tmp_path), Precision.FP32, weights="embedded")
    assert not (tmp_path / "fp32" / "segments.json").exists()
    monkeypatch.undo()
    exported = exported_segments(settings_of(checkpoint, tmp_path), Precision.FP32, weights="embedded")
    opened(checkpoint, exported)


def test_a_place_that_cannot_be_written_is_an_error_that_names_the_setting(checkpoint, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(ExecutorError, match=f"exported to {tmp_path / 'file' / 'fp32'}: .*set engines to"):
        exported_segments(settings_of(checkpoint, tmp_path / "file"), Precision.FP32, weights="embedded")


def test_graphs_of_another_checkpoint_are_refused(checkpoint, tmp_path):
    write_random_checkpoint(tmp_path / "other", vision={}, seed=9)
    export_segments(tmp_path / "other", tmp_path / "fp32", Precision.FP32)
    with pytest.raises(SegmentError, match=f"{tmp_path / 'fp32'} holds segments in fp32 of checkpoint .*remove that"):
        exported_segments(settings_of(checkpoint, tmp_path), Precision.FP32, weights="embedded")


def damaged_graph(directory):
    path = directory / "mid_001.onnx"
    path.write_bytes(b"\x08" * path.stat().st_size)


def damaged_shape(directory):
    path = directory / "last.onnx"
    model = onnx.load(path, load_external_data=False)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value += 1
    onnx.save(model, path)


def renamed_output(directory):
    path = directory / "first.onnx"
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        node.output[:] = ["quux" if name == "q" else name for name in node.output]
    model.graph.output[0].name = "quux"
    onnx.save(model, path)
    manifest = directory / "segments.json"
    content = json.loads(manifest.read_text())
    content["segments"][0]["bytes"] = path.stat().st_size + path.with_suffix(".bin").stat().st_size
    manifest.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damaged_graph, "cannot load .*mid_001.onnx: .*; remove .* to have the segments exported again"),
        (damaged_shape, "cannot load .*last.onnx: .*; remove .* to have the segments exported again"),
        (renamed_output, "first.onnx gives q as nothing in place of .*; remove"),
        (lambda d: (d / "vision.onnx").unlink(), "lacks vision.onnx"),
        (lambda d: (d / "first.bin").unlink(), "first.onnx"),
        (lambda d: (d / "segments.json").write_text("{}"), "segments.json"),
    ],
)
def test_damaged_files_are_errors_that_name_the_file_and_the_remedy(checkpoint, tmp_path, damage, said):
    directory = tmp_path / "fp32"
    export_segments(checkpoint, directory, Precision.FP32)
    damage(directory)
    with pytest.raises(SegmentError, match=said):
        opened(checkpoint, exported_segments(settings_of(checkpoint, tmp_path), Precision.FP32, weights="embedded"))


def test_segments_of_a_model_of_another_shape_are_refused(checkpoint, tmp_path):
    write_random_checkpoint(tmp_path / "other", text={"hidden_size": 64}, vision={})
    exported = export_segments(tmp_path / "other", tmp_path / "graphs", Precision.FP32)
    with pytest.raises(SegmentError, match="holds first of another model"):
        opened(checkpoint, exported)


def test_weights_that_are_missing_or_of_another_shape_are_refused(checkpoint, tmp_path):
    exported = export_segments(checkpoint, tmp_path, Precision.FP32, weights="inputs")
    file = exported.files[Segment(SegmentKind.FIRST)]
    runtime = OnnxRuntime(CPU, threads=1)
    session = runtime.open(file.path)
    with pytest.raises(SegmentError, match=r"first.onnx takes .* as torch\.float32 \[.*\], and there is none"):
        OnnxSegment(runtime, session, file, {})
    weights = {spec.name: torch.zeros(3) for spec in file.weights}
    with pytest.raises(SegmentError, match=r"and there is torch\.float32 \[3\]"):
        OnnxSegment(runtime, session, file, weights)


def test_a_tensor_of_another_type_or_order_is_refused_before_it_is_read(checkpoint, tmp_path):
    executor = executor_of(checkpoint, tmp_path)
    hidden, cos = torch.zeros(4, 48), torch.zeros(4, 16)
    with pytest.raises(EngineError, match=r"first: cos is torch\.float16 .* in place of torch\.float32"):
        executor.first(hidden, cos.half(), cos)
    with pytest.raises(EngineError, match=r"first: hidden is .* with strides \(1, 4\)"):
        executor.first(torch.zeros(48, 4).T, cos, cos)


def test_a_gpu_takes_the_package_for_gpus():
    with pytest.raises(ExecutorError, match="computes on CPUs alone; pip install onnxruntime-gpu in its place"):
        OnnxRuntime(torch.device("cuda", 0), threads=1)
    options = cuda_options(torch.device("cuda", 1), 4711)
    assert (options["device_id"], options["user_compute_stream"], options["use_tf32"]) == ("1", "4711", "0")


def test_nobody_is_told_what_is_computed(tmp_path):
    exported = export_segments(DEMO, tmp_path / "graphs", Precision.FP32)
    told = {"CI", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS"}  # By each of which it is silent.
    environment = {name: value for name, value in os.environ.items() if name not in told}
    environment |= {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home" / ".cache")}
    open_graph = (
        "import sys, pathlib, torch; from wicore_backend.executor.onnx_session import OnnxRuntime; "
        "OnnxRuntime(torch.device('cpu'), threads=1).open(pathlib.Path(sys.argv[1]))"
    )
    graph = exported.files[Segment(SegmentKind.FIRST)].path
    subprocess.run([sys.executable, "-c", open_graph, graph], check=True, env=environment, cwd=DEMO.parents[1])
    # Where it notes the machine's number and what it has not yet sent.
    assert not [*(tmp_path / "home").rglob("*onnxruntime*")]
