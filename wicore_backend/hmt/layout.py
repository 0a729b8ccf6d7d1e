"""The shape of the KV cache: which layers share a block, and how many bytes a block has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property


class LayerGroup(StrEnum):
    """Layers that keep the same keys share block tables and a pool."""

    GLOBAL = "global"
    """Every key of the sequence."""
    LOCAL = "local"
    """A sliding window; blocks wholly behind it are freed."""


@dataclass(frozen=True, slots=True)
class Part:
    """Layers of blocks that are copied together.

    Attributes
    ----------
    first_layer
        The first of the model's layers that is in it.
    spans
        For each of its groups the layers, counted within the group.
    """

    first_layer: int
    spans: Mapping[LayerGroup, range]


_PART_LAYERS = 8
"""Most layers of a part, so that a model with one group has several, too."""


@dataclass(frozen=True)
class KVLayout:
    """Shape of the KV cache of one model.

    Attributes
    ----------
    block_size
        Tokens a block.
    layers
        For each decoder layer its group and its index within that group.
    window
        Keys that a local layer sees, the token's own included.
    """

    block_size: int
    layers: tuple[tuple[LayerGroup, int], ...]
    kv_heads: int
    head_dim: int
    window: int
    bytes_per_value: int

    @classmethod
    def of(
        cls,
        groups: Iterable[LayerGroup],
        *,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        window: int,
        bytes_per_value: int,
    ) -> KVLayout:
        """The layout of a model whose layers, from the first to the last, belong to `groups`."""
        seen = dict.fromkeys(LayerGroup, 0)
        layers = []
        for group in groups:
            layers.append((group, seen[group]))
            seen[group] += 1
        return cls(block_size, tuple(layers), kv_heads, head_dim, window, bytes_per_value)

    @cached_property
    def layers_in(self) -> Mapping[LayerGroup, int]:
        """How many layers each group has; 0 for a group that the model lacks."""
        return {group: sum(g is group for g, _ in self.layers) for group in LayerGroup}

    @cached_property
    def groups(self) -> tuple[LayerGroup, ...]:
        """The groups that have layers."""
        return tuple(group for group, count in self.layers_in.items() if count)

    @cached_property
    def one_of_each(self) -> KVLayout:
        """The same with one layer of each group: what computes one of them has launched all that the others do."""
        return replace(self, layers=tuple((group, 0) for group in self.groups))

    @cached_property
    def whole(self) -> Part:
        """All layers."""
        return Part(0, {group: range(self.layers_in[group]) for group in self.groups})

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """All layers in their order, cut wherever the group changes: what a step needs first is in the first ones."""
        parts: list[Part] = []
        for layer, (group, index) in enumerate(self.layers):
            span = parts[-1].spans.get(group) if parts else None
            if span is None or len(span) == _PART_LAYERS:
                parts.append(Part(layer, {group: range(index, index + 1)}))
            else:
                parts[-1] = Part(parts[-1].first_layer, {group: range(span.start, index + 1)})
        return tuple(parts)

    def blocks_held(self, group: LayerGroup, tokens: int, max_chunk: int) -> int:
        """The most blocks that a sequence of `tokens` tokens, computed by up to `max_chunk`, holds at once."""
        if group is LayerGroup.LOCAL:
            # A chunk's first token, and one after the full block before it, sees window - 1 keys before it; neither
            # end need fall on a block's edge.
            span = min(tokens, self.window - 1 + self.block_size - 1 + max_chunk)
            return min(self.blocks_for(tokens), self.blocks_for(span) + 1)
        return self.blocks_for(tokens)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that `tokens` tokens take."""
        return -(-tokens // self.block_size)

    def block_shape(self, group: LayerGroup) -> tuple[int, int, int, int, int]:
        """[layers of the group, 2 (K, V), block_size, KV heads, head dim]."""
        return (self.layers_in[group], 2, self.block_size, self.kv_heads, self.head_dim)

    def block_bytes(self, group: LayerGroup) -> int:
        """Bytes of one block of `group`."""
        layers, kv, tokens, heads, dim = self.block_shape(group)
        return layers * kv * tokens * heads * dim * self.bytes_per_value
