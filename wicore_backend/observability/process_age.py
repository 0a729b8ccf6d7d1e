"""How long this process has been there: what a start takes begins before the first line of Python."""

from __future__ import annotations

import os
import time
from pathlib import Path

_STARTED = 19
"""Place of the start, in ticks since the machine's, among what /proc/self/stat says after the name."""


def process_age_s() -> float:
    """Seconds since this process was started, to a hundredth."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[_STARTED])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
