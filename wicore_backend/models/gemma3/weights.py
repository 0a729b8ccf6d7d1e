"""A Gemma-3 model's tensors, as the executors read them.

Matrices are [out, in], those that read the same input fused into one; those of the decoder's layers and the head may be
quantised. Gemma's norms multiply by 1 + weight: what stands here is that sum, in float32, as transformers computes it.
D is the hidden size, d a head's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wicore_backend.quantization.base import QuantizedMatrix

Weight = Tensor | QuantizedMatrix


def plain(weight: Weight, dtype: torch.dtype) -> Tensor:
    """`weight` widened, in `dtype`."""
    return weight.to(dtype) if isinstance(weight, Tensor) else weight.dequantized(dtype)


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """One decoder layer with Hq query and Hkv KV heads and an MLP of F."""

    input_norm: Tensor
    """float32 [D]"""
    qkv: Weight
    """[(Hq + 2 Hkv) d, D]"""
    qkv_bias: Tensor | None
    """[(Hq + 2 Hkv) d]"""
    qk_norm: Tensor
    """float32 [Hq + Hkv, d]: the query norm for each query head, then the key norm for each key head."""
    out: Weight
    """[D, Hq d]"""
    out_bias: Tensor | None
    """[D]"""
    post_attention_norm: Tensor
    """float32 [D]"""
    pre_feedforward_norm: Tensor
    """float32 [D]"""
    gate_up: Weight
    """[2 F, D]"""
    down: Weight
    """[D, F]"""
    post_feedforward_norm: Tensor
    """float32 [D]"""

    @property
    def start(self) -> LayerStart:
        return LayerStart(self.input_norm, self.qkv, self.qkv_bias, self.qk_norm)

    @property
    def end(self) -> LayerEnd:
        return LayerEnd(
            out=self.out,
            out_bias=self.out_bias,
            post_attention_norm=self.post_attention_norm,
            pre_feedforward_norm=self.pre_feedforward_norm,
            gate_up=self.gate_up,
            down=self.down,
            post_feedforward_norm=self.post_feedforward_norm,
        )


@dataclass(frozen=True, slots=True, eq=False)
class LayerStart:
    """What a layer reads before its attention; tensors as in `LayerWeights`."""

    input_norm: Tensor
    qkv: Weight
    qkv_bias: Tensor | None
    qk_norm: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LayerEnd:
    """What a layer reads after its attention; tensors as in `LayerWeights`."""

    out: Weight
    out_bias: Tensor | None
    post_attention_norm: Tensor
    pre_feedforward_norm: Tensor
    gate_up: Weight
    down: Weight
    post_feedforward_norm: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class TextWeights:
    """The decoder."""

    embedding: Tensor
    """[V, D]"""
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    """float32 [D]"""
    head: Weight
    """[V, D]; the embedding itself where the two are tied."""


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """A weight and the bias that goes with it: a linear map [out, in] and [out], or a layer norm's [D] and [D]."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class VisionLayerWeights:
    """One layer of the SigLIP tower."""

    norm1: Affine
    qkv: Affine
    out: Affine
    norm2: Affine
    up: Affine
    down: Affine


@dataclass(frozen=True, slots=True, eq=False)
class VisionWeights:
    """The SigLIP tower and the projector to the decoder's hidden size."""

    patches: Affine
    """The patch convolution as a linear map of a patch's pixels [hidden, channels * patch * patch]."""
    positions: Tensor
    """[patches, hidden]"""
    layers: tuple[VisionLayerWeights, ...]
    norm: Affine
    soft_token_norm: Tensor
    """float32 [hidden]"""
    projection: Tensor
    """[D, hidden]"""


@dataclass(frozen=True, slots=True, eq=False)
class Gemma3Weights:
    """A whole model. `vision` is None for a text-only one."""

    text: TextWeights
    vision: VisionWeights | None
