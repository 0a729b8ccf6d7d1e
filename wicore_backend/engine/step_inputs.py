"""Memory at fixed addresses for what recorded steps read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wicore_backend.executor.base import Executor
from wicore_backend.executor.upload import to_device
from wicore_backend.models.gemma3.config import TextConfig


@dataclass(frozen=True, slots=True, eq=False)
class StepInputs:
    """Of a step of up to T tokens, of which only one is computed at a time.

    Attributes
    ----------
    embedded
        [T, D], the embeddings.
    positions
        int32 [T]
    attended
        [T, query heads * d], a layer's attention.
    """

    embedded: Tensor
    positions: Tensor
    attended: Tensor

    @classmethod
    def of(cls, text: TextConfig, executor: Executor, *, tokens: int) -> Self:
        """For steps of up to so many tokens, on the device and in the types of `executor`."""
        device = executor.device
        return cls(
            torch.zeros(tokens, text.hidden_size, dtype=executor.residual, device=device),
            torch.zeros(tokens, dtype=torch.int32, device=device),
            torch.zeros(tokens, text.num_heads * text.head_dim, dtype=executor.dtype, device=device),
        )

    @staticmethod
    def nbytes(text: TextConfig, *, tokens: int, value_bytes: int) -> int:
        """Of what `of` makes; its embeddings may be in float32, whatever else is."""
        attended = text.num_heads * text.head_dim * value_bytes
        return tokens * (text.hidden_size * torch.float32.itemsize + attended + torch.int32.itemsize)

    def __len__(self) -> int:
        return len(self.positions)

    def first(self, count: int) -> Self:
        """The memory of the first tokens."""
        return type(self)(self.embedded[:count], self.positions[:count], self.attended[:count])

    def like(self, count: int) -> Self:
        """Other memory, for so many tokens."""
        parts = (self.embedded, self.positions, self.attended)
        return type(self)(*(part.new_zeros(count, *part.shape[1:]) for part in parts))

    def fill(self, hidden: Tensor, positions: NDArray[np.int32]) -> None:
        """Put the embeddings `hidden` [T, D] and `positions` [T] of a step in; nobody waits for the device."""
        self.embedded[: len(hidden)].copy_(hidden)
        self.positions[: len(hidden)].copy_(to_device(positions, hidden.device))
