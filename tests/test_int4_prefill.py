"""Prompts by INT4 weights in FP8: who gets them, who is told that he does not, and what is counted and cached then."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from scripts.eval_int4_prefill import narrow
from tests.accuracy import relative_error
from tests.gemma3_random import write_random_checkpoint
from tests.kernel_kit import SHAPES_OF_27B
from wicore_backend.config import EngineConfig
from wicore_backend.engine import executor_loading
from wicore_backend.engine.executor_loading import LoadedExecutor, load_executor
from wicore_backend.engine.executors import Choice, ExecutorName
from wicore_backend.engine.loading import _computed_in
from wicore_backend.errors import InvalidArgumentError
from wicore_backend.executor import int4_matrix, torch_executor
from wicore_backend.executor.base import Executor
from wicore_backend.executor.kernels.int4 import MAX_ROWS
from wicore_backend.executor.kernels.int4_codes import takes
from wicore_backend.executor.linear import Linear
from wicore_backend.models.gemma3.checkpoint import load_weights
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.quantization.fp8 import quantized_rows
from wicore_backend.quantization.int4 import Int4Matrix, in_fp8
from wicore_backend.quantization.int4_rounding import quantized_int4

MATRICES = ("qkv", "out", "gate_up", "down")


@pytest.fixture
def loaded(tmp_path):
    """What is loaded of random weights, INT4 in groups of 32 or plain, under a setting."""
    write_random_checkpoint(tmp_path, text={"hidden_size": 64, "head_dim": 32, "intermediate_size": 128})
    config = Gemma3Config.from_checkpoint(tmp_path)
    weights = load_weights(tmp_path, config, device=torch.device("cpu"), dtype=torch.bfloat16)

    def load(prefill: Literal["auto", "fp8"], *, int4: bool = True) -> LoadedExecutor:
        layers = weights.text.layers
        if int4:
            layers = tuple(
                replace(layer, **{name: quantized_int4(getattr(layer, name), 32) for name in MATRICES})
                for layer in layers
            )
        settings = EngineConfig(model=tmp_path, int4_prefill_dtype=prefill)
        of = replace(weights, text=replace(weights.text, layers=layers))
        return executor_loading._by_kernels(settings, config, of)

    return load


@pytest.fixture
def anywhere_in_fp8(monkeypatch):
    """As on a card that multiplies FP8."""
    monkeypatch.setattr(int4_matrix, "multiplies_in_fp8", takes)


@pytest.mark.parametrize("value", ["int8", "bfloat16", True])
def test_other_types_are_refused_with_those_that_there_are(value):
    with pytest.raises(InvalidArgumentError, match=r"int4_prefill_dtype.*'auto' or 'fp8'"):
        EngineConfig(model=Path("/m"), int4_prefill_dtype=value)


@pytest.mark.parametrize("prefill", ["auto", "fp8"])
def test_a_cpu_leaves_it_aside_and_says_so(prefill, tmp_path, caplog):
    write_random_checkpoint(tmp_path)
    load_executor(
        Choice(ExecutorName.TORCH, "on a CPU"),
        EngineConfig(model=tmp_path, int4_prefill_dtype=prefill),
        Gemma3Config.from_checkpoint(tmp_path),
        device=torch.device("cpu"),
        dtype=torch.float32,
        reserved_bytes=lambda: 0,
    )
    said = "int4_prefill_dtype = 'fp8' is for the executor torch on CUDA, not for torch on cpu"
    assert (said in caplog.text) == (prefill == "fp8")


@pytest.mark.parametrize("int4", [True, False], ids=["a card without FP8", "no INT4 weights"])
def test_what_cannot_be_in_fp8_is_not_and_is_said(loaded, int4, caplog):
    exact, asked = loaded("auto", int4=int4), loaded("fp8", int4=int4)
    assert "int4_prefill_dtype = 'fp8' is for INT4 weights in bfloat16 on cards from Ada on" in caplog.text
    assert caplog.text.count("int4_prefill_dtype") == 1
    assert (asked.multiplies, asked.widened_matrix) == (exact.multiplies, exact.widened_matrix)


@pytest.mark.usefixtures("anywhere_in_fp8")
def test_its_memory_is_counted_and_its_keys_are_nobody_elses(loaded, caplog, monkeypatch):
    monkeypatch.setattr(int4_matrix, "_WIDENED_AT_ONCE", 16 * 64)
    exact, narrow = loaded("auto"), loaded("fp8")
    assert "int4_prefill_dtype" not in caplog.text
    assert exact.widened_matrix < narrow.widened_matrix == 2 * 128 * 64
    assert _computed_in(exact) == "torch.bfloat16"
    assert _computed_in(narrow) == f"torch.bfloat16 int4 in fp8 beyond {MAX_ROWS} rows"


@pytest.mark.parametrize("role", ["qkv", "out", "gate_up", "down"])
def test_a_matrix_of_the_27b_model_is_widened_whole_in_no_more_than_parts_take_in_16_bits(role):
    rows, columns = SHAPES_OF_27B[role]
    codes = torch.empty(rows // 16, columns // 256, 16, 32, dtype=torch.int32, device="meta")
    scales = torch.empty(rows // 16, columns // 256, 16, 2, dtype=torch.bfloat16, device="meta")
    weight = Int4Matrix(codes, scales, None, torch.bfloat16)
    exact, narrow = (int4_matrix.widened_bytes(weight, fp8_prefill=fp8) for fp8 in (False, True))
    assert rows * columns < exact == narrow <= 2**28


@pytest.mark.usefixtures("anywhere_in_fp8")
@pytest.mark.parametrize("rows", [3, MAX_ROWS + 1])
@torch.inference_mode()
def test_a_prompts_layers_differ_by_its_rounding_and_a_decodes_do_not(loaded, rows):
    ids = torch.randint(100, (rows,))
    cos, sin = (torch.randn(rows, 16).repeat(1, 2).bfloat16() for _ in range(2))
    attention = torch.randn(rows, 4 * 32).bfloat16()

    def layer(executor: Executor) -> tuple[Tensor, ...]:
        hidden = executor.embed(ids, None, None)
        heads = tuple(part.clone() for part in executor.first(hidden, cos, sin))
        hidden, following = executor.mid(0, hidden, attention, cos, sin)
        return *heads, hidden, *following

    for a, b in zip(*(layer(loaded(prefill).executor) for prefill in ("auto", "fp8")), strict=True):
        assert a.shape == b.shape
        assert torch.equal(a, b) == (rows <= MAX_ROWS)
        assert relative_error(b, a) < 0.15


def test_the_evaluation_on_a_cpu_rounds_what_kernels_do():
    """Rows and weights of products of more rows than it is told, and nothing else."""
    weight = quantized_int4(torch.randn(48, 128), 32)
    with narrow(2) as counted:
        linear, plain = torch_executor.Linear(weight), torch_executor.Linear(torch.eye(4))
    assert isinstance(plain, Linear)
    few, many = torch.randn(2, 128), torch.randn(3, 128)
    assert torch.equal(linear(few), Linear(weight)(few))
    twin = quantized_rows(many).dequantized() @ in_fp8(weight).dequantized(torch.float32).T
    assert relative_error(linear(many), twin) < 1e-5
    assert 1e-2 < relative_error(linear(many), many @ weight.dequantized(torch.float32).T) < 6e-2
    assert (counted.all, counted.narrow) == (8, 6)
