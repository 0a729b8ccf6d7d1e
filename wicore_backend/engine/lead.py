"""When to plan the next step: as late as the device allows, so that who comes meanwhile is in it."""

from __future__ import annotations

from wicore_backend.engine.plan import StepPlan
from wicore_backend.engine.step_time import StepTimeModel

_FIRST_S = 0.005
_LEAST_S, _MOST_S = 0.0005, 1.0

_SLACK_S = 0.002
"""How long before it needs it the device is to have its next step."""

_FOLLOW = 0.1
"""How fast the lead follows the slack seen."""

_ERRORS = 2.0
"""By how many times its usual error a step with prompts may be shorter than the model says."""


class Lead:
    """How long before a step ends the next one has to be planned: what that takes, as measured, and a little more.

    One thread's: it holds no lock.
    """

    def __init__(self, step_time: StepTimeModel) -> None:
        self._step_time = step_time
        self.seconds = _FIRST_S

    def wait_s(self, running: StepPlan) -> float:
        """Seconds after the device has begun with a step to plan the next; 0 while too little is known."""
        if not self._step_time.ready:
            return 0.0
        expected = self._step_time.predict(running.shape)
        margin = _ERRORS * self._step_time.error * expected if running.chunks else 0.0
        return max(0.0, expected - margin - self.seconds)

    def observe(self, slack_s: float) -> None:
        """The device had a step of decodes so long before it was done with the one before; 0 if it had to wait."""
        if slack_s > 0:
            self.seconds = max(_LEAST_S, self.seconds + _FOLLOW * (_SLACK_S - slack_s))
        else:
            self.seconds = min(_MOST_S, 1.5 * self.seconds)
