"""A step that the device has been given and nobody has been told of: what is known of it, and waiting for its end."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from wicore_backend.engine.computation import Computed
from wicore_backend.engine.emission import Choice
from wicore_backend.engine.health import HealthMonitor
from wicore_backend.engine.plan import StepPlan

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class UntoldStep:
    """One step, until its tokens are told.

    Attributes
    ----------
    plan
        What of it is computed.
    began, launched
        When the host began with it, and when the device had all of it, as `time.monotonic` had it then.
    choice
        The tokens chosen; None if there are none.
    guessing
        Whether it was planned so that it could have guesses.
    """

    plan: StepPlan
    began: float
    launched: float
    computed: Computed
    choice: Choice | None
    guessing: bool

    def wait(self, monitor: HealthMonitor) -> None:
        """Wait until the device has computed it, and note with its sequences' blocks where attention fell.

        A device that fails is trouble that `monitor` hears of, until one computes a step.
        """
        try:
            self.computed.done()
        except Exception as error:
            _log.exception("the device failed in a step")
            monitor.trouble(f"the device failed in a step ({error}), and has not computed one since")
            return
        monitor.recovered()
        try:
            masses = self.computed.mass()
        except Exception:
            _log.exception("where attention fell in a step cannot be told")
            return
        for sequence, mass in masses.items():
            if sequence.blocks is not None:
                sequence.blocks.attended(mass)
