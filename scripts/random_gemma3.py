"""Gemma-3 of a published shape with random weights, made on the device: for measurements of speed, where no checkpoint
is at hand and none is needed."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.models.gemma3.weights import Gemma3Weights, LayerWeights, TextWeights, Weight

_COMMON = {
    "model_type": "gemma3_text",
    "vocab_size": 262_208,
    "sliding_window": 1024,
    "max_position_embeddings": 131_072,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "eos_token_id": 1,
}
SHAPES: dict[str, dict[str, Any]] = {
    "gemma-3-27b": {
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 168,
    },
    "gemma-3-12b": {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
    },
    "gemma-3-4b": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
    },
    "gemma-3-27b-kv": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 62,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 168,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "max_position_embeddings": 4096,
    },
}
"""The decoders, as their config.json has them; one with the keys and values of the largest and hardly a weight, for
devices that are emulated; and one that any machine runs, to try things with."""

_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
    "vision_use_head": False,
}


def published_config(shape: str) -> Gemma3Config:
    """The configuration of a published model of this shape, its vision tower included."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(_config(shape, vision=True)))
        return Gemma3Config.from_checkpoint(Path(directory))


def _config(shape: str, *, vision: bool) -> dict[str, Any]:
    text = _COMMON | SHAPES[shape]
    return {"model_type": "gemma3", "text_config": text, "vision_config": _VISION} if vision else text


def write_directory(shape: str, target: Path, *, like: Path, vision: bool = False, **more: Any) -> None:
    """A checkpoint directory of `shape` without weights: its config.json, and the tokenizer files of that in `like`.

    Parameters
    ----------
    vision
        With the published models' tower; otherwise it is a text-only model.
    more
        Keys and values of config.json besides.
    """
    target.mkdir(parents=True, exist_ok=True)
    for file in like.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name != "config.json":
            shutil.copy(file, target)
    (target / "config.json").write_text(json.dumps(_config(shape, vision=vision) | more))


def random_weights(
    config: Gemma3Config,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    quantize: Callable[[Tensor], Weight] = lambda matrix: matrix,
    quantize_head: bool = False,
) -> Gemma3Weights:
    """Weights of the decoder of `config` on `device`, at scales that keep activations as large as a trained model's.

    The layers' matrices are what `quantize` makes of them. Head and embedding are one, and plain, unless the head is
    what `quantize` makes of that. There is no vision tower.
    """
    text = config.text
    generator = torch.Generator(device).manual_seed(seed)
    D, heads = text.hidden_size, text.num_heads * text.head_dim

    def matrix(rows: int, columns: int) -> Tensor:
        made = torch.empty(rows, columns, device=device, dtype=dtype)
        return made.normal_(0.0, columns**-0.5, generator=generator)

    def norm(*shape: int) -> Tensor:
        return torch.empty(shape, device=device).normal_(1.0, 0.1, generator=generator)

    def layer() -> LayerWeights:
        return LayerWeights(
            input_norm=norm(D),
            qkv=quantize(matrix(text.qkv_heads * text.head_dim, D)),
            qkv_bias=None,
            qk_norm=norm(text.qk_heads, text.head_dim),
            out=quantize(matrix(D, heads)),
            out_bias=None,
            post_attention_norm=norm(D),
            pre_feedforward_norm=norm(D),
            gate_up=quantize(matrix(2 * text.intermediate_size, D)),
            down=quantize(matrix(D, text.intermediate_size)),
            post_feedforward_norm=norm(D),
        )

    embedding = matrix(text.vocab_size, D)
    layers = tuple(layer() for _ in range(text.num_layers))
    head = quantize(embedding) if quantize_head else embedding
    return Gemma3Weights(text=TextWeights(embedding, layers, norm(D), head), vision=None)
