"""`scripts/quantize.py`: the checkpoint it makes is the plain one, rounded; and it ends whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from scripts import quantize as script
from scripts.benchmark_shape import QUANTIZE
from scripts.quantize import Scheme, fp8, int4, quantize
from scripts.random_gemma3 import published_config, random_weights
from tests.accuracy import relative_error
from tests.gemma3_random import write_random_checkpoint
from tests.test_checkpoint import load, shard
from wicore_backend import Engine, EngineConfig, SamplingParams
from wicore_backend.errors import CheckpointError
from wicore_backend.models.gemma3.fingerprint import checkpoint_fingerprint
from wicore_backend.quantization.fp8 import Fp8Matrix
from wicore_backend.quantization.int4 import Int4Matrix

DEMO_MODEL = Path(__file__).resolve().parents[1] / "models" / "wicore-demo"
CPU = torch.device("cpu")
MATRICES = ("qkv", "out", "gate_up", "down")
SCHEMES = pytest.mark.parametrize(
    ("scheme", "kind", "error"), [(fp8(), Fp8Matrix, 0.03), (int4(16), Int4Matrix, 0.1)], ids=["fp8", "int4"]
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "plain"
    write_random_checkpoint(directory, vision={}, text={"tie_word_embeddings": True})
    (directory / "tokenizer.json").write_text("{}")
    return directory


@SCHEMES
def test_matrices_are_rounded_and_the_rest_is_kept(
    scheme: Scheme, kind: Any, error: float, source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "quantised"
    total = quantize(source, target, scheme, device=CPU)
    plain, quantised = load(source), load(target)
    for before, after in zip(plain.text.layers, quantised.text.layers, strict=True):
        for name in MATRICES:
            matrix = getattr(after, name)
            assert isinstance(matrix, kind)
            assert relative_error(matrix.dequantized(), getattr(before, name)) < error
        assert torch.equal(after.qk_norm, before.qk_norm)
        assert torch.equal(after.input_norm, before.input_norm)
    assert torch.equal(quantised.text.embedding, plain.text.embedding)
    assert quantised.text.head is quantised.text.embedding
    assert quantised.vision is not None
    assert plain.vision is not None
    assert torch.equal(quantised.vision.layers[0].up.weight, plain.vision.layers[0].up.weight)
    assert (target / "tokenizer.json").read_text() == "{}"
    assert total == sum(file.stat().st_size for file in target.glob("*.safetensors"))
    assert {file.name for file in tmp_path.iterdir()} == {"plain", "quantised"}


@SCHEMES
def test_a_head_that_is_the_embedding_becomes_a_matrix_of_its_own(
    scheme: Scheme, kind: Any, error: float, source: Path, tmp_path: Path
) -> None:
    quantize(source, tmp_path / "quantised", scheme, device=CPU, head=True)
    text = load(tmp_path / "quantised").text
    assert isinstance(text.head, kind)
    assert isinstance(text.embedding, Tensor)
    assert relative_error(text.head.dequantized(), text.embedding) < error


@pytest.mark.parametrize("scheme", [fp8(), int4(64)], ids=["fp8", "int4"])
def test_the_demo_model_still_knows_what_it_knew(scheme: Scheme, tmp_path: Path) -> None:
    quantize(DEMO_MODEL, tmp_path / "demo", scheme, device=CPU)
    settings = EngineConfig(model=tmp_path / "demo", device="cpu", dtype="float32", max_model_len=512)
    with Engine(settings) as engine:
        answers = engine.generate(["What is 12 + 7?", "What is 30 - 4?"], SamplingParams(max_tokens=20, temperature=0))
    assert ["19" in answers[0].text, "26" in answers[1].text] == [True, True]


def test_shards_and_other_layouts_are_read(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "whole", fp8(), device=CPU)
    shard(source, shards=3)
    quantize(source, tmp_path / "sharded", fp8(), device=CPU)
    files = sorted(file.name for file in (tmp_path / "whole").glob("*.safetensors"))
    assert files == ["layer-000.safetensors", *(f"layer-00{i}.safetensors" for i in (1, 2, 3)), "rest.safetensors"]
    for file in files:
        one, other = load_file(tmp_path / "whole" / file), load_file(tmp_path / "sharded" / file)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name].float(), other[name].float()) for name in one)


def test_a_quantised_checkpoint_has_a_fingerprint_of_its_own(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "fp8", fp8(), device=CPU)
    quantize(source, tmp_path / "int4", int4(16), device=CPU)
    prints = {checkpoint_fingerprint(tmp_path / name) for name in ("plain", "fp8", "int4")}
    assert len(prints) == 3


def test_a_run_that_was_cut_short_goes_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, write = tmp_path / "quantised", script._write_group

    def fails_at_layer_2(path: Path, *args: object) -> None:
        if path.name == "layer-002.safetensors":
            path.with_suffix(".tmp").write_bytes(b"half a lay")
            raise KeyboardInterrupt
        write(path, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(script, "_write_group", fails_at_layer_2)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, target, fp8(), device=CPU)
    assert not target.exists()
    first = (tmp_path / "quantised.partial" / "layer-000.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(script, "_write_group", write)
    quantize(source, target, fp8(), device=CPU)
    assert (target / "layer-000.safetensors").stat().st_mtime_ns == first
    assert not list(target.glob("*.tmp"))
    assert not (tmp_path / "quantised.partial").exists()
    assert isinstance(load(target).text.layers[2].down, Fp8Matrix)


def test_what_another_run_left_is_not_gone_on_with(source: Path, tmp_path: Path) -> None:
    partial = tmp_path / "quantised.partial"
    partial.mkdir()
    (partial / "quantising.json").write_text(json.dumps({"source": "another", "scheme": "fp8", "head": False}))
    with pytest.raises(CheckpointError, match=r"quantised\.partial is of another checkpoint or another way"):
        quantize(source, tmp_path / "quantised", fp8(), device=CPU)


def test_a_target_that_exists_is_not_touched(source: Path, tmp_path: Path) -> None:
    (tmp_path / "quantised").mkdir()
    with pytest.raises(CheckpointError, match=r"quantised exists; name a directory that does not"):
        quantize(source, tmp_path / "quantised", fp8(), device=CPU)


def test_a_quantised_checkpoint_is_not_quantised_again(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "quantised", fp8(), device=CPU)
    with pytest.raises(CheckpointError, match=r"quantised already; quantise the checkpoint that it was made of"):
        quantize(tmp_path / "quantised", tmp_path / "twice", fp8(), device=CPU)


def test_a_matrix_that_does_not_fit_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"down_proj\.weight \[48, 80\] cannot be int4 by 128: 80 inputs.* --group"
    ):
        quantize(source, tmp_path / "quantised", int4(128), device=CPU)
    quantize(source, tmp_path / "quantised", int4(16), device=CPU)  # Nothing had been written that is in the way.


def test_values_that_are_not_finite_are_named(source: Path, tmp_path: Path) -> None:
    path = source / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][3, 4] = torch.inf
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight holds values that are not finite"):
        quantize(source, tmp_path / "quantised", fp8(), device=CPU)


def test_files_can_be_read_by_whom_new_files_can(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "quantised", fp8(), device=CPU)
    (tmp_path / "new").touch()
    rights = (tmp_path / "new").stat().st_mode
    assert {file.stat().st_mode for file in (tmp_path / "quantised").glob("*.safetensors")} == {rights}


def test_a_broken_source_is_named(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        quantize(source, tmp_path / "quantised", fp8(), device=CPU)


def test_a_disk_without_room_is_told_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"needs \d+ kB, and its disk has 1 kB free"):
        quantize(source, tmp_path / "quantised", fp8(), device=CPU)
    assert not list((tmp_path / "quantised.partial").glob("*.safetensors"))


@pytest.mark.parametrize("weights", ["fp8", "int4"])
def test_the_benchmarks_random_weights_may_have_the_head_in_fewer_bits_too(weights: str) -> None:
    config, cpu = published_config("tiny"), torch.device("cpu")
    for quantized in (False, True):
        made = random_weights(
            config, device=cpu, dtype=torch.bfloat16, quantize=QUANTIZE[weights], quantize_head=quantized
        ).text
        assert (made.head is made.embedding) is not quantized
        assert isinstance(made.head, torch.Tensor) is not quantized
        assert made.head.shape == made.embedding.shape
    assert made.head.nbytes < 0.6 * made.embedding.nbytes
