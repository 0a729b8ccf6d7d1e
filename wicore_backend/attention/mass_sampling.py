"""When attention mass is measured: seldom enough to cost next to nothing, often enough to tell what matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from wicore_backend.hmt.layout import KVLayout, LayerGroup


@dataclass(frozen=True, slots=True)
class MassSampling:
    """Of a decoding sequence one layer's attention every `interval` tokens; of a prompt's end that of all layers.

    What is measured depends on positions alone, so that a step computed again measures the same.

    Attributes
    ----------
    layers
        Those to measure, all of the global group; decodes take them in turn.
    interval
        Tokens from one measurement of a decode to the next.
    """

    layers: tuple[int, ...]
    interval: int = 16

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"interval = {self.interval}: measure every token (1) or less often")

    @classmethod
    def of(cls, layout: KVLayout, *, interval: int = 16) -> Self:
        """All global layers of a model."""
        layers = tuple(i for i, (group, _) in enumerate(layout.layers) if group is LayerGroup.GLOBAL)
        return cls(layers, interval)

    def first_due(self, positions: range) -> int:
        """The first of a sequence's `positions` at which a decode is measured; their first if there is none."""
        due = -(-positions.start // self.interval) * self.interval
        return due if due in positions else positions.start

    def choose(self, decodes: Sequence[int], prompts: Sequence[int]) -> Mapping[int, Sequence[int]]:
        """The sequences to measure in each layer.

        Parameters
        ----------
        decodes
            Position of the token of each decode, which are the step's first sequences.
        prompts
            The step's sequences whose prompt ends in it.
        """
        chosen = {layer: [*prompts] for layer in self.layers} if prompts else {}
        if self.layers:
            for sequence, position in enumerate(decodes):
                if position % self.interval == 0:
                    layer = self.layers[position // self.interval % len(self.layers)]
                    chosen.setdefault(layer, []).append(sequence)
        return chosen
