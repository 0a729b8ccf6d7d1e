"""The TensorRT executor's own code, all but TensorRT itself: on a stand-in for it that computes by ONNX Runtime."""

import errno
import gc
import json
import logging
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import torch

from tests import stand_in_tensorrt as stand_in
from tests.gemma3_driver import Driver, Sequence
from tests.gemma3_random import IMAGE_TOKEN, TOKENS_PER_IMAGE, write_random_checkpoint
from tests.stand_in_engines import StandInCard, add, write_engines
from tests.stand_in_tensorrt import STREAM
from wicore_backend import Engine, EngineConfig, SamplingParams
from wicore_backend.engine import loading
from wicore_backend.engine.executors import Choice, ExecutorName
from wicore_backend.errors import EngineError, ExecutorError
from wicore_backend.executor.embedding import Embedding
from wicore_backend.executor.segments.contract import Precision, Segment, SegmentKind
from wicore_backend.executor.segments.export import bindings, export_segments
from wicore_backend.executor.segments.manifest import WeightsAs
from wicore_backend.executor.tensorrt import card, library
from wicore_backend.executor.tensorrt.executor import TensorRTExecutor
from wicore_backend.executor.tensorrt.profiles import profiles_for
from wicore_backend.executor.tensorrt.store import EngineFolder
from wicore_backend.executor.torch_executor import TorchExecutor
from wicore_backend.models.gemma3.checkpoint import load_weights
from wicore_backend.models.gemma3.config import Gemma3Config

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "models" / "wicore-demo"
PICTURE = (ROOT / "client" / "wicore_client" / "assets" / "shapes.png").read_bytes()
CPU = torch.device("cpu")
FIRST, LAST, VISION = Segment(SegmentKind.FIRST), Segment(SegmentKind.LAST), Segment(SegmentKind.VISION)
MID = Segment(SegmentKind.MID, 1)


class Model:
    """A checkpoint, its weights, and its exported segments."""

    def __init__(self, checkpoint: Path, directory: Path, *, weights: WeightsAs = "embedded"):
        self.checkpoint = checkpoint
        self.config = Gemma3Config.from_checkpoint(checkpoint)
        self.exported = export_segments(checkpoint, directory, Precision.FP32, weights=weights)
        self.weights = load_weights(checkpoint, self.config, device=CPU, dtype=torch.float32)
        self.embed = Embedding(self.weights.text.embedding, device=CPU, residual=torch.float32)

    def load(self, engines, *, library=None, card=None, **options):
        return TensorRTExecutor.load(
            self.config,
            engines,
            library=library or stand_in.library(),
            card=card or StandInCard(),
            embed=self.embed,
            **options,
        )

    def bindings(self):
        return {
            segment: bindings(self.config, self.weights, segment, Precision.FP32) for segment in self.exported.files
        }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(path, vision={})
    return path


@pytest.fixture(scope="module")
def model(checkpoint, tmp_path_factory):
    return Model(checkpoint, tmp_path_factory.mktemp("segments"))


@pytest.fixture(autouse=True)
def _told():
    stand_in.forget()


def segment_inputs(model, tokens, *, seed=0):
    torch.manual_seed(seed)
    text = model.config.text
    hidden, attention = torch.randn(tokens, text.hidden_size), torch.randn(tokens, text.num_heads * text.head_dim)
    return hidden, attention, torch.randn(tokens, text.head_dim), torch.randn(tokens, text.head_dim)


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
    settings = EngineConfig(model=DEMO, device="cpu", dtype="float32", max_batch_tokens=80, max_running=6)
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


def test_nothing_is_told_twice(model, tmp_path):
    executor = model.load(write_engines(model.exported, tmp_path, library=stand_in.library()))
    hidden, attention, cos, sin = segment_inputs(model, 5)

    def step(count):
        executor.mid(0, hidden[:count], attention[:count], cos[:count], sin[:count])

    step(5)
    told = stand_in.TOLD.addresses, stand_in.TOLD.shapes
    step(5)
    assert (stand_in.TOLD.addresses, stand_in.TOLD.shapes) == told
    step(4)
    assert (stand_in.TOLD.addresses, stand_in.TOLD.shapes) == (told[0], told[1] + 4), "the memory is the same"


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


