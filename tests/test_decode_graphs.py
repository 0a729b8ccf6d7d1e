"""Steps replayed over memory that stays, whole or segment by segment, against the same steps run layer by layer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.gemma3_random import write_random_checkpoint
from wicore_backend.attention.base import PackedStep
from wicore_backend.attention.gpu.paged import GpuPagedAttention
from wicore_backend.engine.graphs import DecodeGraphs, bucket_sizes
from wicore_backend.engine.prompts import PromptGraphs
from wicore_backend.engine.recording import CudaRecorder
from wicore_backend.engine.runner import run_layers
from wicore_backend.engine.segments import SegmentGraphs, token_counts
from wicore_backend.engine.step_inputs import StepInputs
from wicore_backend.executor.cuda_executor import CudaExecutor
from wicore_backend.hmt.layout import KVLayout, LayerGroup
from wicore_backend.hmt.pool import KVPools
from wicore_backend.models.gemma3.checkpoint import load_weights
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.models.gemma3.rope import RotaryTables

BLOCK, BLOCKS, MAX_KEYS = 8, 40, 48
TEXT = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}


class Model:
    """A random model on a device, with pools full of keys from nowhere."""

    def __init__(self, directory, device):
        write_random_checkpoint(directory, text=TEXT)
        self.config = Gemma3Config.from_checkpoint(directory)
        text = self.config.text
        weights = load_weights(directory, self.config, device=device, dtype=torch.float32)
        self.layout = KVLayout.of(
            text.layer_groups,
            block_size=BLOCK,
            kv_heads=text.num_kv_heads,
            head_dim=text.head_dim,
            window=text.window,
            bytes_per_value=4,
        )
        torch.manual_seed(0)
        shapes = {group: (BLOCKS, *self.layout.block_shape(group)) for group in LayerGroup}
        self.keys = {group: torch.randn(shape, device=device) for group, shape in shapes.items()}
        self.pools = KVPools(self.layout, {group: keys.clone() for group, keys in self.keys.items()})
        self.executor = CudaExecutor(self.config, weights)
        self.attention = GpuPagedAttention(
            self.pools,
            query_heads=text.num_heads,
            scale=text.attention_scale,
            window=text.window,
            softcap=None,
            processors=4,
        )
        self.rotary = RotaryTables(self.config, max_positions=64, device=device, dtype=torch.float32)

    def reset(self):
        for group, keys in self.keys.items():
            self.pools.tensors[group].copy_(keys)

    def layer_by_layer(self, step, ids):
        """Logits of a step."""
        positions = torch.from_numpy(step.positions).to(ids.device)
        hidden = self.executor.embed(ids, None, None)
        work, rope = self.attention.plan(step), self.rotary.lookup(positions)
        hidden, attended = run_layers(self.executor, self.attention, work, self.layout.layers, hidden, rope)
        logits = self.executor.last(hidden, attended, torch.arange(len(ids), device=ids.device))
        return logits, self.attention.mass(work)

    def compare(self, step, ids, run):
        """Assert that `run` gives the logits, the masses and the pools that the layers one by one give."""
        self.reset()
        expected, masses = self.layer_by_layer(step, ids)
        written = {group: pool.clone() for group, pool in self.pools.tensors.items()}
        self.reset()
        logits, measured = run()
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        for group, pool in self.pools.tensors.items():
            torch.testing.assert_close(pool, written[group])
        assert measured.keys() == masses.keys() == {s for of in step.measured.values() for s in of}
        for sequence, mass in measured.items():
            np.testing.assert_allclose(mass, masses[sequence], rtol=1e-4, atol=1e-5)


def decodes(positions, measured=None):
    """A step of one token at each of `positions`, with blocks of its sequences' own."""
    width = max(positions) // BLOCK + 1
    table = np.zeros((len(positions), width), np.int32)
    block = 1
    for row, position in zip(table, positions, strict=True):
        count = position // BLOCK + 1
        row[:count] = np.arange(block, block + count)
        block += count
    return PackedStep(
        positions=np.array(positions, np.int32),
        attend_limits=np.array(positions, np.int32),
        query_lens=np.ones(len(positions), np.int32),
        decodes=len(positions),
        block_tables=dict.fromkeys(LayerGroup, table),
        measured=measured or {},
    )


def prompts(lens, *, decoded=(), measured=None):
    """A step of decodes at positions `decoded`, then of the first tokens of as many prompts as `lens` has."""
    of_decodes = decodes([*decoded, *(n - 1 for n in lens)])
    positions = np.concatenate([np.array(decoded, np.int32), *(np.arange(n, dtype=np.int32) for n in lens)])
    return PackedStep(
        positions=positions,
        attend_limits=positions,
        query_lens=np.array([1] * len(decoded) + list(lens), np.int32),
        decodes=len(decoded),
        block_tables=of_decodes.block_tables,
        measured=measured or {},
    )


