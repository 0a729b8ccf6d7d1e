"""How much of a step's time prompts may take beside decodes."""

from __future__ import annotations

from math import inf

from wicore_backend.engine.step_time import StepShape, StepTimeModel

_LEAST_SHARE = 0.1
"""Of the decodes' time, for prompts even where decodes alone are slower than they should be: prompts must get on."""

_WORTH = 6
"""Of a step, prompts may take ahead so many times what the first token of its first chunk costs: what is paid however
short the chunk is, for a mixed step and for reading its keys, is then a sixth. With 2 the simulated H200 has 7 to 11%
less capacity, with 8 it has 3 to 5% more, and decodes pause for longer."""

_STEPS_KEPT = 32
"""What so many steps have left to prompts, and nobody needed, is kept for those who come after them."""

_DECODES_ALONE_EVERY = 8
"""Of so many steps in a row with decodes, one has nothing but decodes, so that what they take alone stays known: from
steps of one shape nobody could tell what each part takes, and guesses that are too high would confirm themselves."""


class Pacer:
    """Keeps the pace of decodes: over some steps, prompts take what the target leaves them.

    The first chunk beside decodes costs much however short it is: the step is a mixed one, and all keys before the
    chunk are read. If every step had one, little but that would be paid for. So a step may take time ahead, as much as
    makes its first chunk worth while, and the steps after it have no prompts until that is paid back. It never takes
    more than it would if the first chunk cost as much as the decodes: a guess that is too high would make all mixed
    steps as long as can be, and from steps of one length nobody could tell that it is.

    Parameters
    ----------
    target_s
        Mean length of a step with decodes in it, over a few steps. None is `slowdown` times what decodes alone take,
        in the long run: what steps without prompts left is kept for a while, so that a burst after them gets in sooner.
    """

    def __init__(self, model: StepTimeModel, *, target_s: float | None, slowdown: float) -> None:
        self._model = model
        self._target = target_s
        self._slowdown = slowdown
        self._saved = inf  # Below 0, what was taken ahead.
        self._waited = 0  # Steps, for more time.
        self._alone = 0.0
        self._mixed_steps = 0
        self._limit: float | None = None

    def begin(self, decodes: StepShape) -> bool:
        """A step with these decodes is being planned. False if it is to have no prompts."""
        self._limit = None
        if not decodes.sequences or not self._model.ready:
            self._saved, self._waited = inf, 0
            return True
        self._alone = alone = self._model.predict(decodes)
        left = max((self._target or self._slowdown * alone) - alone, _LEAST_SHARE * alone)
        if not self._waited:
            self._saved = min(self._saved, _STEPS_KEPT * left if self._target is None else 0.0)
        self._saved += left
        self._limit = alone + max(0.0, min(self._saved, (1 + self._waited) * left))
        return self._saved > 0 and self._mixed_steps < _DECODES_ALONE_EVERY - 1

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
        if not shape.chunks:
            first = model.predict(shape.with_prefill(1, context)) - so_far
            self._limit = max(self._limit, so_far + _WORTH * min(first, self._alone))
            so_far += model.coefficients.mixed  # Of the step, not of this prompt's share.
        left = share * (self._limit - so_far)
        if model.predict(shape.with_prefill(most, context)) - so_far <= left:
            return most
        if left < 2 * (model.predict(shape.with_prefill(1, context)) - so_far):
            return 0
        return model.prefill_tokens(shape, so_far + left, context, most=most)

    def end(self, step: StepShape, *, held_back: bool) -> None:
        """The step is planned; `held_back` is whether prompts wait for more time."""
        self._mixed_steps = self._mixed_steps + 1 if step.mixed else 0
        if self._limit is not None:
            self._saved -= self._model.predict(step) - self._alone
            self._waited = self._waited + 1 if held_back else 0

    def keeps_pace(self, decodes: StepShape) -> bool:
        """Whether a step of these decodes alone is within the target."""
        return self._target is None or not self._model.ready or self._model.predict(decodes) <= self._target
