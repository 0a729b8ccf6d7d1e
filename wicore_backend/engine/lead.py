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
        self._device_done = 0.0
        self.seconds = _FIRST_S

    def plan_at(self, running: StepPlan, launched: float) -> float:
        """When to plan what follows a step that was `launched` before or after the device was done with another."""
        return max(launched, self._device_done) + self.wait_s(running)

    def device_done(self, now: float) -> None:
        """The device is known to be done with a step."""
        self._device_done = now

    def followed(self, launched: float, *, in_time: bool) -> None:
        """The device was given a step of decodes when it was `launched`, `in_time` if it was still at the one before.

        By now it is done with that one.
        """
        self.observe(self._device_done - launched if in_time else 0.0)

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
