"""Tokens to hidden states, for executors whose segments begin after that."""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from wicore_backend.models.gemma3.layers import embedding_scale


class Embedding:
    """The embeddings of tokens, scaled by sqrt(D), with soft tokens put in for pictures.

    The table is read a row for each token, so it may stay in host memory: on CUDA a kernel fetches the rows from there,
    which takes the device no memory and can be recorded.

    Parameters
    ----------
    table
        [V, D], on `device`; or, where that is a CUDA device with OpenAI Triton, in page-locked host memory.
    residual
        Type of the hidden states.
    """

    def __init__(self, table: Tensor, *, device: torch.device, residual: torch.dtype) -> None:
        by_kernel = device.type == "cuda" and find_spec("triton") is not None
        # A tensor's device has its number; one that is asked for may be without, which is the current one.
        there = table.device.type == device.type and device.index in (None, table.device.index)
        if not there and not (by_kernel and table.is_pinned()):
            raise ValueError(f"a table on {table.device} that {device} cannot read")
        self._table = table
        self._residual = residual
        self._scale = embedding_scale(table.shape[1], residual)
        self._by_kernel = by_kernel

    def __call__(self, ids: Tensor, soft_tokens: Tensor | None, soft_rows: Tensor | None) -> Tensor:
        """See `Executor.embed`."""
        if soft_tokens is None or soft_rows is None:
            return self._look_up(ids)
        # The placeholder's id may lie beyond the vocabulary.
        return self._look_up(ids.index_fill(0, soft_rows, 0)).index_copy_(0, soft_rows, soft_tokens)

    def _look_up(self, ids: Tensor) -> Tensor:
        if self._by_kernel:
            # Imported where it is used: OpenAI Triton has no business on a machine without a GPU.
            from wicore_backend.executor.kernels.small import embed

            return embed(ids, self._table, self._scale, dtype=self._residual)
        return F.embedding(ids, self._table).to(self._residual).mul_(self._scale)
