"""FP8 matrices: what they keep, how they are read from a checkpoint, and what they give on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.accuracy import relative_error
from tests.gemma3_random import write_random_checkpoint
from wicore_backend.errors import CheckpointError
from wicore_backend.executor.linear import Linear
from wicore_backend.models.gemma3.checkpoint import load_weights
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.quantization.fp8 import FP8, FP8_MAX, Fp8Matrix, quantized_fp8

FILE = "model.safetensors"
CONFIG: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"type": "float", "num_bits": 8, "strategy": "channel", "dynamic": False, "symmetric": True},
            "input_activations": {"type": "float", "num_bits": 8, "strategy": "token", "dynamic": True},
        }
    },
    "ignore": ["lm_head"],
}


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_weights(directory, Gemma3Config.from_checkpoint(directory), device=torch.device("cpu"), dtype=dtype)


def quantize(directory: Path, *, scale_shape: tuple[int, ...] = (-1, 1), config: dict[str, Any] = CONFIG) -> None:
    """The decoder's matrices of the checkpoint in `directory` in FP8, as compressed-tensors has it."""
    tensors = load_file(directory / FILE)
    for name in [name for name in tensors if name.endswith("_proj.weight") and "vision" not in name]:
        matrix = quantized_fp8(tensors[name])
        if scale_shape != (-1, 1):  # One for the whole matrix.
            scale = tensors[name].abs().max() / FP8_MAX
            matrix = Fp8Matrix((tensors[name] / scale).to(FP8), scale, torch.float32)
        tensors[name] = matrix.values
        tensors[f"{name}_scale"] = matrix.scale.view(scale_shape)
    save_file(tensors, directory / FILE)
    edit_config(directory, quantization_config=config)


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_row_keeps_its_own_range(dtype: torch.dtype) -> None:
    matrix = (torch.randn(6, 64) * torch.logspace(-6, 6, 6)[:, None]).to(dtype)
    matrix[3] = 0
    quantized = quantized_fp8(matrix)
    assert quantized.shape == matrix.shape
    assert quantized.nbytes == 6 * 64 + 6 * 4
    plain = quantized.dequantized()
    assert plain.dtype == dtype
    assert not plain[3].any()
    for row in (0, 1, 2, 4, 5):  # A step of E4M3 is an eighth: half of it at most is lost, 2% on the whole.
        assert relative_error(plain[row], matrix[row]) < 0.04
        assert quantized.values[row].float().abs().max() == FP8_MAX


def test_stacked_rows_are_those_of_the_parts() -> None:
    parts = [quantized_fp8(torch.randn(rows, 16)) for rows in (3, 1, 4)]
    whole = Fp8Matrix.stacked(parts)
    assert torch.equal(whole.dequantized(), torch.cat([part.dequantized() for part in parts]))


