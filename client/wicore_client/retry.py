"""When to try again, and how long to wait before."""

from __future__ import annotations

import random
from dataclasses import dataclass

from wicore_client.errors import ConnectionFailed, InvalidArgument, Unavailable, WicoreClientError


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Bounded retries with exponential backoff, for requests of which nothing has been received.

    Retried are a connection that never came about and a server that says "unavailable"; never a request that may be
    under way. Waits double from `initial_delay` to `max_delay` seconds and are cut by a random share of up to a half,
    so that many clients do not come back at once. A server's own retry-after is waited out, unless it is longer than
    `max_delay`: then its error goes to the caller at once.
    """

    attempts: int = 4
    """In all, the first one included."""
    initial_delay: float = 0.2
    max_delay: float = 5.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise InvalidArgument(f"attempts is {self.attempts}; the first one counts, so it is at least 1")
        if not 0 <= self.initial_delay <= self.max_delay:
            raise InvalidArgument(
                f"initial_delay is {self.initial_delay} s and max_delay {self.max_delay} s; "
                "they are positive, and the second is the longer"
            )

    def delay(self, error: WicoreClientError, failures: int) -> float | None:
        """Seconds to wait after `failures` failed attempts, the last with `error`; None to give up."""
        if failures >= self.attempts:
            return None
        backoff = min(self.max_delay, self.initial_delay * 2.0 ** (failures - 1)) * random.uniform(0.5, 1.0)
        match error:
            case ConnectionFailed(sent=False):
                return backoff
            case Unavailable(retry_after=None):
                return backoff
            case Unavailable(retry_after=float(seconds)) if seconds <= self.max_delay:
                return max(seconds, backoff)
            case _:
                return None