def test_each_recording_has_contexts_of_its_own(model, tmp_path):
    """What a graph was recorded with must never be told other shapes or addresses."""
    executor = model.load(write_engines(model.exported, tmp_path, library=stand_in.library()))
    hidden, attention, cos, sin = segment_inputs(model, 6)
    executor.mid(0, hidden, attention, cos, sin)
    made = stand_in.TOLD.contexts
    kinds = []

    def record(work):
        kinds.append(stand_in.TOLD.contexts)
        work()
        assert stand_in.TOLD.contexts == kinds[-1], "nothing is made while it is recorded"
        return work

    recording = executor.recording(record)
    for count in (6, 3):
        recording(lambda count=count: executor.mid(0, hidden[:count], attention[:count], cos[:count], sin[:count]))
    assert kinds == [made + 1, made + 2]
    kept = {segment: len(contexts._own) for segment, contexts in executor._contexts.items() if contexts._own}
    assert kept == {Segment(SegmentKind.MID, 0): 2}, "nothing is kept for segments that were not recorded"
    told = stand_in.TOLD.shapes
    executor.mid(0, hidden, attention, cos, sin)
    assert stand_in.TOLD.contexts == made + 2
    assert stand_in.TOLD.shapes == told, "other steps use the contexts that they had, and know their shapes"
    gc.collect()
    assert len(stand_in.TOLD.alive) == made + 2, "a graph goes on using those that it was recorded with"


def test_a_recording_that_fails_leaves_the_shared_contexts(model, tmp_path):
    executor = model.load(write_engines(model.exported, tmp_path, library=stand_in.library()))
    hidden, _, cos, sin = segment_inputs(model, 6)

    def record(_work):
        raise RuntimeError("no memory for the graph")

    with pytest.raises(RuntimeError, match="no memory"):
        executor.recording(record)(lambda: executor.first(hidden, cos, sin))
    made = stand_in.TOLD.contexts
    executor.first(hidden, cos, sin)
    assert stand_in.TOLD.contexts == made


def test_engines_that_cannot_be_recorded_say_so_once(model, tmp_path, caplog):
    engines = write_engines(
        model.exported, tmp_path, library=stand_in.library(), faults={MID: "capture", LAST: "capture"}
    )
    with caplog.at_level(logging.WARNING):
        executor = model.load(engines)
    told = [record.getMessage() for record in caplog.records if "cannot be recorded" in record.getMessage()]
    assert told == ["2 engines cannot be recorded as CUDA graphs, mid_001 first: steps are computed engine by engine"]
    assert not executor.recordable
    assert model.load(write_engines(model.exported, tmp_path / "b", library=stand_in.library())).recordable


def test_only_recordings_wait_for_kernels_of_their_size(model, tmp_path):
    """Other steps come in any size, and none may stand still while kernels for it are compiled."""
    executor = model.load(write_engines(model.exported, tmp_path, library=stand_in.library()))
    hidden, _, cos, sin = segment_inputs(model, 6)
    executor.first(hidden, cos, sin)
    eager, lazy = 1, 0
    assert set(stand_in.TOLD.strategies) == {lazy}
    executor.recording(lambda work: work())(lambda: executor.first(hidden, cos, sin))
    assert stand_in.TOLD.strategies[-1] == eager
    assert stand_in.TOLD.strategies.count(eager) == 1


def test_compiled_kernels_are_kept(model, tmp_path, caplog):
    engines = write_engines(model.exported, tmp_path, library=stand_in.library())
    cache = engines.directory / "kernels.cache"
    model.load(engines)
    first = int(cache.read_bytes().split()[1])
    assert first == stand_in.TOLD.contexts
    model.load(engines)
    assert int(cache.read_bytes().split()[1]) == 2 * first, "it went on with what there was"
    cache.write_bytes(b"of another driver")
    with caplog.at_level(logging.INFO):
        model.load(engines)
    assert "is of another card, driver or library" in caplog.text
    assert int(cache.read_bytes().split()[1]) == first
    executor = model.load(engines, cache=tmp_path / "nowhere" / "kernels.cache")
    assert "cannot be written" in caplog.text
    executor.save_kernels()


def test_a_full_disk_has_no_half_of_the_kernels(model, tmp_path, monkeypatch, caplog):
    engines = write_engines(model.exported, tmp_path, library=stand_in.library())
    before = set(engines.directory.iterdir())

    def half(path, content):
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    model.load(engines)
    assert "kernels.cache cannot be written: [Errno 28] No space left on device" in caplog.text
    assert set(engines.directory.iterdir()) == before


# What can go wrong


