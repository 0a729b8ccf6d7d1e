"""Steps of decodes replayed over memory that stays, against the same steps run layer by layer."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.gemma3_random import write_random_checkpoint
from wicore_backend.attention.base import PackedStep
from wicore_backend.attention.gpu.paged import GpuPagedAttention
from wicore_backend.engine.graphs import DecodeGraphs, bucket_sizes, capture
from wicore_backend.engine.runner import run_layers
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


@pytest.fixture(scope="module")
def model(tmp_path_factory, kernel_device):
    return Model(tmp_path_factory.mktemp("model"), kernel_device)


def graphs_of(model, record):
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


@pytest.fixture
def graphs(model, kernel_device):
    return graphs_of(model, capture if kernel_device.type == "cuda" else lambda work: work)


@torch.inference_mode()
def test_replays_compute_what_the_layers_do_one_by_one(model, graphs, kernel_device):
    # A step for each bucket, then others in the same buckets: shorter, longer, fewer, and one whose mass is measured.
    steps = [decodes([9]), decodes([5, 30, 17]), decodes([40]), decodes([2, 47, 8], {1: [0, 2]}), decodes([20, 21])]
    for number, step in enumerate(steps):
        ids = torch.arange(8 + number, 8 + number + len(step.positions), device=kernel_device)
        model.reset()
        expected, masses = model.layer_by_layer(step, ids)
        written = {group: pool.clone() for group, pool in model.pools.tensors.items()}
        model.reset()
        output = graphs.run(step, ids)
        rows = list(range(len(ids)))
        torch.testing.assert_close(output.logits(rows), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(output.logits(rows[::-1]), expected.flip(0), rtol=1e-4, atol=1e-4)
        for group, pool in model.pools.tensors.items():
            torch.testing.assert_close(pool, written[group])
        assert output.offsets == tuple(range(len(ids) + 1))
        measured = output.mass()
        assert measured.keys() == masses.keys() == {s for of in step.measured.values() for s in of}
        for sequence, mass in measured.items():
            np.testing.assert_allclose(mass, masses[sequence], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_what_no_graph_fits_is_left_to_the_layers(graphs, kernel_device):
    assert graphs.run(decodes([1, 2, 3, 4]), torch.arange(4, device=kernel_device)) is None
    assert graphs.run(decodes([MAX_KEYS]), torch.arange(1, device=kernel_device)) is None


@torch.inference_mode()
def test_what_cannot_be_captured_is_left_to_the_layers_from_then_on(model, kernel_device):
    tried = []

    def record(work):
        tried.append(work)
        raise torch.OutOfMemoryError("no room for a graph")

    graphs = graphs_of(model, record)
    for _ in range(2):
        assert graphs.run(decodes([9]), torch.arange(1, device=kernel_device)) is None
    assert len(tried) == 1


@pytest.mark.parametrize("most", [1, 3, 16, 100, 256])
def test_buckets_rise_to_the_most_that_run(most):
    sizes = bucket_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == most
    # What a step is padded by: at most as much again, and two thirds or less where steps take the longest.
    assert all(after <= 2 * before for before, after in pairwise(sizes))
    assert all(3 * (after - before) <= 2 * before for before, after in pairwise(sizes) if before > 8)
