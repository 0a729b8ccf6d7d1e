"""What a person sees while things are set up and started: short lines, on standard error."""

from __future__ import annotations

import sys
import time


def say(text: str) -> None:
    """One line of progress."""
    print(text, file=sys.stderr, flush=True)


class Step:
    """A step that may take long: says its name, now and then that it is still at it, and what it took."""

    _EVERY_SECONDS = 10.0

    def __init__(self, name: str) -> None:
        self._name = name
        self._began = self._last = time.monotonic()
        say(f"  {name} ...")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def alive(self, detail: str = "") -> None:
        """To be called often; speaks every ten seconds."""
        if time.monotonic() - self._last >= self._EVERY_SECONDS:
            self._last = time.monotonic()
            say(f"  {self._name}: {self.seconds:.0f} s{f' ({detail})' if detail else ''}")

    def detail(self, text: str) -> None:
        """Something worth a line of its own."""
        self._last = time.monotonic()
        say(f"    {text}")

    def done(self) -> None:
        say(f"  {self._name}: done in {self.seconds:.1f} s")
