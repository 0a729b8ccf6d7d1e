"""Waits that may not take for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self


class Patience:
    """Gives up waits that take too long, one after the other. Use it as a context manager around all of them.

    A wait costs two assignments; `asyncio.timeout`, which makes and cancels a timer each time, costs 4 us, and a
    stream waits twice for each token.

    Parameters
    ----------
    seconds
        That one wait may take.
    give_up
        Called when one has taken longer; it is to end the wait.
    """

    def __init__(self, seconds: float, give_up: Callable[[], object]) -> None:
        self._seconds = seconds
        self._give_up = give_up
        self._loop = asyncio.get_running_loop()
        self._since: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.lost = False
        """Whether a wait was given up."""

    def __enter__(self) -> Self:
        self._timer = self._loop.call_later(self._seconds, self._look)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def begin(self) -> None:
        """A wait begins."""
        self._since = self._loop.time()

    def end(self) -> None:
        """It is over."""
        self._since = None

    def _look(self) -> None:
        now = self._loop.time()
        rest = self._seconds if self._since is None else self._since + self._seconds - now
        if rest > 0:
            self._timer = self._loop.call_later(rest, self._look)
        else:
            self.lost = True
            self._give_up()
