"""Checkpoints load from every layout that Gemma-3 comes in, and a broken one says what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.gemma3_random import write_random_checkpoint
from wicore_backend.errors import CheckpointError
from wicore_backend.models.gemma3.checkpoint import load_weights
from wicore_backend.models.gemma3.config import Gemma3Config

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
Tensors = dict[str, Tensor]


@pytest.fixture
def multimodal(tmp_path: Path) -> Path:
    write_random_checkpoint(tmp_path, vision={})
    return tmp_path


@pytest.fixture
def text_only(tmp_path: Path) -> Path:
    write_random_checkpoint(tmp_path, text={"tie_word_embeddings": True})
    return tmp_path


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    config = Gemma3Config.from_checkpoint(directory)
    return load_weights(directory, config, device=torch.device("cpu"), dtype=dtype)


def rewrite(directory: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(directory / FILE)), directory / FILE)


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {
        new + name.removeprefix(old) if name.startswith(old) else name: tensor for name, tensor in tensors.items()
    }


def assert_equal(a: Any, b: Any) -> None:
    if is_dataclass(a):
        for field in fields(a):
            assert_equal(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, tuple):
        for one, other in zip(a, b, strict=True):
            assert_equal(one, other)
    elif a is None:
        assert b is None
    else:
        assert torch.equal(a, b)


def test_old_and_new_prefixes_load_the_same_weights(multimodal: Path) -> None:
    old = load(multimodal)
    rewrite(multimodal, renamed("vision_tower.", "vision_tower.vision_model."))
    assert_equal(load(multimodal), old)
    rewrite(multimodal, renamed("language_model.model.", "model.language_model."))
    rewrite(multimodal, renamed("vision_tower.", "model.vision_tower."))
    rewrite(multimodal, renamed("multi_modal_projector.", "model.multi_modal_projector."))
    assert_equal(load(multimodal), old)


def test_fused_matrices_hold_their_parts_in_order(text_only: Path) -> None:
    tensors = load_file(text_only / FILE)
    layer = load(text_only).text.layers[1]
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    assert torch.equal(layer.qkv, torch.cat([tensors[f"{attention}.{n}_proj.weight"] for n in "qkv"]))
    assert torch.equal(layer.gate_up, torch.cat([tensors[f"{mlp}.{n}_proj.weight"] for n in ("gate", "up")]))
    assert torch.equal(layer.qk_norm[3], 1 + tensors[f"{attention}.q_norm.weight"])
    assert torch.equal(layer.qk_norm[4], 1 + tensors[f"{attention}.k_norm.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_stay_in_float32_whatever_the_model_runs_in(dtype: torch.dtype, multimodal: Path) -> None:
    weights = load(multimodal, dtype)
    assert weights.vision is not None
    assert weights.text.norm.dtype == weights.text.layers[0].qk_norm.dtype == torch.float32
    assert weights.vision.soft_token_norm.dtype == torch.float32
    assert weights.text.embedding.dtype == weights.text.layers[0].down.dtype == weights.vision.positions.dtype == dtype


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_half_precision_files_load_into_float32(stored: torch.dtype, text_only: Path) -> None:
    expected = load_file(text_only / FILE)["model.embed_tokens.weight"].to(stored).float()
    rewrite(text_only, lambda tensors: {name: tensor.to(stored) for name, tensor in tensors.items()})
    assert torch.equal(load(text_only).text.embedding, expected)


def test_the_head_is_the_embedding_unless_the_checkpoint_brings_another(text_only: Path) -> None:
    tied = load(text_only).text
    assert tied.head is tied.embedding
    rewrite(text_only, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    repeated = load(text_only).text
    assert repeated.head is repeated.embedding
    rewrite(text_only, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * 2})
    own = load(text_only).text
    assert torch.equal(own.head, own.embedding * 2)


def test_an_untied_checkpoint_without_a_head_is_refused(text_only: Path) -> None:
    edit_config(text_only, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"lacks: lm_head\.weight"):
        load(text_only)


def test_shards_load_as_one_file_does(multimodal: Path) -> None:
    whole = load(multimodal)
    shard(multimodal, shards=3)
    assert_equal(load(multimodal), whole)


def test_the_pooling_head_that_gemma_does_not_use_is_passed_over(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, vision={"vision_use_head": True})
    assert load(tmp_path).vision is not None


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(directory: Path, *, shards: int) -> None:
    """Split the checkpoint's one file into several and an index."""
    tensors = load_file(directory / FILE)
    weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, directory / file)
    (directory / FILE).unlink()
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def test_missing_tensors_are_named(text_only: Path) -> None:
    rewrite(text_only, without("model.layers.2.mlp.down_proj.weight", "model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"lacks: text\.layers\.2\.mlp\.down_proj\.weight, text\.norm\.weight"):
        load(text_only)


def test_of_many_missing_tensors_the_first_are_named(text_only: Path) -> None:
    rewrite(text_only, lambda tensors: {"model.norm.weight": tensors["model.norm.weight"]})
    with pytest.raises(CheckpointError, match=r"and \d+ more; download the checkpoint again"):
        load(text_only)


def test_tensors_that_the_config_does_not_call_for_are_named(text_only: Path) -> None:
    rewrite(text_only, lambda tensors: tensors | {"model.layers.9.mlp.gate_proj.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"beside what config\.json calls for: model\.layers\.9\.mlp\.gate_proj"):
        load(text_only)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(text_only: Path) -> None:
    rewrite(text_only, lambda tensors: tensors | {"model.norm.weight": torch.zeros(7)})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight \[7\] in place of \[48\]"):
        load(text_only)


def test_a_quantised_tensor_without_a_quantization_config_is_refused(text_only: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    rewrite(text_only, lambda tensors: tensors | {name: tensors[name].to(torch.int8)})
    with pytest.raises(CheckpointError, match=r"down_proj\.weight I8 in place of F32 or BF16 or F16; a quantised"):
        load(text_only)


def test_a_tensor_under_two_names_is_refused(multimodal: Path) -> None:
    name = "vision_tower.post_layernorm.bias"
    rewrite(multimodal, lambda tensors: tensors | {f"model.{name}": tensors[name].clone()})
    with pytest.raises(CheckpointError, match=r"post_layernorm\.bias twice"):
        load(multimodal)


@pytest.mark.parametrize("size", [0, 4, 100, 50_000])
def test_a_truncated_file_is_named(size: int, text_only: Path) -> None:
    (text_only / FILE).write_bytes((text_only / FILE).read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: .*; download"):
        load(text_only)


def test_a_file_that_is_something_else_is_named(text_only: Path) -> None:
    (text_only / FILE).write_bytes(b"\xff" * 4096)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load(text_only)


def test_no_weights_at_all(text_only: Path) -> None:
    (text_only / FILE).unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load(text_only)


def test_a_missing_shard_is_named(text_only: Path) -> None:
    shard(text_only, shards=3)
    (text_only / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of the shards its index names: model-00002-of-00003"):
        load(text_only)


@pytest.mark.parametrize("weight_map", [{"model.norm.weight": "../elsewhere.safetensors"}, {"a": "/etc/passwd"}])
def test_an_index_that_points_outside_is_refused(weight_map: dict[str, str], text_only: Path) -> None:
    (text_only / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"shards lie beside the index"):
        load(text_only)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{"])
def test_a_broken_index_is_named(index: str, text_only: Path) -> None:
    (text_only / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        load(text_only)
