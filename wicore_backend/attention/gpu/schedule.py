"""How a step's attention is shared out among programs: books, without tensors.

All positions here count from where a sequence's table in the plan begins: the first block that is visible. So a local
group's sequences are short, and one with blocks that have left (`closing_up.py`) is no special case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wicore_backend.attention.base import PackedStep
from wicore_backend.hmt.layout import LayerGroup

ITEM_FIELDS = 8
"""Of a decode's work item: see `kernels/decode.py`."""
WORK_FIELDS = 4
"""Of a sequence for `kernels/decode_hopper.cu`: see `Sequence` there."""
WORK_KEYS = 32
"""Of a tile there."""
TILE_FIELDS = 10
"""Of a prefill's work item: see `kernels/prefill.py`."""

_SHORT_ITEM = 1024
"""Keys below which a program's start and end weigh more than that there are as many programs as can be."""

Ints = NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """A step's sequences as one group of layers sees them.

    Attributes
    ----------
    table
        int32, the sequences' visible blocks, one after the other.
    table_at
        Where each one's begin in it.
    shift
        The position at which each one's table begins.
    """

    table: Ints
    table_at: Ints
    shift: Ints

    @classmethod
    def of(cls, step: PackedStep, group: LayerGroup, *, block_size: int, window: int) -> Sequences:
        ends = step.query_lens.cumsum()
        first = step.positions[ends - step.query_lens].astype(np.int64)
        last = np.maximum.reduceat(step.attend_limits, ends - step.query_lens).astype(np.int64)
        lowest = np.maximum(first - window + 1, 0) if group is LayerGroup.LOCAL else np.zeros_like(first)
        first_block = lowest // block_size
        counts = last // block_size + 1 - first_block
        table_at = counts.cumsum() - counts
        column = np.arange(counts.sum()) - np.repeat(table_at - first_block, counts)
        table = step.block_tables[group][np.repeat(np.arange(len(counts)), counts), column]
        return cls(table, table_at, first_block * block_size)


