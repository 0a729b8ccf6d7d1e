"""What an executor takes of the device while it computes, its results included: told from sizes alone.

A matrix that is widened for its product takes memory besides: `executor/matrix.py` says how much.
"""

from __future__ import annotations

import torch

from wicore_backend.models.gemma3.config import TextConfig

_WIDE = torch.float32.itemsize


def activation_bytes(text: TextConfig, *, tokens: int, value_bytes: int) -> int:
    """The most that `CudaExecutor`'s segments of a step of so many tokens have at a time, short of the head.

    That is where gate and up are multiplied with each other: the layer's queries, keys and values, its input, what it
    has become and its norm are there, too, and the embeddings and the cosines and sines of the whole step.
    """
    wide = 3 * text.intermediate_size + text.qkv_heads * text.head_dim + text.hidden_size
    rotations = 2 * 2 * text.head_dim
    # The residual stream may be in float32, whatever else is.
    return tokens * ((wide + rotations) * value_bytes + 5 * text.hidden_size * _WIDE)


def handed_bytes(text: TextConfig, *, tokens: int, value_bytes: int) -> int:
    """What a step of so many tokens has outside of an executor that took memory of its own when it was loaded.

    Its embeddings, its hidden states and the last step's, until their logits are asked for; likewise what attention
    gave, a layer's while the next one's is made; and cosines and sines.
    """
    attended = 3 * text.num_heads * text.head_dim
    rotations = 2 * 2 * text.head_dim
    return tokens * ((attended + rotations) * value_bytes + 3 * text.hidden_size * _WIDE)


def logits_bytes(text: TextConfig, *, rows: int, value_bytes: int) -> int:
    """Of so many rows' logits, and of the product that they are widened from."""
    return rows * text.vocab_size * (_WIDE + value_bytes)
