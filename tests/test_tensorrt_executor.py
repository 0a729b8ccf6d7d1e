"""The TensorRT executor's own code, all but TensorRT itself: on a stand-in for it that computes by ONNX Runtime."""

import gc

import pytest
import torch

from tests import stand_in_tensorrt as stand_in
from tests.engine_kit import MODEL, PICTURE
from tests.gemma3_driver import Driver, Sequence
from tests.gemma3_random import IMAGE_TOKEN, TOKENS_PER_IMAGE
from tests.stand_in_engines import StandInCard, write_engines
from tests.stand_in_tensorrt import STREAM
from tests.tensorrt_kit import CPU, MID, Model, segment_inputs
from wicore_backend import Engine, EngineConfig, SamplingParams
from wicore_backend.engine import loading
from wicore_backend.engine.executors import Choice, ExecutorName
from wicore_backend.errors import EngineError, ExecutorError
from wicore_backend.executor.embedding import Embedding
from wicore_backend.executor.segments.contract import Precision
from wicore_backend.executor.segments.export import export_segments
from wicore_backend.executor.tensorrt import card, library
from wicore_backend.executor.tensorrt.executor import TensorRTExecutor
from wicore_backend.executor.tensorrt.profiles import profiles_for
from wicore_backend.executor.torch_executor import TorchExecutor
from wicore_backend.models.gemma3.checkpoint import load_weights
from wicore_backend.models.gemma3.config import Gemma3Config

pytest_plugins = ["tests.tensorrt_fixtures"]
pytestmark = pytest.mark.usefixtures("told_anew")


def sequences():
    torch.manual_seed(1)
    picture = [6, *[IMAGE_TOKEN] * TOKENS_PER_IMAGE, 7]
    pictures = [torch.randn(3, 32, 32) for _ in range(5)]
    with_pictures = Sequence([9, 10, *picture, 11, *picture, 12], [(3, pictures[0]), (22, pictures[1])])
    many = Sequence([13, *picture * 3], [(2, pictures[2]), (20, pictures[3]), (38, pictures[4])])
    return [with_pictures, Sequence([8 + i % 150 for i in range(90)]), many]


@torch.inference_mode()
def served(driver):
    """Chunks, pictures, ragged mixed steps, then decodes: logits of every step."""
    a, b, c = sequences()
    steps = [[(a, 2)], [(a, 19), (b, 40)], [(b, 30), (c, 20)], [(a, 18), (b, 19)], [(c, 34)], [(a, 1), (b, 1), (c, 1)]]
    logits = [row for chunks in steps for row in driver.step(chunks)]
    for _ in range(12):
        for sequence, row in zip((a, b, c), logits[-3:], strict=True):
            sequence.ids.append(int(row[-1].argmax()))
        logits += driver.step([(a, 1), (b, 1), (c, 1)])
    return logits


@pytest.mark.parametrize("rtx", [True, False], ids=["tensorrt_rtx", "tensorrt"])
@pytest.mark.parametrize("weights", ["embedded", "inputs"])
def test_steps_give_what_the_torch_executor_gives(checkpoint, tmp_path, rtx, weights):
    model, library = Model(checkpoint, tmp_path / "segments", weights=weights), stand_in.library(rtx=rtx)
    engines = write_engines(model.exported, tmp_path / "engines", library=library)
    given = model.bindings() if weights == "inputs" else None
    driver = Driver(checkpoint)
    expected = served(driver)
    driver = Driver(checkpoint)
    driver.executor = model.load(engines, library=library, weights=given)
    del engines, library
    gc.collect()
    found = served(driver)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
        assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
    assert set(stand_in.TOLD.executions) == {STREAM}, "PyTorch's current stream"


