"""What every way of keeping a matrix in fewer bits has in common, in memory and in a checkpoint's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor


class QuantizedMatrix(Protocol):
    """A matrix [N, K] of a linear map, N out and K in, in fewer bits than the type that is computed in."""

    @property
    def shape(self) -> torch.Size:
        """[N, K], whatever the tensors that hold it are like."""

    @property
    def dtype(self) -> torch.dtype:
        """The type that is computed in: of what the matrix multiplies and of the product."""

    @property
    def device(self) -> torch.device: ...

    @property
    def nbytes(self) -> int:
        """Of all that a product reads of the matrix: values and scales."""

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix as an ordinary tensor [N, K] in `dtype`, its own if None: the plain twin of all kernels on it."""

    @classmethod
    def stacked(cls, parts: Sequence[Self]) -> Self:
        """The rows of `parts` [N_i, K] one after another, as in a fused QKV: [sum of N_i, K]."""


PLAIN_TYPES = ("F32", "BF16", "F16")
"""safetensors' names of the types of what is not quantised, and of scales."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a checkpoint as its file describes it.

    Attributes
    ----------
    shapes
        Those allowed.
    types
        Those allowed, by safetensors' names: `F8_E4M3`, `BF16`, `I32`.
    optional
        The tensor may be missing.
    """

    shapes: tuple[tuple[int, ...], ...]
    types: tuple[str, ...]
    optional: bool = False


class WeightFormat(Protocol):
    """How a checkpoint stores the matrix of one linear module, which a plain one stores as `weight`."""

    def stored(self, shape: tuple[int, ...]) -> Mapping[str, Stored]:
        """The tensors of a module whose matrix is `shape` [N, K], by their names after the module's.

        Raises
        ------
        CheckpointError
            If a matrix of this shape cannot be stored so.
        """

    def matrix(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], *, dtype: torch.dtype) -> QuantizedMatrix:
        """The module's matrix, to be computed in `dtype`, of its `tensors`: those of `stored`, on their device.

        Raises
        ------
        ValueError
            If their values cannot be those of a matrix; says what they are.
        """
