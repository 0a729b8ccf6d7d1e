"""How long transfers take, learnt from those that were made. Pure arithmetic; one thread writes, any reads."""

from __future__ import annotations

from dataclasses import dataclass

_MEMORY = 0.95
"""Share of what is known that survives a sample: about the latest 20 count, which are 80 MiB in batches of 4."""

_TOLD_APART = 0.05
"""Of the squared bytes, the share that is not just "bytes of a first batch, times a constant"."""


@dataclass(frozen=True, slots=True)
class Cost:
    """A transfer takes `latency_s + seconds_per_byte * bytes`."""

    latency_s: float
    seconds_per_byte: float


class Pace:
    """Latency and bandwidth of a pipeline, by least squares with exponential forgetting.

    A sample is the time in which a batch was the pipeline's next to end: for one that found the pipeline empty from its
    own start, so that latency is in it, for others from the end of the batch before.
    """

    def __init__(self) -> None:
        self.cost: Cost | None = None
        self.measured_at: float | None = None
        self.seconds = 0.0
        self._firsts = self._first_bytes = self._first_seconds = 0.0
        self._squared_bytes = self._bytes_seconds = 0.0

    @property
    def bytes_per_second(self) -> float | None:
        """Of a pipeline that is kept busy; None before the first sample."""
        cost = self.cost
        return None if cost is None or not cost.seconds_per_byte else 1 / cost.seconds_per_byte

    def add(self, *, started: float, size: int, first: bool, now: float) -> None:
        """A batch of `size` bytes, begun at `started`, has ended `now`; both as `time.monotonic` has it.

        `first` says whether it found the pipeline empty.
        """
        if not first and self.measured_at is not None:
            started = max(started, self.measured_at)
        seconds = now - started
        self.measured_at = now
        self.seconds += seconds
        self._firsts = _MEMORY * self._firsts + first
        self._first_bytes = _MEMORY * self._first_bytes + first * size
        self._first_seconds = _MEMORY * self._first_seconds + first * seconds
        self._squared_bytes = _MEMORY * self._squared_bytes + size * size
        self._bytes_seconds = _MEMORY * self._bytes_seconds + size * seconds
        self.cost = self._solved()

    def _solved(self) -> Cost:
        """The fit; where the samples do not tell the terms apart, or contradict them, all is bytes.

        That is the careful guess: it lets a large transfer look slow rather than a small one.
        """
        determinant = self._firsts * self._squared_bytes - self._first_bytes**2
        latency = self._first_seconds * self._squared_bytes - self._bytes_seconds * self._first_bytes
        slope = self._firsts * self._bytes_seconds - self._first_bytes * self._first_seconds
        told_apart = determinant > _TOLD_APART * self._firsts * self._squared_bytes
        if not told_apart or latency < 0 or slope <= 0:
            return Cost(0.0, self._bytes_seconds / self._squared_bytes)
        return Cost(latency / determinant, slope / determinant)
