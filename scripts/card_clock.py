"""The clock that a card keeps while something runs, its power, and what holds the clock down, as NVML tells them.

    with CardClock("GPU-...") as clock:
        began = time.perf_counter()
        ...
        print(clock.between(began, time.perf_counter()))

A process of its own asks every few milliseconds, so that what is measured has its interpreter for itself.
"""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

_INTERVAL_S = 0.005
_STARTS_S = 10.0
_SM_CLOCK = 1
_REASONS = {0x4: "power", 0x8: "hardware", 0x20: "heat", 0x40: "heat", 0x80: "power"}
"""Of NVML's nvmlClocksEventReasons, those that lower the clock of a card at work."""


@dataclass(frozen=True, slots=True)
class Sample:
    """At `time` of `time.perf_counter`: the multiprocessors' clock in MHz, power in W, NVML's reasons as bits."""

    time: float
    sm_mhz: int
    watts: float
    reasons: int

    @classmethod
    def of(cls, line: str) -> Sample:
        moment, sm_mhz, watts, reasons = line.split()
        return cls(float(moment), int(sm_mhz), float(watts), int(reasons))


def summary(samples: Sequence[Sample]) -> dict[str, Any] | None:
    """The median clock, the greatest power, and of each reason in which share of them it held; None of none."""
    if not samples:
        return None
    held: dict[str, float] = {}
    for name in dict.fromkeys(_REASONS.values()):
        bits = sum(bit for bit, of in _REASONS.items() if of == name)
        if share := sum(bool(sample.reasons & bits) for sample in samples) / len(samples):
            held[name] = round(share, 2)
    return {
        "sm_mhz": round(statistics.median(sample.sm_mhz for sample in samples)),
        "watts": round(max(sample.watts for sample in samples)),
        "held_down_by": held,
    }


class CardClock:
    """Samples of a card from when it is entered until it is left; none where there is no NVML.

    Parameters
    ----------
    uuid
        The card's, as NVML has it ("GPU-..."); None for no card.
    """

    def __init__(self, uuid: str | None) -> None:
        self._uuid = uuid
        self._process: subprocess.Popen[bytes] | None = None
        self._directory = tempfile.TemporaryDirectory(prefix="card-clock-")
        self._file = Path(self._directory.name) / "samples"

    def __enter__(self) -> CardClock:
        self._file.touch()
        if self._uuid is None:
            return self
        with self._file.open("wb") as out:
            self._process = subprocess.Popen([sys.executable, "-P", __file__, self._uuid], stdout=out)
        until = time.perf_counter() + _STARTS_S
        while not self._samples() and self._process.poll() is None and time.perf_counter() < until:
            time.sleep(_INTERVAL_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._directory.cleanup()

    def between(self, *times: tuple[float, float]) -> dict[str, Any] | None:
        """The `summary` of samples from one moment to another of `time.perf_counter`, of all such `times`."""
        return summary([s for s in self._samples() if any(began <= s.time <= ended for began, ended in times)])

    def _samples(self) -> list[Sample]:
        whole = self._file.read_text().rpartition("\n")[0]
        return [Sample.of(line) for line in whole.splitlines()]


def _asked(uuid: str) -> Iterator[Sample]:
    nvml = ctypes.CDLL("libnvidia-ml.so.1")

    def checked(status: int) -> None:
        if status:
            raise OSError(f"NVML refuses: status {status}")

    checked(nvml.nvmlInit_v2())
    card = ctypes.c_void_p()
    checked(nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(card)))
    sm_mhz, milliwatts, reasons = ctypes.c_uint(), ctypes.c_uint(), ctypes.c_ulonglong()
    while True:
        checked(nvml.nvmlDeviceGetClockInfo(card, _SM_CLOCK, ctypes.byref(sm_mhz)))
        checked(nvml.nvmlDeviceGetPowerUsage(card, ctypes.byref(milliwatts)))
        checked(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(card, ctypes.byref(reasons)))
        yield Sample(time.perf_counter(), sm_mhz.value, milliwatts.value / 1e3, reasons.value)


def _tell(samples: Iterable[Sample]) -> None:
    for sample in samples:
        print(sample.time, sample.sm_mhz, sample.watts, sample.reasons, flush=True)
        time.sleep(_INTERVAL_S)


if __name__ == "__main__":
    try:
        _tell(_asked(sys.argv[1]))
    except OSError as error:
        sys.exit(f"the card's clock is not told: {error}")