def test_half_precision_keeps_its_residual_stream_in_float32(checkpoint, tmp_path, monkeypatch):
    """As for cards without bfloat16: what attention sees is float16, hidden states and soft tokens are not."""
    config = Gemma3Config.from_checkpoint(checkpoint)
    exported = export_segments(checkpoint, tmp_path / "segments", Precision.FP16)
    engines = write_engines(exported, tmp_path / "engines", library=stand_in.library(), compute_capability="sm75")
    expected = served(Driver(checkpoint))
    driver = Driver(checkpoint, dtype=torch.float16)
    table = load_weights(checkpoint, config, device=CPU, dtype=torch.float16).text.embedding
    monkeypatch.setattr(stand_in.CARD, "compute_capability", "sm75")
    driver.executor = TensorRTExecutor.load(
        config,
        engines,
        library=stand_in.library(),
        card=StandInCard(name="Tesla T10", compute_capability="sm75"),
        embed=Embedding(table, device=CPU, residual=torch.float32),
    )
    assert (driver.executor.dtype, driver.executor.residual) == (torch.float16, torch.float32)
    assert driver.executor.vision(torch.zeros(1, 3, 32, 32, dtype=torch.float16)).dtype is torch.float32
    first = len(expected) - 3 * 12  # From there on each has its own tokens.
    for ours, theirs in zip(served(driver)[:first], expected[:first], strict=True):
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_the_whole_engine_runs_on_it(tmp_path, monkeypatch):
    """The demo model: scheduling, prefix cache, chunks around pictures, guesses, logprobs. Answers as on torch."""
    settings = EngineConfig(model=MODEL, device="cpu", dtype="float32", max_batch_tokens=80, max_running=6)
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=2)
    prompts = [
        ("Describe this picture.", [PICTURE]),
        ("What is 12 + 7?", []),
        ("The code of Anna is 4821. " * 20 + "What is the code of Anna?", []),
    ]

    def answers():
        with Engine(settings) as engine:
            told = engine.generate([p for p, _ in prompts] * 2, params, images=[i for _, i in prompts] * 2)
            return [result.token_ids for result in told]

    expected = answers()
    model = Model(settings.model, tmp_path / "segments")
    profiles = profiles_for(max_running=6, max_batch_tokens=80, max_images=1)
    engines = write_engines(model.exported, tmp_path / "engines", library=stand_in.library(), profiles=profiles)
    # All that a CUDA device would have chosen.
    monkeypatch.setattr(loading, "choose", lambda *_, **__: Choice(ExecutorName.TENSORRT, "tried", engines))
    monkeypatch.setattr(card, "CudaCard", StandInCard)
    monkeypatch.setattr(loading, "device_needs", lambda *_, **__: {"graphs": 1})
    monkeypatch.setattr(library, "load_library", lambda _: stand_in.library())
    assert answers() == expected
    assert len(stand_in.TOLD.executions) > 24 * model.config.text.num_layers


def test_weights_that_are_inputs_are_the_tensors_themselves(checkpoint, tmp_path):
    model = Model(checkpoint, tmp_path / "segments", weights="inputs")
    engines = write_engines(model.exported, tmp_path / "engines", library=stand_in.library())
    assert len(engines.records) == 4, "all middle layers are one engine"
    given = model.bindings()
    executor = model.load(engines, weights=given)
    hidden, attention, cos, sin = segment_inputs(model, 3)
    before, _ = executor.mid(1, hidden, attention, cos, sin)
    before = before.clone()
    down = model.weights.text.layers[1].down
    down.mul_(2)
    after, _ = executor.mid(1, hidden, attention, cos, sin)
    assert not torch.allclose(before, after)
    with pytest.raises(ExecutorError, match="first takes its weights as inputs, and was given none"):
        model.load(engines)


def test_of_two_models_in_a_process_each_quotes_its_own_faults(model, tmp_path):
    sound = model.load(write_engines(model.exported, tmp_path / "sound", library=stand_in.library()))
    faults = {MID: "execute"}
    faulty = model.load(write_engines(model.exported, tmp_path / "faulty", library=stand_in.library(), faults=faults))
    inputs = segment_inputs(model, 3)
    with pytest.raises(EngineError, match=r"could not execute mid_001 .* \(an illegal memory access\)$"):
        faulty.mid(1, *inputs)
    sound.mid(1, *inputs)


def test_results_stay_as_long_as_is_promised(model, tmp_path):
    """Queries, keys and values until the next segment, hidden states until the one after; logits for ever."""
    engines = write_engines(model.exported, tmp_path, library=stand_in.library())
    executor, torch_executor = model.load(engines), TorchExecutor(model.config, model.weights)
    hidden, attention, cos, sin = segment_inputs(model, 5)
    last_mid = model.config.text.num_layers - 2

    first, _ = executor.mid(0, hidden, attention, cos, sin)
    expected = first.clone()
    second, qkv = executor.mid(1, first, attention, cos, sin)
    assert torch.equal(first, expected), "it is read while the next one is computed"
    assert qkv.k.data_ptr() == executor.first(second, cos, sin).k.data_ptr(), "memory that stays"
    kept, _ = executor.mid(last_mid, second, attention, cos, sin)
    logits = executor.last(kept, attention, torch.tensor([4, 0]))
    both = kept.clone(), logits.clone()
    again, _ = executor.mid(last_mid, hidden, attention, cos, sin)
    assert again.data_ptr() == kept.data_ptr(), "memory that stays"
    executor.last(hidden, attention, torch.tensor([1, 2]))
    assert torch.equal(logits, both[1])
    theirs = torch_executor.last(both[0].clone(), attention, torch.tensor([4, 0]))
    assert torch.allclose(logits, theirs, rtol=1e-4, atol=1e-5)


