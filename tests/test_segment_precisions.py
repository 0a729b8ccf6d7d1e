"""Segments in 16, 8 and 4 bits: what they compute, and that float16 holds what would overflow it."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

import onnx
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from scripts.quantize import fp8, int4, quantize
from tests.gemma3_random import write_random_checkpoint
from tests.segment_runs import CPU, errors, random_step, run_onnx, run_torch, stored_inputs, torch_weights
from wicore_backend.errors import SegmentError
from wicore_backend.executor.segments.contract import Precision, Segment, SegmentKind
from wicore_backend.executor.segments.export import bindings, export_segments
from wicore_backend.executor.torch_executor import TorchExecutor
from wicore_backend.models.gemma3.weights import Gemma3Weights
from wicore_backend.quantization.fp8 import Fp8Matrix, quantized_fp8, quantized_rows
from wicore_backend.quantization.int4 import Int4Matrix
from wicore_backend.quantization.int4_formats import packed_tensors
from wicore_backend.quantization.int4_rounding import quantized_int4

BIASED = {"attention_bias": True, "final_logit_softcapping": 20.0}
QUANTIZABLE = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "num_attention_heads": 4}
"""Matrices of 128 and of 192 inputs, which groups of 128 do not divide."""
MATRICES = ("qkv", "out", "gate_up", "down")


def test_float16_holds_what_would_overflow_it(tmp_path):
    for seed, (text, vision) in enumerate([({}, None), (BIASED, {}), ({"num_key_value_heads": 1}, {})]):
        directory = tmp_path / str(seed)
        write_random_checkpoint(directory / "model", text=text, vision=vision, seed=seed)
        _enlarge_products(directory / "model")
        config, weights = torch_weights(directory / "model", dtype=torch.float16)
        exact = TorchExecutor(config, _in_float32(weights))
        # The stream is as large as Gemma-3-27B's is said to become, twelve times what float16 holds.
        step = random_step(config)
        step = replace(step, hidden=step.hidden * 2e5)
        for weights_as in ("embedded", "inputs"):
            out = directory / weights_as
            exported = export_segments(directory / "model", out, Precision.FP16, weights=weights_as)
            bound = partial(bindings, config, weights, precision=Precision.FP16) if weights_as == "inputs" else None
            found = errors(exported, step, partial(run_torch, exact), bindings=bound)
            assert max(found.values()) < 2e-3, found

        # As it stands, each part of a layer overflows, even with a stream that fits.
        plain = TorchExecutor(config, weights)
        mid = Segment(SegmentKind.MID, 1)
        small = replace(step, hidden=step.hidden / 1e5)
        assert not run_torch(plain, mid, step.inputs(mid))[0].isfinite().all()
        assert not run_torch(plain, mid, small.inputs(mid))[0].isfinite().all()
        layer = weights.text.layers[1]
        assert not F.linear(small.attention.half(), layer.out).isfinite().all()
        gate, up = F.linear(torch.ones(1, config.text.hidden_size).half(), layer.gate_up).chunk(2, -1)
        assert not (gate * up).isfinite().all()
        if vision is not None:
            pictures = Segment(SegmentKind.VISION)
            assert not run_torch(plain, pictures, step.inputs(pictures))[0].isfinite().all()


def test_scales_for_float16_reach_biases_and_epsilons(tmp_path):
    """Results beside which neither is nothing, as they are for a model's first layers: scales would be seen."""
    text = {"attention_bias": True, "rms_norm_eps": 0.03}
    write_random_checkpoint(tmp_path / "model", text=text)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    large = {name: tensor * 20 if name.endswith("o_proj.bias") else tensor for name, tensor in tensors.items()}
    save_file(large, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    config, weights = torch_weights(tmp_path / "model", dtype=torch.float16)
    exact = partial(run_torch, TorchExecutor(config, _in_float32(weights)))
    exported = export_segments(tmp_path / "model", tmp_path / "out", Precision.FP16)
    found = errors(exported, random_step(config, size=0.1), exact)
    assert max(found.values()) < 2e-3, found


def _enlarge_products(checkpoint):
    """Weights by which the output projection, gate times up, and the vision tower's MLP leave float16's range."""
    tensors = load_file(checkpoint / "model.safetensors")
    factors = {"o_proj": 2.0**16, "gate_proj": 2.0**8, "up_proj": 2.0**10, "down_proj": 2.0**2, "fc2": 2.0**17}
    for name, tensor in tensors.items():
        part = name.split(".")[-2]
        tensors[name] = (tensor * factors.get(part, 1.0)).clamp(-6e4, 6e4)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


def _in_float32(weights: Gemma3Weights) -> Gemma3Weights:
    """The very values, in a wider type."""

    def widened(value):
        if isinstance(value, torch.Tensor):
            return value.float()
        if isinstance(value, tuple):
            return tuple(map(widened, value))
        if hasattr(value, "__dataclass_fields__"):
            return replace(value, **{name: widened(getattr(value, name)) for name in value.__dataclass_fields__})
        return value

    wide: Gemma3Weights = widened(weights)
    return wide


def test_bfloat16_rounds_no_more_than_the_torch_executor_does(tmp_path):
    for seed, (text, vision) in enumerate([({}, {}), (BIASED, None)]):
        model, out = tmp_path / f"model{seed}", tmp_path / f"out{seed}"
        write_random_checkpoint(model, text=text, vision=vision, seed=seed)
        config, weights = torch_weights(model, dtype=torch.bfloat16)
        exact = partial(run_torch, TorchExecutor(config, _in_float32(weights)))
        step = random_step(config)
        exported = export_segments(model, out, Precision.BF16)
        assert max(errors(exported, step, exact, rounded=False).values()) < 1e-5
        found = errors(exported, step, exact)
        rounding = TorchExecutor(config, weights)
        for segment, file in exported.files.items():
            inputs = stored_inputs(file, step)
            theirs, true = run_torch(rounding, segment, inputs), exact(segment, inputs)
            of_torch = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(theirs, true, strict=True))
            assert found[segment.name] < max(1.5 * of_torch, 0.01), (segment, found, of_torch)