def test_engines_of_another_card_or_library_are_refused(model, tmp_path):
    engines = write_engines(model.exported, tmp_path, library=stand_in.library())
    turing = StandInCard(name="Tesla T10", compute_capability="sm75")
    with pytest.raises(ExecutorError, match=r"for sm89, and this card, Tesla T10, is sm75; .*--target sm75"):
        model.load(engines, card=turing)
    older = replace(stand_in.library(), version="1.6.0.1")
    with pytest.raises(ExecutorError, match=r"of tensorrt_rtx 1\.7\.1\.116, and this is tensorrt_rtx 1\.6\.0\.1"):
        model.load(engines, library=older)


def test_engines_that_are_not_what_their_list_says_are_refused_by_the_library(model, tmp_path):
    engines = write_engines(model.exported, tmp_path, library=stand_in.library(), compute_capability="sm120")
    as_if = engines.key.model_copy(update={"compute_capability": "sm89"})
    with pytest.raises(ExecutorError, match=r"engine, built by .* for sm89, cannot run on .*: unsupported cc"):
        model.load(replace(engines, key=as_if))


def test_files_that_are_missing_cut_short_or_damaged_are_refused(model, tmp_path):
    engines = write_engines(model.exported, tmp_path, library=stand_in.library())
    path = engines.directory / "mid_001.engine"
    whole = path.read_bytes()
    for content, said in (
        (whole[:-1], rf"{len(whole) - 1} bytes instead of {len(whole)}"),
        (whole[:-2] + b"??", "is damaged: its checksum is not that of engines.json"),
    ):
        path.write_bytes(content)
        with pytest.raises(ExecutorError, match=said):
            model.load(engines)
    path.unlink()
    with pytest.raises(ExecutorError, match=r"mid_001\.engine cannot be read"):
        model.load(engines)
    (tmp_path / "elsewhere").write_bytes(whole)
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ExecutorError, match="is a link"):
        model.load(engines)


def test_too_little_memory_is_refused_with_the_arithmetic(model, tmp_path):
    gib = 2**30
    engines = write_engines(model.exported, tmp_path, library=stand_in.library(), weight_bytes=gib)
    card = StandInCard(name="RTX 4060", free=8 * gib)
    with pytest.raises(ExecutorError) as refused:
        model.load(engines, card=card, reserved_bytes=gib, kv_cache_bytes=2 * gib)
    said = str(refused.value)
    count = len(engines.records)
    assert f"too little memory on RTX 4060 for fp32 engines: weights {count}.00 GiB + activations 0.00 GiB" in said
    assert f"the rest 1.00 GiB + KV cache 2.00 GiB = {count + 3}.00 GiB, and 8.00 GiB are free" in said
    assert "--precision int4" in said
    assert "--weight-streaming" in said
    assert not stand_in.TOLD.contexts, "nothing was begun"


def test_a_small_card_streams_what_does_not_fit(model, tmp_path):
    mib = 2**20
    engines = write_engines(
        model.exported, tmp_path, library=stand_in.library(), weight_bytes=100 * mib, streams_weights=True
    )
    executor = model.load(engines, card=StandInCard(free=400 * mib), reserved_bytes=70 * mib, kv_cache_bytes=30 * mib)
    budgets = stand_in.TOLD.budgets.values()
    assert len(budgets) == len(engines.records)
    assert 299 * mib - len(budgets) < sum(budgets) < 300 * mib
    assert not executor.recordable, "it allocates while it executes"
    hidden, _, cos, sin = segment_inputs(model, 6)
    executor.first(hidden, cos, sin)
    stand_in.forget()
    model.load(engines, card=StandInCard(free=4000 * mib))
    assert set(stand_in.TOLD.budgets.values()) == {100 * mib}, "all of them stay where there is room"
    with pytest.raises(ExecutorError, match="too little memory"):
        model.load(engines, card=StandInCard(free=90 * mib), reserved_bytes=100 * mib)


def test_weights_are_not_streamed_into_memory_that_the_kv_cache_was_to_have(model, tmp_path):
    """What remains beside weights that take all is nothing: how much the cache is to have must be said."""
    gib = 2**30
    engines = write_engines(
        model.exported, tmp_path, library=stand_in.library(), weight_bytes=gib, streams_weights=True
    )
    with pytest.raises(
        ExecutorError,
        match=r"leave no KV cache: weights .*the rest 1\.00 GiB = .* 4\.00 GiB are free; set kv_cache_bytes",
    ):
        model.load(engines, card=StandInCard(free=4 * gib), reserved_bytes=gib)
    assert not stand_in.TOLD.contexts, "nothing was begun"