@pytest.mark.parametrize("rows", [1, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cpu_multiplies_by_the_dequantised_matrix(rows: int, dtype: torch.dtype) -> None:
    weight = quantized_fp8((torch.randn(24, 64) * torch.logspace(-9, 3, 24)[:, None]).to(dtype))
    bias, x = torch.randn(24).to(dtype), torch.randn(rows, 64).to(dtype)
    exact = x.double() @ weight.dequantized(torch.float64).T + bias.double()
    assert relative_error(Linear(weight, bias)(x), exact) < (1e-6 if dtype is torch.float32 else 1e-2)


@pytest.mark.parametrize("scale_shape", [(-1, 1), (1,), ()], ids=["rows", "matrix", "scalar"])
def test_a_checkpoint_is_loaded_as_it_was_quantised(scale_shape: tuple[int, ...], tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, vision={})
    plain = load(tmp_path)
    quantize(tmp_path, scale_shape=scale_shape)
    loaded = load(tmp_path)
    for layer, before in zip(loaded.text.layers, plain.text.layers, strict=True):
        for name in ("qkv", "out", "gate_up", "down"):
            matrix, exact = getattr(layer, name), getattr(before, name)
            assert isinstance(matrix, Fp8Matrix)
            assert matrix.scale.shape == exact.shape[:1]
            assert relative_error(matrix.dequantized(), exact) < 0.04
    assert isinstance(loaded.text.head, Tensor)
    assert torch.equal(loaded.text.head, plain.text.head)


def test_matrices_left_out_of_quantisation_stay_as_they_are(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path)
    plain = load(tmp_path).text.layers
    tensors = load_file(tmp_path / FILE)
    quantize(tmp_path)
    quantized = load_file(tmp_path / FILE)
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.k_proj"):
        quantized[f"{name}.weight"] = tensors[f"{name}.weight"]
        del quantized[f"{name}.weight_scale"]
    save_file(quantized, tmp_path / FILE)
    layers = load(tmp_path).text.layers
    assert torch.equal(layers[0].down, plain[0].down)
    k = slice(4 * 16, 6 * 16)
    assert torch.equal(layers[1].qkv[k], plain[1].qkv[k])  # Fused with two that are quantised: all are plain.
    assert relative_error(layers[1].qkv, plain[1].qkv) < 0.04


def test_a_measured_scale_of_activations_is_left_aside(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path)
    quantize(tmp_path)
    before = load(tmp_path).text.layers[0].out.dequantized()
    tensors = load_file(tmp_path / FILE)
    save_file(tensors | {"model.layers.0.self_attn.o_proj.input_scale": torch.ones(1)}, tmp_path / FILE)
    assert torch.equal(load(tmp_path).text.layers[0].out.dequantized(), before)


def changed(path: str, value: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(json.dumps(CONFIG))
    *parents, key = path.split(".")
    inner = config
    for parent in parents:
        inner = inner[parent]
    inner[key] = value
    return config


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (changed("quant_method", "bitsandbytes"), r"quantization_config\.quant_method is 'bitsandbytes'.*'compressed-"),
        (changed("format", "marlin-24"), r"quantization_config\.format is 'marlin-24'; it must be 'float-quantized'"),
        (changed("config_groups", {}), r"config_groups is \{\}; it must be groups"),
        (changed("config_groups", {"group_0": 7}), r"group_0 is 7; it must be an object"),
        (changed("config_groups.group_0.weights.num_bits", 4), r"weights\.num_bits is 4; it must be 8"),
        (changed("config_groups.group_0.weights.type", "int"), r"weights\.type is 'int'; it must be 'float'"),
        (changed("config_groups.group_0.weights.strategy", "block"), r"weights\.strategy is 'block'; .*'channel' or"),
    ],
)
def test_a_way_that_is_not_read_is_named(config: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path)
    edit_config(tmp_path, quantization_config=config)
    with pytest.raises(CheckpointError, match=complaint):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "complaint"),
    [
        ("weight_scale", None, r"lacks: text\.layers\.1\.mlp\.up_proj\.weight_scale"),
        ("weight_scale", torch.ones(3, 1), r"up_proj\.weight_scale \[3, 1\] in place of \[80, 1\] or \[80\] or \[1\]"),
        ("weight_scale", torch.ones(80, 1).int(), r"up_proj\.weight_scale I32 in place of F32"),
        (
            "weight_scale",
            torch.full((80, 1), torch.nan),
            r"up_proj holds a weight_scale that is negative or not finite",
        ),
        ("weight_scale", torch.full((80, 1), -1.0), r"up_proj holds a weight_scale that is negative"),
        ("weight", torch.ones(80, 7).to(FP8), r"up_proj\.weight \[80, 7\] in place of \[80, 48\]"),
        ("weight", torch.ones(80, 48).to(torch.int8), r"up_proj\.weight I8 in place of F8_E4M3"),
        ("weight_zero", torch.ones(80, 1), r"beside what config\.json calls for: .*up_proj\.weight_zero"),
    ],
)
def test_what_does_not_fit_is_named(name: str, tensor: Tensor | None, complaint: str, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path)
    quantize(tmp_path)
    tensors = load_file(tmp_path / FILE)
    key = f"model.layers.1.mlp.up_proj.{name}"
    tensors = {k: t for k, t in tensors.items() if k != key} | ({} if tensor is None else {key: tensor})
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=complaint):
        load(tmp_path)
