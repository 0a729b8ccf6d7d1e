"""Steps as the engine records them, with the TensorRT executor on its stand-in: what the layers one by one give."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from tests import stand_in_tensorrt as stand_in
from tests.stand_in_engines import StandInCard, write_engines
from tests.test_decode_graphs import (
    Model,
    Repeated,
    decode_graphs,
    decodes,
    prompt_graphs,
    prompts,
    run_by,
    segment_graphs,
)
from wicore_backend.config import EngineConfig
from wicore_backend.engine.device_memory import recorded_segments
from wicore_backend.executor.embedding import Embedding
from wicore_backend.executor.segments.contract import Precision
from wicore_backend.executor.segments.export import export_segments
from wicore_backend.executor.tensorrt.executor import TensorRTExecutor
from wicore_backend.executor.tensorrt.profiles import profiles_for
from wicore_backend.models.gemma3.checkpoint import load_weights

CPU = torch.device("cpu")


class OnTensorRT:
    """A model whose steps are recorded with the executor, and compared with those of its own."""

    def __init__(self, model, executor):
        self.plain = model
        self.executor = executor
        self.config, self.attention, self.rotary, self.layout = (
            model.config,
            model.attention,
            model.rotary,
            model.layout,
        )


class Strict(Repeated):
    """A recording that, like a graph, has contexts of its own: nothing is made or told when it is repeated."""

    def __call__(self):
        before = stand_in.TOLD.contexts
        results = super().__call__()
        assert stand_in.TOLD.contexts == before
        return results


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    if torch.cuda.is_available():
        pytest.skip("the stand-in computes on a CPU, where kernels then do not run")
    directory = tmp_path_factory.mktemp("model")
    model = Model(directory, CPU)
    exported = export_segments(directory, tmp_path_factory.mktemp("segments"), Precision.FP32)
    engines = write_engines(
        exported,
        tmp_path_factory.mktemp("engines"),
        library=stand_in.library(),
        profiles=profiles_for(max_running=3, max_batch_tokens=66),
    )
    table = load_weights(directory, model.config, device=CPU, dtype=torch.float32).text.embedding
    executor = TensorRTExecutor.load(
        model.config,
        engines,
        library=stand_in.library(),
        card=StandInCard(),
        embed=Embedding(table, device=CPU, residual=torch.float32),
    )
    return OnTensorRT(model, executor)


def with_own_contexts(model, work):
    """Repeat recorded work, as a graph would, on the contexts that it was recorded with."""
    restores = [contexts.keep_own() for contexts in model.executor._contexts.values()]
    work()  # Makes them, as `recording` does.
    kept = [contexts._bound for contexts in model.executor._contexts.values()]
    for restore in restores:
        restore()

    def again():
        for contexts, bound in zip(model.executor._contexts.values(), kept, strict=True):
            contexts._bound = bound
        try:
            return Strict(work)()
        finally:
            for contexts in model.executor._contexts.values():
                contexts._bound = contexts._shared

    return again


@pytest.fixture(scope="module")
def record(model):
    return model.executor.recording(lambda work: Repeated(with_own_contexts(model, work)))


@torch.inference_mode()
def test_recorded_decodes(model, record):
    graphs = decode_graphs(model, record)
    graphs.prepare()
    for number, step in enumerate([decodes([9]), decodes([5, 30, 17]), decodes([40]), decodes([20, 21])]):
        ids = torch.arange(8 + number, 8 + number + len(step.positions))

        def run(step=step, ids=ids):
            output = graphs.run(step, ids)
            rows = list(range(len(ids)))
            logits = output.logits(rows)
            # The head once more, outside of the graph, from the hidden states that it left.
            torch.testing.assert_close(output.logits(rows[::-1]).flip(0), logits, rtol=1e-4, atol=1e-4)
            return logits, output.mass()

        model.plain.compare(step, ids, run)


@pytest.mark.parametrize("graphs", [segment_graphs, prompt_graphs], ids=["segments", "prompts"])
@torch.inference_mode()
def test_recorded_steps_with_prompts(model, record, graphs):
    replay = graphs(model, record, max_tokens=20)
    replay.prepare()
    steps = [prompts([20]), prompts([9])]
    if graphs is segment_graphs:
        steps += [prompts([5, 9], decoded=[30, 3])]
    for number, step in enumerate([*steps, prompts([2])]):
        ids = torch.arange(8 + number, 8 + number + len(step.positions))
        model.plain.compare(step, ids, partial(run_by, replay, model, step, ids, []))


@torch.inference_mode()
def test_recordings_have_as_many_contexts_as_are_set_aside(model):
    """Each for ever: a model of 62 layers has about a thousand and a half."""
    record = model.executor.recording(Repeated)
    settings = EngineConfig(model=Path("model"), max_running=3, max_batch_tokens=20)
    text_only = replace(model.config, vision=None)
    before = stand_in.TOLD.contexts
    graphs = [decode_graphs(model, record)]
    graphs += [make(model, record, max_tokens=20) for make in (prompt_graphs, segment_graphs)]
    for each in graphs:
        each.prepare()
    assert stand_in.TOLD.contexts - before == recorded_segments(text_only, settings)


@torch.inference_mode()
def test_steps_beside_recorded_ones_disturb_nothing(model, record):
    """A step of another size in between, on the contexts that are shared, and the recorded ones again."""
    graphs = decode_graphs(model, record)
    graphs.prepare()
    step, ids = decodes([5, 30, 17]), torch.tensor([8, 9, 10])
    model.plain.reset()
    before = graphs.run(step, ids).logits([0, 1, 2]).clone()
    text = model.config.text
    hidden, attention = torch.randn(50, text.hidden_size), torch.randn(50, text.num_heads * text.head_dim)
    rope = torch.randn(50, text.head_dim)
    model.executor.mid(0, hidden, attention, rope, rope)
    model.executor.last(hidden, attention, torch.arange(50))
    model.plain.reset()
    assert torch.equal(graphs.run(step, ids).logits([0, 1, 2]), before)
