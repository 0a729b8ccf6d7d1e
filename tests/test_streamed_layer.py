"""A layer of one token as one kernel: how it is shared out, which models it takes, and on a GPU what it computes."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scripts.random_gemma3 import _COMMON, SHAPES, random_weights
from tests.accuracy import relative_error
from tests.kernel_kit import assert_nvrtc_compiles
from wicore_backend.executor.streamed_layer import (
    HEADERS,
    MEASURED,
    SOURCE,
    Form,
    StreamedLayers,
    Tuning,
    shared_out,
    streamed_layers,
)
from wicore_backend.executor.torch_executor import TorchExecutor
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.models.gemma3.weights import plain
from wicore_backend.quantization.fp8 import quantized_fp8
from wicore_backend.quantization.int4_rounding import quantized_int4

H200_BLOCKS = 132
QUANTIZE = {
    "bf16": lambda matrix: matrix,
    "fp8": quantized_fp8,
    "int4": lambda matrix: quantized_int4(matrix, search=False),
    "int4 with zero points": lambda matrix: quantized_int4(matrix, symmetric=False, search=False),
}
BITS = {"bf16": 16, "fp8": 8, "int4": 4, "int4 with zero points": 4}
every_width = pytest.mark.parametrize("bits", [4, 8, 16])
every_kind = pytest.mark.parametrize("kind", QUANTIZE)
SMALL = {
    "heads of 128": {
        "hidden_size": 512,
        "intermediate_size": 1280,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 128,
    },
    "heads of 256": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
    },
    "of 27B": {
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
    },
}
LAYERS = 3
WAYS = {
    "as it is": MEASURED,
    "with little on its way": Tuning(in_flight=24 * 1024),
}
every_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture
def config(tmp_path):
    def write(shape):
        small = {"vocab_size": 256, "num_hidden_layers": LAYERS, "query_pre_attn_scalar": 128}
        (tmp_path / "config.json").write_text(json.dumps(_COMMON | shape | small))
        return Gemma3Config.from_checkpoint(tmp_path)

    return write


# ---- How it is shared out


@given(pieces=st.integers(1, 1400), stages=st.integers(1, 12), blocks=st.integers(1, 140))
def test_blocks_have_equally_many_stages_and_no_piece_is_three_blocks(pieces, stages, blocks):
    share = shared_out(pieces, stages, blocks)
    assert len(share) == blocks + 1
    assert (share[0], share[-1]) == (0, pieces * stages)
    lengths = [after - first for first, after in pairwise(share)]
    if pieces < blocks:
        assert all(end % stages == 0 for end in share), "whole pieces"
        assert max(lengths) == stages
    else:
        assert min(lengths) >= stages
        assert max(lengths) - min(lengths) <= 1


@every_width
@pytest.mark.parametrize("shape", ["gemma-3-27b", "gemma-3-12b"])
def test_blocks_of_a_large_model_read_equally_much_of_each_matrix(shape, bits, config):
    form = form_of(config(SHAPES[shape]).text, bits=bits)
    for share in form.shares(H200_BLOCKS):
        lengths = [after - first for first, after in pairwise(share)]
        assert max(lengths) - min(lengths) <= 1


# ---- Which models it takes


def form_of(text, bits):
    return Form(
        text.hidden_size,
        text.num_heads * text.head_dim,
        text.intermediate_size,
        text.qkv_heads * text.head_dim,
        text.head_dim,
        text.qk_heads,
        bits,
    )


@every_width
@pytest.mark.parametrize("shape", ["gemma-3-27b", "gemma-3-12b", "gemma-3-4b"])
def test_published_models_have_room(shape, bits, config):
    form = form_of(config(SHAPES[shape]).text, bits)
    launch = form.launch(form.shares(H200_BLOCKS))
    assert launch is not None
    assert launch.shared_bytes <= 227 * 1024
    assert 1 <= launch.in_flight < launch.stages
    spans = form.hidden // form.span
    stages = -(-spans // form.warps)
    assert stages * form.warps - spans < stages, "a stage leaves no warp idle, but for one of them"


@every_kind
def test_the_form_is_that_of_the_weights(kind, config):
    model = config(SMALL["heads of 128"])
    form = Form.of(model.text, layers_of(model, torch.bfloat16, QUANTIZE[kind]))
    assert form is not None
    assert form.bits == BITS[kind]
    assert form.zeros == (kind == "int4 with zero points")
    assert (form.attended, form.qkv, form.qk_heads) == (6 * 128, 10 * 128, 8)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 576, "why": "no whole groups"},
        {"head_dim": 64, "why": "heads that a warp does not fill"},
        {"intermediate_size": 1352, "why": "no whole tiles"},
    ],
    ids=lambda change: change["why"],
)
def test_other_sizes_are_left_to_several_kernels(change, config):
    model = config(SMALL["heads of 128"] | change)
    weights = random_weights(model, device=CPU, dtype=torch.bfloat16, quantize=quantized_fp8)
    assert Form.of(model.text, weights.text.layers) is None


def test_other_matrices_are_left_to_several_kernels(config):
    model = config(SMALL["heads of 128"])
    taken = layers_of(model, torch.bfloat16, QUANTIZE["int4"])
    assert Form.of(model.text, taken) is not None
    assert Form.of(model.text, [replace(taken[0], qkv_bias=torch.zeros(10 * 128)), *taken[1:]]) is None
    assert Form.of(model.text, [replace(taken[0], down=quantized_fp8(torch.zeros(512, 1280))), *taken[1:]]) is None
    plain = torch.zeros(512, 1280, dtype=torch.bfloat16)
    assert Form.of(model.text, [replace(taken[0], down=plain), *taken[1:]]) is None
    assert Form.of(model.text, layers_of(model, torch.float32, lambda matrix: matrix)) is None
    assert Form.of(model.text, layers_of(model, torch.float16, QUANTIZE["int4"])) is None
    groups_of_64 = layers_of(model, torch.bfloat16, lambda matrix: quantized_int4(matrix, 64, search=False))
    assert Form.of(model.text, groups_of_64) is None
    assert streamed_layers(model.text, taken) is None, "on a CPU"


def layers_of(model, dtype, quantize):
    return random_weights(model, device=CPU, dtype=dtype, quantize=quantize).text.layers


@every_way
@every_width
def test_it_compiles(bits, way, config):
    form = replace(form_of(config(SHAPES["gemma-3-27b"]).text, bits), tuning=WAYS[way])
    launch = form.launch(form.shares(H200_BLOCKS))
    assert_nvrtc_compiles(SOURCE, HEADERS, form.defines(launch))


# ---- What it computes

CPU = torch.device("cpu")
MATRICES = ("qkv", "out", "gate_up", "down")


@pytest.fixture
def hopper():
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no Hopper GPU here")
    with torch.inference_mode():
        yield torch.device("cuda")


class Case:
    """A model's layers on the GPU, what one token brings, and the plain twin."""

    def __init__(self, model, kind, device, way="as it is"):
        weights = random_weights(model, device=device, dtype=torch.bfloat16, quantize=QUANTIZE[kind])
        text = model.text
        self.layers = weights.text.layers
        self.streamed = StreamedLayers(Form.of(text, self.layers, WAYS[way]), text.rms_norm_eps, self.layers, device)
        widened = [
            replace(layer, **{n: plain(getattr(layer, n), torch.float32) for n in MATRICES}) for layer in self.layers
        ]
        twin = replace(weights.text, embedding=weights.text.embedding.float(), layers=tuple(widened))
        self.twin = TorchExecutor(model, replace(weights, text=replace(twin, head=twin.embedding)))
        angles = torch.randn(1, text.head_dim // 2, device=device).repeat(1, 2)
        self.rope = angles.cos().bfloat16(), angles.sin().bfloat16()
        self.sizes = text.hidden_size, text.num_heads * text.head_dim
        self.device = device

    def row(self, scale=1.0):
        return [torch.randn(1, size, device=self.device).mul_(scale).bfloat16() for size in self.sizes]

    def errors(self, hidden, attention):
        """Relative, of the residual stream and of the heads, after the first layer."""
        ours = self.streamed(0, hidden, attention, *self.rope)
        theirs, qkv = self.twin.mid(0, hidden.float(), attention.float(), *(table.float() for table in self.rope))
        heads = torch.cat([part.flatten() for part in qkv])
        return relative_error(ours[0], theirs), relative_error(ours[1].flatten(), heads)


@pytest.mark.gpu
@every_kind
@every_way
@pytest.mark.parametrize("shape", SMALL)
def test_a_layer_is_what_the_plain_twin_makes_of_it(shape, way, kind, config, hopper):
    case = Case(config(SMALL[shape]), kind, hopper, way)
    # Activations of trained models reach far beyond float16, in which few-bit weights are multiplied.
    for scale in (1.0, 1e-3, 1e5):
        assert max(case.errors(*case.row(scale))) < 1e-2


@pytest.mark.gpu
@every_kind
@every_way
@pytest.mark.parametrize("shape", SMALL)
def test_replays_repeat_bit_for_bit_whatever_came_between(shape, way, kind, config, hopper):
    case = Case(config(SMALL[shape]), kind, hopper, way)
    rows = [case.row() for _ in range(4)]
    hidden, attention = (torch.empty_like(value) for value in rows[0])

    def steps():
        row, heads = hidden, attention
        for layer in range(LAYERS - 1):
            row, product = case.streamed(layer, row, heads, *case.rope)
            heads = product[:, : case.sizes[1]]
        return row, product

    def expected():
        return [value.clone() for value in steps()]

    once = []
    for row in rows:
        for into, value in zip((hidden, attention), row, strict=True):
            into.copy_(value)
        once.append(expected())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = steps()
    for turn in range(100):
        for into, value in zip((hidden, attention), rows[turn % 4], strict=True):
            into.copy_(value)
        graph.replay()
        for result, right in zip(results, once[turn % 4], strict=True):
            assert torch.equal(result, right), f"replay {turn}"
