"""How far something long is: a bar for who watches a terminal, lines in the log for everybody else."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

_LOG_EVERY_S = 5.0


class ByteProgress:
    """A context that is told, as often as one likes, how many bytes of how many are done.

    Parameters
    ----------
    what
        Is being done, for the reader: "reading weights".
    log
        Gets a line every 5 s, if standard error is no terminal.
    """

    def __init__(self, what: str, log: logging.Logger) -> None:
        self._what = what
        self._log = log
        self._began = self._told = time.monotonic()
        self._bar = tqdm(desc=what, unit="B", unit_scale=True, leave=False) if sys.stderr.isatty() else None

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` bytes."""
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if now - self._told >= _LOG_EVERY_S and done < total:
            self._told = now
            rate = done / (now - self._began)
            self._log.info(
                "%s: %.1f of %.1f GB at %.2f GB/s, %.0f s left",
                *(self._what, done / 1e9, total / 1e9, rate / 1e9, (total - done) / rate),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
