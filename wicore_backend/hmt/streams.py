"""The streams on which blocks are copied; who uses which for what is in `hmt/transfers.py`."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Stream(Enum):
    """Work on one is done in order; between two, only events make an order."""

    STEP = auto()
    """The caller's own: the model runs there."""
    SWAP = auto()
    DRAIN = auto()


class Event(Protocol):
    """A point in a stream."""

    def synchronize(self) -> None:
        """Return once the stream has come to it. On any thread."""


class Streams(Protocol):
    """Takes work for streams, and lets them wait for each other. Nothing here waits itself."""

    def run(self, stream: Stream, work: Callable[[], object]) -> None:
        """Have the stream do what `work` issues. Streams other than STEP only."""

    def record(self, stream: Stream, *, for_threads: bool = False) -> Event:
        """The point that the stream has come to once it has done all that it has been given by now.

        Threads may wait for it only if it is made for them.
        """

    def wait(self, stream: Stream, event: Event) -> None:
        """Have the stream do nothing of what it is given from now on before `event`."""

    def upload(self, numbers: NDArray[np.int64]) -> Tensor:
        """Numbers on the device, for any work on SWAP or DRAIN that is given from now on."""


class CudaStreams:
    """Streams of one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Copies take few of the device's processors, and the step waits for them: they go first where both want one.
        self._sides = {
            side: torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
            for side in (Stream.SWAP, Stream.DRAIN)
        }

    def run(self, stream: Stream, work: Callable[[], object]) -> None:
        with torch.cuda.stream(self._sides[stream]):
            work()

    def record(self, stream: Stream, *, for_threads: bool = False) -> torch.cuda.Event:
        event = torch.cuda.Event(blocking=for_threads)  # type: ignore[no-untyped-call]
        event.record(self._stream(stream))
        return event

    def wait(self, stream: Stream, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event)
        self._stream(stream).wait_event(event)

    def upload(self, numbers: NDArray[np.int64]) -> Tensor:
        with torch.cuda.stream(self._sides[Stream.SWAP]):
            uploaded = torch.from_numpy(numbers).pin_memory().to(self._device, non_blocking=True)
        uploaded.record_stream(self._sides[Stream.DRAIN])  # Which waits for SWAP before it reads them.
        return uploaded

    def _stream(self, stream: Stream) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device) if stream is Stream.STEP else self._sides[stream]
