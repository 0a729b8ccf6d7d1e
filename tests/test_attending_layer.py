"""Layers of one token that attend themselves: who leaves attention to them, for which pools, and that they compile.

What they compute: `test_attending_layer_on_cpu.py`, and here on a card.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from scripts.random_gemma3 import _COMMON, SHAPES, random_weights
from tests.attention_kit import Bench
from tests.hopper_twin.attending_layers import Token
from tests.kernel_kit import assert_nvrtc_compiles, needs_nvcc, nvcc_compiled
from tests.paged_steps import PREFILLS, SCALE, Part
from tests.test_decode_planner import BY_TILES, LOG2_E, SHAPE, PlainDecode
from tests.test_streamed_layer import H200_BLOCKS, LAYERS, SMALL, Case, form_of
from wicore_backend.attention.gpu import hopper_decode
from wicore_backend.engine.runner import run_layers
from wicore_backend.executor.base import QKV, AttendingExecutor
from wicore_backend.executor.streamed_layer import HEADERS, SOURCE, Pool, StreamedLayers
from wicore_backend.hmt.fp8 import FP8
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.models.gemma3.config import Gemma3Config

LOCAL = LayerGroup.LOCAL
POOLS = {"bfloat16": Pool(32, 16), "FP8": Pool(32, 8)}
KV_DTYPES = {"bfloat16": torch.bfloat16, "FP8": FP8}
every_width = pytest.mark.parametrize("bits", [4, 8, 16])
over_every_pool = pytest.mark.parametrize("pool", POOLS)


# ---- Who leaves attention to whom


class Layers:
    """An executor whose layers change nothing, but attend plainly themselves if they are to."""

    dtype = residual = torch.float32
    recordable = False

    def __init__(self, bench: Bench, *, takes: bool) -> None:
        self.device, self._takes = bench.device, takes
        self.qkv = QKV(*bench.qkv(sum(part.new for part in bench.parts)))
        self.attended: list[torch.Tensor] = []
        self.left: list[int] = []

    def embed(self, *_):
        raise NotImplementedError

    last = vision = embed

    def attends(self, _):
        return self._takes

    def first(self, *_):
        return self.qkv

    def mid(self, layer, hidden, attention, *_):
        if not isinstance(attention, torch.Tensor):
            self.left.append(layer)
            attention = plainly(attention)
        self.attended.append(attention.clone())
        return hidden, self.qkv


def plainly(left):
    """What is left, computed from what is told of it alone."""
    out = left.q.new_empty(1, left.q[0].numel())
    assert left.pool.shape[3] == left.block_size
    where = {name: getattr(left, name) // left.pool.itemsize for name in ("layer_at", "block_stride")}
    assert left.scale == pytest.approx(SCALE * LOG2_E)
    PlainDecode()(LOCAL, 1, left.q, left.k, left.v, left.pool, out, left.work, left.tables, **where)
    return out


@pytest.fixture
def hopper_s(monkeypatch):
    """Attentions that are made have a kernel as on Hopper."""
    kernel = PlainDecode()
    kernel.scale = SCALE * LOG2_E
    monkeypatch.setattr(hopper_decode, "hopper_decode", lambda *_, **__: kernel)


def layers_of(parts, device, *, takes, measured=None):
    """The step through the layers: who attended, and the pools after it."""
    bench = Bench(SHAPE, parts, device, tuning=BY_TILES)
    executor = Layers(bench, takes=takes)
    assert isinstance(executor, AttendingExecutor)
    step = bench.step(measured)
    plan = bench.attention.plan(step)
    rope = dict.fromkeys(LayerGroup, (torch.empty(0), torch.empty(0)))
    hidden = torch.empty(len(step.positions), 1)
    _, last = run_layers(executor, bench.attention, plan, bench.layout.layers, hidden, rope)
    executor.attended.append(last.clone())
    return executor, bench


@pytest.mark.usefixtures("hopper_s")
@pytest.mark.parametrize("position", [0, 31, 32, 200])
def test_one_decode_s_local_layers_are_left_to_an_executor_that_takes_them(position, kernel_device):
    parts = [Part(position, 1)]
    inside, bench = layers_of(parts, kernel_device, takes=True, measured={1: [0]})
    assert inside.left == [0, 2], "the local ones, but for the last layer"
    apart, expected = layers_of(parts, kernel_device, takes=False, measured={1: [0]})
    assert not apart.left
    for ours, right in zip(inside.attended, apart.attended, strict=True):
        torch.testing.assert_close(ours, right)
    for group, pool in bench.pools.tensors.items():
        assert torch.equal(pool.nan_to_num(7.0), expected.pools.tensors[group].nan_to_num(7.0))


@pytest.mark.usefixtures("hopper_s")
@pytest.mark.parametrize(
    "parts",
    [[Part(40, 1), Part(3, 1)], [Part(40, 1), *PREFILLS[:1]], PREFILLS[:1]],
    ids=["two decodes", "a decode and a prompt", "a prompt"],
)
def test_other_steps_are_not(parts, kernel_device):
    assert not layers_of(parts, kernel_device, takes=True)[0].left


def test_other_attention_leaves_nothing(kernel_device):
    assert not layers_of([Part(40, 1)], kernel_device, takes=True)[0].left


# ---- Which pools have room, and whether it compiles


@pytest.fixture
def config(tmp_path):
    def write(shape):
        small = {"vocab_size": 256, "num_hidden_layers": LAYERS, "query_pre_attn_scalar": 128}
        (tmp_path / "config.json").write_text(json.dumps(_COMMON | shape | small))
        return Gemma3Config.from_checkpoint(tmp_path)

    return write


def launch_of(form, blocks=H200_BLOCKS):
    return form.launch(form.shares(blocks))


@over_every_pool
@every_width
def test_a_stage_of_27b_has_room_for_tiles_of_either_pool(bits, pool, config):
    plain = form_of(config(SHAPES["gemma-3-27b"]).text, bits)
    form = replace(plain, pool=POOLS[pool])
    assert (form.kv_heads, form.members) == (16, 2)
    launch = launch_of(form)
    assert launch is not None
    assert launch.shared_bytes <= 227 * 1024
    assert launch.stages >= launch_of(plain).stages - 1


def test_pools_and_heads_that_do_not_fit_are_left_to_attention(config):
    form = form_of(config(SHAPES["gemma-3-27b"]).text, 8)
    assert launch_of(replace(form, pool=Pool(64, 8))) is not None
    assert launch_of(replace(form, pool=Pool(16, 8))) is None, "half a tile"
    assert launch_of(replace(form, pool=Pool(32, 32))) is None, "tiles of 32 KB"
    large = form_of(config(SHAPES["gemma-3-12b"]).text, 8)
    assert launch_of(replace(large, pool=Pool(32, 16))) is None, "tiles of 32 KB, too"
    assert launch_of(replace(large, pool=Pool(32, 8))) is not None
    assert launch_of(form, blocks=15) is None or launch_of(replace(form, pool=Pool(32, 8)), blocks=15) is None


@over_every_pool
@every_width
def test_it_compiles(bits, pool, config):
    form = replace(form_of(config(SHAPES["gemma-3-27b"]).text, bits), pool=POOLS[pool])
    assert_nvrtc_compiles(SOURCE, HEADERS, form.defines(launch_of(form)))


@over_every_pool
@every_width
@needs_nvcc
def test_the_toolkit_s_compiler_takes_it_and_nothing_spills(bits, pool, config, tmp_path):
    form = replace(form_of(config(SHAPES["gemma-3-27b"]).text, bits), pool=POOLS[pool])
    launch = launch_of(form)
    spills, of_thread = nvcc_compiled(SOURCE, form.defines(launch), tmp_path / "code")
    assert max(spills) == 0
    assert launch.threads * of_thread <= 65_536


# ---- What it computes on a card


@pytest.fixture
def hopper():
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no Hopper GPU here")
    with torch.inference_mode():
        yield torch.device("cuda")


class AttendingCase(Case):
    """As `Case`, whose layers attend to keys in a pool."""

    def __init__(self, model, kind, device, kv_dtype):
        super().__init__(model, kind, device)
        self.text, self.kv_dtype, self.block_size = model.text, kv_dtype, 32

    def token(self, keys, window):
        return Token(self, keys, window).to(self.device)

    def steps(self, token, pool):
        """Two layers, of which each attends itself."""
        hidden, heads = token.hidden, token.heads
        found = []
        for layer in range(LAYERS - 1):
            left = token.left(layer, heads, pool)
            assert self.streamed.attends(left)
            hidden, heads = self.streamed(layer, hidden, left, *self.rope)
            found.append((hidden, heads))
        return found


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("kind", ["bf16", "fp8", "int4", "int4 with zero points"])
@pytest.mark.parametrize("keys", [1, 2, 33, 575, 576, 577, 1024, 1025, 3000])
def test_layers_of_27b_are_what_the_plain_twin_makes_of_them_and_replays_repeat(keys, kind, kv_dtype, config, hopper):
    case = AttendingCase(config(SMALL["of 27B"]), kind, hopper, KV_DTYPES[kv_dtype])
    token = case.token(keys, 1024)
    pool = token.pool.clone()
    first = case.steps(token, pool)
    token.assert_written(pool, [token.heads, first[0][1]])
    assert max(token.errors(case, first)) < 1e-2
    pool.copy_(token.pool)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = case.steps(token, pool)
    for turn in range(100):
        if turn % 10 == 0:
            pool.copy_(token.pool)
        graph.replay()
        for result, right in zip(results, first, strict=True):
            assert all(map(torch.equal, result, right)), f"replay {turn}"


@pytest.mark.gpu
def test_a_graph_takes_whatever_keys_a_step_has(config, hopper):
    case = AttendingCase(config(SMALL["of 27B"]), "fp8", hopper, torch.bfloat16)
    longest = case.token(1500, 1024)
    pool, inputs = longest.pool.clone(), [longest.hidden, longest.heads, longest.work, longest.tables]
    case.steps(longest, pool)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = case.steps(longest, pool)
    kept = [tensor.clone() for tensor in inputs]
    for keys in (1500, 7, 700, 1500):
        token = case.token(keys, 1024) if keys != 1500 else None
        given = kept if token is None else [token.hidden, token.heads, token.work, token.tables]
        for into, value in zip(inputs, given, strict=True):
            into[: len(value)].copy_(value)
        own = longest.pool if token is None else token.pool
        pool[: len(own)].copy_(own)
        graph.replay()
        if token is not None:
            assert max(token.errors(case, results)) < 1e-2, f"{keys} keys"


@pytest.mark.gpu
def test_streamed_layers_take_a_pool_that_fits_and_no_other(config, hopper):
    model = config(SMALL["of 27B"])
    layers = random_weights(model, device=hopper, dtype=torch.bfloat16).text.layers
    streamed = StreamedLayers(form_of(model.text, 16), model.text.rms_norm_eps, layers, hopper)
    case = AttendingCase(model, "bf16", hopper, torch.bfloat16)
    token = case.token(40, 1024)
    left = token.left(0, token.heads, token.pool)
    assert streamed.attends(left)
    assert not streamed.attends(replace(left, block_size=16))
