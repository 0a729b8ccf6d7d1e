"""The vision tower as CUDA graphs: some three hundred launches a batch become one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import Tensor

from wicore_backend.engine.recording import Record, Recorded

BATCHES = (2, 1)
"""Pictures at once. The largest first: the others find room in its memory."""

_log = logging.getLogger(__name__)


class _Tokens(NamedTuple):
    tokens: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Graph:
    pixels: Tensor
    replay: Recorded[_Tokens]


class VisionGraphs:
    """What `encode` makes of pixels [N, 3, S, S], replayed for the next larger N of `BATCHES`.

    To be used under `torch.inference_mode()`, on one thread and, since the graphs share their memory, one stream.

    Parameters
    ----------
    encode
        Soft tokens [N, M, D] of pixels, without waiting for the device.
    """

    def __init__(self, encode: Callable[[Tensor], Tensor], record: Record) -> None:
        self._encode = encode
        self._record = record
        self._graphs: dict[int, _Graph] = {}

    def prepare(self, pixels: Tensor) -> None:
        """Record the graphs for pictures like `pixels` [3, S, S]. Those that cannot be had are computed without."""
        together = pixels.expand(max(BATCHES), -1, -1, -1).contiguous()  # One batch at a time is computed.
        for size in BATCHES:
            batch = together[:size]
            try:
                self._encode(batch)  # What is compiled, loaded and allocated once is so now.
                recorded = self._record(partial(self._work, batch))
            except Exception:
                _log.exception("the vision tower cannot be recorded for %d pictures: it is launched by kernels", size)
                continue
            recorded.lend()
            self._graphs[size] = _Graph(batch, recorded)

    def _work(self, pixels: Tensor) -> _Tokens:
        return _Tokens(self._encode(pixels))

    def __call__(self, pixels: Tensor) -> Tensor:
        """Soft tokens [N, M, D], the caller's own."""
        count = len(pixels)
        size = min((size for size in self._graphs if size >= count), default=None)
        if size is None:
            return self._encode(pixels)
        graph = self._graphs[size]
        graph.pixels[:count].copy_(pixels)
        return graph.replay().tokens[:count].clone()
