"""What the kernels for decodes are told of a step's: the one that takes them, and no other."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from wicore_backend.attention.gpu.hopper_decode import MOST, HopperDecode
from wicore_backend.attention.gpu.plans import DecodeItems, Decodes, DecodeWork, Scratch
from wicore_backend.attention.gpu.schedule import ITEM_FIELDS, WORK_FIELDS, Ints
from wicore_backend.attention.gpu.tile_scheduler import Seen, TileScheduler
from wicore_backend.attention.gpu.tiling import Tiling
from wicore_backend.hmt.layout import LayerGroup


class DecodePlanner:
    """Makes the `Decodes` of plans: work items are told to `decode_kernel`, and whole sequences to `HopperDecode`.

    Which of them takes a plan's decodes follows from how many sequences the plan is for: `sequences` everywhere here.

    Parameters
    ----------
    hopper
        Takes up to `MOST` sequences, if there is one.
    """

    def __init__(self, tiling: Tiling, scheduler: TileScheduler, hopper: HopperDecode | None) -> None:
        self._tiling = tiling
        self._scheduler = scheduler
        self._hopper = hopper

    def records(self, group: LayerGroup, seen: Seen, *, sequences: int) -> Ints:
        """Of a step's decodes, `sequences` or fewer: int32 [n, fields of a record]."""
        if self._hopper_for(sequences) is not None:
            return self._scheduler.decode_work(group, seen, sequences=sequences)
        return self._scheduler.decode_items(group, seen)

    def idle(self, group: LayerGroup, *, sequences: int, max_keys: int) -> Ints:
        """Of no decodes, as many records as any step's of up to so many sequences of up to `max_keys` keys."""
        if self._hopper_for(sequences) is not None:
            return np.zeros((sequences + 1, WORK_FIELDS), np.int32)
        count = self._scheduler.decode_capacity(group, sequences=sequences, max_keys=max_keys)
        return np.full((count, ITEM_FIELDS), -1, np.int32)

    def plan(self, records: Tensor, tables: Tensor, *, sequences: int) -> Decodes:
        """Of records and block tables on the device, int32 and flat, with what else their kernel needs."""
        if (hopper := self._hopper_for(sequences)) is not None:
            return DecodeWork(hopper, records, tables)
        num_items = len(records) // ITEM_FIELDS
        scratch = Scratch.empty(
            self._tiling, records.device, items=num_items, rows=self._tiling.group, shared=sequences
        )
        return DecodeItems(records, num_items, tables, scratch)

    def _hopper_for(self, sequences: int) -> HopperDecode | None:
        return self._hopper if sequences <= MOST else None
