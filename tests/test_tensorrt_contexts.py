"""Contexts of the TensorRT executor, on its stand-in: what each is told, and those that recordings keep."""

import gc
import logging

import pytest

from tests import stand_in_tensorrt as stand_in
from tests.stand_in_engines import write_engines
from tests.tensorrt_kit import LAST, MID, segment_inputs
from wicore_backend.executor.segments.contract import Segment, SegmentKind

pytest_plugins = ["tests.tensorrt_fixtures"]
pytestmark = pytest.mark.usefixtures("told_anew")


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
