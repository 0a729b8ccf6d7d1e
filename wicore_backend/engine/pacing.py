"""How much of a step's time prompts may take beside decodes."""

from __future__ import annotations

from wicore_backend.engine.step_time import StepShape, StepTimeModel

_LEAST_SHARE = 0.1
"""Of the decodes' time, for prompts even where decodes alone are slower than they should be: prompts must get on."""

_DECODES_ALONE_EVERY = 8
"""Of so many steps in a row with decodes, one has nothing but decodes, so that what they take alone stays known: from
steps of one shape nobody could tell what each part takes, and guesses that are too high would confirm themselves."""


class Pacer:
    """Keeps the pace of decodes: over some steps, prompts take what the target leaves them.

    A chunk has to read all keys before it, however short it is. So the time that a step leaves is saved up while a
    chunk would take less than that reading, and spent at once when it is worth it.

    Parameters
    ----------
    target_s
        Mean length of a step with decodes in it; None is `slowdown` times what the decodes alone take.
    """

    def __init__(self, model: StepTimeModel, *, target_s: float | None, slowdown: float) -> None:
        self._model = model
        self._target = target_s
        self._slowdown = slowdown
        self._saved = 0.0
        self._mixed_steps = 0
        self._limit: float | None = None

    def begin(self, decodes: StepShape) -> bool:
        """A step with these decodes is being planned. False if it is to have no prompts."""
        self._limit = None
        if not decodes.sequences or not self._model.ready:
            return True
        alone = self._model.predict(decodes)
        target = self._target or self._slowdown * alone
        self._saved += max(target - alone, _LEAST_SHARE * alone)
        self._limit = alone + self._saved
        return self._mixed_steps < _DECODES_ALONE_EVERY - 1

    @property
    def limit_s(self) -> float | None:
        """What the step may take; None if it has no decodes, or too little is known."""
        return self._limit

    def tokens(self, shape: StepShape, *, context: int, most: int, share: float = 1.0) -> int:
        """How many of the next `most` tokens of a prompt to compute beside `shape`, `context` being computed.

        They may take a `share` of the time that is left.
        """
        if self._limit is None:
            return most
        model = self._model
        so_far = model.predict(shape)
        left = share * (self._limit - so_far)
        if model.predict(shape.with_prefill(most, context)) - so_far <= left:
            return most
        if left < 2 * (model.predict(shape.with_prefill(1, context)) - so_far):
            return 0
        return min(most, model.prefill_tokens(shape, so_far + left, context))

    def end(self, *, mixed: bool, held_back: bool) -> None:
        """The step is planned: it has decodes and prompts (`mixed`), or prompts wait for more time (`held_back`)."""
        self._mixed_steps = self._mixed_steps + 1 if mixed else 0
        if not held_back:
            self._saved = 0.0

    def keeps_pace(self, decodes: StepShape) -> bool:
        """Whether a step of these decodes alone is within the target."""
        return self._target is None or not self._model.ready or self._model.predict(decodes) <= self._target