def most_items(sequences: int, items: int) -> int:
    """How many work items `decode_items` may make of so many sequences, where `items` fill the card.

    Programs that all fit the card at once read at its full speed and end together; a few more would run alone after
    them. Where there are too many sequences for that, some are left to be shared out, for those that are much longer.
    """
    return max(items, sequences + sequences // 2)


def decode_capacity(*, sequences: int, most_keys: int, keys: int, items: int) -> int:
    """The most work items that `decode_items` makes of up to so many sequences of up to `most_keys` visible keys."""
    # Keys need not begin where a tile does, so that they may lie in one more than they fill.
    return min(most_items(sequences, items), sequences * (-(-most_keys // keys) + 1))


def decode_items(
    step: PackedStep, group: LayerGroup, of_group: Sequences, *, window: int, keys: int, items: int
) -> Ints:
    """Work items int32 [n, ITEM_FIELDS] of the step's decodes, as equal and as many as `most_items` lets them be.

    Parameters
    ----------
    keys
        Of a tile, of which an item takes a whole number.
    """
    count = step.decodes
    lowest, new = _visible(step, group, of_group, window)
    start = lowest // keys * keys
    tiles = new // keys + 1 - start // keys
    if int(tiles.sum()) * keys < items * _SHORT_ITEM:
        items = max(1, items // 2)
    parts = -(-tiles // _tiles_an_item(tiles, most_items(count, items)))
    first_item = parts.cumsum() - parts
    sequence = np.repeat(np.arange(count), parts)
    nth = np.arange(len(sequence)) - first_item[sequence]
    # A sequence's items are as long as each other, give or take a tile.
    begin = start[sequence] + tiles[sequence] * nth // parts[sequence] * keys
    end = start[sequence] + tiles[sequence] * (nth + 1) // parts[sequence] * keys
    of_new = new[sequence]
    fields = (
        sequence,
        begin,
        np.minimum(end, of_new + 1),
        lowest[sequence],
        of_new,
        of_group.table_at[sequence],
        first_item[sequence],
        parts[sequence],
    )
    return _records(fields)


def decode_work(step: PackedStep, group: LayerGroup, of_group: Sequences, *, window: int, sequences: int) -> Ints:
    """What `kernels/decode_hopper.cu` is told of the step's decodes: int32 [sequences + 1, WORK_FIELDS].

    Parameters
    ----------
    sequences
        As many as the step has decodes, or more.
    """
    count = step.decodes
    lowest, new = _visible(step, group, of_group, window)
    work = np.zeros((sequences + 1, WORK_FIELDS), np.int32)
    work[1 : count + 1, 0] = (new // WORK_KEYS + 1 - lowest // WORK_KEYS).cumsum()
    work[count:, 0] = work[count, 0]
    work[:count, 1], work[:count, 2], work[:count, 3] = lowest, new, of_group.table_at[:count]
    return work


def _visible(step: PackedStep, group: LayerGroup, of_group: Sequences, window: int) -> tuple[Ints, Ints]:
    """The first and the last key that each decode sees; the last is its own."""
    new = step.positions[: step.decodes] - of_group.shift[: step.decodes]
    return np.maximum(new - window + 1, 0) if group is LayerGroup.LOCAL else np.zeros_like(new), new


def _records(fields: Sequence[Ints]) -> Ints:
    """int32 [n, fields]."""
    records = np.empty((len(fields[0]), len(fields)), np.int32)
    for at, field in enumerate(fields):
        records[:, at] = field
    return records


def _tiles_an_item(tiles: Ints, most: int) -> int:
    """The fewest tiles that an item can have if there may be `most` items, at least as many as sequences."""
    low, high = max(1, -(-int(tiles.sum()) // most)), int(tiles.max())
    while low < high:
        middle = (low + high) // 2
        if int((-(-tiles // middle)).sum()) <= most:
            high = middle
        else:
            low = middle + 1
    return low


@dataclass(frozen=True, slots=True, eq=False)
class PrefillTiles:
    """Work items of a step's prefills in one group of layers; rows are counted from the first prefill's first token.

    Attributes
    ----------
    items
        int32 [n, TILE_FIELDS], the longest first.
    tiles
        How many tiles of queries they are made of; fewer than the items if some are split.
    lowers, uppers, slots
        int32 [T], of each token: the first and the last key that it sees, and where its own goes in the pool, in
        tokens.
    """

    items: Ints
    tiles: int
    lowers: Ints
    uppers: Ints
    slots: Ints

    @property
    def split(self) -> bool:
        """Whether some tile's keys are shared out among several items."""
        return len(self.items) > self.tiles

    def arrays(self) -> dict[str, Ints]:
        """What the kernels need, by name."""
        return {"tiles": self.items, "lowers": self.lowers, "uppers": self.uppers, "slots": self.slots}


def prefill_tiles(
    step: PackedStep,
    group: LayerGroup,
    of_group: Sequences,
    *,
    block_size: int,
    window: int,
    tokens: int,
    keys: int,
    items: int,
    least_keys: int,
) -> PrefillTiles:
    """Share out the prefills.

    Parameters
    ----------
    tokens
        Of a tile of queries.
    keys
        Of a tile of keys.
    items
        How many fill the card: if there are fewer tiles of queries, their keys are shared out.
    least_keys
        Of an item, where keys are shared out.
    """
    lens = step.query_lens[step.decodes :]
    sequence = np.repeat(np.arange(step.decodes, len(step.query_lens)), lens)
    positions = step.positions[step.decodes :] - of_group.shift[sequence]
    slots = slots_of(step, of_group, block_size=block_size)
    uppers = step.attend_limits[step.decodes :] - of_group.shift[sequence]
    lowers = np.maximum(positions - window + 1, 0) if group is LayerGroup.LOCAL else np.zeros_like(positions)

    of_sequence = -(-lens // tokens)
    nth = np.arange(of_sequence.sum()) - np.repeat(of_sequence.cumsum() - of_sequence, of_sequence)
    rows = np.repeat(lens.cumsum() - lens, of_sequence) + nth * tokens
    num_tokens = np.minimum(np.repeat(lens, of_sequence) - nth * tokens, tokens)
    start = lowers[rows] // keys * keys
    end = np.maximum.reduceat(uppers, rows) + 1
    # What all of a tile's tokens see, in whole tiles of keys.
    full_from = -(-lowers[rows + num_tokens - 1] // keys) * keys
    full_to = (np.minimum.reduceat(uppers, rows) + 1) // keys * keys

    lengths = -(-(end - start) // keys)
    each = int(lengths.max())
    if len(rows) < items:
        each = max(-(-least_keys // keys), -(-int(lengths.sum()) // items))
    parts = -(-lengths // each)
    first_item = parts.cumsum() - parts
    tile = np.repeat(np.arange(len(rows)), parts)
    part = np.arange(len(tile)) - first_item[tile]
    begin = start[tile] + lengths[tile] * part // parts[tile] * keys
    finish = np.minimum(start[tile] + lengths[tile] * (part + 1) // parts[tile] * keys, end[tile])
    full_begin = np.minimum(np.maximum(full_from[tile], begin), finish // keys * keys)
    full_finish = np.minimum(np.maximum(full_to[tile], full_begin), finish // keys * keys)
    # With nothing in full, all tiles of keys are at the edges.
    none = full_begin >= full_finish
    fields = (
        rows[tile],
        num_tokens[tile],
        begin,
        finish,
        np.where(none, begin, full_begin),
        np.where(none, begin, full_finish),
        of_group.table_at[sequence[rows[tile]]],
        first_item[tile],
        parts[tile],
        tile,
    )
    records = _records(fields)
    if len(tile) == len(rows):
        records = records[np.argsort(begin - finish, kind="stable")]
    return PrefillTiles(records, len(rows), lowers.astype(np.int32), uppers.astype(np.int32), slots)


def slots_of(step: PackedStep, of_group: Sequences, *, block_size: int) -> Ints:
    """int32 [T], of each of the prefills' tokens where its keys and values go in the pool, in tokens."""
    lens = step.query_lens[step.decodes :]
    first = np.repeat(of_group.table_at[step.decodes :], lens)
    positions = step.positions[step.decodes :] - np.repeat(of_group.shift[step.decodes :], lens)
    block, place = np.divmod(positions, block_size)
    slots: Ints = (of_group.table[first + block] * block_size + place).astype(np.int32)
    return slots