def test_int4_is_the_dequantised_twin(tmp_path):
    write_random_checkpoint(tmp_path / "model", text=QUANTIZABLE | BIASED, vision={})
    exported = export_segments(tmp_path / "model", tmp_path / "out", Precision.INT4)
    config, weights = torch_weights(tmp_path / "model", dtype=torch.bfloat16)
    groups = {"down": 64}
    twin = _with_matrices(weights, lambda name, w: quantized_int4(w, groups.get(name, 128)).dequantized(torch.float32))
    found = errors(exported, random_step(config), partial(run_torch, TorchExecutor(config, twin)), rounded=False)
    assert max(found.values()) < 1e-5, found
    rounded = errors(exported, random_step(config), partial(run_torch, TorchExecutor(config, twin)))
    assert max(rounded.values()) < 0.04, rounded
    mid = onnx.load(exported.files[Segment(SegmentKind.MID, 0)].path)
    codes = {t.name: list(t.dims) for t in mid.graph.initializer if t.data_type == onnx.TensorProto.INT4}
    assert codes == {
        "layer.0.out.codes": [128, 128],
        "layer.0.gate_up.codes": [128, 384],
        "layer.0.down.codes": [192, 128],
        "layer.1.qkv.codes": [128, 256],
    }


def _with_matrices(weights: Gemma3Weights, change) -> Gemma3Weights:
    """In float32, decoder matrices as `change` of their name and of what they are makes them."""

    def changed(layer):
        return replace(layer, **{name: change(name, getattr(layer, name)) for name in MATRICES})

    text = replace(weights.text, layers=tuple(map(changed, weights.text.layers)))
    return _in_float32(replace(weights, text=text))


