"""The vision tower as CUDA graphs: some three hundred launches a batch become one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_BATCHES = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True, eq=False)
class _Captured:
    graph: torch.cuda.CUDAGraph
    pixels: Tensor
    tokens: Tensor


class VisionGraphs:
    """What `encode` makes of pixels [N, 3, S, S], replayed for the next larger N of 1, 2, 4 and 8.

    A batch size is captured when it comes for the first time. Replays share memory, so they must be on one stream, or
    on streams that wait for each other.

    Parameters
    ----------
    encode
        Soft tokens [N, M, D] of pixels, without waiting for the device.
    """

    def __init__(self, encode: Callable[[Tensor], Tensor]) -> None:
        self._encode = encode
        self._captured: dict[int, _Captured] = {}
        self._pool: Any = None

    def __call__(self, pixels: Tensor) -> Tensor:
        """Soft tokens [N, M, D], the caller's own."""
        count = len(pixels)
        size = next((batch for batch in _BATCHES if count <= batch), None)
        if size is None:
            return self._encode(pixels)
        if size not in self._captured:
            self._captured[size] = self._capture(pixels.new_zeros(size, *pixels.shape[1:]))
        captured = self._captured[size]
        captured.pixels[:count].copy_(pixels)
        captured.graph.replay()
        return captured.tokens[:count].clone()

    def _capture(self, pixels: Tensor) -> _Captured:
        self._encode(pixels)  # What is loaded and allocated once is so now.
        graph = torch.cuda.CUDAGraph()
        # On the stream that will replay it: cuBLAS has a workspace for each stream, and two graphs that were captured
        # on one must not run beside each other. The default stream cannot be captured.
        stream = torch.cuda.current_stream(pixels.device)
        own = None if stream == torch.cuda.default_stream(pixels.device) else stream
        # Other threads may use the device meanwhile, to move blocks between the tiers; that is no part of the graph.
        with torch.cuda.graph(graph, pool=self._pool, stream=own, capture_error_mode="thread_local"):
            tokens = self._encode(pixels)
        self._pool = graph.pool()
        return _Captured(graph, pixels, tokens)
