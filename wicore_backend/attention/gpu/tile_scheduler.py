"""A step's work in each group of layers, by the tiles that a model has on a card: books, without tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from wicore_backend.attention.base import PackedStep
from wicore_backend.attention.closing_up import ClosedUp, close_up
from wicore_backend.attention.gpu.masses import Measurements
from wicore_backend.attention.gpu.schedule import (
    Ints,
    PrefillTiles,
    Sequences,
    decode_capacity,
    decode_items,
    decode_work,
    prefill_tiles,
    slots_of,
)
from wicore_backend.attention.gpu.tiling import Tiling
from wicore_backend.hmt.layout import LayerGroup


class Seen(NamedTuple):
    """A step as one group of layers sees it."""

    step: PackedStep
    """The global group's is without the blocks that have left."""
    sequences: Sequences


@dataclass(frozen=True, slots=True, eq=False)
class StepView:
    """A step as each group of layers sees it."""

    step: PackedStep
    """As the engine has it."""
    groups: Mapping[LayerGroup, Seen]
    closed_up: ClosedUp | None
    """None if no block has left."""


class TileScheduler:
    """Cuts steps into the kernels' work items. Stateless.

    Parameters
    ----------
    window
        Keys that a local layer's token sees, its own included.
    """

    def __init__(self, tiling: Tiling, *, window: int) -> None:
        self._tiling = tiling
        self._layout = tiling.layout
        self._tuning = tiling.tuning
        self._window = window

    def view(self, step: PackedStep) -> StepView:
        """What each group of layers sees of a step.

        Raises
        ------
        ValueError
            If attention mass is asked of local layers, or a block that the step writes has left.
        """
        local = [layer for layer in step.measured if self._layout.layers[layer][0] is not LayerGroup.GLOBAL]
        if local:
            raise ValueError(f"attention mass is asked of layers {local}, which are local; ask global ones")
        size, groups = self._layout.block_size, self._layout.groups
        closed_up = close_up(step, size) if LayerGroup.GLOBAL in groups else None
        seen: dict[LayerGroup, Seen] = {}
        for group in groups:
            of_group = step if closed_up is None or group is LayerGroup.LOCAL else closed_up.step
            seen[group] = Seen(of_group, Sequences.of(of_group, group, block_size=size, window=self._window))
        return StepView(step, seen, closed_up)

    def decode_items(self, group: LayerGroup, seen: Seen) -> Ints:
        """Work items int32 [n, ITEM_FIELDS] of the step's decodes."""
        return decode_items(
            seen.step,
            group,
            seen.sequences,
            window=self._window,
            keys=self._tuning.decode.keys,
            items=self._tiling.decode_fill,
        )

    def decode_work(self, group: LayerGroup, seen: Seen, *, sequences: int) -> Ints:
        """The step's decodes as `HopperDecode` takes them, int32 [sequences + 1, WORK_FIELDS], up to so many."""
        return decode_work(seen.step, group, seen.sequences, window=self._window, sequences=sequences)

    def decode_capacity(self, group: LayerGroup, *, sequences: int, max_keys: int) -> int:
        """The most of them that up to so many decodes of up to `max_keys` keys have."""
        return decode_capacity(
            sequences=sequences,
            most_keys=self._most_seen(group, max_keys),
            keys=self._tuning.decode.keys,
            items=self._tiling.decode_fill,
        )

    def table_blocks(self, group: LayerGroup, *, max_keys: int, tokens: int = 0) -> int:
        """The most visible blocks of a sequence of up to `max_keys` keys, of which a step adds a prompt's `tokens`."""
        # Of a window neither end need fall on a block's edge.
        return self._layout.blocks_for(self._most_seen(group, max_keys, tokens)) + 1

    def prefill_tiles(self, group: LayerGroup, seen: Seen) -> PrefillTiles:
        """Work items of the step's prefills."""
        return prefill_tiles(
            seen.step,
            group,
            seen.sequences,
            block_size=self._layout.block_size,
            window=self._window,
            tokens=self._tiling.tile_tokens,
            keys=self._tuning.prefill_of(group).keys,
            items=self._tiling.prefill_fill,
            least_keys=self._tuning.prefill.least_keys,
        )

    def prompt_tiles(self, view: StepView) -> Mapping[LayerGroup, PrefillTiles]:
        """Work items, by group, of a step that is a prompt by itself; its first token waits for them.

        Within the window, where no block has left, all that one group sees so does the other, from blocks of its own.
        """
        alike = view.closed_up is None and int(view.step.positions.max()) < self._window
        tiles: dict[LayerGroup, PrefillTiles] = {}
        for group, seen in view.groups.items():
            if alike and tiles:
                slots = slots_of(view.step, seen.sequences, block_size=self._layout.block_size)
                other = next(iter(tiles.values()))
                tiles[group] = PrefillTiles(other.items, other.tiles, other.lowers, other.uppers, slots)
            else:
                tiles[group] = self.prefill_tiles(group, seen)
        return tiles

    def measurements(self, view: StepView) -> Measurements | None:
        """The measurements of attention mass that the step asks for; None if it asks for none."""
        if not view.step.measured:
            return None
        seen = view.groups[LayerGroup.GLOBAL]
        return Measurements.of(seen.step, seen.sequences.table_at, cell=self._tiling.cell)

    def _most_seen(self, group: LayerGroup, max_keys: int, tokens: int = 0) -> int:
        return min(max_keys, self._window + tokens) if group is LayerGroup.LOCAL else max_keys
