"""From pixels to soft tokens: the SigLIP tower (https://arxiv.org/abs/2303.15343) and Gemma-3's projector."""

from __future__ import annotations

from math import isqrt

import torch.nn.functional as F
from torch import Tensor

from wicore_backend.models.gemma3.config import Gemma3Config, VisionConfig
from wicore_backend.models.gemma3.weights import Affine, VisionLayerWeights, VisionWeights


def encode_images(pixels: Tensor, weights: VisionWeights, config: Gemma3Config) -> Tensor:
    """Soft tokens [N, M, D] of normalised pixels [N, channels, S, S], M being `config.mm_tokens_per_image`."""
    vision = config.vision
    assert vision is not None, "a text-only model has no vision weights"
    hidden = F.linear(_patches(pixels, vision), weights.patches.weight, weights.patches.bias) + weights.positions
    for layer in weights.layers:
        hidden = hidden + _attention(_layer_norm(hidden, layer.norm1, vision), layer, vision)
        hidden = hidden + _mlp(_layer_norm(hidden, layer.norm2, vision), layer)
    hidden = _pool(_layer_norm(hidden, weights.norm, vision), vision, isqrt(config.mm_tokens_per_image))
    normed = F.rms_norm(hidden.float(), hidden.shape[-1:], weights.soft_token_norm, vision.layer_norm_eps)
    return F.linear(normed.to(hidden.dtype), weights.projection)


def encoding_bytes(vision: VisionConfig, *, pictures: int, value_bytes: int) -> int:
    """Memory that `encode_images` takes for so many pictures at a time, their pixels and soft tokens aside."""
    patches, pixels = vision.patches_per_side**2, vision.num_channels * vision.image_size**2
    attending, feeding = 8 * vision.hidden_size, 3 * vision.hidden_size + 2 * vision.intermediate_size
    return pictures * (pixels + patches * max(attending, feeding)) * value_bytes


def _patches(pixels: Tensor, vision: VisionConfig) -> Tensor:
    """[N, patches, channels * patch * patch], patches row by row: what a convolution of stride `patch` reads."""
    side, size = vision.patches_per_side, vision.patch_size
    grid = pixels.view(-1, vision.num_channels, side, size, side, size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, side * side, vision.num_channels * size * size)


def _attention(hidden: Tensor, layer: VisionLayerWeights, vision: VisionConfig) -> Tensor:
    """Every patch [N, P, D] attends to every patch of its image."""
    N, P, D = hidden.shape
    qkv = F.linear(hidden, layer.qkv.weight, layer.qkv.bias)
    q, k, v = qkv.view(N, P, 3, vision.num_heads, D // vision.num_heads).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, P, D)
    return F.linear(attended, layer.out.weight, layer.out.bias)


def _mlp(hidden: Tensor, layer: VisionLayerWeights) -> Tensor:
    # In a function, so that nothing wide outlives it.
    wide = F.gelu(F.linear(hidden, layer.up.weight, layer.up.bias), approximate="tanh")
    return F.linear(wide, layer.down.weight, layer.down.bias)


def _layer_norm(hidden: Tensor, norm: Affine, vision: VisionConfig) -> Tensor:
    return F.layer_norm(hidden, hidden.shape[-1:], norm.weight, norm.bias, vision.layer_norm_eps)


def _pool(hidden: Tensor, vision: VisionConfig, tokens_per_side: int) -> Tensor:
    """Average the grid of patches [N, P, D] over squares, down to [N, tokens_per_side ** 2, D]."""
    side = vision.patches_per_side
    grid = hidden.transpose(1, 2).reshape(-1, vision.hidden_size, side, side)
    return F.avg_pool2d(grid, side // tokens_per_side).flatten(2).transpose(1, 2)
