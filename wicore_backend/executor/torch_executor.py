"""Dense segments in plain PyTorch: the reference for the other executors, and quick on a CPU.

With a small model on a CPU a decode step is bound by the number of kernels, so matrices that read the same input are
one, queries and keys are normalised and rotated together, and fresh results are updated in place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wicore_backend.executor.base import QKV
from wicore_backend.executor.linear import Linear
from wicore_backend.models.gemma3.config import Gemma3Config
from wicore_backend.models.gemma3.layers import RMSNorm, embedding_scale
from wicore_backend.models.gemma3.vision import encode_images
from wicore_backend.models.gemma3.weights import Gemma3Weights, LayerWeights


class TorchExecutor:
    """`Executor` on torch, on the device and in the type of `weights`. To be used under `torch.inference_mode()`."""

    def __init__(self, config: Gemma3Config, weights: Gemma3Weights) -> None:
        embedding = weights.text.embedding
        self.device = embedding.device
        self.dtype = self.residual = embedding.dtype
        self.recordable = False  # Graphs need OpenAI Triton, and where that is, `CudaExecutor` is quicker.
        self._config = config
        self._vision = weights.vision
        self._embedding = embedding
        self._embedding_scale = embedding_scale(config.text.hidden_size, self.dtype)
        self._layers = tuple(_Layer(config, layer) for layer in weights.text.layers)
        self._norm = RMSNorm(weights.text.norm, config.text.rms_norm_eps)
        self._head = Linear(weights.text.head)
        self._softcap = config.text.final_logit_softcapping

    def embed(self, ids: Tensor, soft_tokens: Tensor | None, soft_rows: Tensor | None) -> Tensor:
        if soft_tokens is None or soft_rows is None:
            return F.embedding(ids, self._embedding).mul_(self._embedding_scale)
        # The placeholder's id may lie beyond the vocabulary.
        hidden = F.embedding(ids.index_fill(0, soft_rows, 0), self._embedding).mul_(self._embedding_scale)
        return hidden.index_copy_(0, soft_rows, soft_tokens)

    def first(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> QKV:
        return self._layers[0].before_attention(hidden, cos, sin)

    def mid(self, layer: int, hidden: Tensor, attention: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, QKV]:
        hidden = self._layers[layer].after_attention(hidden, attention)
        return hidden, self._layers[layer + 1].before_attention(hidden, cos, sin)

    def last(self, hidden: Tensor, attention: Tensor, rows: Tensor) -> Tensor:
        hidden = self._layers[-1].after_attention(hidden.index_select(0, rows), attention.index_select(0, rows))
        logits = self._head(self._norm(hidden)).float()
        return logits if self._softcap is None else logits.div_(self._softcap).tanh_().mul_(self._softcap)

    def vision(self, pixels: Tensor) -> Tensor:
        assert self._vision is not None, "a text-only model sees no pictures"
        return encode_images(pixels, self._vision, self._config)


class _Layer:
    """One decoder layer, cut at its attention."""

    def __init__(self, config: Gemma3Config, weights: LayerWeights) -> None:
        text = config.text
        self._num_q_heads = text.num_heads
        self._qk_heads = text.qk_heads
        self._heads_shape = (-1, text.qkv_heads, text.head_dim)
        self._half = text.head_dim // 2
        self._input_norm = RMSNorm(weights.input_norm, text.rms_norm_eps)
        self._qkv = Linear(weights.qkv, weights.qkv_bias)
        self._qk_norm = RMSNorm(weights.qk_norm, text.rms_norm_eps)
        self._out = Linear(weights.out, weights.out_bias)
        self._post_attention_norm = RMSNorm(weights.post_attention_norm, text.rms_norm_eps)
        self._pre_feedforward_norm = RMSNorm(weights.pre_feedforward_norm, text.rms_norm_eps)
        self._gate_up = Linear(weights.gate_up)
        self._down = Linear(weights.down)
        self._post_feedforward_norm = RMSNorm(weights.post_feedforward_norm, text.rms_norm_eps)

    def before_attention(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> QKV:
        heads = self._qkv(self._input_norm(hidden)).view(self._heads_shape)
        qk = self._rotate(self._qk_norm(heads[:, : self._qk_heads]), cos.unsqueeze(1), sin.unsqueeze(1))
        return QKV(qk[:, : self._num_q_heads], qk[:, self._num_q_heads :], heads[:, self._qk_heads :])

    def after_attention(self, hidden: Tensor, attention: Tensor) -> Tensor:
        hidden = self._post_attention_norm(self._out(attention)).add_(hidden)
        gate, up = self._gate_up(self._pre_feedforward_norm(hidden)).chunk(2, -1)
        fed = self._down(F.gelu(gate, approximate="tanh").mul_(up))
        return self._post_feedforward_norm(fed).add_(hidden)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """RoPE of `x` [T, heads, d], whose two halves are the planes' two axes."""
        turned = torch.cat((-x[..., self._half :], x[..., : self._half]), -1)
        return (x * cos).addcmul_(turned, sin)