def test_what_is_quoted_of_a_file_was_said_of_that_file(model, tmp_path, monkeypatch):
    """Several are opened at once, and the library has one logger for all."""
    engines = write_engines(model.exported, tmp_path, library=stand_in.library())
    other_failed, opened = Event(), stand_in.Runtime.deserialize_cuda_engine

    def told(runtime, buffer):
        if b"first.onnx" in bytes(buffer):
            runtime.logger.log(stand_in.ILogger.Severity.ERROR, "said of first")
            other_failed.set()
        elif b"mid_001.onnx" in bytes(buffer):
            assert other_failed.wait(10)
            runtime.logger.log(stand_in.ILogger.Severity.ERROR, "said of mid_001")
            return None
        return opened(runtime, buffer)

    monkeypatch.setattr(stand_in.Runtime, "deserialize_cuda_engine", told)
    with pytest.raises(ExecutorError, match=r"mid_001\.engine on Stand-in RTX: said of mid_001; if it"):
        model.load(engines)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("open", r"cannot open .*mid_001\.engine on Stand-in RTX: .*magicTag does not match"),
        ("context", r"no context for mid_001 on Stand-in RTX: Error Code 2: OutOfMemory .*lower kv_cache_bytes"),
        ("weights", r"the weights of mid_001\.engine cannot be copied to Stand-in RTX: .*OutOfMemory"),
    ],
)
def test_what_the_library_refuses_is_told_in_its_words(model, tmp_path, fault, said):
    engines = write_engines(model.exported, tmp_path, library=stand_in.library(), faults={MID: fault})
    with pytest.raises(ExecutorError, match=said):
        model.load(engines)


def test_an_execution_that_fails_names_the_segment_and_what_the_library_said(model, tmp_path):
    engines = write_engines(model.exported, tmp_path, library=stand_in.library(), faults={MID: "execute"})
    executor = model.load(engines)
    hidden, attention, cos, sin = segment_inputs(model, 6)
    executor.mid(0, hidden, attention, cos, sin)
    with pytest.raises(EngineError, match=r"could not execute mid_001 for 6 rows: .*an illegal memory access"):
        executor.mid(1, hidden, attention, cos, sin)


def test_engines_of_another_shape_are_refused_with_all_that_differs(model, tmp_path, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write_random_checkpoint(other, text={"hidden_size": 64, "num_hidden_layers": 4}, vision={})
    wrong = Model(other, tmp_path / "segments")
    engines = write_engines(wrong.exported, tmp_path / "engines", library=stand_in.library())
    with pytest.raises(ExecutorError, match=r"hidden is \(-1, 64\) in place of \(-1, 48\)"):
        model.load(engines)


def test_names_that_the_contract_does_not_have_are_refused(model, tmp_path):
    import onnx

    engines = write_engines(model.exported, tmp_path, library=stand_in.library())
    record = engines.engines[FIRST]
    path = engines.directory / record.file
    plan = json.loads(path.read_bytes().removeprefix(b"stand-in"))
    graph = onnx.load(plan["onnx"], load_external_data=False)
    graph.graph.input[0].name = "hidden_in"
    for node in graph.graph.node:
        node.input[:] = ["hidden_in" if name == "hidden" else name for name in node.input]
    renamed = Path(plan["onnx"]).with_name("renamed.onnx")
    onnx.save(graph, renamed)
    folder = EngineFolder.open(tmp_path, engines.key)
    ranges = plan["ranges"] | {"hidden_in": plan["ranges"]["hidden"]}
    fields = plan | {"onnx": str(renamed), "ranges": ranges, "activation_bytes": tuple(plan["activation_bytes"])}
    add(folder, [FIRST], stand_in.Plan(**fields))
    changed = {**engines.engines, FIRST: next(r for r in folder.records if "first" in r.segments)}
    with pytest.raises(
        ExecutorError, match=r"has an input 'hidden_in' that is not in the contract; .*no input 'hidden'"
    ):
        model.load(replace(engines, engines=changed))


def test_engines_with_other_ranges_than_their_list_says_are_refused(model, tmp_path):
    engines = write_engines(model.exported, tmp_path, library=stand_in.library())
    as_if = engines.key.model_copy(update={"profiles": profiles_for(max_running=8, max_batch_tokens=80)})
    with pytest.raises(ExecutorError, match="has the ranges"):
        model.load(replace(engines, key=as_if))


def test_sets_that_lack_an_engine_are_refused(model, tmp_path):
    engines = write_engines(model.exported, tmp_path, library=stand_in.library())
    fewer = {segment: record for segment, record in engines.engines.items() if segment != VISION}
    with pytest.raises(ExecutorError, match="has no engine for vision"):
        model.load(replace(engines, engines=fewer))
