"""What a person sees while things are set up and started: short lines, on standard error."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Self

_EVERY_SECONDS = 10.0


def say(text: str) -> None:
    """One line of progress."""
    print(text, file=sys.stderr, flush=True)


class Step:
    """A step that may take long: says its name, every ten seconds that it is still at it, and what it took."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._began = time.monotonic()
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Self:
        say(f"  {self._name} ...")
        self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._ticker.join()
        if kind is None:
            say(f"  {self._name}: done in {self._seconds:.1f} s")

    def detail(self, text: str) -> None:
        """Something worth a line of its own."""
        say(f"    {text}")

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._began

    def _tick(self) -> None:
        while not self._over.wait(_EVERY_SECONDS):
            say(f"  {self._name}: {self._seconds:.0f} s so far")
