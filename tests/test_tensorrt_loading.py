"""Engines that are loaded, on a stand-in for TensorRT: what does not fit the card, the list or the model is refused."""

import json
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest

from tests import stand_in_tensorrt as stand_in
from tests.gemma3_random import write_random_checkpoint
from tests.stand_in_engines import StandInCard, add, write_engines
from tests.tensorrt_kit import FIRST, MID, VISION, Model, segment_inputs
from wicore_backend.errors import ExecutorError
from wicore_backend.executor.tensorrt.profiles import profiles_for
from wicore_backend.executor.tensorrt.store import EngineFolder

pytest_plugins = ["tests.tensorrt_fixtures"]
pytestmark = pytest.mark.usefixtures("told_anew")

# Files, and what they were built for


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


# Memory


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


# The contract


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
