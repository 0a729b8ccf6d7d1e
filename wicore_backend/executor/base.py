"""The executor: dense segments of the decoder, cut at attention, and the vision tower.

Between two attentions everything is a stateless function of T packed tokens, prefill and decode of all sequences
mixed. An executor implements these five functions and nothing else; it never sees a sequence, a block or a mask.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class QKV(NamedTuple):
    """One layer's projections of T packed tokens, after QK-norm and RoPE.

    `q` [T, query heads, head dim] is unscaled; `k` and `v` are [T, KV heads, head dim], as the KV cache stores them.
    """

    q: Tensor
    k: Tensor
    v: Tensor


class Executor(Protocol):
    """Dense segments of one Gemma-3 model on one device. D is the hidden size, V the vocabulary.

    What `first` and `mid` give may be in the executor's memory, which later calls write again: queries, keys and values
    are good until the next segment, hidden states until the one after that. So `last`, as often as it is called, comes
    before the next step's `first`, in the order in which the device computes. Logits and soft tokens are the caller's.

    Attributes
    ----------
    dtype
        Of queries, keys, values, attention's results, cosines, sines and pixels.
    residual
        Of hidden states and soft tokens: `dtype`, but float32 where the residual stream would overflow it (float16).
    recordable
        Whether a CUDA graph can hold what it gives the device.
    """

    device: torch.device
    dtype: torch.dtype
    residual: torch.dtype
    recordable: bool

    def embed(self, ids: Tensor, soft_tokens: Tensor | None, soft_rows: Tensor | None) -> Tensor:
        """Hidden states [T, D] of `ids` int [T], scaled by sqrt(D).

        Rows `soft_rows` int [R] are replaced by `soft_tokens` [R, D], unscaled; both are None in a step without images.
        """

    def first(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> QKV:
        """Layer 0 up to its attention. `cos` and `sin` [T, head dim] are of layer 0's RoPE at each token's position."""

    def mid(self, layer: int, hidden: Tensor, attention: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, QKV]:
        """The end of `layer` after its attention, and the start of `layer + 1`.

        `attention` is [T, query heads * head dim]; `cos` and `sin` are of layer + 1. Returns the new hidden [T, D].
        """

    def last(self, hidden: Tensor, attention: Tensor, rows: Tensor) -> Tensor:
        """The end of the last layer, final norm and head: float32 logits [R, V] of the packed rows `rows` int [R]."""

    def vision(self, pixels: Tensor) -> Tensor:
        """Soft tokens [N, M, D] of normalised float pixels [N, 3, S, S]."""
