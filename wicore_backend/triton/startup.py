"""How long a model's process took to be ready, and what with."""

from __future__ import annotations

import os
import time
from pathlib import Path


def process_age_s() -> float:
    """Seconds since this process was started, before Python ran."""
    # The 22nd field; the second, the program's name, may hold blanks and brackets.
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)


class Startup:
    """Times the parts of a start, one after the other. Made when a model begins to load: all before was Python and its
    packages."""

    def __init__(self) -> None:
        self._parts = [("Python and packages", process_age_s())]
        self._since = time.monotonic()

    def done(self, part: str) -> None:
        """`part` is over; what comes next is another."""
        now = time.monotonic()
        self._parts.append((part, now - self._since))
        self._since = now

    def __str__(self) -> str:
        total = sum(seconds for _, seconds in self._parts)
        parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self._parts)
        return f"ready {total:.1f} s after its process was started ({parts})"
