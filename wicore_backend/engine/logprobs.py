"""Log-probabilities, worked out where the logits are and read when they are needed."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from wicore_backend.engine.request import TokenLogprob
from wicore_backend.executor.upload import to_host

ReadLogprobs = Callable[[], list[TokenLogprob]]


def logprobs_bytes(*, rows: int, vocab: int) -> int:
    """Memory that `logprobs_of` takes for so many rows, their logits aside."""
    return rows * vocab * 2 * torch.float32.itemsize


def logprobs_of(logits: Tensor, tokens: Tensor, tops: Rows[int]) -> ReadLogprobs:
    """Log-probability of each of `tokens` under its row of `logits`, and of as many of the likeliest as `tops` says.

    Parameters
    ----------
    logits
        float32 [R, V], which may be overwritten after this.
    tokens
        int64 [R], where the logits are.

    Returns
    -------
    A call that gives them. It waits for the device, though not for what that is given after this.
    """
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(1, tokens[:, None])[:, 0]
    values, ids = logprobs.topk(min(max(tops), logits.shape[1]), dim=-1)
    on_host = to_host(tokens, chosen, values, ids)

    def read() -> list[TokenLogprob]:
        columns = [array.tolist() for array in on_host()]
        return [
            TokenLogprob(token, logprob, tuple(zip(row_ids[:top], row_values[:top], strict=True)))
            for token, logprob, row_values, row_ids, top in zip(*columns, tops, strict=True)
        ]

    return read
