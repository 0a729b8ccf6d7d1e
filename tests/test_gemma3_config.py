"""Gemma-3's config files are read as transformers reads them, and refused with a reason where they cannot be served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma3Config as TheirConfig
from transformers import Gemma3TextConfig as TheirTextConfig

from wicore_backend.errors import CheckpointError
from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.models.gemma3.config import Gemma3Config, Rope

LOCAL, GLOBAL = LayerGroup.LOCAL, LayerGroup.GLOBAL
LAYER_TYPES = {GLOBAL: "full_attention", LOCAL: "sliding_attention"}

# The keys of Google's own config.json for the 4B and 27B instruction-tuned models, which leave the rest to defaults.
PUBLISHED_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    },
}
PUBLISHED_27B = {
    **PUBLISHED_4B,
    "text_config": {
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "model_type": "gemma3_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
}
PUBLISHED_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}


def read(directory: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> Gemma3Config:
    (directory / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return Gemma3Config.from_checkpoint(directory)


def assert_same(ours: Gemma3Config, theirs: TheirConfig | TheirTextConfig) -> None:
    text = theirs if isinstance(theirs, TheirTextConfig) else theirs.text_config
    assert ours.text.vocab_size == text.vocab_size
    assert ours.text.hidden_size == text.hidden_size
    assert ours.text.intermediate_size == text.intermediate_size
    assert ours.text.num_layers == text.num_hidden_layers
    assert ours.text.num_heads == text.num_attention_heads
    assert ours.text.num_kv_heads == text.num_key_value_heads
    assert ours.text.head_dim == text.head_dim
    assert ours.text.window == text.sliding_window
    assert [LAYER_TYPES[group] for group in ours.text.layer_groups] == text.layer_types
    for group, rope in ours.text.rope.items():
        parameters = text.rope_parameters[LAYER_TYPES[group]]
        assert rope == Rope(parameters["rope_theta"], parameters.get("factor", 1.0))
    assert ours.text.rms_norm_eps == text.rms_norm_eps
    assert ours.text.attention_scale == text.query_pre_attn_scalar**-0.5
    assert ours.text.attn_logit_softcapping == text.attn_logit_softcapping
    assert ours.text.final_logit_softcapping == text.final_logit_softcapping
    assert ours.text.max_position_embeddings == text.max_position_embeddings
    assert ours.text.attention_bias == text.attention_bias
    if isinstance(theirs, TheirTextConfig):
        assert ours.vision is None
        return
    assert ours.vision is not None
    for name in ("hidden_size", "intermediate_size", "num_channels", "image_size", "patch_size", "layer_norm_eps"):
        assert getattr(ours.vision, name) == getattr(theirs.vision_config, name)
    assert ours.vision.num_layers == theirs.vision_config.num_hidden_layers
    assert ours.vision.num_heads == theirs.vision_config.num_attention_heads
    assert ours.mm_tokens_per_image == theirs.mm_tokens_per_image
    assert (ours.image_token_id, ours.boi_token_id, ours.eoi_token_id) == (
        theirs.image_token_index,
        theirs.boi_token_index,
        theirs.eoi_token_index,
    )


@pytest.mark.parametrize("config", [PUBLISHED_4B, PUBLISHED_27B], ids=["4B", "27B"])
def test_published_configs_mean_what_they_mean_to_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    ours = read(tmp_path, config)
    assert_same(ours, TheirConfig.from_pretrained(tmp_path))
    assert ours.eos_token_ids == (1, 106)
    assert ours.text.rope == {GLOBAL: Rope(1e6, 8.0), LOCAL: Rope(1e4)}


def test_published_text_only_config(tmp_path: Path) -> None:
    ours = read(tmp_path, PUBLISHED_1B)
    assert_same(ours, TheirTextConfig.from_pretrained(tmp_path))
    assert ours.eos_token_ids == (1, 106)
    assert ours.text.layer_groups[:7] == (LOCAL,) * 5 + (GLOBAL, LOCAL)


def test_a_config_that_leaves_everything_out_gets_transformers_defaults(tmp_path: Path) -> None:
    assert_same(read(tmp_path, {"model_type": "gemma3_text"}), TheirTextConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": {"type": "linear", "factor": 4}},
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 3e5}}},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 7e5},
                "sliding_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 8e3},
            }
        },
        {"sliding_window_pattern": 3, "num_hidden_layers": 7},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "num_hidden_layers": 3},
        {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention_bias": True},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_version_4_and_version_5_names(changes: dict[str, Any], tmp_path: Path) -> None:
    ours = read(tmp_path, PUBLISHED_1B | changes if "rope_parameters" not in changes else _without_rope() | changes)
    assert_same(ours, TheirTextConfig.from_pretrained(tmp_path))


def _without_rope() -> dict[str, Any]:
    return {key: value for key, value in PUBLISHED_1B.items() if not key.startswith("rope")}


def test_what_transformers_saves_is_read_back(tmp_path: Path) -> None:
    theirs = TheirConfig.from_dict(PUBLISHED_4B)
    theirs.save_pretrained(tmp_path)
    assert_same(Gemma3Config.from_checkpoint(tmp_path), theirs)


def test_generation_config_names_the_ends_of_an_answer_first(tmp_path: Path) -> None:
    assert read(tmp_path, PUBLISHED_4B, {"eos_token_id": 7}).eos_token_ids == (7,)
    assert read(tmp_path, PUBLISHED_4B, {"eos_token_id": [3, 4]}).eos_token_ids == (3, 4)
    assert read(tmp_path, PUBLISHED_4B, {}).eos_token_ids == (1, 106)
    without = {key: value for key, value in PUBLISHED_4B.items() if key != "eos_token_id"}
    assert read(tmp_path, without, {}).eos_token_ids == (1,)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_type": "gemma2"}, r"config\.json: model_type is 'gemma2'; it must be 'gemma3' or 'gemma3_text'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, r"rope_scaling\.rope_type is 'yarn'.*'linear'"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"rope_scaling\.factor is missing; it must be a positive number"),
        ({"rope_parameters": {"rope_type": "linear"}}, r"rope_parameters\.rope_type is 'linear'; it must be absent"),
        ({"hidden_activation": "silu"}, r"hidden_activation is 'silu'; it must be 'gelu_pytorch_tanh'"),
        ({"layer_types": ["full_attention"]}, r"layer_types .* num_hidden_layers = 26"),
        ({"layer_types": ["chunked_attention"] * 26}, r"layer_types .* 'full_attention' and 'sliding_attention'"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads is 3; it must be a divisor of num_attention_heads = 4"),
        ({"head_dim": 63}, r"head_dim is 63; it must be even"),
        ({"hidden_size": "1152"}, r"hidden_size is '1152'; it must be an integer"),
        ({"hidden_size": True}, r"hidden_size is True"),
        ({"vocab_size": 0}, r"vocab_size is 0; it must be an integer from 1 to 2,147,483,647"),
        ({"vocab_size": 10**12}, r"vocab_size is 1000000000000; it must be an integer from 1 to 2,147,483,647"),
        ({"num_hidden_layers": 2**31 - 1}, r"num_hidden_layers is 2147483647; it must be an integer from 1 to 1,024"),
        ({"rms_norm_eps": -1}, r"rms_norm_eps is -1; it must be a positive number"),
        ({"query_pre_attn_scalar": 1e999}, r"query_pre_attn_scalar is inf"),
        ({"use_bidirectional_attention": True}, r"use_bidirectional_attention is True"),
        ({"eos_token_id": ["1"]}, r"eos_token_id .* a token id or a list of token ids"),
        ({"eos_token_id": 10**30}, r"eos_token_id is 10+; it must be a token id .* from 0 to 2,147,483,647"),
        ({"rope_scaling": [8]}, r"rope_scaling is \[8\]; it must be an object"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else None,
)
def test_what_cannot_be_served_is_refused_by_name(changes: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        read(tmp_path, PUBLISHED_1B | changes)


@pytest.mark.parametrize(
    ("vision", "complaint"),
    [
        ({"patch_size": 13}, r"vision_config\.patch_size is 13; it must be a divisor of image_size = 896"),
        ({"patch_size": 128}, r"vision_config\.patch_size is 128; .* mm_tokens_per_image = 256"),
        ({"num_attention_heads": 7}, r"vision_config\.num_attention_heads is 7"),
        ({"hidden_act": "relu"}, r"vision_config\.hidden_act is 'relu'"),
        ({"model_type": "clip_vision_model"}, r"vision_config\.model_type is 'clip_vision_model'"),
    ],
)
def test_a_tower_that_cannot_be_served_is_refused_by_name(
    vision: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        read(tmp_path, PUBLISHED_4B | {"vision_config": {**PUBLISHED_4B["vision_config"], **vision}})  # type: ignore[dict-item]


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Gemma3Config.from_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON: .*; fetch"):
        Gemma3Config.from_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text", ['{"a":' * 100_000 + "1" + "}" * 100_000, '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"]
)
def test_a_file_that_is_nested_too_deep_is_named_with_the_remedy(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: .* nested too deep; fetch"):
        Gemma3Config.from_checkpoint(tmp_path)
