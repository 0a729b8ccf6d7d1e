"""Dense segments on a GPU: fused small kernels in OpenAI Triton, matrices by cuBLAS or, for few rows, streamed.

`TorchExecutor` is the plain twin. Here a layer is five kernels around its four products: the norm at the end of a part
also adds the residual and norms for the next part, queries and keys are normalised and rotated in place in the QKV
product, GELU is taken where gate and up are computed. Nothing waits for the device, so a step can be captured.
For one token on Hopper, a layer's end and the next one's beginning are one kernel, where its weights let it.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from wicore_backend.executor.base import QKV
from wicore_backend.executor.kernels.small import embed, norm, qk_norm_rope
from wicore_backend.executor.matrix import Matrix, add_norm, gated, matrix_of
from wicore_backend.executor.streamed_layer import streamed_layers
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.models.gemma3.layers import embedding_scale
from wicore_backend.models.gemma3.vision import encode_images
from wicore_backend.models.gemma3.weights import Gemma3Weights, LayerWeights
from wicore_backend.quantization.fp8 import Rows


class CudaExecutor:
    """`Executor` on a GPU, in the type of `weights`. To be used under `torch.inference_mode()`.

    Parameters
    ----------
    fp8_prefill
        Whether layers' INT4 matrices multiply many rows in FP8, where they can.
    """

    def __init__(self, config: Gemma3Config, weights: Gemma3Weights, *, fp8_prefill: bool = False) -> None:
        text = weights.text
        self.device = text.embedding.device
        self.dtype = self.residual = text.embedding.dtype
        self.recordable = True
        self._config = config
        self._vision = weights.vision
        self._embedding = text.embedding
        self._embedding_scale = embedding_scale(config.text.hidden_size, self.dtype)
        self._layers = tuple(_Layer(config, layer, fp8_prefill=fp8_prefill) for layer in text.layers)
        self._norm = text.norm
        self._eps = config.text.rms_norm_eps
        self._head = matrix_of("head", text.head)
        self._softcap = config.text.final_logit_softcapping
        self._streamed = streamed_layers(config.text, text.layers)

    def embed(self, ids: Tensor, soft_tokens: Tensor | None, soft_rows: Tensor | None) -> Tensor:
        if soft_tokens is None or soft_rows is None:
            return embed(ids, self._embedding, self._embedding_scale)
        # The placeholder's id may lie beyond the vocabulary.
        hidden = embed(ids.index_fill(0, soft_rows, 0), self._embedding, self._embedding_scale)
        return hidden.index_copy_(0, soft_rows, soft_tokens)

    def first(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> QKV:
        layer = self._layers[0]
        return layer.before_attention(norm(hidden, layer.input_norm, self._eps), cos, sin)

    def mid(self, layer: int, hidden: Tensor, attention: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, QKV]:
        following = self._layers[layer + 1]
        if self._streamed is not None and len(hidden) == 1:
            hidden, heads = self._streamed(layer, hidden, attention, cos, sin)
            return hidden, following.split(heads)
        hidden, normed = self._layers[layer].after_attention(
            hidden, attention, following.input_norm, reader=following.qkv
        )
        return hidden, following.before_attention(normed, cos, sin)

    def last(self, hidden: Tensor, attention: Tensor, rows: Tensor) -> Tensor:
        hidden, attention = hidden.index_select(0, rows), attention.index_select(0, rows)
        _, normed = self._layers[-1].after_attention(hidden, attention, self._norm, reader=self._head)
        logits = self._head(normed)
        return logits if self._softcap is None else logits.div_(self._softcap).tanh_().mul_(self._softcap)

    def vision(self, pixels: Tensor) -> Tensor:
        assert self._vision is not None, "a text-only model sees no pictures"
        return encode_images(pixels, self._vision, self._config)


class _Layer:
    """One decoder layer, cut at its attention."""

    def __init__(self, config: Gemma3Config, weights: LayerWeights, *, fp8_prefill: bool = False) -> None:
        text = config.text
        of = partial(matrix_of, fp8_prefill=fp8_prefill)
        self._heads_shape = (-1, text.qkv_heads, text.head_dim)
        self._heads = [text.num_heads, text.num_kv_heads, text.num_kv_heads]
        self._eps = text.rms_norm_eps
        self._weights = weights
        self.input_norm = weights.input_norm
        self.qkv = of("qkv", weights.qkv, weights.qkv_bias)
        self._out = of("out", weights.out, weights.out_bias)
        self._gate_up = of("gate_up", weights.gate_up)
        self._down = of("down", weights.down)

    def before_attention(self, normed: Rows, cos: Tensor, sin: Tensor) -> QKV:
        """`normed` is the layer's input after its norm."""
        product = self.qkv(normed)
        qk_norm_rope(product, self._weights.qk_norm, cos, sin, self._eps)
        return self.split(product)

    def split(self, heads: Tensor) -> QKV:
        """`heads` [T, (Hq + 2 Hkv) d] as queries, keys and values."""
        return QKV(*torch.split(heads.view(self._heads_shape), self._heads, 1))

    def after_attention(
        self, hidden: Tensor, attention: Tensor, next_norm: Tensor, *, reader: Matrix
    ) -> tuple[Tensor, Rows]:
        """The residual stream after the layer, and its norm by `next_norm`, which `reader` multiplies next."""
        weights, eps = self._weights, self._eps
        norms = weights.post_attention_norm, weights.pre_feedforward_norm
        hidden, normed = add_norm(self._out, attention, hidden, *norms, eps, reader=self._gate_up)
        fed = gated(self._gate_up, normed, reader=self._down)
        return add_norm(self._down, fed, hidden, weights.post_feedforward_norm, next_norm, eps, reader=reader)
