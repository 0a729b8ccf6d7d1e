"""INT4 checkpoints of GPTQ, AutoAWQ and compressed-tensors, written code by code as those libraries lay them out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.accuracy import relative_error
from tests.gemma3_random import write_random_checkpoint
from tests.test_fp8 import FILE, edit_config, load
from wicore_backend.errors import CheckpointError
from wicore_backend.executor.linear import Linear
from wicore_backend.quantization.int4 import Int4Matrix
from wicore_backend.quantization.int4_formats import AwqFormat, GptqFormat, PackedFormat, packed_tensors

GROUP = 16
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""AutoAWQ's `order_map`: the output whose code stands at each place of a word, from its lowest bits."""
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"type": "int", "num_bits": 4, "strategy": "group", "group_size": GROUP, "symmetric": True},
        }
    },
    "ignore": ["lm_head"],
}


@dataclass(frozen=True)
class Parts:
    """Codes [N, K], scales [N, groups] and zeros [N, groups] of one matrix, and the matrix."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    @property
    def matrix(self) -> Tensor:
        columns = self.codes.shape[1]
        by_column = torch.arange(columns) // (columns // self.scales.shape[1])
        return (self.codes - self.zeros[:, by_column]) * self.scales.float()[:, by_column]


def random_parts(shape: tuple[int, ...], *, symmetric: bool, group: int = GROUP) -> Parts:
    rows, columns = shape
    scales = (torch.rand(rows, columns // group) * 0.01 + 0.01).half()
    zeros = torch.full(scales.shape, 8) if symmetric else torch.randint(0, 16, scales.shape)
    return Parts(torch.randint(0, 16, shape), scales, zeros)


def words(codes: Tensor, places: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Rows of codes int64 [n, m] in words int32 [n, m / 8], the code at `places[i]` of each eight in the i-th bits."""
    packed = torch.zeros(len(codes), codes.shape[1] // 8, dtype=torch.int64)
    for i, place in enumerate(places):
        packed += codes[:, place::8].long() << 4 * i
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def as_gptq(parts: Parts, *, less: int = 1) -> dict[str, Tensor]:
    columns = parts.codes.shape[1]
    return {
        "qweight": words(parts.codes).T.contiguous(),
        "qzeros": words((parts.zeros.T - less) % 16),
        "scales": parts.scales.T.contiguous(),
        "g_idx": (torch.arange(columns) // (columns // parts.scales.shape[1])).int(),
    }


def as_awq(parts: Parts) -> dict[str, Tensor]:
    return {
        "qweight": words(parts.codes.T, AWQ_COLUMNS),
        "qzeros": words(parts.zeros.T, AWQ_COLUMNS),
        "scales": parts.scales.T.contiguous(),
    }


def as_packed(parts: Parts) -> dict[str, Tensor]:
    """Zero points are packed down the rows, the last word filled up."""
    padded = torch.nn.functional.pad(parts.zeros.T, (0, -len(parts.zeros) % 8))
    return {
        "weight_packed": words(parts.codes),
        "weight_scale": parts.scales,
        "weight_shape": torch.tensor(parts.codes.shape),
        "weight_zero_point": words(padded).T.contiguous(),
    }


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plain")
    write_random_checkpoint(directory, text={"num_hidden_layers": 2})
    return directory


@pytest.fixture
def plain(made_once: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made_once, tmp_path / "checkpoint")


def quantize(
    directory: Path, write: Callable[[Parts], dict[str, Tensor]], config: dict[str, Any], *, symmetric: bool = False
) -> dict[str, Tensor]:
    """Put random INT4 matrices in place of the decoder's in `directory`; what they stand for, by their names."""
    tensors, matrices = load_file(directory / FILE), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        parts = random_parts(tuple(tensors.pop(name).shape), symmetric=symmetric)
        matrices[name] = parts.matrix
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{part}": tensor for part, tensor in write(parts).items()}
    save_file(tensors, directory / FILE)
    edit_config(directory, quantization_config=config)
    return matrices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zeros"])
@pytest.mark.parametrize(
    ("write", "config"),
    [
        (as_gptq, GPTQ),
        (lambda parts: as_gptq(parts, less=0), GPTQ | {"checkpoint_format": "gptq_v2"}),
        (as_awq, AWQ),
        (as_packed, PACKED),
    ],
    ids=["gptq", "gptq v2", "awq", "compressed-tensors"],
)
def test_a_checkpoint_is_what_its_codes_stand_for(
    write: Any, config: dict[str, Any], symmetric: bool, dtype: torch.dtype, plain: Path
) -> None:
    matrices = quantize(plain, write, config, symmetric=symmetric)
    for i, layer in enumerate(load(plain, dtype).text.layers):
        fused = {
            "qkv": [f"self_attn.{name}_proj" for name in "qkv"],
            "out": ["self_attn.o_proj"],
            "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
            "down": ["mlp.down_proj"],
        }
        for name, modules in fused.items():
            ours = getattr(layer, name)
            assert isinstance(ours, Int4Matrix)
            assert ours.dtype == dtype
            assert (ours.zeros is None) is symmetric
            whole = torch.cat([matrices[f"model.layers.{i}.{module}.weight"] for module in modules])
            assert torch.equal(ours.dequantized(torch.float32), whole)


def test_what_is_not_quantised_stays_plain(plain: Path) -> None:
    before = load(plain)
    quantize(plain, as_awq, AWQ)
    after = load(plain)
    assert torch.equal(after.text.embedding, before.text.embedding)
    assert torch.equal(after.text.head, before.text.head)
    assert torch.equal(after.text.layers[1].qk_norm, before.text.layers[1].qk_norm)


@pytest.mark.parametrize("columns", [256, 192])
def test_a_scale_for_a_whole_output(columns: int) -> None:
    parts = random_parts((16, columns), symmetric=False, group=columns)
    for written, read_as in (
        (as_gptq(parts), GptqFormat(None)),
        (as_awq(parts), AwqFormat(None)),
        (as_packed(parts), PackedFormat(None)),
    ):
        for name, stored in read_as.stored((16, columns)).items():
            assert stored.optional or tuple(written[name].shape) in stored.shapes, name
        matrix = read_as.matrix(written, (16, columns), dtype=torch.float32)
        assert torch.equal(matrix.dequantized(), parts.matrix)
        assert matrix.group == (128 if columns == 256 else columns)  # 128 is what the kernels were chosen for.


def test_zero_points_that_are_not_packed() -> None:
    parts = random_parts((16, 64), symmetric=False)
    written = as_packed(parts) | {"weight_zero_point": (parts.zeros - 8).to(torch.int8)}
    matrix = PackedFormat(GROUP).matrix(written, (16, 64), dtype=torch.float32)
    assert torch.equal(matrix.dequantized(), parts.matrix)


@pytest.mark.parametrize("rows", [16, 12])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_written_is_as_compressed_tensors_has_it(symmetric: bool, rows: int) -> None:
    parts = random_parts((rows, 64), symmetric=symmetric)
    matrix = Int4Matrix.packed(parts.codes.to(torch.uint8), parts.scales, parts.zeros.half(), torch.float32)
    expected = as_packed(parts)
    if symmetric:
        del expected["weight_zero_point"]
    else:
        padded = torch.nn.functional.pad(parts.zeros.T, (0, -rows % 8))
        expected["weight_zero_point"] = words(padded).T
    ours = packed_tensors(matrix)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_inputs_in_another_order_are_refused(plain: Path) -> None:
    def reordered(parts: Parts) -> dict[str, Tensor]:
        tensors = as_gptq(parts)
        return tensors | {"g_idx": tensors["g_idx"].flip(0)}

    quantize(plain, reordered, GPTQ | {"desc_act": True})
    with pytest.raises(CheckpointError, match="quantise without desc_act"):
        load(plain)


def test_an_order_that_was_undone_is_read(plain: Path) -> None:
    """With `static_groups`, or an order that only chose the roundings, groups lie side by side again."""
    matrices = quantize(plain, as_gptq, GPTQ | {"desc_act": True, "static_groups": True})
    ours = load(plain).text.layers[0].down.dequantized()
    assert torch.equal(ours, matrices["model.layers.0.mlp.down_proj.weight"])


def with_nan(parts: Parts) -> dict[str, Tensor]:
    tensors = as_awq(parts)
    tensors["scales"][0, 0] = float("nan")
    return tensors


def of_another_shape(parts: Parts) -> dict[str, Tensor]:
    return as_packed(parts) | {"weight_shape": torch.tensor([1, 2])}


def out_of_range(parts: Parts) -> dict[str, Tensor]:
    return as_packed(parts) | {"weight_zero_point": torch.full(parts.zeros.shape, 8, dtype=torch.int8)}


def in_words_by_themselves(parts: Parts) -> dict[str, Tensor]:
    return as_packed(parts) | {"weight_zero_point": parts.zeros.to(torch.int32)}


def packed_weights(**changes: Any) -> dict[str, Any]:
    group = PACKED["config_groups"]["group_0"]  # type: ignore[index]
    return PACKED | {"config_groups": {"group_0": group | {"weights": group["weights"] | changes}}}


@pytest.mark.parametrize(
    ("write", "config", "message"),
    [
        (as_gptq, GPTQ | {"bits": 8}, r"bits is 8; it must be 4"),
        (as_gptq, GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        (as_gptq, GPTQ | {"group_size": 0}, "group_size is 0; it must be -1 or a positive integer"),
        (as_gptq, GPTQ | {"group_size": 128}, "groups of 128; quantise in smaller ones"),
        (as_gptq, GPTQ | {"group_size": 8}, "scales"),
        (as_awq, AWQ | {"version": "gemv"}, "version is 'gemv'; it must be 'gemm'"),
        (as_awq, AWQ | {"quant_method": "hqq"}, "quant_method is 'hqq'"),
        (as_awq, GPTQ, "qweight"),
        (as_packed, packed_weights(num_bits=8), "num_bits is 8; it must be 4"),
        (as_packed, packed_weights(type="float"), "type is 'float'"),
        (as_packed, packed_weights(strategy="tensor"), "strategy is 'tensor'"),
        (with_nan, AWQ, "a scale that is not finite"),
        (of_another_shape, PACKED, "weight_shape of \\[1, 2\\] in place of"),
        (out_of_range, PACKED, "weight_zero_point outside of four bits"),
        (in_words_by_themselves, PACKED, "weight_zero_point of .* not in whole words"),
    ],
)
def test_what_cannot_be_read_is_named(write: Any, config: dict[str, Any], message: str, plain: Path) -> None:
    quantize(plain, write, config)
    with pytest.raises(CheckpointError, match=message):
        load(plain)


@pytest.mark.parametrize(("group", "columns"), [(3, 24), (12, 36), (None, 36)])
def test_groups_that_fill_no_words_are_refused(group: int | None, columns: int) -> None:
    with pytest.raises(CheckpointError, match=f"{columns} inputs in .* groups is not read"):
        AwqFormat(group).stored((16, columns))


def test_a_cpu_multiplies_by_what_the_codes_stand_for() -> None:
    parts = random_parts((48, 64), symmetric=False)
    matrix = AwqFormat(GROUP).matrix(as_awq(parts), (48, 64), dtype=torch.float32)
    x = torch.randn(3, 64)
    assert relative_error(Linear(matrix)(x), x @ parts.matrix.T) < 1e-3
