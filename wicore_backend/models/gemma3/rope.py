"""Rotary position embedding, a table for each layer group."""

from __future__ import annotations

import torch
from torch import Tensor

from wicore_backend.hmt.layout import LayerGroup
from wicore_backend.models.gemma3.config import Gemma3Config, Rope, TextConfig


class RotaryTables:
    """Cosines and sines of positions 0 to `max_positions` - 1, computed in float32 and kept in `dtype`.

    Gemma-3 (https://arxiv.org/abs/2503.19786, section 2) uses base 1M, positions scaled down by 8 in the larger
    models, in global layers, and base 10k in local ones.
    """

    def __init__(self, config: Gemma3Config, *, max_positions: int, device: torch.device, dtype: torch.dtype) -> None:
        head_dim = config.text.head_dim
        self._tables = {
            group: _table(rope, head_dim, max_positions, device).to(dtype)
            for group, rope in config.text.rope.items()
            if group in config.text.layer_groups
        }

    @staticmethod
    def nbytes(text: TextConfig, *, max_positions: int, value_bytes: int) -> int:
        """Of the tables of a model."""
        return len(set(text.layer_groups)) * max_positions * 2 * text.head_dim * value_bytes

    def lookup(self, positions: Tensor) -> dict[LayerGroup, tuple[Tensor, Tensor]]:
        """For each group that the model has, cosines and sines [T, head dim], each contiguous, of `positions`
        int [T]."""
        looked_up = {}
        for group, table in self._tables.items():
            cos, sin = table.index_select(1, positions).unbind()
            looked_up[group] = (cos, sin)
        return looked_up


def _table(rope: Rope, head_dim: int, max_positions: int, device: torch.device) -> Tensor:
    """[2 (cos, sin), max_positions, head dim]; both halves of the head have the same angles."""
    inverse = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), inverse / rope.factor).to(device)
    angles = torch.cat((angles, angles), -1)
    return torch.stack((angles.cos(), angles.sin()))