def after(step, computed):
    """The rest of a step of one prompt, `computed` tokens of which are done."""
    positions = step.positions[computed:]
    return replace(
        step,
        positions=positions,
        attend_limits=positions,
        query_lens=step.query_lens - computed,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory, kernel_device):
    return Model(tmp_path_factory.mktemp("model"), kernel_device)


class Repeated:
    """What is recorded where there are no graphs: the work itself."""

    def __init__(self, work):
        self._work = work

    def __call__(self):
        return self._work()

    def lend(self):
        pass


@pytest.fixture(scope="module")
def record(kernel_device):
    return CudaRecorder(kernel_device) if kernel_device.type == "cuda" else Repeated


def decode_graphs(model, record):
    return DecodeGraphs(
        executor=model.executor,
        attention=model.attention,
        rotary=model.rotary,
        layout=model.layout,
        max_sequences=3,
        max_keys=MAX_KEYS,
        measures=True,
        record=record,
    )


def inputs_of(model, max_tokens):
    return StepInputs.of(model.config.text, model.executor, tokens=token_counts(max_tokens)[-1])


def segment_graphs(model, record, max_tokens):
    return SegmentGraphs(
        executor=model.executor,
        attention=model.attention,
        rotary=model.rotary,
        layout=model.layout,
        inputs=inputs_of(model, max_tokens),
        record=record,
    )


def prompt_graphs(model, record, max_tokens):
    return PromptGraphs(
        executor=model.executor,
        attention=model.attention,
        rotary=model.rotary,
        layout=model.layout,
        inputs=inputs_of(model, max_tokens),
        max_keys=MAX_KEYS,
        measures=True,
        record=record,
    )


class Watched:
    """An executor that computes nothing, and of which it is known what each `mid` read and left when it ran last."""

    def __init__(self):
        self.read, self.left = {}, {}

    def first(self, hidden, *_):
        return hidden, hidden, hidden

    def mid(self, layer, hidden, *_):
        self.read[layer], self.left[layer] = hidden, hidden.clone()
        return self.left[layer], (hidden, hidden, hidden)


class Positions:
    """Without any cosines and sines."""

    def lookup(self, _):
        return dict.fromkeys(LayerGroup, (None, None))


@torch.inference_mode()
def test_a_segment_that_is_tried_before_it_is_recorded_reads_what_the_one_before_it_left():
    def tried_first(work):
        work()
        work()
        return Repeated(work)

    executor, layers = Watched(), 5
    inputs = StepInputs(torch.zeros(16, 4), torch.zeros(16, dtype=torch.int32), torch.zeros(16, 4))
    layout = KVLayout.of([LayerGroup.LOCAL] * layers, block_size=4, kv_heads=1, head_dim=4, window=8, bytes_per_value=4)
    graphs = SegmentGraphs(
        executor=executor, attention=None, rotary=Positions(), layout=layout, inputs=inputs, record=tried_first
    )
    graphs.prepare()
    left = {-1: inputs.embedded} | executor.left
    assert list(executor.read) == list(range(layers - 1))
    for layer, hidden in executor.read.items():
        assert hidden.data_ptr() == left[layer - 1].data_ptr(), f"layer {layer}"


@pytest.fixture(scope="module")
@torch.inference_mode()
def graphs(model, record):
    graphs = decode_graphs(model, record)
    graphs.prepare()
    return graphs


@pytest.fixture(scope="module")
@torch.inference_mode()
def segments(model, record):
    segments = segment_graphs(model, record, max_tokens=40)
    segments.prepare()
    return segments


@pytest.fixture(scope="module")
@torch.inference_mode()
def whole_prompts(model, record):
    graphs = prompt_graphs(model, record, max_tokens=40)
    graphs.prepare()
    return graphs


@torch.inference_mode()
def test_preparing_graphs_touches_no_pool(model, record):
    model.reset()
    decode_graphs(model, record).prepare()
    prompt_graphs(model, record, max_tokens=16).prepare()
    segments = segment_graphs(model, record, max_tokens=16)
    segments.prepare()
    segments.rehearse(20)
    for group, keys in model.keys.items():
        assert torch.equal(model.pools.tensors[group], keys)


@torch.inference_mode()
def test_replays_compute_what_the_layers_do_one_by_one(model, graphs, kernel_device):
    # A step for each bucket, then others in the same buckets: shorter, longer, fewer, and one whose mass is measured.
    steps = [decodes([9]), decodes([5, 30, 17]), decodes([40]), decodes([2, 47, 8], {1: [0, 2]}), decodes([20, 21])]
    for number, step in enumerate(steps):
        ids = torch.arange(8 + number, 8 + number + len(step.positions), device=kernel_device)

        def run(step=step, ids=ids):
            output = graphs.run(step, ids)
            assert output.offsets == tuple(range(len(ids) + 1))
            rows = list(range(len(ids)))
            logits = output.logits(rows)
            torch.testing.assert_close(output.logits(rows[::-1]).flip(0), logits, rtol=1e-4, atol=1e-4)
            return logits, output.mass()

        model.compare(step, ids, run)


