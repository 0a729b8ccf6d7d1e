"""Random Gemma-3 checkpoints, written by transformers, whose own model is what ours is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    PreTrainedModel,
)

IMAGE_TOKEN, BOI_TOKEN, EOI_TOKEN = 5, 6, 7
FIRST_TEXT_TOKEN = 8

TEXT: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 24,
    "query_pre_attn_scalar": 16,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,  # A random model whose head is its embedding mostly repeats itself.
}
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
    "vision_use_head": False,
}
TOKENS_PER_IMAGE = 16


def write_random_checkpoint(
    path: Path, *, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, seed: int = 0
) -> PreTrainedModel:
    """Write a random checkpoint to `path` and return transformers' own model of it, float32, eager attention.

    `text` and `vision` change the small defaults above; without `vision` the model is text-only.
    """
    torch.manual_seed(seed)
    text_config = Gemma3TextConfig(**TEXT | (text or {}))
    if vision is None:
        model: PreTrainedModel = Gemma3ForCausalLM(text_config)
    else:
        config = Gemma3Config(
            text_config=text_config.to_dict(),
            vision_config={"model_type": "siglip_vision_model", **VISION, **vision},
            tie_word_embeddings=text_config.tie_word_embeddings,
            mm_tokens_per_image=TOKENS_PER_IMAGE,
            image_token_index=IMAGE_TOKEN,
            boi_token_index=BOI_TOKEN,
            eoi_token_index=EOI_TOKEN,
        )
        model = Gemma3ForConditionalGeneration(config)
    model.set_attn_implementation("eager")
    randomize(model)
    model.save_pretrained(path)
    return model.eval()


@torch.no_grad()
def randomize(model: PreTrainedModel) -> None:
    """Weights for which attention, positions and norms matter, and answers that do not repeat one token."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and name.endswith(".bias"):
            parameter.normal_(0.0, 0.1)
        elif parameter.ndim == 1:
            parameter.normal_(_mean_of_norm(name), 0.3)
        elif "embed_tokens" in name:
            parameter.normal_(0.0, parameter.shape[1] ** -0.5)
        else:
            fan_in = parameter.shape[0] if "projection_weight" in name else parameter[0].numel()
            parameter.normal_(0.0, fan_in**-0.5)


def _mean_of_norm(name: str) -> float:
    if "vision_tower" in name:
        return 1.0  # SigLIP's norms multiply by the weight, Gemma's by 1 + weight.
    if "post_attention" in name or "post_feedforward" in name:
        return 1.0  # What the layers add has to outweigh the embedding.
    return 0.0