def test_steps_of_any_size_are_right_in_every_profile(model, tmp_path):
    profiles = profiles_for(max_running=4, max_batch_tokens=1100)
    assert [profile.name for profile in profiles] == ["decode", "prompts", "long"]
    engines = write_engines(model.exported, tmp_path, library=stand_in.library(), profiles=profiles)
    executor, torch_executor = model.load(engines), TorchExecutor(model.config, model.weights)
    for tokens in (1, 4, 5, 1024, 1025, 1100, 2):
        hidden, attention, cos, sin = segment_inputs(model, tokens, seed=tokens)
        ours, qkv = executor.mid(2, hidden, attention, cos, sin)
        theirs, expected = torch_executor.mid(2, hidden.clone(), attention, cos, sin)
        for found, wanted in zip((ours, *qkv), (theirs, *expected), strict=True):
            assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5), tokens


def test_rows_and_pictures_beyond_a_profile_are_computed_in_parts(model, tmp_path):
    profiles = profiles_for(max_running=2, max_batch_tokens=300, max_images=2)
    assert profiles[0].rows.max == 66
    executor = model.load(write_engines(model.exported, tmp_path, library=stand_in.library(), profiles=profiles))
    torch_executor = TorchExecutor(model.config, model.weights)
    hidden, attention, *_ = segment_inputs(model, 200)
    rows = torch.randperm(200)
    expected = torch_executor.last(hidden.clone(), attention, rows)
    assert torch.allclose(executor.last(hidden, attention, rows.int()), expected, rtol=1e-4, atol=1e-5)
    assert executor.last(hidden, attention, rows[:0]).shape == (0, model.config.text.vocab_size)
    pixels = torch.randn(5, 3, 32, 32)
    assert torch.allclose(executor.vision(pixels), torch_executor.vision(pixels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [0, 2], ids=["", "the_last"])
def test_tensors_in_other_orders_are_copied(model, tmp_path, layer):
    executor = model.load(write_engines(model.exported, tmp_path, library=stand_in.library()))
    hidden, attention, cos, sin = segment_inputs(model, 6)
    straight = executor.mid(layer, hidden, attention, cos, sin)[0].clone()
    turned = [tensor.t().contiguous().t() for tensor in (hidden, attention, cos, sin)]
    assert torch.equal(executor.mid(layer, *turned)[0], straight)


@pytest.mark.parametrize("wrong", ["type", "size"])
def test_what_does_not_fit_the_contract_is_not_executed(model, tmp_path, wrong):
    executor = model.load(write_engines(model.exported, tmp_path, library=stand_in.library()))
    hidden, attention, cos, sin = segment_inputs(model, 6)
    attention = attention.double() if wrong == "type" else attention[:, 1:]
    with pytest.raises(EngineError, match=r"mid_000: attention is torch\.float.* in place of torch\.float32"):
        executor.mid(0, hidden, attention, cos, sin)
    assert not stand_in.TOLD.executions


def test_steps_that_are_too_long_say_what_to_set(model, tmp_path):
    executor = model.load(write_engines(model.exported, tmp_path, library=stand_in.library()))
    hidden, _, cos, sin = segment_inputs(model, 65)
    with pytest.raises(EngineError, match=r"65 tokens, .* 64 at most; set max_batch_tokens = 64, or .*tokens 65"):
        executor.first(hidden, cos, sin)


def test_an_execution_that_fails_names_the_segment_and_what_the_library_said(model, tmp_path):
    engines = write_engines(model.exported, tmp_path, library=stand_in.library(), faults={MID: "execute"})
    executor = model.load(engines)
    hidden, attention, cos, sin = segment_inputs(model, 6)
    executor.mid(0, hidden, attention, cos, sin)
    with pytest.raises(EngineError, match=r"could not execute mid_001 for 6 rows: .*an illegal memory access"):
        executor.mid(1, hidden, attention, cos, sin)
