"""Whether the engine can be trusted with new requests, as seen from any thread, and the watchdog over its steps."""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Health:
    """`reason` says what is wrong; it is empty if nothing is."""

    ok: bool
    reason: str = ""


class HealthMonitor:
    """The engine's state of health. The loop's thread reports to it; any thread may ask.

    A watchdog notices a step that does not return, and logs once where the loop's thread stands.

    Parameters
    ----------
    step_timeout_s
        After this long in one step the engine counts as hung.
    """

    def __init__(self, *, step_timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout = step_timeout_s
        self._clock = clock
        self._step_began: float | None = None
        self._trouble = ""
        self._stopped = threading.Event()
        self._watched = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="wicore-watchdog", daemon=True)
        self._thread.start()

    def step_begins(self) -> None:
        self._step_began = self._clock()

    def step_ends(self) -> float:
        """Seconds that the step took."""
        began, self._step_began = self._step_began, None
        assert began is not None
        return self._clock() - began

    def trouble(self, reason: str) -> None:
        """Something is wrong until `recovered`."""
        self._trouble = reason

    def recovered(self) -> None:
        self._trouble = ""

    @property
    def in_trouble(self) -> bool:
        return bool(self._trouble)

    def health(self) -> Health:
        began = self._step_began
        if began is not None and (seconds := self._clock() - began) > self._timeout:
            return Health(False, f"a step has been running for {seconds:.0f} s (step_timeout_s = {self._timeout:g})")
        return Health(not self._trouble, self._trouble)

    def stop(self) -> None:
        """End the watchdog."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        reported: float | None = None
        while not self._stopped.wait(min(1.0, self._timeout / 4)):
            began = self._step_began
            if began is None or began == reported or self._clock() - began <= self._timeout:
                continue
            reported = began
            frame = sys._current_frames().get(self._watched)
            stack = "".join(traceback.format_stack(frame)) if frame else "unknown\n"
            _log.error("a step has been running for more than %g s; the loop stands at:\n%s", self._timeout, stack)