@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_checkpoint_in_int4_keeps_its_codes(tmp_path, caplog, group):
    text = QUANTIZABLE | {"intermediate_size": 256, "num_hidden_layers": 2}
    write_random_checkpoint(tmp_path / "plain", text=text)
    quantize(tmp_path / "plain", tmp_path / "model", int4(group), device=CPU, head=True)
    exported = export_segments(tmp_path / "model", tmp_path / "out", Precision.INT4)
    assert "rounded again" not in caplog.text
    config, weights = torch_weights(tmp_path / "model", dtype=torch.bfloat16)
    for segment, names in {
        Segment(SegmentKind.MID, 0): {
            "layer.0.down": weights.text.layers[0].down,
            "layer.1.qkv": weights.text.layers[1].qkv,
        },
        Segment(SegmentKind.LAST): {"text.head": weights.text.head},
    }.items():
        graph = onnx.load(exported.files[segment].path).graph
        stored = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        for name, matrix in names.items():
            assert isinstance(matrix, Int4Matrix)
            codes, scales, _ = matrix.unpacked()
            assert torch.equal(torch.from_numpy(stored[f"{name}.codes"].astype("int8")), codes.T.to(torch.int8) - 8)
            assert torch.equal(
                torch.from_numpy(stored[f"{name}.scales"].astype("float32")), scales.T.bfloat16().float()
            )
    twin = _with_matrices(weights, lambda _, matrix: matrix.dequantized(torch.float32))
    twin = replace(twin, text=replace(twin.text, head=weights.text.head.dequantized(torch.float32)))
    found = errors(exported, random_step(config), partial(run_torch, TorchExecutor(config, twin)), rounded=False)
    # Scales of a checkpoint in float16 would be rounded to bfloat16; these are in it.
    assert max(found.values()) < 1e-5, found


def test_int4_that_a_graph_cannot_take_is_rounded_again_with_a_word(tmp_path, caplog):
    write_random_checkpoint(tmp_path / "model", text=QUANTIZABLE | {"num_hidden_layers": 3})
    quantize(tmp_path / "model", tmp_path / "packed", int4(64), device=CPU)
    _add_zero_points(tmp_path / "packed")
    with caplog.at_level(logging.WARNING):
        exported = export_segments(tmp_path / "packed", tmp_path / "out", Precision.INT4)
    words = [record.message for record in caplog.records if "rounded again" in record.message]
    assert words[0].startswith(
        "the checkpoint has INT4 in groups of 64 with zero points: rounded again, to INT4 in groups"
    )
    assert len(words) == len(set(words)) <= 2  # 128 inputs and 192 take other groups.
    config, weights = torch_weights(tmp_path / "packed", dtype=torch.bfloat16)
    exact = _with_matrices(weights, lambda _, matrix: matrix.dequantized(torch.float32))
    found = errors(exported, random_step(config), partial(run_torch, TorchExecutor(config, exact)), rounded=False)
    assert max(found.values()) < 0.2, found  # Rounded twice, to 15 levels each time.


def _add_zero_points(checkpoint):
    """Zero points other than 8, as an asymmetric checkpoint has."""
    for path in checkpoint.glob("layer-*.safetensors"):
        tensors = load_file(path)
        for name in [name for name in tensors if name.endswith("weight_packed")]:
            module = name.removesuffix("weight_packed")
            rows, columns = tensors[f"{module}weight_shape"].tolist()
            values = torch.randn(rows, columns).mul_(columns**-0.5).add_(0.02).bfloat16()
            matrix = quantized_int4(values, 64, symmetric=False)
            assert matrix.zeros is not None
            tensors |= {f"{module}{part}": tensor for part, tensor in packed_tensors(matrix).items()}
        save_file(tensors, path)


