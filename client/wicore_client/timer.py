"""A request's time, attempts and waits between them included."""

from __future__ import annotations

import math
import time

from wicore_client.errors import InvalidArgument, timed_out

_LONGEST_S = 10**6
"""The longest deadline that the server takes."""


def checked_timeout(seconds: float | None) -> float | None:
    """A timeout as it can be waited for; one that is longer than any deadline of the server's is none.

    Raises
    ------
    InvalidArgument
        If it is no number.
    """
    if seconds is None or seconds > _LONGEST_S:
        return None
    if math.isnan(seconds):
        raise InvalidArgument("timeout is nan; give seconds, or None for no limit")
    return seconds


class Timer:
    """Counts down from `timeout` seconds, or for ever if there is none."""

    def __init__(self, timeout: float | None) -> None:
        self._end = None if timeout is None else time.monotonic() + timeout

    def remaining(self) -> float | None:
        """Seconds left; None without a limit.

        Raises
        ------
        DeadlineExceeded
            When there are none.
        """
        if self._end is None:
            return None
        seconds = self._end - time.monotonic()
        if seconds <= 0:
            raise timed_out()
        return seconds

    def ends_within(self, seconds: float) -> bool:
        return self._end is not None and self._end - time.monotonic() <= seconds
