"""How a model's heads and blocks of keys are cut for the kernels' programs: books, without tensors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from wicore_backend.attention.gpu.tuning import MASS_KEYS, Tuning
from wicore_backend.hmt.layout import KVLayout


@dataclass(frozen=True)
class Tiling:
    """The sizes that follow from a model, its pools and a card.

    Attributes
    ----------
    query_heads
        Of the model, a multiple of its KV heads.
    tuning
        Shapes of the kernels' tiles.
    processors
        Multiprocessors to fill.
    """

    layout: KVLayout
    query_heads: int
    tuning: Tuning
    processors: int

    def __post_init__(self) -> None:
        if self.query_heads % self.layout.kv_heads:
            raise ValueError(
                f"query_heads = {self.query_heads} must be a multiple of the {self.layout.kv_heads} KV heads"
            )

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.query_heads // self.layout.kv_heads

    @property
    def group_rows(self) -> int:
        """Rows that a token has in a tile of queries: one for each query head of a KV head, and up to a power of 2."""
        return 1 << (self.group - 1).bit_length()

    @cached_property
    def tile_tokens(self) -> int:
        """Tokens of a tile of a prompt's queries."""
        return max(1, self.tuning.prefill.rows // self.group_rows)

    @property
    def prefill_rows(self) -> int:
        """Rows of such a tile."""
        return self.tile_tokens * self.group_rows

    @cached_property
    def cell(self) -> int:
        """Keys whose attention mass the kernels sum up: a block's, or a part of one that divides their tiles, too."""
        size = self.layout.block_size
        return min(size & -size, self.tuning.decode.keys, MASS_KEYS)

    def cells(self, keys: int) -> int:
        """That so many keys of a sequence lie in."""
        return -(-keys // self.cell)

    @cached_property
    def decode_fill(self) -> int:
        """Work items of decodes that fill the card; each is a program for each KV head."""
        return max(1, self.processors * self.tuning.decode.fill // self.layout.kv_heads)

    @cached_property
    def prefill_fill(self) -> int:
        """The same of prefills."""
        return max(1, self.processors * self.tuning.prefill.fill // self.layout.kv_heads)