@torch.inference_mode()
def test_segments_compute_what_the_layers_do_one_by_one(model, segments, kernel_device):
    # A step for each bucket, one beside decodes, one whose mass is measured, and a smaller one in memory used before.
    steps = [prompts([40]), prompts([7, 9]), prompts([5, 20], decoded=[30, 3]), prompts([33], measured={1: [0]})]
    for number, step in enumerate([*steps, prompts([2], decoded=[8])]):
        ids = torch.arange(8 + number, 8 + number + len(step.positions), device=kernel_device)
        arrived = []
        model.compare(step, ids, partial(run_by, segments, model, step, ids, arrived))
        assert arrived == list(range(len(model.layout.layers)))


def run_by(replay, model, step, ids, arrived):
    """What `Model.compare` compares, of a step whose layers `replay` runs."""
    attended = replay.run(step, model.executor.embed(ids, None, None), arrived.append)
    assert attended is not None
    rows = torch.arange(len(ids), device=ids.device)
    logits = model.executor.last(attended.hidden, attended.attention, rows)
    return logits, model.attention.collect(attended.plan)()


@torch.inference_mode()
def test_prompts_by_themselves_compute_what_the_layers_do_one_by_one(model, whole_prompts, kernel_device):
    # One for each bucket, one whose mass is measured, the end of one, and a smaller one in memory used before.
    steps = [prompts([40]), prompts([9]), prompts([33], measured={1: [0]}), after(prompts([30]), 12), prompts([2])]
    for number, step in enumerate(steps):
        ids = torch.arange(8 + number, 8 + number + len(step.positions), device=kernel_device)
        arrived = []
        model.compare(step, ids, partial(run_by, whole_prompts, model, step, ids, arrived))
        assert arrived == [None]


@torch.inference_mode()
def test_what_is_not_one_short_prompt_is_left_to_segments(model, whole_prompts, kernel_device):
    hidden = torch.zeros(41, model.config.text.hidden_size, device=kernel_device)
    long = after(prompts([MAX_KEYS + 9]), MAX_KEYS - 2)
    for step in (prompts([41]), prompts([20, 3]), prompts([5], decoded=[9]), decodes([9]), long):
        assert whole_prompts.run(step, hidden[: len(step.positions)], [].append) is None


@torch.inference_mode()
def test_what_no_graph_fits_is_left_to_the_layers(model, graphs, segments, kernel_device):
    assert graphs.run(decodes([1, 2, 3, 4]), torch.arange(4, device=kernel_device)) is None
    assert graphs.run(decodes([MAX_KEYS]), torch.arange(1, device=kernel_device)) is None
    many = prompts([21, 20])
    hidden = torch.zeros(41, model.config.text.hidden_size, device=kernel_device)
    assert segments.run(many, hidden, lambda _: None) is None


@torch.inference_mode()
def test_a_size_that_cannot_be_recorded_takes_the_next_and_the_largest_is_left_to_the_layers(model, kernel_device):
    sizes = []

    def record(work):
        sizes.append(len(work()[0]))
        if sizes[-1] in (1, 3, 40):
            raise torch.OutOfMemoryError("no room for a graph")
        return Repeated(work)

    graphs = decode_graphs(model, record)
    graphs.prepare()
    assert sizes == [3, 2, 1]
    one, three = decodes([9]), decodes([5, 30, 17])
    ids = torch.arange(3, device=kernel_device)
    assert graphs.run(three, ids) is None
    model.compare(one, ids[:1], lambda: (graphs.run(one, ids[:1]).logits([0]), {}))
    segments = segment_graphs(model, record, max_tokens=40)
    segments.prepare()
    hidden = torch.zeros(40, model.config.text.hidden_size, device=kernel_device)
    assert segments.run(prompts([40]), hidden, lambda _: None) is None
    assert segments.run(prompts([32]), hidden[:32], lambda _: None) is not None


@pytest.mark.parametrize("most", [1, 3, 16, 100, 256])
def test_buckets_rise_to_the_most_that_run(most):
    sizes = bucket_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == most
    # What a step is padded by: at most as much again, and two thirds or less where steps take the longest.
    assert all(after <= 2 * before for before, after in pairwise(sizes))
    assert all(3 * (after - before) <= 2 * before for before, after in pairwise(sizes) if before > 8)


@pytest.mark.parametrize("most", [1, 40, 128, 512, 700, 8192])
def test_token_counts_rise_to_what_is_worth_recording(most):
    sizes = token_counts(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == min(most, 1024)
    # No more tiles of the products than the tokens have themselves.
    assert all(-(-(before + 1) // 128) == -(-after // 128) for before, after in pairwise(sizes))