@pytest.mark.parametrize("quantized", [False, True])
def test_fp8_is_the_twin_that_multiplies_rounded_tokens(tmp_path, quantized):
    text = {"hidden_size": 64, "intermediate_size": 96, "attention_bias": True}
    write_random_checkpoint(tmp_path / "plain", text=text, vision={})
    model = tmp_path / "plain"
    if quantized:
        model = tmp_path / "model"
        quantize(tmp_path / "plain", model, fp8(), device=CPU, head=True)
    exported = export_segments(model, tmp_path / "out", Precision.FP8)
    config, weights = torch_weights(model, dtype=torch.bfloat16)
    kept = {(i, name): _fp8(getattr(layer, name)) for i, layer in enumerate(weights.text.layers) for name in MATRICES}
    head = weights.text.head
    assert isinstance(head, Fp8Matrix) is quantized
    plain = head.dequantized() if isinstance(head, Fp8Matrix) else head
    weights = replace(weights, text=replace(weights.text, head=plain))
    twin = TorchExecutor(config, _with_matrices(weights, lambda _, matrix: _fp8(matrix).dequantized(torch.float32)))
    if isinstance(head, Fp8Matrix):
        twin._head = _RoundingTokens(head, None)
    for (i, name), matrix in kept.items():
        linear = _RoundingTokens(matrix, getattr(weights.text.layers[i], f"{name}_bias", None))
        setattr(twin._layers[i], f"_{name}", linear)
    found = errors(exported, random_step(config), partial(run_torch, twin), rounded=False)
    # A token's value that lies between two of E4M3's may fall to either side.
    assert max(found.values()) < 5e-3, found
    assert found["first"] < 1e-5

    graph = onnx.load(exported.files[Segment(SegmentKind.MID, 0)].path).graph
    stored = {t.name: t for t in graph.initializer}
    values = onnx.numpy_helper.to_array(stored["layer.0.gate_up.values"])
    assert stored["layer.0.gate_up.values"].data_type == onnx.TensorProto.FLOAT8E4M3FN
    assert values.tobytes() == kept[0, "gate_up"].values.view(torch.uint8).numpy().tobytes()


def _fp8(matrix) -> Fp8Matrix:
    return matrix if isinstance(matrix, Fp8Matrix) else quantized_fp8(matrix)


class _RoundingTokens:
    """x W^T + b with x rounded to E4M3 by token."""

    def __init__(self, matrix: Fp8Matrix, bias: torch.Tensor | None) -> None:
        self._matrix = matrix.dequantized(torch.float32)
        self._bias = None if bias is None else bias.float()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(quantized_rows(x).dequantized(), self._matrix, self._bias)


def test_weights_that_float16_cannot_hold_are_named(tmp_path):
    write_random_checkpoint(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = 1e5
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(SegmentError, match=r"layer 2's gate and up holds values beyond 65,504, where float16 ends"):
        export_segments(tmp_path / "model", tmp_path / "out", Precision.FP16)


def test_a_token_of_zeros_is_zeros_in_fp8(tmp_path):
    write_random_checkpoint(tmp_path / "model", text={"hidden_size": 64, "intermediate_size": 96})
    exported = export_segments(tmp_path / "model", tmp_path / "out", Precision.FP8)
    config, _ = torch_weights(tmp_path / "model")
    step = random_step(config, size=0.0)
    for segment, file in exported.files.items():
        for result in run_onnx(file, step.inputs(segment), rounded=False):
            assert result.isfinite().all()
            assert not result.any()


def test_a_quantised_checkpoint_can_be_exported_in_16_bits(tmp_path):
    write_random_checkpoint(tmp_path / "plain", text=QUANTIZABLE)
    quantize(tmp_path / "plain", tmp_path / "model", fp8(), device=CPU)
    exported = export_segments(tmp_path / "model", tmp_path / "out", Precision.BF16)
    config, weights = torch_weights(tmp_path / "model", dtype=torch.bfloat16)
    wide = _with_matrices(weights, lambda _, matrix: matrix.dequantized())
    found = errors(exported, random_step(config), partial(run_torch, TorchExecutor(config, wide)), rounded=False)
    assert max(found.values()) < 1e-5, found
